"""Rates of a device: calls, matrix products and copies per second, the clock read when the device has done its work."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dinov3_ray.model.float8 import Float8Linear

__all__ = ["copy_rates", "free_memory", "matmul_rate", "seconds_of", "wait_for_device"]


def seconds_of(once: Callable[[], object], device: torch.device, repeats: int, least: float = 0.3) -> list[float]:
    """Seconds per call of ``once``, ``repeats`` values, after one call to warm up.

    Each value is the mean of as many calls as fill ``least`` seconds, so that the clock and, on a CUDA device, the
    synchronisation count for little.
    """
    once()
    calls = max(1, math.ceil(least / max(_timed(once, 1, device), 1e-6)))
    return [_timed(once, calls, device) for _ in range(repeats)]


def _timed(once: Callable[[], object], calls: int, device: torch.device) -> float:
    wait_for_device(device)
    begun = time.perf_counter()
    for _ in range(calls):
        once()
    wait_for_device(device)
    return (time.perf_counter() - begun) / calls


def wait_for_device(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Give back what models that are gone have used, so that another process may have it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def matmul_rate(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]], repeats: int, least: float
) -> float:
    """FLOP/s of ``x @ weight.T`` in a linear layer, the best of several shapes.

    Args:
        device: to compute on.
        dtype: of both operands; float8_e4m3fn means a float8 linear layer, with its quantisation.
        shapes: (rows, columns in, columns out) each.
        repeats: runs per shape, of which the median counts.
        least: seconds per run.
    """
    best = 0.0
    for rows, inner, columns in shapes:
        once = _linear(device, dtype, rows, inner, columns)
        seconds = statistics.median(seconds_of(once, device, repeats, least))
        best = max(best, 2.0 * rows * inner * columns / seconds)
    return best


def _linear(device: torch.device, dtype: torch.dtype, rows: int, inner: int, columns: int) -> Callable[[], Tensor]:
    is_float8 = dtype == torch.float8_e4m3fn
    storage = torch.bfloat16 if is_float8 else dtype
    x = torch.randn(rows, inner, device=device).to(storage)
    linear = torch.nn.Linear(inner, columns, bias=False, device=device, dtype=storage).requires_grad_(False)
    layer = Float8Linear(linear) if is_float8 else linear
    return lambda: layer(x)


def copy_rates(device: torch.device, nbytes: int, repeats: int, least: float) -> tuple[float, float]:
    """(Bytes/s from pinned memory to a CUDA device, bytes/s back), copying ``nbytes`` at a time."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    copies = (lambda: there.copy_(host, non_blocking=True), lambda: host.copy_(there, non_blocking=True))
    into, out = (nbytes / statistics.median(seconds_of(copy, device, repeats, least)) for copy in copies)
    return into, out
