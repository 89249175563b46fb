"""Targets ahead of the training loop: while the student computes one batch, the teacher computes the next ones.

It knows teachers by two methods only, ``submit`` and ``parallelism`` (see :class:`Submitter`), and nothing of Ray.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import torch

from dinov3_ray.errors import ConfigError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import Images

__all__ = ["Prefetch", "PrefetchStatistics", "Submitted", "Submitter"]

log = logging.getLogger("dinov3_ray")

Batch = TypeVar("Batch")

_WAITED = 1e-3  # seconds from which on a wait counts as one
_CALM_STEPS = 50  # steps without a wait after which one batch less is kept ahead
_WARN_SHARE = 0.05
_WARN_AFTER = 50  # steps: the first ones fill the pipeline and always wait


class Submitted(Protocol):
    """A batch that is being answered."""

    def result(self, timeout: float | None = None) -> Features: ...

    def done(self) -> bool: ...

    def cancel(self) -> None: ...


class Submitter(Protocol):
    """What can be sent batches ahead of time."""

    @property
    def parallelism(self) -> int:
        """Batches that it can usefully have in flight now."""
        ...

    def submit(self, images: Images, spec: FeatureSpec) -> Submitted: ...


@dataclass(frozen=True, slots=True)
class PrefetchStatistics:
    """How the loop fared, over all epochs so far.

    Attributes:
        steps: batches delivered.
        seconds: in the loop, from the first delivery on: the student's time and the waits.
        wait_seconds: of these, waiting for the teacher (the first batch of an epoch, which nothing could be ahead of,
            is left out; so is the time in the loader).
        depth: batches kept in flight ahead of the loop now.
    """

    steps: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    depth: int = 0

    @property
    def wait_share(self) -> float:
        """``wait_seconds`` over ``seconds``; 0 before the second batch."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0


class Prefetch(Generic[Batch]):
    """Iterates over ``(batch, targets)``, in the loader's order, with the teacher working ahead.

    Each ``for`` begins a new pass over the loader. Leaving the loop early, by ``break``, an exception or Ctrl-C, gives
    up what is in flight. An error of the loader, of the teacher, or of the loop's body reaches the caller as itself.

    Args:
        teacher: a pool's ``RemoteTeacher``, or anything else that takes batches ahead of time.
        loader: any iterable of batches, such as a DataLoader with workers.
        spec: what to compute for each batch.
        images: takes a batch's images out of it. uint8 crosses the network in a quarter of float32's bytes.
        depth: batches in flight ahead of the loop; ``auto`` begins with what keeps each replica busy, adds one whenever
        the
            loop had to wait, and gives one back after a long time without a wait.
        device: where the targets shall be; None leaves them where the teacher puts them.
        on_step: told of each step after the first: seconds waited for the teacher, and seconds in all.

    Raises:
        ConfigError: ``depth`` is neither ``auto`` nor a whole number of at least 1.
    """

    def __init__(
        self,
        teacher: Submitter,
        loader: Iterable[Batch],
        spec: FeatureSpec,
        *,
        images: Callable[[Batch], Images],
        depth: int | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
        on_step: Callable[[float, float], None] | None = None,
    ) -> None:
        if depth != "auto" and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 1):
            raise ConfigError(f'depth must be "auto" or a whole number >= 1; got {depth!r}')
        spec.require_outputs()
        self._teacher = teacher
        self._loader = loader
        self._spec = spec
        self._images = images
        self._fixed_depth = None if depth == "auto" else depth
        self._device = None if device is None else torch.device(device)
        self._on_step = on_step
        self._depth = self._fixed_depth or 2
        self._calm = 0
        self._steps = 0
        self._seconds = 0.0
        self._wait_seconds = 0.0
        self._warned = False

    def __iter__(self) -> Iterator[tuple[Batch, Features]]:
        return self._pass()

    def __len__(self) -> int:
        """Batches of one pass, if the loader knows."""
        if not isinstance(self._loader, Sized):
            raise TypeError(f"the loader, a {type(self._loader).__name__}, has no length")
        return len(self._loader)

    def statistics(self) -> PrefetchStatistics:
        return PrefetchStatistics(self._steps, self._seconds, self._wait_seconds, self._depth)

    @property
    def wait_seconds(self) -> float:
        """See :class:`PrefetchStatistics`."""
        return self._wait_seconds

    @property
    def wait_share(self) -> float:
        """See :class:`PrefetchStatistics`."""
        return self.statistics().wait_share

    def __repr__(self) -> str:
        return f"<Prefetch {self._steps} batches, depth {self._depth}, {self.wait_share:.1%} of the time waited>"

    def _pass(self) -> Generator[tuple[Batch, Features], None, None]:
        ahead: deque[tuple[Batch, Submitted]] = deque()
        batches = iter(self._loader)
        fingerprint: str | None = None
        exhausted = False
        resumed: float | None = None  # when the loop's body began with the last batch
        if self._fixed_depth is None:
            self._depth = max(self._depth, self._teacher.parallelism)
        try:
            while True:
                while not exhausted and len(ahead) < self._depth:
                    begun = time.perf_counter()
                    batch = next(batches, _END)
                    if resumed is not None:
                        resumed += time.perf_counter() - begun  # the loader's time is neither loop nor wait
                    if isinstance(batch, _End):
                        exhausted = True
                    else:
                        ahead.append((batch, self._teacher.submit(self._images(batch), self._spec)))
                if not ahead:
                    return
                batch, submitted = ahead.popleft()
                begun = time.perf_counter()
                try:
                    features = submitted.result()
                except BaseException:
                    submitted.cancel()
                    raise
                if self._device is not None:
                    features = features.to(self._device, non_blocking=True)
                now = time.perf_counter()
                if resumed is not None:
                    self._count(now - begun, now - resumed)
                if fingerprint is not None and features.fingerprint != fingerprint:
                    log.warning(
                        "the pool's teacher changed from %s to %s in mid-stream", fingerprint, features.fingerprint
                    )
                fingerprint = features.fingerprint
                self._steps += 1
                resumed = now
                yield batch, features
        finally:
            for _, submitted in ahead:
                submitted.cancel()

    def _count(self, waited: float, seconds: float) -> None:
        self._wait_seconds += waited
        self._seconds += seconds
        if self._on_step is not None:
            self._on_step(waited, seconds)
        if self._fixed_depth is None:
            self._tune(waited)
        if self._steps >= _WARN_AFTER and not self._warned and self.wait_share > _WARN_SHARE:
            self._warned = True
            log.warning(
                "the loop waits for its teacher %.0f%% of the time: more replicas (pool.scale), smaller maps "
                "(FeatureSpec.map_size) or narrower ones (dtype='int8') would help",
                100 * self.wait_share,
            )

    def _tune(self, waited: float) -> None:
        enough = self._teacher.parallelism
        if waited > _WAITED:
            self._calm = 0
            self._depth = min(self._depth + 1, 2 * enough)
        else:
            self._calm += 1
            if self._calm >= _CALM_STEPS:
                self._calm = 0
                self._depth = max(self._depth - 1, 2)


class _End:
    """What an exhausted loader gives, told apart from any batch."""


_END = _End()
