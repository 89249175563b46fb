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
_ENOUGH = 0.5  # of the parameters up to the last tokens of a map's grid, from which the map is worth a comparison


@dataclass(frozen=True, slots=True, eq=False)
class _SeenMap:
    """The output of a layer that ran: a map, ``stride`` pixels to a location."""

    layer: str
    kind: str
    stride: float
    grid: tuple[int, int]
    output: Tensor
    is_convolution: bool

    @property
    def cells(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, slots=True, eq=False)
class _SeenTokens:
    """The output of a layer that ran, with the channels last; ``place`` maps had been seen before it."""

    layer: str
    place: int
    output: Tensor


class _Notes:
    """What the layers of a student gave in one run."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.maps: list[_SeenMap] = []
        self.tokens: list[_SeenTokens] = []
        self.calls: dict[str, int] = {}


def run_student(student: nn.Module, images: Any) -> Any:
    """Run ``student`` once in eval mode, with gradients on; its modes, and torch's random numbers, stay as they were.

    Returns what it gives.

    Args:
        images: what the student takes: a tensor; a mapping, which becomes its keywords, as transformers' models have
            it; or whatever else its ``forward`` takes first.
    """
    with _evaluated(student), torch.enable_grad():
        if isinstance(images, Mapping) and "self" not in images and _takes_keywords(student, images):
            return student(**images)
        return student(images)


def find_layer(student: nn.Module, images: Any, *, stride: int | None = None, prefers: tuple[str, ...] = ()) -> str:
    """The name of the student's deepest layer with a map: the last one before maps become finer again.

    That is a backbone's last map, also inside a detector, whose neck begins where maps become finer. Maps up to which
    nothing learns are skipped, and so is a convolution behind which no weights stand (it gives logits), where a map
    before it will do.

    Args:
        student: any module; it runs once (:func:`run_student`).
        images: an example batch, with a tensor [B, 3, H, W] in it.
        stride: pixels of the image per location that the map must have; None takes the coarsest.
        prefers: parts of class names; a layer of such a class is taken before others.

    Raises:
        ConfigError: no layer, or none of that stride, gives a map [B, C, h, w]; or the student goes on with tokens of
            the same locations behind the map, and less than half of the parameters up to them would learn from it.
    """
    notes = _Notes(_image_size(images))
    height, width = notes.size
    handles = []
    for name, layer in named_layers(student):
        if name:
            handles.append(layer.register_forward_hook(_Recorder(name, layer, notes)))
    try:
        given = run_student(student, images)
    finally:
        for handle in handles:
            handle.remove()
    # A tap of a shared layer would have its last call's.
    once = [each for each in notes.maps if notes.calls[each.layer] == 1]
    maps = [each for each in once if each.cells > 1] or once  # one location, as after pooling, is not a map
    if not maps:
        raise ConfigError(
            "layers must be given for this student: no layer of it gives a map [B, C, h, w] of an image of "
            f"{height} x {width} (where outputs are tokens, give select, a function that makes a map of them)"
        )
    # Of a student that is frozen as a whole, the caller says so.
    learning = [each for each in maps if each.output.requires_grad] or maps
    of_stride = [each for each in learning if stride is None or abs(each.stride - stride) <= _STRIDE_TOLERANCE * stride]
    if not of_stride:
        there = ", ".join(f"{found:g}" for found in sorted({round(each.stride, 1) for each in learning}))
        raise ConfigError(
            f"the student must have a map of stride {stride} for this recipe; it has {there} at {height} x {width} "
            "(give layers, or stride=None for its deepest map)"
        )
    reached = _Reach(student)
    preferred = [each for each in of_stride if any(part in each.kind for part in prefers)]
    chosen = preferred[-1] if preferred else _before_logits(maps, of_stride, given, reached)
    _check_reach(chosen, notes, reached)
    return chosen.layer


class _Reach:
    """Which of a student's parameters get a gradient from a tensor."""

    def __init__(self, student: nn.Module) -> None:
        self._parameters = [each for each in student.parameters() if each.requires_grad]

    def __call__(self, output: Tensor) -> int:
        """How many numbers they have."""
        if not output.requires_grad or not self._parameters:
            return 0
        gradients = torch.autograd.grad(output.sum(), self._parameters, retain_graph=True, allow_unused=True)
        return sum(each.numel() for each, found in zip(self._parameters, gradients, strict=True) if found is not None)


def _before_logits(maps: list[_SeenMap], among: list[_SeenMap], given: Any, reached: _Reach) -> _SeenMap:
    """The last map before maps rise; or the one before the convolution that gives it, if that gives logits."""
    chosen = _before_it_rises(maps, among)
    ends = _without_weights_behind(given)
    for place, each in enumerate(among):
        # The modules around the convolution follow it, and give what it gives.
        if each.is_convolution and each.output.grad_fn in ends and among.index(chosen) >= place:
            before = [other for other in among[:place] if other.stride >= chosen.stride * (1 - _STRIDE_TOLERANCE)]
            if before and reached(before[-1].output) >= _ENOUGH * reached(chosen.output):
                return before[-1]
            break
    return chosen


