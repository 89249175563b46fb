"""The outputs to compute, and in what form; needs no torch.

Shapes: B images, D channels, h × w patches, R register tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from dinov3_ray.errors import SpecError

__all__ = ["RESULT_DTYPES", "FeatureSpec", "ResultDtype"]

ResultDtype = Literal["native", "float32", "bfloat16", "float16", "int8"]
"""The dtype of results; ``native`` is the teacher's compute dtype."""

RESULT_DTYPES: tuple[str, ...] = get_args(ResultDtype)


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """Which outputs one forward pass gives, and in what form.

    Args:
        cls: the CLS token after the model's final LayerNorm, [B, D].
        feature_map: the patch tokens after the final LayerNorm as a map, [B, D, h, w].
        registers: the register tokens after the final LayerNorm, [B, R, D].
        layers: maps of intermediate blocks, [B, D, h, w] each: 0-based block indices as in the official
            ``get_intermediate_layers``; negative ones count from the end.
        norm: apply the model's final LayerNorm to intermediate layers too.
        map_size: (h, w), or one int for both, to which all maps are resampled on the teacher: area pooling down,
            bilinear up.
        dtype: of the results. ``native`` is the compute dtype; ``int8`` crosses the network with one scale per token,
            and comes out in the compute dtype.

    Raises:
        SpecError: names the field, the rule and the value.
    """

    cls: bool = False
    feature_map: bool = False
    registers: bool = False
    layers: tuple[int, ...] = ()
    norm: bool = True
    map_size: tuple[int, int] | None = None
    dtype: ResultDtype = "native"

    def __post_init__(self) -> None:
        for name in ("cls", "feature_map", "registers", "norm"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"FeatureSpec.{name} must be True or False; got {getattr(self, name)!r}")
        object.__setattr__(self, "layers", _as_ints(self.layers, "layers"))
        if len(set(self.layers)) != len(self.layers):
            raise SpecError(f"FeatureSpec.layers must name each block once; got {self.layers}")
        if self.map_size is not None:
            size = _as_ints([self.map_size] * 2 if isinstance(self.map_size, int) else self.map_size, "map_size")
            if len(size) != 2 or min(size) < 1:
                raise SpecError(f"FeatureSpec.map_size must be (h, w), both at least 1, or None; got {self.map_size!r}")
            object.__setattr__(self, "map_size", size)
        if self.dtype not in RESULT_DTYPES:
            raise SpecError(f"FeatureSpec.dtype must be one of {', '.join(RESULT_DTYPES)}; got {self.dtype!r}")

    @property
    def empty(self) -> bool:
        """Whether it asks for nothing."""
        return not (self.cls or self.feature_map or self.registers or self.layers)

    def require_outputs(self) -> None:
        """Raise SpecError if the spec asks for nothing."""
        if self.empty:
            raise SpecError(
                f"FeatureSpec must ask for at least one of cls, feature_map, registers or layers; got {self!r}"
            )

    def blocks(self, depth: int) -> tuple[int, ...]:
        """``layers`` as indices from 0 for a model of ``depth`` blocks.

        Raises:
            SpecError: if an index is out of range, or two name the same block.
        """
        for index in self.layers:
            if not -depth <= index < depth:
                raise SpecError(f"FeatureSpec.layers must lie in {-depth}..{depth - 1} for this model; got {index}")
        blocks = tuple(index % depth for index in self.layers)
        if len(set(blocks)) != len(blocks):
            raise SpecError(f"FeatureSpec.layers {self.layers} names one block twice (of {depth})")
        return blocks

    def native(self) -> FeatureSpec:
        """The same outputs in the compute dtype: what a replica asks its teacher for."""
        return self if self.dtype == "native" else replace(self, dtype="native")


def _as_ints(values: object, name: str) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise SpecError(f"FeatureSpec.{name} must be a sequence of integers; got {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise SpecError(f"FeatureSpec.{name} must hold integers; got {value!r} in {values!r}")
    return tuple(values)
