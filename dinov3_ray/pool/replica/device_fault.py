"""What an exception says of the device: that it is lost to this process, or that its memory did not suffice. Pure.

Some CUDA errors are sticky: whatever the process asks of the device afterwards fails with the same error, until the
process ends. Their codes and texts are those of ``cudaError_t`` in CUDA's runtime API, of which the documentation says
that "to continue using CUDA, the process must be terminated and relaunched", and a few more that only a new process
gets rid of. Libraries that meet such a device report an internal error of theirs.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from enum import StrEnum

import torch

from dinov3_ray.errors import DinoV3Error

__all__ = ["DeviceFault", "chain_of", "device_fault", "drop_frames"]


class DeviceFault(StrEnum):
    """What is wrong with the device."""

    #: This process can no longer use it.
    LOST = "lost"
    #: It has too little memory for what was asked.
    MEMORY = "memory"


_LOST_CODES = {
    46: "busy or unavailable",
    214: "uncorrectable ECC error encountered",
    220: "uncorrectable NVLink error detected during the execution",
    226: "error containment",
    700: "an illegal memory access was encountered",
    702: "the launch timed out and was terminated",
    709: "context is destroyed",
    710: "device-side assert triggered",
    714: "hardware stack error",
    715: "an illegal instruction was encountered",
    716: "misaligned address",
    717: "operation not supported on global/shared address space",
    718: "invalid program counter",
    719: "unspecified launch failure",
    721: "tensor memory was not completely",
    806: "remote procedural call between the MPS",
    810: "MPS client has been terminated",
    999: "unknown error",
}
_OUT_OF_MEMORY_CODE = 2
# cuDNN 9 has statuses for the reasons of these, of which only some lose the device.
_LOST_STATUS = (r"INTERNAL_ERROR\b", r"EXECUTION_FAILED(?:_CUDART|_CUDA_DRIVER|_CUBLAS)?\b", r"MAPPING_ERROR\b")
# A handle is made at the first use: memory is what it lacks.
_MEMORY_STATUS = ("ALLOC_FAILED", "NOT_INITIALIZED", "INTERNAL_ERROR_(?:DEVICE|HOST)_ALLOCATION_FAILED")

_DEVICE = re.compile(r"\b(?:CUDA|HIP)", re.IGNORECASE)
_LOST = re.compile("|".join(map(re.escape, _LOST_CODES.values())), re.IGNORECASE)
_LIBRARY = r"(?:CUBLAS|CUBLASLT|CUDNN|CUSOLVER|CUSPARSE|CUFFT|HIPBLAS|MIOPEN)_STATUS_"
_LOST_LIBRARY = re.compile(_LIBRARY + f"(?:{'|'.join(_LOST_STATUS)})", re.IGNORECASE)
_MEMORY = re.compile(
    r"\bout of memory\b|DefaultCPUAllocator|bad_?alloc|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|"
    # torch tries cuDNN's convolutions one by one, and says this alone where none has found room for its workspace.
    r"\b(?:GET|FIND) was unable to find an engine to execute this computation|"
    + _LIBRARY
    + f"(?:{'|'.join(_MEMORY_STATUS)})",
    re.IGNORECASE,
)


def device_fault(error: BaseException) -> DeviceFault | None:
    """What ``error``, or one that it was raised from, says of the device; None if nothing.

    A lost device outweighs all else: what was raised afterwards, by whomever, changes nothing of it.
    """
    found = {_fault_of(one) for one in chain_of(error)}
    return next((fault for fault in (DeviceFault.LOST, DeviceFault.MEMORY) if fault in found), None)


def drop_frames(error: BaseException) -> None:
    """Let go of what the frames of ``error`` hold, such as the tensors of a batch: they are often parts of a cycle."""
    for one in chain_of(error):
        one.__traceback__ = None


def _fault_of(error: BaseException) -> DeviceFault | None:
    if isinstance(error, DinoV3Error):
        return None  # these quote others, and may come from other processes
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return DeviceFault.MEMORY
    if isinstance(error, OSError):
        return DeviceFault.MEMORY if error.errno == errno.ENOMEM else None
    if not isinstance(error, RuntimeError):
        return None
    code = getattr(error, "error_code", None)  # of torch.AcceleratorError, in newer releases of torch
    if code in _LOST_CODES:
        return DeviceFault.LOST
    text = str(error)
    if code == _OUT_OF_MEMORY_CODE or _MEMORY.search(text):
        return DeviceFault.MEMORY
    lost = _LOST_LIBRARY.search(text) or (_DEVICE.search(text) and _LOST.search(text))
    return DeviceFault.LOST if lost else None


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """``error``, and what it was raised from or while handling, suppressed or not; each once."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__cause__, one.__context__]
            if isinstance(one, BaseExceptionGroup):
                waiting += one.exceptions
