"""A teacher's device: its name, the dtype to compute in, what it can run, and a stopwatch that does not block it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from dinov3_ray.config import ComputeDtype
from dinov3_ray.errors import ConfigError

__all__ = [
    "TRIAL_TOKENS",
    "Stopwatch",
    "Stretch",
    "as_device",
    "choose_dtype",
    "computing_on",
    "empty_cache",
    "full_float32",
    "parse_device",
    "settle_thread",
    "trial_error",
]

TRIAL_TOKENS = 41
"""For the trial of a kernel: no multiple of what one may want, since images give any number of tokens."""


_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.bfloat16,  # of all but its linear layers
}


def as_device(device: torch.device | str | int) -> torch.device:
    """``device`` as a torch.device that is there, with its index: ``cuda`` is this thread's current device.

    The current device is the thread's own, and 0 in a new one. So ``cuda`` is given its index once, in the thread of
    the caller who means it, and handed to other threads with it.

    Raises:
        ConfigError: it is not a device, or this process does not have it.
    """
    found = parse_device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device must be one that this process has; got {str(found)!r}, and it sees {torch.cuda.device_count()} "
            "CUDA devices (check CUDA_VISIBLE_DEVICES and torch's build, or pass device='cpu')"
        )
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())  # as tensors name it
    if found.type in ("cpu", "cuda"):
        return found
    try:
        return torch.empty(0, device=found).device
    except Exception as error:  # torch has no one kind of error for what it was built without
        raise ConfigError(
            f"device must be one that this process has; got {str(found)!r}, and torch {torch.__version__} cannot "
            "compute there (pass device='cpu')"
        ) from error


def parse_device(device: torch.device | str | int) -> torch.device:
    """``device`` as a torch.device, which another process may have.

    Raises:
        ConfigError: it is not a device.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device must be a torch device such as 'cpu' or 'cuda:0'; got {device!r}") from error


def choose_dtype(dtype: ComputeDtype, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why it was chosen.

    ``auto`` is bfloat16 where the device multiplies it in hardware, and float32 elsewhere. It is never float16:
    DINOv3's activations may exceed its range. A CPU must have AVX512-BF16 or AMX; without them bfloat16 is emulated and
    slower than float32. Measured with AVX512-BF16 alone (2 cores, 224 px, torch 2.13): ViT-S 1.5 times float32's
    speed, ConvNeXt-T 2.1 times.

    Raises:
        ConfigError: the type of device has no such dtype at all.
    """
    if dtype == "float8" and device.type not in ("cpu", "cuda"):
        raise ConfigError(f"dtype must be another than 'float8' on {device.type}, for which torch has none; use 'auto'")
    if dtype != "auto":
        return _DTYPES[dtype], "as asked"
    if device.type == "cuda":
        with torch.cuda.device(device):
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        fast, name = _cpu_multiplies_bfloat16(), "this CPU"
    else:
        # The speed of bfloat16 on other devices was not measured; float32 is right everywhere.
        fast, name = False, device.type
    if fast:
        return torch.bfloat16, f"{name} multiplies bfloat16 in hardware"
    if device.type == "cuda":
        return torch.float32, (
            f"{name} does not multiply bfloat16 in hardware, and DINOv3 may overflow float16. dtype='float16' is much "
            "faster there; whether your checkpoint allows it is what the golden check finds out, which a pool runs "
            "before it serves, and teacher.prove() here"
        )
    return torch.float32, f"{name} is not known to multiply bfloat16 in hardware"


def _cpu_multiplies_bfloat16() -> bool:
    # Public in newer releases of torch; before that, the same facts under private names.
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        found = capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def trial_error(trial: Callable[[], object], device: torch.device) -> Exception | None:
    """Why ``trial``, such as one call of a kernel, does not run on ``device``; None if it does.

    Which kernels a device can run depends on torch's build too, and torch has no error of its own for it.

    Raises:
        torch.OutOfMemoryError: the trial found too little memory, which says nothing of the kernel.
    """
    try:
        trial()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        return error
    return None


def empty_cache() -> None:
    """Give back what torch's allocators keep of accelerators' memory; without an accelerator, it does nothing."""
    torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def computing_on(device: torch.device) -> AbstractContextManager[object]:
    """A context whose current CUDA device is ``device``, if it is one.

    Kernels follow their tensors, but pinned memory, events and streams belong to the current device: on another one
    they would cost that one a CUDA context, half a gigabyte.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def full_float32() -> Iterator[None]:
    """A context in which products of float32 are float32's: not TF32's on a GPU, nor bfloat16's on a CPU.

    These are settings of the whole process: other threads' products are as exact meanwhile.
    """
    backends: Any = torch.backends  # its annotations lack what is in place of TF32's flags from torch 2.9 on
    if hasattr(backends.mkldnn, "matmul"):
        modes = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
        before = [(mode, "fp32_precision", mode.fp32_precision) for mode in modes]
        exact: object = "ieee"
    else:
        before = [(backends.cudnn, "allow_tf32", backends.cudnn.allow_tf32)]
        exact = False
    products = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        for mode, name, _ in before:
            setattr(mode, name, exact)
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        for mode, name, value in before:
            setattr(mode, name, value)


def settle_thread(device: object) -> None:
    """Make ``device``, if it is a CUDA device, the current one of this thread for as long as that lives."""
    if isinstance(device, torch.device) and device.type == "cuda":
        torch.cuda.set_device(as_device(device))


class Stretch:
    """One measured stretch of work.

    On a CUDA device, two events mark it in the stream and are read later, when the device has passed them. The host
    does not wait, as it would if the device were synchronised before and after.
    """

    def __init__(self, seconds: float = 0.0, events: tuple[Any, Any] | None = None) -> None:
        self._seconds = seconds
        self._events = events

    @property
    def seconds(self) -> float:
        """Its duration; 0 while a CUDA device has not finished it."""
        if self._events is None:
            return self._seconds
        begin, end = self._events
        return float(begin.elapsed_time(end)) / 1e3 if end.query() else 0.0


class Stopwatch:
    """Times stretches of work, and keeps the last one.

    Attributes:
        last: the last stretch; before the first, one of 0 seconds.
    """

    def __init__(self) -> None:
        self.last = Stretch()

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Time what is done inside, on ``device``."""
        if device.type != "cuda":
            begun = time.perf_counter()
            yield
            self.last = Stretch(time.perf_counter() - begun)
            return
        event: Any = torch.cuda.Event  # its annotations are partial
        begin, end = event(enable_timing=True), event(enable_timing=True)
        stream = torch.cuda.current_stream(device)
        begin.record(stream)
        yield
        end.record(stream)
        self.last = Stretch(events=(begin, end))

    @property
    def seconds(self) -> float:
        """Duration of the last stretch."""
        return self.last.seconds

    def __reduce__(self) -> tuple[type[Stopwatch], tuple[()]]:
        return Stopwatch, ()  # a copy starts anew: events belong to their process and device
