"""A batch that waits for its targets is delivered as it was drawn, even if the loader fills its memory again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinov3_ray.errors import InputError

__all__ = ["BatchGuard"]

Batch = TypeVar("Batch")
Seen = TypeVar("Seen")

_WATCHED = 8  # parts of a batch that are compared if it is not copied
_SAMPLE = 4096  # values of a tensor that are compared
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per value
_OPAQUE = (str, bytes, int, float, complex, type(None), type, ModuleType, FunctionType, nn.Module, Dataset, DataLoader)


class BatchGuard(Generic[Batch, Seen]):
    """Keeps a batch, and compares it with itself when it is delivered.

    Some loaders yield the same buffers again and again, with new content. A batch that was drawn ahead of the loop
    would then be delivered with the content of a later one.

    Args:
        batch: as the loader yielded it.
        seen: what the teachers are given of it, such as its images.
        copies: keep a copy too, which is delivered if the batch has changed.

    Attributes:
        seen: what to give to the teachers; of the copy, if there is one.
        changed: whether :meth:`intact` found the batch changed.
    """

    def __init__(self, batch: Batch, seen: Seen, *, copies: bool) -> None:
        self.changed = False
        self._batch = batch
        self._copy: tuple[Batch, Seen] | None = _copied((batch, seen), {}) if copies else None
        self.seen = seen if self._copy is None else self._copy[1]
        self._parts = list(islice(_parts((seen, batch), set()), None if copies else _WATCHED))
        self._signatures = [_signature(part) for part in self._parts]

    @property
    def is_copied(self) -> bool:
        return self._copy is not None

    def intact(self) -> Batch:
        """The batch, or its copy if the batch has changed. Of large tensors, a sample is compared.

        Raises:
            InputError: the batch has changed, and there is no copy.
        """
        before = zip(self._parts, self._signatures, strict=True)
        self.changed = any(_signature(part) != signature for part, signature in before)
        if not self.changed:
            return self._batch
        if self._copy is None:
            raise InputError(
                "loader must not change a batch that waits for its targets; this one was changed, as by a loader that "
                "fills the same memory again (yield copies, such as batch.clone(), or pass depth=1)"
            )
        return self._copy[0]


def _attributes(value: Any) -> dict[str, Any]:
    if is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    return vars(value) if hasattr(value, "__dict__") else {}


def _children(value: Any) -> list[Any] | None:
    """What a container or an object holds; None for what has no tensors or is not a batch's own."""
    if isinstance(value, _OPAQUE):
        return None
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    return list(_attributes(value).values()) or None


def _parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """The tensors, arrays and containers in ``value``."""
    if id(value) in seen:
        return
    seen.add(id(value))
    children = None if isinstance(value, (Tensor, np.ndarray)) else _children(value)
    if isinstance(value, (Tensor, np.ndarray)) or (children and not isinstance(value, tuple)):
        yield value
    for child in children or ():
        yield from _parts(child, seen)


def _signature(part: Any) -> object:
    """Changes if the part does; of a large tensor, if a sample of its values does."""
    if isinstance(part, Tensor):
        if part.device.type != "cpu" or part.layout is not torch.strided:  # reading a GPU's values would wait for it
            return None if part.is_inference() else part._version
        # NumPy does not have all of torch's dtypes, but samples any layout without a copy of the whole.
        part = part.detach().view(_INTEGERS.get(part.itemsize, part.dtype)).numpy()
    if isinstance(part, np.ndarray):
        return part.flat[:: max(1, part.size // _SAMPLE)].tobytes()
    return tuple(map(id, _children(part) or ()))


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """``value`` with its tensors, arrays and containers copied; what occurs twice in it is copied once."""
    if id(value) not in memo:
        if isinstance(value, Tensor):
            memo[id(value)] = value.clone().pin_memory() if value.is_pinned() else value.clone()
        elif isinstance(value, np.ndarray):
            memo[id(value)] = value.copy()
        else:
            try:
                memo[id(value)] = value if _children(value) is None else _copied_container(value, memo)
            except (TypeError, AttributeError, ValueError, RuntimeError):  # objects that cannot be copied
                memo[id(value)] = value
    return memo[id(value)]


def _copied_container(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, tuple):
        items = [_copied(item, memo) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    copied = copy.copy(value)
    if isinstance(value, Mapping):
        copied.update({key: _copied(item, memo) for key, item in value.items()})
    elif isinstance(value, list):
        copied[:] = [_copied(item, memo) for item in value]
    else:
        for name, item in _attributes(value).items():
            object.__setattr__(copied, name, _copied(item, memo))
    return copied
