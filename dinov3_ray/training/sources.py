"""Where targets come from: anything that takes batches ahead of time, and teachers that compute when they are asked.

Nothing here knows of Ray: a pool's client is one more :class:`Submitter`.
"""

from __future__ import annotations

import threading
from typing import Protocol, cast

import torch

from dinov3_ray.errors import ConfigError, PoolClosedError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import Images
from dinov3_ray.teacher import Extractor

__all__ = ["LocalSource", "Submitted", "Submitter", "as_source"]


class Submitted(Protocol):
    """A batch that is being answered."""

    def result(self, timeout: float | None = None) -> Features: ...

    def done(self) -> bool: ...

    def cancel(self) -> None: ...


class Submitter(Protocol):
    """What can be sent batches ahead of time.

    It may also have ``statistics()`` with ``resends`` in it, and ``count_step(waited, seconds)``, which is told of each
    step of a loop over its targets; both are looked up by name.
    """

    @property
    def parallelism(self) -> int:
        """Batches that it can usefully have in flight now."""
        ...

    def submit(self, images: Images, spec: FeatureSpec) -> Submitted: ...


class LocalSource:
    """A teacher of this process as a source: a batch is computed when, and in the thread in which, it is waited for.

    Args:
        teacher: local, fake, stored, cached, or one's own. It is asked for one batch at a time.
    """

    def __init__(self, teacher: Extractor) -> None:
        self.teacher = teacher
        self.lock = threading.Lock()

    @property
    def parallelism(self) -> int:
        """One being computed and one behind it."""
        return 2

    def submit(self, images: Images, spec: FeatureSpec) -> LocalBatch:
        return LocalBatch(self, images, spec)

    def shares(self, device: torch.device | None) -> bool:
        """Whether the teacher computes on the accelerator where its targets shall be (None: where they come to be)."""
        own = getattr(self.teacher, "device", None)
        if own is None or torch.device(own).type == "cpu":
            return False
        return device is None or _indexed(torch.device(own)) == _indexed(device)


class LocalBatch:
    """A batch that a teacher of this process will compute, or has computed."""

    def __init__(self, source: LocalSource, images: Images, spec: FeatureSpec) -> None:
        self._source, self._images, self._spec = source, images, spec
        self._done = False

    def result(self, timeout: float | None = None) -> Features:  # noqa: ARG002 - computing cannot be broken off
        """Compute it, here and now; once."""
        with self._source.lock:
            if self._done:
                raise PoolClosedError("this batch was given up, or taken already")
            try:
                with torch.no_grad():  # grad mode belongs to a thread: another one would begin with gradients on
                    return self._source.teacher.extract(self._images, self._spec)
            finally:
                self._done = True

    def done(self) -> bool:
        return self._done

    def cancel(self) -> None:
        """Give it up if it has not begun; one that has is finished first."""
        with self._source.lock:
            self._done = True


def as_source(teacher: Submitter | Extractor) -> Submitter:
    """``teacher`` itself if it takes batches ahead of time, or else as one that is asked in turn."""
    if callable(getattr(teacher, "submit", None)):
        return cast(Submitter, teacher)
    if callable(getattr(teacher, "extract", None)):
        return LocalSource(cast(Extractor, teacher))
    raise ConfigError(
        "teacher must be a RemoteTeacher, an object with .extract(images, spec), or a dict of them by name; "
        f"got {teacher!r}"
    )


def _indexed(device: torch.device) -> torch.device:
    """``cuda`` as the ``cuda:0`` (or another) that it stands for."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())
