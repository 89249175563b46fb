"""Which layer of a student to compare with its teacher: found by running the student once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_ray.errors import ConfigError, describe
from dinov3_ray.training.taps import named_layers

__all__ = ["find_layer", "run_student"]

_STRIDE_TOLERANCE = 0.25  # of a stride: grids are rounded up or down


@dataclass(frozen=True, slots=True)
class _SeenMap:
    """The output of a layer that ran: a map, ``stride`` pixels to a location."""

    layer: str
    kind: str
    stride: float
    cells: int


def run_student(student: nn.Module, images: Any) -> None:
    """Run ``student`` once in eval mode, with gradients on; its modes, and torch's random numbers, stay as they were.

    Args:
        images: what the student takes: a tensor; a mapping, which becomes its keywords, as transformers' models have
            it; or whatever else its ``forward`` takes first.
    """
    with _evaluated(student), torch.enable_grad():
        if isinstance(images, Mapping) and "self" not in images and _takes_keywords(student, images):
            student(**images)
        else:
            student(images)


def find_layer(student: nn.Module, images: Any, *, stride: int | None = None, prefers: tuple[str, ...] = ()) -> str:
    """The name of the student's deepest layer with a map: the last one before maps become finer again.

    That is a backbone's last map, also inside a detector, whose neck begins where maps become finer.

    Args:
        student: any module; it runs once (:func:`run_student`).
        images: an example batch, with a tensor [B, 3, H, W] in it.
        stride: pixels of the image per location that the map must have; None takes the coarsest.
        prefers: parts of class names; a layer of such a class is taken before others.

    Raises:
        ConfigError: no layer, or none of that stride, gives a map [B, C, h, w].
    """
    height, width = _image_size(images)
    seen: list[_SeenMap] = []
    calls: dict[str, int] = {}
    handles = []
    for name, layer in named_layers(student):
        if name:
            hook = _Recorder(name, type(layer).__name__, (height, width), seen, calls)
            handles.append(layer.register_forward_hook(hook))
    try:
        run_student(student, images)
    finally:
        for handle in handles:
            handle.remove()
    once = [each for each in seen if calls[each.layer] == 1]  # a tap of a shared layer would have its last call's
    maps = [each for each in once if each.cells > 1] or once  # what is pooled to one location is no map
    if not maps:
        raise ConfigError(
            "layers must be given for this student: no layer of it gives a map [B, C, h, w] of an image of "
            f"{height} x {width} (where outputs are tokens, give select, a function that makes a map of them)"
        )
    of_stride = [each for each in maps if stride is None or abs(each.stride - stride) <= _STRIDE_TOLERANCE * stride]
    if not of_stride:
        there = ", ".join(f"{found:g}" for found in sorted({round(each.stride, 1) for each in maps}))
        raise ConfigError(
            f"the student must have a map of stride {stride} for this recipe; it has {there} at {height} x {width} "
            "(give layers, or stride=None for its deepest map)"
        )
    preferred = [each for each in of_stride if any(part in each.kind for part in prefers)]
    if preferred:
        return preferred[-1].layer
    return _before_it_rises(maps, of_stride).layer


def _before_it_rises(maps: list[_SeenMap], among: list[_SeenMap]) -> _SeenMap:
    """The last of ``among``'s coarsest maps before any later map is finer than one already seen."""
    coarsest = max(each.stride for each in among)
    last = None
    for each in maps:
        if last is not None and each.stride < last.stride * (1 - _STRIDE_TOLERANCE):
            break
        if each in among and each.stride >= coarsest * (1 - _STRIDE_TOLERANCE):
            last = each
    assert last is not None
    return last


class _Recorder:
    """A forward hook that notes the map which a layer gives."""

    def __init__(
        self, name: str, kind: str, size: tuple[int, int], seen: list[_SeenMap], calls: dict[str, int]
    ) -> None:
        self._name, self._kind, self._size, self._seen, self._calls = name, kind, size, seen, calls

    def __call__(self, _module: nn.Module, _args: object, output: object) -> None:
        self._calls[self._name] = self._calls.get(self._name, 0) + 1
        if not isinstance(output, Tensor) or output.ndim != 4 or not output.is_floating_point():
            return
        (height, width), (cells_y, cells_x) = self._size, output.shape[2:]
        if not cells_y or not cells_x or cells_y > height or cells_x > width:
            return
        stride = min(height / cells_y, width / cells_x)  # of the side that rounding changed less
        # A map has the image's aspect; channels-last outputs and matrices of attention do not.
        if abs(height / stride - cells_y) <= 1 and abs(width / stride - cells_x) <= 1:
            self._seen.append(_SeenMap(self._name, self._kind, stride, cells_y * cells_x))


def _image_size(images: Any) -> tuple[int, int]:
    found = [images] if isinstance(images, Tensor) else []
    if isinstance(images, Mapping):
        found = [each for each in images.values() if isinstance(each, Tensor)]
    elif isinstance(images, (list, tuple)):
        found = [each if each.ndim == 4 else each[None] for each in images if isinstance(each, Tensor)]
    sizes = [(each.shape[2], each.shape[3]) for each in found if each.ndim == 4 and each.is_floating_point()]
    if not sizes:
        raise ConfigError(f"images must hold a float tensor [B, 3, H, W], to find the layer; got {describe(images)}")
    return sizes[0]


def _takes_keywords(student: nn.Module, images: Mapping[Any, Any]) -> bool:
    parameters = inspect.signature(student.forward).parameters
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return open_ended or all(name in parameters for name in images)


@contextmanager
def _evaluated(student: nn.Module) -> Iterator[None]:
    training = [module for module in student.modules() if module.training]
    devices = {each.device for each in student.parameters() if each.device.type == "cuda"}
    with torch.random.fork_rng([*devices]):
        student.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