def _without_weights_behind(given: Any) -> set[Any]:
    """The nodes of autograd's graph from which what the student gives is computed without further weights."""
    ends: set[Any] = set()
    waiting = [each.grad_fn for each in _tensors_in(given) if each.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in ends:
            continue
        ends.add(node)
        inputs = [each for each, _ in node.next_functions if each is not None]
        # A weight is an input itself, or transposed.
        if not any(hasattr(one, "variable") for each in inputs for one in (each, *_only_input(each))):
            waiting.extend(inputs)
    return ends


def _only_input(node: Any) -> list[Any]:
    inputs = [each for each, _ in node.next_functions]
    return inputs if len(inputs) == 1 else []


def _tensors_in(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, Mapping):
        for each in given.values():
            yield from _tensors_in(each)
    elif isinstance(given, (list, tuple)):
        for each in given:
            yield from _tensors_in(each)


def _check_reach(chosen: _SeenMap, notes: _Notes, reached: _Reach) -> None:
    """Refuse a map behind which the student goes on with tokens of its locations, as behind a patch embedding."""
    batch = len(chosen.output)
    behind = next(number for number, each in enumerate(notes.maps) if each is chosen)
    later = [
        each
        for each in notes.tokens
        if each.place > behind and notes.calls[each.layer] == 1 and each.output.requires_grad
    ]
    alike = [each for each in later if _tokens_as_map(each.output, batch, chosen.grid) is not None]
    if not alike:
        return
    share = reached(chosen.output) / max(reached(alike[-1].output), 1)
    if share >= _ENOUGH:
        return
    last, how = alike[-1], _tokens_as_map(alike[-1].output, batch, chosen.grid)
    for each in later[later.index(last) + 1 :]:  # stages behind have fewer tokens
        for factor in (2, 4, 8):
            grid = (chosen.grid[0] // factor, chosen.grid[1] // factor)
            coarser = _tokens_as_map(each.output, batch, grid) if min(grid) > 1 else None
            if coarser is not None:
                last, how = each, coarser
    raise ConfigError(
        f"layers must be given for this student: the deepest map that was found, of {chosen.layer!r}, is followed by "
        f"tokens of the same locations, and only {share:.1%} of the parameters up to {alike[-1].layer!r} would learn "
        f"from it (name a layer near the end, and select, which makes a map of its tokens, such as "
        f"layers={last.layer!r}, select=lambda tokens: {how})"
    )


def _tokens_as_map(tokens: Tensor, batch: int, grid: tuple[int, int]) -> str | None:
    """The expression that makes a map of ``tokens``; None if they are not those of the grid's locations."""
    if tokens.ndim == 4:
        return "tokens.movedim(-1, 1)" if tuple(tokens.shape[1:3]) == grid else None
    cells = grid[0] * grid[1]
    for axis, picked in ((1, "tokens[:, {}:].mT"), (0, "tokens[{}:].permute(1, 2, 0)")):
        special = tokens.shape[axis] - cells  # CLS and registers stand first
        if tokens.shape[1 - axis] == batch and 0 <= special <= min(8, cells // 3):
            return picked.format(special) + f".unflatten(2, {grid})"
    return None


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
    """A forward hook that notes the map, or the tokens, which a layer gives."""

    def __init__(self, name: str, layer: nn.Module, notes: _Notes) -> None:
        self._name, self._kind, self._notes = name, type(layer).__name__, notes
        self._is_convolution = isinstance(layer, nn.Conv2d)

    def __call__(self, _module: nn.Module, _args: object, output: object) -> None:
        notes = self._notes
        notes.calls[self._name] = notes.calls.get(self._name, 0) + 1
        if not isinstance(output, Tensor) or output.ndim not in (3, 4) or not output.is_floating_point():
            return
        if output.ndim == 3 or not self._note_map(output):
            notes.tokens.append(_SeenTokens(self._name, len(notes.maps), output))

    def _note_map(self, output: Tensor) -> bool:
        (height, width), (cells_y, cells_x) = self._notes.size, output.shape[2:]
        if not cells_y or not cells_x or cells_y > height or cells_x > width:
            return False
        stride = min(height / cells_y, width / cells_x)  # of the side that rounding changed less
        # A map has the image's aspect; channels-last outputs and matrices of attention do not.
        if abs(height / stride - cells_y) > 1 or abs(width / stride - cells_x) > 1:
            return False
        grid = (cells_y, cells_x)
        self._notes.maps.append(_SeenMap(self._name, self._kind, stride, grid, output, self._is_convolution))
        return True


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
