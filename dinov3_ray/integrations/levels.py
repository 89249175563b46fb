"""The layers of a student that are compared with its teacher's map, each with a weight."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dinov3_ray.errors import ConfigError

__all__ = ["Levels", "level_weights", "named_levels"]

Levels = str | int | Iterable[str | int] | Mapping[str | int, float]
"""Layers and their weights, in one of these forms; a layer that is given without a weight has the weight 1.

- ``"P4"``: the head's input of stride 2⁴, as YOLO's model files count their levels.
- ``16`` or ``"model.16"``: a layer by its number or by its name.
- ``"P3:0.5,P4,P5:0.5"``: several in one string, for command lines.
- ``["P3", "P4"]``, or ``{"P3": 0.5, "P4": 1.0}``.
"""


def level_weights(levels: Levels) -> dict[str, float]:
    """The weight of each layer, in the order given; numbers become names.

    Raises:
        ConfigError: no layer, one that is named twice, or a weight that is not a number above 0.
    """
    if isinstance(levels, str):
        pairs: list[tuple[Any, Any]] = [_pair(part) for part in levels.split(",")]
    elif isinstance(levels, Mapping):
        pairs = list(levels.items())
    elif isinstance(levels, Iterable):
        pairs = [(name, 1.0) for name in levels]
    else:
        pairs = [(levels, 1.0)]
    weights: dict[str, float] = {}
    for level, weight in pairs:
        name = _layer_name(level)
        if name is None or name in weights:
            raise ConfigError(
                f"distill_layer must name layers such as 'P4', 16 or 'model.16', each once; got {level!r} in {levels!r}"
            )
        try:
            weights[name] = float(weight)
        except (TypeError, ValueError):
            weights[name] = 0.0
        if not 0 < weights[name] < float("inf"):
            raise ConfigError(f"the weight of a layer in distill_layer must be more than 0; got {weight!r} for {name}")
    if not weights:
        raise ConfigError(f"distill_layer must name at least one layer; got {levels!r} (leave it out for the default)")
    return weights


def _pair(part: str) -> tuple[str, Any]:
    name, colon, weight = part.partition(":")
    return name, weight if colon else 1.0


def _layer_name(level: object) -> str | None:
    if isinstance(level, bool) or not isinstance(level, (int, str)):
        return None
    name = str(level).strip()
    return f"model.{name}" if name.isdecimal() else name or None


def named_levels(levels: Levels | None, inputs: Mapping[float, str], default_stride: int) -> dict[str, float]:
    """The weight of each layer, with the names of a model's layers in place of P3, P4, ...

    Args:
        levels: None is the input whose stride is nearest to ``default_stride``.
        inputs: the layers that a model's head takes, by their strides.

    Raises:
        ConfigError: as for :func:`level_weights`, and for a level that the model's head does not take.
    """
    if levels is None:
        if not inputs:
            raise ConfigError("distill_layer must be given for this model: its head does not show its inputs' strides")
        return {inputs[min(inputs, key=lambda stride: abs(stride - default_stride))]: 1.0}
    weights, known = level_weights(levels), {f"P{round(math.log2(stride))}": layer for stride, layer in inputs.items()}
    named: dict[str, float] = {}
    for level, weight in weights.items():
        name = known.get(level, level)
        if name in named or (name is level and re.fullmatch(r"P\d+", level)):
            there = ", ".join(f"{each} ({layer})" for each, layer in known.items())
            raise ConfigError(f"distill_layer must name levels of the model, each once: {there}; got {list(weights)}")
        named[name] = weight
    return named
