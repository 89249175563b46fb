"""The fake itself: what it must catch, and what it must let pass, one fault at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda
from planted import planted
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec

ONE, OTHER = torch.device("cuda:1"), torch.device("cuda:0")


def on_device(*shape: int) -> Tensor:
    return torch.zeros(shape, device=ONE)


def pinned(*shape: int) -> Tensor:
    return torch.empty(shape, pin_memory=True)


# What waits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: torch.equal(x, x),
        lambda x: x.cpu(),
        lambda x: pinned(3).copy_(x),
        lambda x: torch.tensor([1.0, 2.0], device=ONE),
        lambda x: torch.zeros(3).pin_memory().to(ONE),
        lambda x: torch.zeros(3).to(ONE, non_blocking=True),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.current_stream(ONE).synchronize(),
        lambda x: torch.cuda.current_stream(ONE).record_event().synchronize(),
    ],
    ids=[
        "item", "bool", "tolist", "equal", "cpu", "blocking-copy", "tensor", "blocking-to", "unpinned", "device",
        "stream", "event",
    ],
)  # fmt: skip
def test_a_wait_is_seen(cuda: FakeCuda, wait: Callable[[Tensor], object]) -> None:
    x = on_device(3)
    assert not cuda.found()
    wait(x)
    assert [fault for fault in cuda.found() if fault.startswith("wait: ")]


def test_a_copy_that_waits_says_why(cuda: FakeCuda) -> None:
    torch.zeros(3).to(ONE, non_blocking=True)
    assert any(fault.startswith("unpinned: aten._to_copy") for fault in cuda.found())
    cuda.forget()
    pinned(3).to(ONE)
    assert cuda.found() == ["wait: aten._to_copy.default in MainThread"]


def test_an_index_that_would_be_copied_to_the_device_is_refused(cuda: FakeCuda) -> None:
    with pytest.raises(NotImplementedError, match="waits"):
        on_device(3)[[0, 1]]


def test_what_does_not_wait_passes(cuda: FakeCuda) -> None:
    x = pinned(2, 3).to(ONE, non_blocking=True)
    y = (x.float() * 2 + torch.arange(3, device=ONE))[:, 1:].t().contiguous()
    y[0] = 1.0
    host = pinned(2, 2)
    host.copy_(y, non_blocking=True)
    assert not cuda.found()
    assert (y.device, host.device.type, y.shape) == (ONE, "cpu", (2, 2))
    assert cuda.watch.launches


# What is not ordered ------------------------------------------------------------------------------------------------


def test_devices_do_not_mix(cuda: FakeCuda) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        on_device(3) + torch.zeros(3, device=OTHER)
    with pytest.raises(RuntimeError, match="same device"):
        on_device(3) + torch.zeros(3)
    with pytest.raises(RuntimeError, match="ordinal"):
        torch.cuda.set_device(2)
    with pytest.raises(TypeError, match="can't convert"):
        on_device(3).numpy()


@pytest.mark.parametrize("ordered", [True, False])
def test_two_streams_race_unless_one_waits(cuda: FakeCuda, ordered: bool) -> None:
    x = on_device(3)
    stream = torch.cuda.Stream(ONE)
    if ordered:
        stream.wait_stream(torch.cuda.current_stream(ONE))
    with torch.cuda.device(ONE), torch.cuda.stream(stream):
        x.add_(1)
    assert bool(cuda.found()) is not ordered
    assert all(fault.startswith("race: aten.add_") for fault in cuda.found())


@pytest.mark.parametrize("kept", ["held", "recorded", "waited", "dropped"])
def test_memory_must_outlive_the_kernels_that_read_it(cuda: FakeCuda, kept: str) -> None:
    stream = torch.cuda.Stream(ONE)
    with torch.cuda.device(ONE), torch.cuda.stream(stream):
        x = on_device(3)
    current = torch.cuda.current_stream(ONE)
    current.wait_stream(stream)
    y = x + 1  # in the current stream; the allocator gave x to the other
    held = x if kept == "held" else None
    if kept == "recorded":
        x.record_stream(current)
    if kept == "waited":
        stream.wait_stream(current)
    del x
    assert bool(cuda.found()) is (kept == "dropped")
    assert all(fault.startswith("freed: ") for fault in cuda.found())
    del y, held


@pytest.mark.parametrize("waited", ["event", "stream", "query", None])
def test_the_host_must_not_read_before_a_copy_has_arrived(cuda: FakeCuda, waited: str | None) -> None:
    host = pinned(1)
    host.copy_(on_device(1), non_blocking=True)
    stream = torch.cuda.current_stream(ONE)
    event = stream.record_event()
    if waited == "query":
        assert event.query()
    elif waited is not None:
        (event if waited == "event" else stream).synchronize()
    host.item()
    races = [fault for fault in cuda.found() if fault.startswith("race: ")]
    assert bool(races) is (waited is None)


def test_the_host_must_not_write_what_is_being_copied(cuda: FakeCuda) -> None:
    host = pinned(3)
    copy = host.to(ONE, non_blocking=True)
    assert not cuda.found()
    host.zero_()
    assert any(fault.startswith("race: aten.zero_") for fault in cuda.found())
    del copy


# Devices of threads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("touch", "devices"),
    [
        (lambda: on_device(3), {1}),
        (lambda: on_device(3).add_(1), {1}),
        (lambda: pinned(3), {0}),  # pinned memory belongs to the current device
        (lambda: torch.zeros(3, device="cuda"), {0}),
        (lambda: torch.cuda.Stream(), {0}),
        (lambda: torch.cuda.Event().record(), {0}),
        (lambda: torch.cuda.set_device(1), {1}),
        (lambda: torch.cuda.current_stream(ONE), set()),
    ],
    ids=["memory", "kernel", "pinned", "no-index", "stream", "event", "set", "question"],
)
def test_a_device_that_is_touched_is_paid_for(cuda: FakeCuda, touch: Callable[[], object], devices: set[int]) -> None:
    touch()
    assert cuda.contexts == devices


def test_what_is_done_while_another_device_is_current_is_noted(cuda: FakeCuda) -> None:
    x = on_device(3)
    event = torch.cuda.current_stream(ONE).record_event()
    event.synchronize()
    assert [note.split(" on ")[0] for note in cuda.astray] == [
        "aten.zeros.default",
        "Event.record",
        "Event.synchronize",
    ]
    assert cuda.astray[0].endswith("on cuda:1 while cuda:0 is current in MainThread")
    cuda.forget()
    with torch.cuda.device(ONE):
        x.add_(1)
        torch.cuda.Stream().record_event().synchronize()
    assert cuda.astray == []


def test_a_stream_of_another_device_touches_the_current_one(cuda: FakeCuda) -> None:
    stream = torch.cuda.Stream(ONE)
    with torch.cuda.device(ONE), torch.cuda.stream(stream):
        assert torch.cuda.current_stream() is stream
    assert (cuda.contexts, torch.cuda.current_device()) == ({1}, 0)
    with torch.cuda.stream(stream):
        assert torch.cuda.current_device() == 1
    assert (cuda.contexts, torch.cuda.current_device()) == ({0, 1}, 0)


def test_each_thread_has_its_own_current_device_and_stream(cuda: FakeCuda) -> None:
    torch.cuda.set_device(1)
    torch.cuda.set_stream(torch.cuda.Stream(ONE))
    found = []

    def look() -> None:
        found.append((torch.cuda.current_device(), torch.zeros(1, device="cuda").device))
        found.append(torch.cuda.current_stream(ONE) is torch.cuda.default_stream(ONE))

    thread = threading.Thread(target=look, name="dinov3-test")
    thread.start()
    thread.join()
    assert found == [(0, OTHER), True]


def test_it_leaves_torch_as_it_was() -> None:
    before = (torch.cuda.Stream, torch.cuda.is_available(), threading.Thread.run, Tensor.record_stream)
    with FakeCuda():
        assert torch.cuda.is_available()
    assert before == (torch.cuda.Stream, torch.cuda.is_available(), threading.Thread.run, Tensor.record_stream)
    assert type(torch.zeros(3)) is Tensor


def test_nothing_without_values_stays_behind(tiny_checkpoint: Path) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32", image_size=64))
    images, spec = torch.rand(2, 3, 64, 64), FeatureSpec(cls=True)
    expected = teacher.extract(images, spec).cls
    with FakeCuda():
        assert isinstance(teacher.extract(images, spec).cls, FakeTensor)
    found = teacher.extract(images, spec).cls
    assert expected is not None
    assert found is not None
    assert type(found) is Tensor
    assert torch.equal(found, expected)


def test_a_fault_whose_place_is_gone_is_not_planted() -> None:
    def double(x: int) -> int:
        return 2 * x

    with planted(double, "2 * x", "3 * x"):
        assert double(2) == 6
    assert double(2) == 4
    with pytest.raises(AssertionError, match="any more"), planted(double, "4 * x", "3 * x"):
        pass
