"""Fake CUDA devices for a torch without CUDA: tensors have shapes and devices, but no values.

torch's FakeTensorMode computes shapes and refuses to mix devices. This module adds what the CPU build lacks: streams,
events, pinned memory, a current device in each thread, and indexing, which wants a device guard. A ``StreamWatch`` sees
every operation, so that a test can assert that nothing would race, wait, or touch another GPU::

    with FakeCuda() as cuda:
        teacher.to("cuda:1")
        cuda.forget()  # what was slow and is allowed to be
        teacher.extract(images, spec)
        assert not cuda.found()

Values read from a device are ones, and the read counts as a wait. It is not a model of speed, nor of what a kernel
computes: the tests marked gpu are.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self
from unittest import mock

import numpy as np
import torch
from stream_watch import StreamWatch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dinov3_ray.model.preprocess import _statistics

__all__ = ["FakeCuda"]

_OURS = ("dinov3", "feature-cache")  # so the names of threads that have tensors begin


class FakeCuda:
    """Fake GPUs in this thread, and in the threads of this package that start meanwhile.

    Args:
        devices: how many.
        capability: of each; Hopper's by default.
        name: of each.

    Attributes:
        watch: what was given to the devices.
        contexts: indices of the devices that were used in any way. A process pays half a gigabyte for each.
        astray: what was done on a device while another was its thread's current one. Kernels and copies come out right
            all the same; pinned memory, and whatever names no device, would not.
    """

    def __init__(self, devices: int = 2, capability: tuple[int, int] = (9, 0), name: str = "Fake H100") -> None:
        self.devices, self.capability, self.name = devices, capability, name
        self.watch = StreamWatch()
        self.contexts: set[int] = set()
        self.astray: list[str] = []
        self.ids = itertools.count(1)
        self.defaults = [FakeStream(self, index) for index in range(devices)]
        self._mode = _SharedFakeMode(allow_non_fake_inputs=True)
        self._local = threading.local()
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Self:
        _empty_caches()
        self._exit.callback(_empty_caches)
        for name, fake in self._replacements().items():
            self._exit.enter_context(mock.patch.object(torch.cuda, name, fake))
        self._exit.enter_context(mock.patch.object(Tensor, "record_stream", self._record_stream()))
        self._exit.enter_context(mock.patch.object(torch.nn.Module, "compile", _compile))
        # Not a function mode: torch's decompositions call it where those are off.
        self._exit.enter_context(mock.patch.object(Tensor, "contiguous", _contiguous))
        run = threading.Thread.run

        def run_on_fakes(thread: threading.Thread) -> None:
            with self.here() if thread.name.startswith(_OURS) else contextlib.nullcontext():
                run(thread)

        self._exit.enter_context(mock.patch.object(threading.Thread, "run", run_on_fakes))
        self._exit.enter_context(self.here())
        return self

    def __exit__(self, *error: object) -> None:
        self.watch.look_for_freed()
        self._exit.close()

    def here(self) -> contextlib.ExitStack:
        """The modes that act in one thread."""
        modes = contextlib.ExitStack()
        for mode in (self._mode, _CudaFunctions(self), _Seen(self)):
            modes.enter_context(mode)
        return modes

    def forget(self) -> None:
        """Begin to look: what was found so far was allowed, such as the waits of loading."""
        self.watch.look_for_freed()
        self.watch.waits.clear()
        self.watch.faults.clear()
        self.watch.launches.clear()
        self.astray.clear()

    def found(self) -> list[str]:
        """All that would be wrong, or wait, each once."""
        self.watch.look_for_freed()
        waits = [f"wait: {wait.what} in {wait.thread}" for wait in self.watch.waits]
        return sorted(set(self.watch.faults + waits))

    def astray_in_our_threads(self) -> list[str]:
        """What this package's own threads did on another device than their current one."""
        return [note for note in self.astray if "dinov3-" in note]

    def _record_stream(self) -> Callable[[Tensor, FakeStream], None]:
        def record_stream(tensor: Tensor, stream: FakeStream) -> None:
            with self.watch.lock:
                self.watch.record_stream(tensor, stream.stream_id)

        return record_stream

    # torch.cuda -----------------------------------------------------------------------------------------------------

    def _replacements(self) -> dict[str, Any]:
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "is_bf16_supported": lambda including_emulation=True: including_emulation or self.capability >= (8, 0),
            "device_count": lambda: self.devices,
            "current_device": lambda: self.current,
            "set_device": lambda device: self.set_device(self.index(device)),
            "_exchange_device": self._exchange,  # with which torch.cuda.device goes to a device, and back
            "_maybe_exchange_device": self._go_back,
            "get_device_name": lambda device=None: self.name,
            "get_device_capability": lambda device=None: self.capability,
            "Stream": self._stream_class(),
            "Event": self._event_class(),
            "current_stream": lambda device=None: self.stream_of(self.index(device)),
            "default_stream": lambda device=None: self.defaults[self.index(device)],
            "stream": self._in_stream,
            "set_stream": self.set_stream,
            "synchronize": lambda device=None: self.watch.wait_on_host("torch.cuda.synchronize"),
            "empty_cache": lambda: None,
        }

    def use(self, index: int, what: str) -> None:
        """A device is used, by this thread."""
        self.contexts.add(index)
        if index != self.current:
            thread = threading.current_thread().name
            self.astray.append(f"{what} on cuda:{index} while cuda:{self.current} is current in {thread}")

    @property
    def current(self) -> int:
        """The current device of this thread."""
        return getattr(self._local, "device", 0)

    def index(self, device: Any) -> int:
        device = torch.device(device) if isinstance(device, str) else device
        index = device.index if isinstance(device, torch.device) else device
        index = self.current if index is None else index
        if not 0 <= index < self.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}")
        return index

    def set_device(self, index: int) -> None:
        self._local.device = index
        self.contexts.add(index)  # since CUDA 12

    def _exchange(self, index: int) -> int:
        before = self.current
        self.set_device(index)
        return before

    def _go_back(self, index: int) -> int:
        before, self._local.device = self.current, index  # without using it, as torch does
        return before

    # Classes, since they stand in annotations that are evaluated.

    def _stream_class(self) -> type[FakeStream]:
        cuda = self

        class Stream(FakeStream):
            def __init__(self, device: Any = None, priority: int = 0) -> None:
                super().__init__(cuda, cuda.index(device))
                cuda.use(self.device.index, "Stream")

        return Stream

    def _event_class(self) -> type[FakeEvent]:
        cuda = self

        class Event(FakeEvent):
            def __init__(self, **options: Any) -> None:
                super().__init__(cuda)

        return Event

    def stream_of(self, index: int) -> FakeStream:
        streams: dict[int, FakeStream] = self._local.__dict__.setdefault("streams", {})
        return streams.get(index, self.defaults[index])

    def set_stream(self, stream: FakeStream) -> None:
        self.set_device(stream.device.index)
        self._local.__dict__.setdefault("streams", {})[stream.device.index] = stream

    @contextlib.contextmanager
    def _in_stream(self, stream: FakeStream) -> Iterator[None]:
        # As torch's StreamContext: it goes back to the device before by using it.
        before, there = self.stream_of(self.current), self.stream_of(stream.device.index)
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(there)
            if before.device != stream.device:
                self.set_stream(before)


class FakeStream:
    """A stream of a fake device."""

    def __init__(self, cuda: FakeCuda, index: int) -> None:
        self._cuda = cuda
        self.device = torch.device("cuda", index)
        self.stream_id = next(cuda.ids)
        with cuda.watch.lock:
            cuda.watch.stream(self.stream_id)

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent(self._cuda)
        event.record(self)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        event.wait(self)

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        with self._cuda.watch.lock:
            self._cuda.watch.wait_on_host("Stream.synchronize", stream=self.stream_id)


class FakeEvent:
    """An event. ``query`` says that it has been reached, without a wait: the host may use what came before it."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._id = next(cuda.ids)
        self._recorded: int | None = None  # on which device
        with cuda.watch.lock:
            cuda.watch.event(self._id)

    def record(self, stream: FakeStream | None = None) -> None:
        stream = stream or self._cuda.stream_of(self._cuda.current)
        self._recorded = stream.device.index
        self._cuda.use(self._recorded, "Event.record")
        with self._cuda.watch.lock:
            self._cuda.watch.record(self._id, stream.stream_id)

    def wait(self, stream: FakeStream | None = None) -> None:
        if self._recorded is not None:
            stream = stream or self._cuda.stream_of(self._cuda.current)
            with self._cuda.watch.lock:
                self._cuda.watch.wait_in_stream(self._id, stream.stream_id)

    def synchronize(self) -> None:
        if self._recorded is not None:
            self._cuda.use(self._recorded, "Event.synchronize")
            with self._cuda.watch.lock:
                self._cuda.watch.wait_on_host("Event.synchronize", event=self._id)

    def query(self) -> bool:
        if self._recorded is not None:
            with self._cuda.watch.lock:
                self._cuda.watch.reached(self._id)
        return True

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1.0


class _SharedFakeMode(FakeTensorMode):
    """One mode for several threads: whether a kernel runs is true of a thread, not of all."""

    _running = threading.local()

    @property
    def in_kernel_invocation(self) -> bool:  # type: ignore[override]
        return getattr(self._running, "flag", False)

    @in_kernel_invocation.setter
    def in_kernel_invocation(self, flag: bool) -> None:
        self._running.flag = flag

    @property
    def avoid_device_init(self) -> bool:
        return True  # although torch.cuda.is_available() says so here, there is none


class _Seen(TorchDispatchMode):
    """Shows each operation to the watch. One thread at a time: a FakeTensorMode is not made for several."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        cuda = self._cuda

        with cuda.watch.lock:
            return cuda.watch.see(
                func,
                args,
                kwargs,
                run=lambda: func(*args, **kwargs),
                stream_of=lambda device: cuda.stream_of(device.index).stream_id,
                use=lambda device, what: cuda.use(device.index, what),
            )


class _CudaFunctions(TorchFunctionMode):
    """What a torch without CUDA cannot do, although a fake tensor needs no CUDA for it."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda
        self._instead: dict[Any, Callable[..., Any]] = {
            Tensor.__getitem__: _index,
            Tensor.__setitem__: _assign,
            Tensor.copy_: _copy,
            Tensor.data_ptr: lambda tensor: tensor.untyped_storage()._cdata,
            Tensor.numpy: _numpy,
            Tensor.pin_memory: lambda tensor, device=None: self._pin(tensor.clone()),
            Tensor.is_pinned: lambda tensor, device=None: cuda.watch.is_pinned(tensor),
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.device:
            args, kwargs = self._indexed(args), {name: self._indexed(value) for name, value in kwargs.items()}
        if func in self._instead and (isinstance(args[0], FakeTensor) or func in (Tensor.pin_memory, Tensor.is_pinned)):
            return self._instead[func](*args, **kwargs)
        if kwargs.get("pin_memory"):
            return self._pin(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)

    def _indexed(self, value: Any) -> Any:
        """``cuda`` with the current device's index, as torch itself would have it."""
        if type(value) is tuple:
            return tuple(map(self._indexed, value))
        is_cuda = isinstance(value, (str, torch.device)) and str(value) == "cuda"
        return torch.device("cuda", self._cuda.current) if is_cuda else value

    def _pin(self, tensor: Tensor) -> Tensor:
        assert tensor.device.type == "cpu", "only memory of the host can be pinned"
        self._cuda.contexts.add(self._cuda.current)
        with self._cuda.watch.lock:
            return self._cuda.watch.pin(tensor)


def _compile(module: torch.nn.Module, **options: Any) -> None:
    """Compiled code is the module's own: torch compiles for real devices only."""
    module._compiled_call_impl = module._call_impl


def _empty_caches() -> None:
    """Those that keep tensors for all who come later: with values and without must not meet."""
    _statistics.cache_clear()


def _index(tensor: Tensor, key: Any) -> Tensor:
    key = key if isinstance(key, tuple) else (key,)
    if any(part is Ellipsis for part in key):
        at = next(place for place, part in enumerate(key) if part is Ellipsis)
        missing = tensor.ndim - sum(part is not None and part is not Ellipsis for part in key)
        key = (*key[:at], *[slice(None)] * missing, *key[at + 1 :])
    dim = 0
    for part in key:
        if isinstance(part, slice):
            if part != slice(None):
                tensor = torch.ops.aten.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
            dim += 1
        elif isinstance(part, int):
            tensor = tensor.select(dim, part)
        elif part is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        else:
            raise NotImplementedError(f"indexing by {type(part).__name__}, which waits for the device on a real one")
    return tensor


def _assign(tensor: Tensor, key: Any, value: Any) -> None:
    place = _index(tensor, key)
    _copy(place, value) if isinstance(value, Tensor) else place.fill_(value)


def _copy(tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():  # whose kernel wants a device guard
        return torch.ops.aten.copy_.default(tensor, source, non_blocking)


def _contiguous(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    if not isinstance(tensor, FakeTensor):
        return torch._C.TensorBase.contiguous(tensor, memory_format=memory_format)
    if tensor.is_contiguous(memory_format=memory_format):
        return tensor
    return torch.ops.aten.clone(tensor, memory_format=memory_format)


def _numpy(tensor: Tensor, *, force: bool = False) -> np.ndarray:
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert {tensor.device} device type tensor to numpy")
    return np.ones(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
