"""What an exception says of a device: a table of what torch, CUDA and its libraries raise."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch
from faulty import CudaError

from dinov3_ray.errors import DeviceMemoryError, InputError, NumericsError, PoolError, first_line
from dinov3_ray.pool.replica.device_fault import DeviceFault, chain_of, device_fault

ADVICE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the trace might be incorrect."
)


class CodedError(CudaError):
    """As newer releases of torch raise it."""

    def __init__(self, code: int, text: str = "CUDA error: in words that nobody foresaw") -> None:
        super().__init__(text)
        self.error_code = code


LOST = [
    CudaError(f"CUDA error: an illegal memory access was encountered{ADVICE}"),
    CudaError(f"CUDA error: device-side assert triggered{ADVICE}"),
    CudaError(f"HIP error: unspecified launch failure{ADVICE}"),
    RuntimeError(f"CUDA error: misaligned address{ADVICE}"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("CUDA error: uncorrectable NVLink error detected during the execution"),
    RuntimeError("CUDA error: an illegal instruction was encountered"),
    RuntimeError("CUDA error: the launch timed out and was terminated"),
    RuntimeError("CUDA error: unknown error"),
    RuntimeError("CUDA driver error: hardware stack error"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, opa, opb, ...)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasLtMatmul(...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED_CUDART"),
    CodedError(700),
    CodedError(719),
    CodedError(214),
]
MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"),
    torch.OutOfMemoryError("in other words"),
    CudaError(f"CUDA error: out of memory{ADVICE}"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    CodedError(2),
]
NEITHER = [
    InputError("images must be finite; got a file named 'CUDA error: an illegal memory access was encountered.png'"),
    PoolError("a replica of another pool raised CUDA error: device-side assert triggered"),
    DeviceMemoryError("images must fit the memory: CUDA out of memory"),
    NumericsError("not finite"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("an unknown error"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("CUDA error: invalid configuration argument"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_COMPILATION_FAILED"),
    LookupError("CUDA error: an illegal memory access was encountered"),
    OSError(errno.ENOENT, "no such file"),
    CodedError(9),
]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(error, expected) for errors, expected in
     ((LOST, DeviceFault.LOST), (MEMORY, DeviceFault.MEMORY), (NEITHER, None)) for error in errors],
    ids=lambda value: repr(value)[:70],
)  # fmt: skip
def test_what_an_error_says_of_the_device(error: BaseException, expected: DeviceFault | None) -> None:
    assert device_fault(error) is expected


def test_the_errors_that_this_machine_raises_itself() -> None:
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(2**60)
    with pytest.raises(MemoryError) as numpys:
        np.empty(2**55)
    assert device_fault(torchs.value) is device_fault(numpys.value) is DeviceFault.MEMORY


@pytest.mark.parametrize("suppressed", [False, True])
def test_a_lost_device_stays_lost_whatever_is_raised_afterwards(suppressed: bool) -> None:
    def compute() -> None:
        try:
            raise LOST[0]
        except RuntimeError:
            if suppressed:
                raise InputError("the images are bad") from None
            raise torch.OutOfMemoryError("while it was handled")  # noqa: B904 - a context and not a cause

    with pytest.raises((InputError, torch.OutOfMemoryError)) as raised:
        compute()
    assert device_fault(raised.value) is DeviceFault.LOST
    assert LOST[0] in list(chain_of(raised.value))


def test_errors_in_a_circle_or_a_group_are_looked_at_once_each() -> None:
    one, other = LookupError("one"), LookupError("other")
    one.__cause__, other.__cause__ = other, one
    assert list(chain_of(one)) == [one, other]
    assert device_fault(ExceptionGroup("several", [one, MEMORY[0]])) is DeviceFault.MEMORY


def test_an_error_in_one_line() -> None:
    assert first_line(LOST[0]) == f"{CudaError.__name__}: CUDA error: an illegal memory access was encountered"
    assert first_line(MemoryError()) == "MemoryError"
