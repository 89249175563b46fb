"""Targets on their way to the trainer's device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov3_ray.features import Features

__all__ = ["Delivered", "Delivery"]


@dataclass(frozen=True, slots=True)
class Delivered:
    """Features by teacher, on the device or being copied there until ``event``."""

    features: Mapping[str, Features]
    event: torch.cuda.Event | None = None


class Delivery:
    """Copies features to a device ahead of their use.

    To CUDA, they go through pinned memory on a stream of their own, so that the copy runs beside the student's kernels;
    the consumer's stream waits for the copy, the consumer itself does not. Pinned blocks come from torch's caching
    allocator, which gives none back to others before the copy from it is over.

    :meth:`send` may be called from another thread than :meth:`receive`.

    Args:
        device: None leaves everything where it is.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        on_cuda = device is not None and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_cuda else None  # type: ignore[no-untyped-call]

    def send(self, features: Mapping[str, Features]) -> Delivered:
        """Begin to copy."""
        if self._device is None or self._stream is None:
            return self._send_plainly(features)
        device, stream = self._device, self._stream
        if any(tensor.device.type == "cuda" for each in features.values() for _, tensor in each.named()):
            # Computed on a GPU by this thread: the copies below, and with them the consumer, wait for that.
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            moved = {name: each.map(lambda _, tensor: _pinned(tensor)) for name, each in features.items()}
            moved = {name: each.to(device, non_blocking=True) for name, each in moved.items()}
            return Delivered(moved, stream.record_event())

    def receive(self, delivered: Delivered) -> dict[str, Features]:
        """The features, safe to use on the caller's current stream."""
        if delivered.event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(delivered.event)
            for features in delivered.features.values():
                for _, tensor in features.named():
                    if tensor.is_cuda:
                        # Its memory belongs to the stream that it was made on, which must not use it again before the
                        # caller's kernels have read it.
                        tensor.record_stream(current)
        return dict(delivered.features)

    def _send_plainly(self, features: Mapping[str, Features]) -> Delivered:
        moved = features if self._device is None else {name: each.to(self._device) for name, each in features.items()}
        cuda = [tensor for each in moved.values() for _, tensor in each.named() if tensor.is_cuda]
        # A local teacher's outputs, left where they are: the caller's stream waits for this thread's.
        event = torch.cuda.current_stream(cuda[0].device).record_event() if cuda else None
        return Delivered(moved, event)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor
