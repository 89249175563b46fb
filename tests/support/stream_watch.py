"""Watches what is given to the streams of fake GPUs, and writes down what would go wrong on real ones.

Races are found by the event handler of torch's CUDA sanitizer: it keeps the order that streams and events settle, and
every access to a storage. The host counts as one more stream, which is ordered before each launch that follows, and
after each event that it waits for; so results that are read before they have arrived are a race as well. Memory that
is freed while another stream may still use it is looked for here, since the allocator would hand it out again.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.cuda import _sanitizer
from torch.cuda._sanitizer import EventHandler, UnsynchronizedAccessError
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

__all__ = ["HOST", "StreamWatch", "Wait"]

HOST = -1  # the host as a stream
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_LIKELY = {torch.bool: True, torch.uint8: 100}  # what a value is said to be; others are 1.0
_READS = {  # what the host cannot go on without, and what it is told
    torch.ops.aten._local_scalar_dense.default: lambda tensor: _LIKELY.get(tensor.dtype, 1.0),
    torch.ops.aten.equal.default: lambda tensor: True,
    torch.ops.aten.allclose.default: lambda tensor: True,
}


# The sanitizer keeps a traceback of each access, which takes longer than all else.
_NO_TRACES = SimpleNamespace(
    StackSummary=SimpleNamespace(extract=lambda frames, lookup_lines: []), walk_stack=lambda frame: []
)


@dataclass(frozen=True, slots=True)
class Wait:
    """The host has waited for a device."""

    thread: str
    what: str


@dataclass(slots=True)
class _Block:
    """Device memory, or pinned memory of the host."""

    weak: StorageWeakRef
    stream: int  # in which the allocator gave it, and would give it again
    uses: dict[int, tuple[int, str]] = field(default_factory=dict)  # by stream, the last: its number, and the kernel
    recorded: set[int] = field(default_factory=set)  # streams for which the allocator waits


class StreamWatch:
    """
    Attributes:
        faults: what would go wrong, in words.
        waits: where the host has waited for a device.
        launches: each kernel and copy: its device's index, its stream, and its name.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.faults: list[str] = []
        self.waits: list[Wait] = []
        self.launches: list[tuple[int, int, str]] = []
        self._handler = EventHandler()
        self._handler._handle_stream_creation(HOST)
        self._blocks: dict[int, _Block] = {}
        self._pinned: set[int] = set()

    # Streams, events and memory -------------------------------------------------------------------------------------

    def stream(self, stream: int) -> None:
        self._handler._handle_stream_creation(stream)

    def event(self, event: int) -> None:
        self._handler._handle_event_creation(event)

    def record(self, event: int, stream: int) -> None:
        self._handler._handle_event_record(event, stream)

    def wait_in_stream(self, event: int, stream: int) -> None:
        self._handler._handle_event_wait(event, stream)

    def wait_on_host(self, what: str, *, event: int | None = None, stream: int | None = None) -> None:
        """The host waits: for an event, for a stream, or for all that was launched."""
        self.waits.append(Wait(threading.current_thread().name, what))
        if event is not None:
            self._handler._handle_event_synchronization(event)
        elif stream is not None:
            self._handler._handle_stream_synchronization(stream)
        else:
            self._handler._handle_device_synchronization()

    def reached(self, event: int) -> None:
        """The host has seen, without a wait, that an event was reached."""
        self._handler._handle_event_synchronization(event)

    def pin(self, tensor: Tensor) -> Tensor:
        self._own(tensor, HOST)
        self._pinned.add(_key(tensor))
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return _key(tensor) in self._pinned

    def record_stream(self, tensor: Tensor, stream: int) -> None:
        if _key(tensor) in self._blocks:
            self._blocks[_key(tensor)].recorded.add(stream)

    def look_for_freed(self) -> None:
        """Find memory that is gone, which another stream than its own may still use."""
        for key, block in list(self._blocks.items()):
            if not block.weak.expired():
                continue
            del self._blocks[key]
            self._pinned.discard(key)
            self._handler.tensors_accessed.accesses.pop(key, None)
            syncs = self._handler.syncs
            for stream, (number, kernel) in block.uses.items():
                # torch's cache of pinned memory waits for the copies itself.
                safe = stream in (block.stream, HOST) or block.stream == HOST or stream in block.recorded
                known = max(syncs.current_sync_states[at].get(stream, -1) for at in (block.stream, HOST))
                if not safe and number > known:
                    self.faults.append(f"freed: memory of stream {block.stream}, while {kernel} may use it in {stream}")

    # Kernels --------------------------------------------------------------------------------------------------------

    def see(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        run: Callable[[], Any],
        stream_of: Callable[[torch.device], int],
        use: Callable[[torch.device, str], None],
    ) -> Any:
        """Run ``func``, and write down what a device would be given.

        Args:
            run: computes it, on tensors without values.
            stream_of: the current stream of a device in this thread.
            use: is called with the device of what is launched.
        """
        if func.namespace == "prim":  # a question to a tensor, such as its device
            return run()
        self.look_for_freed()
        given = _tensors((args, kwargs))
        if func in _READS:
            self._read(func, given)
            return _READS[func](given[0])
        out = run()
        made = _tensors(out)
        on_devices = [tensor.device for tensor in [*given, *made] if tensor.device.type == "cuda"]
        if not on_devices:
            self._on_host(func, args, kwargs, given, made)
            return out
        for tensor in made:
            self._own(tensor, stream_of(tensor.device) if tensor.device.type == "cuda" else HOST)
        if _is_view(func):
            return out
        # A copy between devices runs in a stream of its source, between barriers with the other one's.
        device, other = on_devices[0], on_devices[-1]
        stream = stream_of(device)
        use(device, str(func))
        self._follow(stream, stream_of(other))
        self.launches.append((device.index, stream, str(func)))
        self._access(stream, func, args, kwargs, made)
        self._follow(stream_of(other), stream)
        if any(tensor.device.type == "cpu" and tensor.ndim for tensor in [*given, *made]):
            self._crosses(func, args, kwargs, given, made, stream)
        return out

    def _follow(self, stream: int, other: int) -> None:
        states = self._handler.syncs.current_sync_states
        self._handler.syncs._state_wait_for_other(states[stream], states[other])

    def _crosses(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor], stream: int) -> None:
        """A copy between the host and a device."""
        unpinned = any(t.device.type == "cpu" and not self.is_pinned(t) for t in [*given, *made])
        blocks = func not in _COPIES or not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        if unpinned:
            self.faults.append(f"unpinned: {func} copies to or from memory that is not pinned")
        if unpinned or blocks:
            # From pageable memory, the driver returns when the copy is staged: behind all that the stream has.
            self.wait_on_host(str(func), stream=stream)

    def _on_host(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> None:
        if not _is_view(func) and any(_key(tensor) in self._pinned for tensor in [*given, *made]):
            self._access(HOST, func, args, kwargs, made)

    def _read(self, func: Any, given: list[Tensor]) -> None:
        tensor = given[0]
        if tensor.device.type == "cuda":
            self.wait_on_host(str(func))
        elif _key(tensor) in self._pinned:
            self._launch(HOST, {_key(tensor)}, set(), str(func))

    def _access(self, stream: int, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
        read, written = set(), set()
        for argument, value in _arguments(func, args, kwargs):
            keys = {_key(tensor) for tensor in _tensors(value)}
            (written if argument.alias_info and argument.alias_info.is_write else read).update(keys)
        written |= {_key(tensor) for tensor in made} - read
        tracked = self._blocks.keys()
        self._launch(stream, (read - written) & tracked, written & tracked, str(func))

    def _launch(self, stream: int, read: set[int], written: set[int], name: str) -> None:
        handler = self._handler
        if stream != HOST:
            # A launch follows all that the host has done by then.
            handler.syncs.current_sync_states[stream][HOST] = handler.syncs.current_sync_states[HOST].get(HOST, -1)
        with mock.patch.object(_sanitizer, "traceback", _NO_TRACES):
            errors = handler._handle_kernel_launch(stream, read, written, set(), name, defaultdict(list))
        for key in read | written:
            self._blocks[key].uses[stream] = (handler.seq_num, name)
        for error in errors:
            assert isinstance(error, UnsynchronizedAccessError)
            now, before = error.current_access, error.previous_access
            self.faults.append(
                f"race: {now.operator} in stream {now.stream} and {before.operator} in stream {before.stream}"
            )

    def _own(self, tensor: Tensor, stream: int) -> None:
        if _key(tensor) not in self._blocks and (tensor.device.type == "cuda" or stream == HOST):
            self._blocks[_key(tensor)] = _Block(StorageWeakRef(tensor.untyped_storage()), stream)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@cache
def _is_view(func: Any) -> bool:
    return any(argument.alias_info and not argument.alias_info.is_write for argument in func._schema.arguments)


def _arguments(func: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    named = {argument.name: argument for argument in func._schema.arguments}
    yield from zip(func._schema.arguments, args, strict=False)
    yield from ((named[name], value) for name, value in kwargs.items())
