"""Passes recorded as CUDA graphs: the host starts all kernels of a pass at once, where it would start one by one.

Written from torch's documentation (``torch.cuda.graph``), and not run on a GPU yet: off unless asked for. A graph holds
for one shape of input and one spec. It is recorded when a shape has come often enough, and serves only if it agrees
with the pass that was just computed in the ordinary way. Everything else goes that way, as all did before.

Each graph has memory of its own, which nothing else may use. Its results lie there too, so that they are copied in the
stream before the next replay can be: whoever has them (a pipeline with several passes under way) keeps a copy.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from dinov3_ray.errors import NumericsError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.model.golden import agreement

__all__ = ["CudaGraphs", "Shapes"]

logger = logging.getLogger("dinov3_ray")

Constants = tuple[Tensor, ...] | None
"""Tensors of a pass that depend on its shape alone."""

Forward = Callable[[Tensor, Constants], Features]
"""One pass in the ordinary way: pixels [B,3,H,W], and constants, or None for it to make them."""

_MOST = 8
_REMEMBERED = 256
_WARM_UP = 2
_MINIMUM = 0.9999  # the same kernels on the same pixels: less than this is another computation


class Shapes:
    """Which shapes deserve a graph: those that came ``times`` times, and of these the first ``most``. Pure.

    Batches are never padded to a shape that has one: results are those of the batch as it came.
    """

    def __init__(self, times: int, most: int = _MOST) -> None:
        self._times, self._left = times, most
        self._seen: dict[Hashable, int] = {}

    def deserves(self, shape: Hashable) -> bool:
        """Note that ``shape`` was computed without a graph; True says, once for each shape, that one is due."""
        if self._left == 0:
            return False
        count = self._seen.pop(shape, 0) + 1
        self._seen[shape] = count  # the last seen stand last
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        if count != self._times:
            return False
        self._left -= 1
        return True


class CudaGraphs:
    """The graphs of one model on one device. Safe to use from several threads and streams, which wait for each other.

    Args:
        shapes: decides what is recorded.
        record: makes a graph of (pixels, pass, constants).
    """

    #: After so many passes of a shape its graph is there, if it gets one.
    TIMES = 3

    def __init__(
        self, shapes: Shapes | None = None, record: Callable[[Tensor, Forward, Constants], Any] | None = None
    ) -> None:
        self._shapes = shapes or Shapes(self.TIMES)
        self._record = record or Graph
        self._graphs: dict[Hashable, Any] = {}
        self._lock = threading.Lock()

    def run(
        self, pixels_B3HW: Tensor, spec: FeatureSpec, forward: Forward, constants: Callable[[], Constants]
    ) -> Features:
        """What ``forward`` gives: from a graph where there is one. Must be called under ``no_grad``.

        Args:
            forward: the pass; apart from its arguments it must depend on ``spec`` alone.
            constants: makes its constants, which the graph keeps alive.
        """
        key = (tuple(pixels_B3HW.shape), pixels_B3HW.dtype, spec)
        with self._lock:
            graph = self._graphs.get(key)
            if graph is not None:
                replayed: Features = graph.replay(pixels_B3HW)
                return replayed
            features = forward(pixels_B3HW, None)
            if self._shapes.deserves(key):
                recorded = self._recorded(pixels_B3HW, forward, constants(), features)
                if recorded is not None:
                    self._graphs[key] = recorded
            return features

    def __len__(self) -> int:
        return len(self._graphs)

    def __reduce__(self) -> tuple[type[CudaGraphs], tuple[()]]:
        return CudaGraphs, ()  # a copy starts anew: graphs belong to their process, device and weights

    def _recorded(self, pixels_B3HW: Tensor, forward: Forward, constants: Constants, features: Features) -> Any | None:
        """A graph that agrees with ``features``; None, and a warning, if there is none."""
        what = f"a CUDA graph of {list(pixels_B3HW.shape)}"
        try:
            graph = self._record(pixels_B3HW, forward, constants)
            agreement(graph.replay(pixels_B3HW), features, _MINIMUM, what)
        except (RuntimeError, NumericsError) as error:
            logger.warning("%s was not recorded, such batches run without: %s", what, error)
            return None
        return graph


class Graph:
    """One recorded pass. Its methods are called by one thread at a time.

    Raises:
        RuntimeError: the pass cannot be recorded.
    """

    def __init__(self, pixels_B3HW: Tensor, forward: Forward, constants: Constants) -> None:
        cuda: Any = torch.cuda  # its annotations are partial
        self._device = pixels_B3HW.device
        self._pixels_B3HW = pixels_B3HW.clone()
        self._constants = constants  # the graph reads their memory
        with cuda.device(self._device):
            # What kernels set up at their first call must not be recorded, and wants a stream of its own.
            side = cuda.Stream(self._device)
            side.wait_stream(cuda.current_stream())
            with cuda.stream(side):
                for _ in range(_WARM_UP):
                    forward(self._pixels_B3HW, constants)
            cuda.current_stream().wait_stream(side)
            self._graph = cuda.CUDAGraph()
            # No pool is named, so that it gets a private one. Other threads (who wait for earlier passes) may go on
            # meanwhile with calls that would break a recording of theirs.
            with cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._features = forward(self._pixels_B3HW, constants)
            self._copied = cuda.Event()

    def replay(self, pixels_B3HW: Tensor) -> Features:
        """The results of ``pixels_B3HW``, in memory of their own, enqueued in the current stream."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._copied)  # the replay before may have been in another stream
            self._pixels_B3HW.copy_(pixels_B3HW)
            self._graph.replay()
            features = self._features.map(lambda _, tensor: tensor.clone())
            self._copied.record(stream)
        return features
