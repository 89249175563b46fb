"""A loader that yields targets too, for trainers that take a loader and iterate over it themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dinov3_ray.training.prefetch import Prefetch

__all__ = ["TargetLoader"]


class TargetLoader:
    """Iterates over a prefetch, and looks like the loader that the prefetch draws from.

    Trainers read a loader's sampler, data set, length and more, and set its ``worker_init_fn``: these are attributes of
    the wrapped loader.

    Args:
        stream: the prefetch.
        join: makes one item of a batch and its targets; a pair by default.
    """

    def __init__(self, stream: Prefetch[Any, Any], join: Callable[[Any, Any], Any] = lambda *pair: pair) -> None:
        self.stream = stream
        self._join = join
        if hasattr(stream, "state_dict"):  # set here and not in the class: trainers look whether a loader has them
            self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict

    def __iter__(self) -> Iterator[Any]:
        passing = iter(self.stream)
        try:
            for batch, targets in passing:
                yield self._join(batch, targets)
        finally:
            passing.close()  # type: ignore[attr-defined] # a generator: what is in flight is given up here and now

    def __len__(self) -> int:
        return len(self.stream)

    @property
    def worker_init_fn(self) -> Any:
        return getattr(self.stream.loader, "worker_init_fn", None)

    @worker_init_fn.setter
    def worker_init_fn(self, function: Any) -> None:
        self.stream.loader.worker_init_fn = function  # type: ignore[attr-defined] # set where it was found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "stream":
            raise AttributeError(name)  # an object that is being copied has no stream to ask yet
        return getattr(self.stream, name)

    def __repr__(self) -> str:
        return f"<TargetLoader of {self.stream!r}>"
