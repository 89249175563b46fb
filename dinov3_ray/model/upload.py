"""Copies to a CUDA device for which neither the host nor the work that is queued there waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dinov3_ray.features import Features
from dinov3_ray.images import ImageBatch
from dinov3_ray.model.device import computing_on

__all__ = ["Pending", "Upload"]


@dataclass(frozen=True, slots=True)
class Pending:
    """Tensors that one CUDA device is making, or has made: they hold their values from ``ready`` on."""

    tensors: tuple[Tensor, ...]
    ready: Any
    device: torch.device

    @classmethod
    def here(cls, tensors: Sequence[Tensor]) -> tuple[Pending, ...]:
        """``tensors`` as the current streams of this thread make them, device by device; those on a CPU left out."""
        devices = dict.fromkeys(tensor.device for tensor in tensors if tensor.is_cuda)
        pending = []
        for device in devices:
            with computing_on(device):
                ready = torch.cuda.current_stream().record_event()
            pending.append(cls(tuple(tensor for tensor in tensors if tensor.device == device), ready, device))
        return tuple(pending)

    def receive(self) -> tuple[Tensor, ...]:
        """The tensors for the caller's current stream, which waits for them; the caller's thread does not."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.ready)
        for tensor in self.tensors:
            # The allocator would reuse its memory, once it is dropped, in the stream that made it; not before the
            # kernels that this stream has been given by then have read it.
            tensor.record_stream(stream)
        return self.tensors


class Upload:
    """Copies tensors to ``device`` from pinned memory, in a stream of its own.

    In the stream that computes, a copy would wait for all that is queued there, such as a student's step; from memory
    that is not pinned, the host would wait with it. What is copied is a pinned copy, so the caller may change the
    original at once. torch keeps pinned memory, and hands it out again once the copies from it are over.

    Args:
        device: a CUDA device with its index. For any other device, features are copied plainly, and images stay where
            they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def _stream(self) -> Any:
        stream: Any = torch.cuda.Stream  # its annotations are partial
        return stream(self.device)

    def begin(self, tensors: Sequence[Tensor]) -> Pending:
        """Begin the copies. One of a tensor that a CUDA device is still computing, for this thread, waits for that."""
        with computing_on(self.device):
            if any(tensor.is_cuda for tensor in tensors):
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
            staged = [_staged(tensor) for tensor in tensors]
            with torch.cuda.stream(self._stream):
                copies = tuple(tensor.to(self.device, non_blocking=True) for tensor in staged)
                return Pending(copies, self._stream.record_event(), self.device)

    def __call__(self, batch: ImageBatch) -> ImageBatch:
        """``batch`` on the device, for the caller's current stream; images that are on a GPU already stay there."""
        if self.device.type != "cuda" or all(tensor.is_cuda for tensor in batch.tensors):
            return batch
        # float64 is narrowed before it crosses; whatever is narrower is widened on the device.
        tensors = [tensor.float() if tensor.dtype == torch.float64 else tensor for tensor in batch.tensors]
        uploaded = self.begin(tensors).receive()
        return ImageBatch(uploaded[0]) if batch.stacked is not None else ImageBatch(None, uploaded)

    def features(self, features: Features) -> Features:
        """``features`` on the device, for the caller's current stream."""
        if self.device.type != "cuda":
            return features.to(self.device)
        copies = iter(self.begin([tensor for _, tensor in features.named()]).receive())
        return features.map(lambda *_: next(copies))

    def __reduce__(self) -> tuple[type[Upload], tuple[torch.device]]:
        return Upload, (self.device,)  # a copy starts anew: a stream belongs to its process


def _staged(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy in pinned memory of one that is on the CPU: dense, so that it crosses in one piece."""
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor) if tensor.device.type == "cpu" else tensor
