"""The machine that a bench measures on: its Ray, its name, and its rates of matrix products and copies."""

from __future__ import annotations

import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version

import ray
import torch
from rich.console import Console
from torch import Tensor

from dinov3_ray.model.float8 import Float8Linear
from dinov3_ray.pool.cluster import connect

__all__ = ["copy_rates", "describe_machine", "matmul_rate", "running", "seconds_of"]


_STORE_BYTES = 2 * 2**30  # room for every contender's results in flight, and for those not freed yet


@contextmanager
def running(address: str | None, *, store_bytes: int = _STORE_BYTES) -> Iterator[Callable[[str], None]]:
    """Use the Ray at ``address``, or RAY_ADDRESS, or one that is started with an object store of ``store_bytes`` and
    ends here.

    Yields:
        What to tell each step's name.
    """
    # Ray tells on standard output, whatever it is asked, of tasks that end and of many processes, the last of it as it
    # ends: tables and JSON are to stand there alone.
    with redirect_stdout(sys.stderr):
        runtime = connect(address, may_start=True, object_store_memory=store_bytes)
        try:
            with Console(stderr=True).status("starting") as status:
                yield lambda step: status.update(f"measuring {step}")
        finally:
            runtime.close()


def seconds_of(once: Callable[[], object], device: torch.device, repeats: int, least: float = 0.3) -> list[float]:
    """Seconds of ``once``, ``repeats`` times, after it has run once to warm up.

    Each is a mean over as many calls as fill ``least`` seconds, so that the clock and, on a CUDA device, the wait for
    its end count for little.
    """
    once()
    calls = max(1, math.ceil(least / max(_timed(once, 1, device), 1e-6)))
    return [_timed(once, calls, device) for _ in range(repeats)]


def _timed(once: Callable[[], object], calls: int, device: torch.device) -> float:
    _finish(device)
    begun = time.perf_counter()
    for _ in range(calls):
        once()
    _finish(device)
    return (time.perf_counter() - begun) / calls


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]], repeats: int, least: float
) -> float:
    """FLOP/s of ``x @ weight.T`` as linear layers do it, the best of several shapes.

    Args:
        dtype: of both operands; float8_e4m3fn stands for float8 linear layers, quantisation included.
        shapes: (rows, columns in, columns out).
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
    """Bytes/s from pinned memory to a CUDA device, and back."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    copies = (lambda: there.copy_(host, non_blocking=True), lambda: host.copy_(there, non_blocking=True))
    into, out = (nbytes / statistics.median(seconds_of(copy, device, repeats, least)) for copy in copies)
    return into, out


def describe_machine() -> str:
    return (
        f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, ray {ray.__version__}, "
        f"torch {torch.__version__}, transformers {version('transformers')}"
    )
