"""config.json as timm writes it for the hub: which model it is, and how its images are prepared.

timm's config names a function that makes a model, not its numbers: these come from the weights' shapes. Names and
options whose models compute what DINOv3 does are known here; all others are refused, since weights of the same shapes
may be meant for another function (other positions, another norm).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dinov3_ray.config.architecture import Architecture, Shapes, ViTArchitecture, infer_convnext, infer_vit
from dinov3_ray.config.preprocessing import Preprocessing
from dinov3_ray.config.variants import preprocessing_for
from dinov3_ray.errors import ConfigError
from dinov3_ray.validation import check, from_list, rule

__all__ = ["TimmFile", "is_timm", "read_timm", "timm_architecture", "timm_heads"]

_NAME = re.compile(r"vit_\w+_(dinov3|lingbot)\w*|convnext_(tiny|small|base|large)")
_SHAPES = {
    *("in_chans", "embed_dim", "depth", "mlp_ratio", "num_reg_tokens", "patch_size"),
    *("swiglu_mlp", "swiglu_align_to", "qkv_bias"),
}
_SHAPES_OF_CONVNEXT = {"in_chans", "depths", "dims"}
_NO_MATTER = {
    *("img_size", "dynamic_img_size", "num_classes", "global_pool", "num_heads"),
    *("drop_rate", "drop_path_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("init_values", "ls_init_value", "head_init_scale"),
}
"""Options that change nothing here: the shapes tell, or only training or a classifier would use them, or, as with
``num_heads``, they are read."""

_Three = Annotated[
    tuple[float, float, float], Field(strict=True), from_list, rule("must be three numbers, one per channel")
]


class _Pretrained(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    input_size: Annotated[
        tuple[Literal[3], Annotated[int, Field(strict=True, ge=1)], Annotated[int, Field(strict=True, ge=1)]],
        from_list,
        rule("must be [3, height, width]"),
    ]
    mean: _Three
    std: _Three
    tag: str = ""
    license: str | None = None


class TimmFile(BaseModel):
    """config.json of timm, what of it matters here."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    architecture: Annotated[str, Field(strict=True), rule("must be a model's name")]
    model_args: dict[str, Any] = {}
    pretrained_cfg: _Pretrained

    def preprocessing(self, image_size: int | tuple[int, int] | None, patch_size: int) -> Preprocessing:
        """DINOv3's rule with ``pretrained_cfg``'s mean, std and input size.

        timm's own transform resizes with a bicubic filter, and crops what is not square. DINOv3's resizes the whole
        image with a bilinear one.

        Raises:
            ConfigError: ``image_size`` is not a size, or smaller than a patch.
        """
        cfg = self.pretrained_cfg
        return preprocessing_for((cfg.mean, cfg.std), image_size or cfg.input_size[1:], patch_size)


def is_timm(values: Mapping[str, Any]) -> bool:
    """Whether the values of a config.json are timm's."""
    return isinstance(values.get("architecture"), str) and isinstance(values.get("pretrained_cfg"), dict)


def read_timm(values: Mapping[str, Any], path: Path) -> TimmFile:
    """Check the ``values`` of timm's config.json at ``path``.

    Raises:
        ConfigError: they are wrong, or those of a model that is not known to compute what DINOv3 does.
    """
    file = check(TimmFile, dict(values), path=path)
    name = file.architecture
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{path}: architecture must be one of timm's DINOv3 models (vit_*_dinov3*, vit_*_lingbot, or "
            f"convnext_tiny, _small, _base or _large); got {name!r}"
        )
    known = _NO_MATTER | (_SHAPES_OF_CONVNEXT if name.startswith("convnext") else _SHAPES)
    if unknown := sorted(set(file.model_args) - known):
        raise ConfigError(
            f"{path}: model_args must not change what the model computes; got "
            + ", ".join(f"{key}={file.model_args[key]!r}" for key in unknown)
        )
    return file


def timm_heads(file: TimmFile, architecture: Architecture) -> Architecture:
    """``architecture`` with the number of heads that the file names; shapes cannot tell it.

    Raises:
        ConfigError: it does not divide the hidden size, or is missing for a size that no published model has.
    """
    heads = file.model_args.get("num_heads")
    if not isinstance(architecture, ViTArchitecture) or (heads is None and architecture.num_heads):
        return architecture
    if type(heads) is not int or heads < 1 or architecture.hidden_size % (4 * heads):
        raise ConfigError(f"model_args.num_heads must divide the hidden size {architecture.hidden_size}; got {heads!r}")
    return replace(architecture, num_heads=heads)


def timm_architecture(root: Path, file: TimmFile, shapes: Callable[[], Shapes]) -> Architecture:
    """The architecture of timm's model in ``root``, by its weights' ``shapes``.

    Raises:
        ConfigError: the weights are not those of a DINOv3.
        CheckpointError: they are missing or damaged.
    """
    found = shapes()
    inferred = infer_vit(found) or infer_convnext(found)
    if inferred is None:
        raise ConfigError(f"the weights in {root} are not those of timm's {file.architecture}")
    return timm_heads(file, inferred)
