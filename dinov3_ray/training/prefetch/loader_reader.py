"""Reads a loader ahead of the training loop, and keeps the loader's state at the batch that the loop has."""

from __future__ import annotations

import copy
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader

from dinov3_ray.training.prefetch.batch_guard import BatchGuard

__all__ = ["LoaderReader"]

log = logging.getLogger("dinov3_ray")

Batch = TypeVar("Batch")
Seen = TypeVar("Seen")

# What accelerate's loaders set when they yield a batch, and its Accelerator reads: whether the batch is the last one,
# how many of its images are not padding, and where to resume.
_ACCELERATE = ("end_of_dataloader", "remainder", "dl_state_dict")
_TRIAL = 16  # batches delivered unchanged before batches are no longer copied


@dataclass(frozen=True, slots=True)
class _LoaderState:
    """What a loader shows after a draw."""

    state: Any = None
    flags: dict[str, Any] = field(default_factory=dict)


class LoaderReader(Generic[Batch, Seen]):
    """Draws batches ahead of a loop, in one pass over a loader after the other.

    The state of a loader is that of the batch that it yielded last. The loop has not seen this batch yet. Here, the
    state is that of the batch that the loop got last: :meth:`state_dict`, and the attributes of accelerate's loaders.

    An iterator cannot be repeated. If the loop ends early, the batches that were drawn from it and not delivered are
    the first ones of the next pass. Iterators are not closed: one that nobody else holds ends with its last reference.

    Args:
        loader: any iterable of batches.
        look: returns what the teachers need of a batch.
    """

    def __init__(self, loader: Iterable[Batch], look: Callable[[Batch], Seen]) -> None:
        self.loader = loader
        self._look = look
        self._iterator: Iterator[Batch] | None = None
        self._last_iterator: Callable[[], object] = lambda: None
        self._left: deque[tuple[Batch, _LoaderState]] = deque()  # by the last pass
        self._waiting: deque[tuple[BatchGuard[Batch, Seen], _LoaderState]] = deque()
        self._delivered: _LoaderState | None = None
        self._last_drawn: _LoaderState | None = None
        self._most_waiting = 0
        self._trial = _TRIAL
        self._changes = False
        self._exhausted = False
        self._has_ended = False  # before this pass

    @property
    def has_state(self) -> bool:
        """Whether the loader has a ``state_dict()`` that can be called."""
        return hasattr(self.loader, "dl_state_dict" if self._is_accelerates else "state_dict")

    @property
    def draws_together(self) -> bool:
        """Whether each draw communicates with the other ranks, so that all ranks must draw in the same steps."""
        state = getattr(self.loader, "state", None)  # of accelerate's DataLoaderDispatcher
        return hasattr(self.loader, "slice_fn") and getattr(state, "num_processes", 1) > 1

    def may_draw(self) -> bool:
        """Whether another batch may be drawn now.

        If the last draw announced the end of the pass, the next one ends it, with all state that accelerate keeps of
        it. The loop must have had all batches before. More batches than ever before may wait only if all are copied:
        the loader may have just so many buffers.
        """
        announced = self._last_drawn is not None and self._last_drawn.flags.get("end_of_dataloader")
        if self._exhausted or (announced and self._waiting):
            return False
        if len(self._waiting) < self._most_waiting:
            return True
        self._trial = _TRIAL
        return all(guard.is_copied for guard, _ in self._waiting)

    def begin(self) -> None:
        """Begin a pass."""
        before = _attributes_of(self.loader)
        iterator = iter(self.loader)
        if iterator is self.loader:
            # Some loaders are their own iterator, and __iter__ sets them back to their beginning.
            continues = _attributes_of(self.loader) == before
        else:
            # A DataLoader with persistent workers returns the iterator of the last pass, but has reset it.
            continues = iterator is self._last_iterator() and not isinstance(self.loader, DataLoader)
        if not continues:
            self._left.clear()
        self._has_ended = continues and self._exhausted
        self._iterator, self._exhausted, self._delivered, self._last_drawn = iterator, False, None, None

    def draw(self) -> Seen | None:
        """Draw the next batch, and return what ``look`` gives of it; None at the end of the pass.

        Raises:
            Exception: of the loader or of ``look``, unchanged.
        """
        assert self._iterator is not None
        if not self._left:
            batch = next(self._iterator, _END)
            if isinstance(batch, _End):
                self._exhausted = True
                if self._has_ended and self._last_drawn is None:
                    log.warning("this pass has no batches: the loader is an iterator that has ended (pass a loader)")
                return None
            self._left.append((batch, self._state_after_draw()))
        batch, state = self._left[0]  # it stays there if look() raises
        guard = BatchGuard(batch, self._look(batch), copies=self._changes or self._trial > 0)
        self._waiting.append((guard, state))
        self._left.popleft()
        self._last_drawn = state
        self._most_waiting = max(self._most_waiting, len(self._waiting))
        return guard.seen

    def deliver(self) -> Batch:
        """The batch that waited longest, for the loop: the loader's state becomes that of this batch.

        Raises:
            InputError: the batch has changed since it was drawn, and was not copied.
        """
        guard, self._delivered = self._waiting[0]
        batch = guard.intact()
        self._changes = self._changes or guard.changed
        self._trial -= 1
        self._waiting.popleft()
        for name, value in self._delivered.flags.items():
            setattr(self.loader, name, value)
        return batch

    def end(self) -> None:
        """End the pass."""
        if self._exhausted and not self._waiting:
            self._delivered = None
        try:
            self._last_iterator = weakref.ref(self._iterator)
        except TypeError:  # iterators of builtins
            self._last_iterator = lambda: None
        once = self._iterator is self.loader
        self._iterator = None
        if once or self._last_iterator() is not None:  # what goes on may be continued
            self._left.extendleft(reversed([(guard.intact(), state) for guard, state in self._waiting]))
        self._waiting.clear()

    def state_dict(self) -> Any:
        """The loader's state after the batch that the loop got last."""
        if self._delivered is None or self._is_accelerates:
            return self._state_of_loader()
        return self._delivered.state

    def load_state_dict(self, state: Any) -> None:
        """Load a state into the loader, for the next pass."""
        self._left.clear()
        self._delivered = None
        self.loader.load_state_dict(state)  # type: ignore[attr-defined]

    def _state_of_loader(self) -> Any:
        return self.loader.state_dict()  # type: ignore[attr-defined] # only if has_state

    @property
    def _is_accelerates(self) -> bool:
        return hasattr(self.loader, "end_of_dataloader")

    def _state_after_draw(self) -> _LoaderState:
        """The loader's state now; what accelerate reads becomes again what it was before the draw."""
        if not self._is_accelerates:
            return _LoaderState(copy.deepcopy(self._state_of_loader()) if self.has_state else None)
        flags = {name: getattr(self.loader, name) for name in _ACCELERATE if hasattr(self.loader, name)}
        shown = self._delivered.flags if self._delivered is not None else {**flags, "end_of_dataloader": False}
        for name, value in shown.items():
            setattr(self.loader, name, value)
        return _LoaderState(flags=flags)


def _attributes_of(loader: object) -> dict[str, int]:
    """Which objects the attributes of ``loader`` are."""
    return {name: id(value) for name, value in getattr(loader, "__dict__", {}).items()}


class _End:
    """Marks the end of a loader; no batch equals it."""


_END = _End()
