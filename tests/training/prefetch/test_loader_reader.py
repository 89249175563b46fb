"""A loader read ahead: nothing is lost or overwritten, and its state is that of the batch delivered."""

from __future__ import annotations

import itertools
import logging
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from sample_features import same
from streams import numbered
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov3_ray import FeatureSpec
from dinov3_ray.errors import InputError
from dinov3_ray.integrations.loader import TargetLoader
from dinov3_ray.testing import FakeTeacher
from dinov3_ray.training.prefetch import Prefetch, prefetch

SPEC = FeatureSpec(feature_map=True)
DEPTHS = [1, 2, 4, 30, "auto"]
Pair = namedtuple("Pair", ["img", "number"])


def number_of(images: Any) -> int:
    first = images[0]
    return int(first.flatten()[0])


def stream_of(loader: Iterable[Any], depth: Any = 4, images: Callable[[Any], Any] | None = None) -> Prefetch[Any, Any]:
    return prefetch(FakeTeacher(), loader, SPEC, depth=depth, images=images)


def take(stream: Prefetch[Any, Any], most: int | None = None, images: Callable[[Any], Any] = lambda b: b) -> list[int]:
    """The numbers in the batches of one pass, each checked against its targets."""
    seen = []
    for batch, targets in stream:
        assert same(targets, FakeTeacher().extract(images(batch), SPEC))
        seen.append(number_of(images(batch)))
        if len(seen) == most:
            break
    return seen


# --- What cannot be repeated ----------------------------------------------------------------------------------------


def generated(count: int = 12) -> Iterator[Tensor]:
    yield from map(numbered, range(count))


class Shared:
    """Not an iterator, but each pass goes on where the last one ended."""

    def __init__(self) -> None:
        self._iterator = generated()

    def __iter__(self) -> Iterator[Tensor]:
        return self._iterator


ONCE: dict[str, Callable[[], Iterable[Tensor]]] = {
    "generator": generated,
    "iterator of a list": lambda: iter(list(generated())),
    "map": lambda: map(numbered, range(12)),
    "islice": lambda: itertools.islice(generated(20), 12),
    "iterator of a DataLoader": lambda: iter(DataLoader([numbered(n)[0] for n in range(12)], batch_size=1)),
    "shared": Shared,
}


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", ONCE)
def test_what_cannot_be_repeated_goes_on_behind_the_last_batch_delivered(kind: str, depth: Any) -> None:
    stream = stream_of(ONCE[kind](), depth)
    assert [take(stream, 5), take(stream, 1), take(stream)] == [[0, 1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 11]]


def test_a_pass_over_an_iterator_that_has_ended_is_said(caplog: pytest.LogCaptureFixture) -> None:
    stream = stream_of(generated(3))
    with caplog.at_level(logging.WARNING, "dinov3_ray"):
        assert take(stream) == [0, 1, 2]
        assert not caplog.records
        assert take(stream) == []
    assert "the loader is an iterator that has ended" in caplog.text


@pytest.mark.parametrize("where", ["body", "images", "loader", "teacher"])
def test_an_error_loses_no_batch_of_an_iterator(where: str) -> None:
    failed = False

    def fail(here: str, number: int) -> None:
        nonlocal failed
        if here == where and number == 6 and not failed:
            failed = True
            raise LookupError(here)

    class Loader:
        numbers = iter(range(10))

        def __iter__(self) -> Iterator[Tensor]:
            return self

        def __next__(self) -> Tensor:
            fail("loader", 6 if where == "loader" and next(self.ahead) == 6 else 0)
            return numbered(next(self.numbers))

        ahead = itertools.count()

    class Teacher(FakeTeacher):
        def extract(self, images: Any, spec: FeatureSpec) -> Any:
            fail("teacher", number_of(images))
            return super().extract(images, spec)

    def images(batch: Tensor) -> Tensor:
        fail("images", number_of(batch))
        return batch

    stream: Prefetch[Any, Any] = prefetch(Teacher(), Loader(), SPEC, depth=3, images=images)
    seen = []
    for _ in range(2):
        try:
            for batch, _ in stream:
                seen.append(number_of(batch))
                fail("body", seen[-1])
        except LookupError:
            assert failed
    assert seen == list(range(10))


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_loader_that_is_its_own_iterator_and_sets_itself_back_begins_anew(
    depth: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Loader:
        def __iter__(self) -> Loader:
            self.numbers = iter(range(12))
            return self

        def __next__(self) -> Tensor:
            return numbered(next(self.numbers))

    stream = stream_of(Loader(), depth)
    passes = [take(stream, 5), take(stream, 5), take(stream), take(stream)]
    assert passes == [[0, 1, 2, 3, 4]] * 2 + [list(range(12))] * 2
    assert "has ended" not in caplog.text


def test_a_loader_that_can_be_repeated_begins_anew_and_ends_with_its_pass() -> None:
    ended = []

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            try:
                yield from generated()
            finally:
                ended.append(True)

    stream = stream_of(Loader())
    for number in (1, 2):
        assert take(stream, 5) == [0, 1, 2, 3, 4]
        assert len(ended) == number
    workers = DataLoader(Numbers(), batch_size=2, num_workers=1, persistent_workers=True)
    stream = stream_of(workers)
    assert [take(stream, 2), take(stream)] == [[0, 2], [0, 2, 4, 6, 8, 10]]


class Numbers(Dataset[Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return numbered(index)[0]


# --- Memory that is filled again ------------------------------------------------------------------------------------


class Nested:
    """As DETR's NestedTensor: an object with tensors in it."""

    def __init__(self, tensors: Tensor) -> None:
        self.tensors = tensors


@dataclass(frozen=True)
class Sample:
    img: Tensor


class Ring:
    """Fills ``buffers`` in turn, and yields what ``wrap`` makes of the one filled."""

    def __init__(
        self, wrap: Callable[[Any], Any], buffers: int = 1, fill: Callable[[Any, int], Any] | None = None
    ) -> None:
        self._wrap, self._fill = wrap, fill or (lambda buffer, number: buffer.fill_(number))
        self._buffers = [numbered(0) for _ in range(buffers)]

    def __iter__(self) -> Iterator[Any]:
        for number in range(40):
            buffer = self._buffers[number % len(self._buffers)]
            self._fill(buffer, number)
            yield self._wrap(buffer)


HALF = numbered(0).bfloat16()
REUSED_DICT: dict[str, Any] = {}


def in_one_dict(buffer: Tensor) -> dict[str, Any]:
    REUSED_DICT["img"] = buffer.clone()
    return REUSED_DICT


FILLED_AGAIN: dict[str, tuple[Iterable[Any], Callable[[Any], Any]]] = {
    "tensor": (Ring(lambda buffer: buffer), lambda batch: batch),
    "two buffers": (Ring(lambda buffer: buffer, buffers=2), lambda batch: batch),
    "three buffers": (Ring(lambda buffer: {"img": buffer}, buffers=3), lambda batch: batch["img"]),
    "array": (Ring(lambda buffer: buffer.numpy()), lambda batch: batch),
    "flipped array": (Ring(lambda buffer: buffer.numpy()[:, ::-1]), lambda batch: batch),
    "channels last": (Ring(lambda buffer: buffer.permute(0, 2, 3, 1)), lambda batch: batch.permute(0, 3, 1, 2)),
    "bfloat16": (Ring(lambda buffer: HALF.copy_(buffer)), lambda batch: batch),
    "list of images": (Ring(lambda buffer: list(buffer)), lambda batch: batch),
    "pair": (Ring(lambda buffer: (buffer, torch.ones(2))), lambda batch: batch[0]),
    "named tuple": (Ring(lambda buffer: Pair(buffer, 3)), lambda batch: batch.img),
    "object": (Ring(Nested), lambda batch: batch.tensors),
    "frozen dataclass": (Ring(Sample), lambda batch: batch.img),
    "view": (Ring(lambda buffer: buffer[1:]), lambda batch: batch),
    "one dict with new tensors": (Ring(in_one_dict), lambda batch: batch["img"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", FILLED_AGAIN)
def test_a_loader_that_fills_its_memory_again_does_not_change_what_was_drawn(kind: str, depth: Any) -> None:
    loader, images = FILLED_AGAIN[kind]
    stream = stream_of(loader, depth, images)
    for _ in range(2):
        assert take(stream, images=images) == list(range(40))


def test_one_pixel_is_enough() -> None:
    def fill(buffer: Tensor, number: int) -> None:
        buffer[1, 2, 3, 4] = number

    loader = Ring(lambda buffer: buffer, fill=fill)
    assert [int(batch[1, 2, 3, 4]) for batch, _ in stream_of(loader)] == list(range(40))


def test_images_that_a_function_makes_in_one_buffer() -> None:
    buffer = numbered(0)
    seen = [
        (number, int(targets.feature_map.argmax() >= 0), same(targets, FakeTeacher().extract(numbered(number), SPEC)))
        for number, targets in stream_of(range(40), images=lambda number: buffer.fill_(number))
    ]
    assert seen == [(number, 1, True) for number in range(40)]


def test_batches_that_do_not_change_are_the_loaders_own_objects() -> None:
    one = {"img": numbered(1), "names": ["a", "b"], "lock": object()}
    given = [{"img": numbered(number)} for number in range(30)]
    for loader in ([one] * 30, given):
        got = [batch for batch, _ in stream_of(loader, 8)]
        assert all(a is b for a, b in zip(got, loader, strict=True))


def test_a_loader_that_changes_batches_late_is_refused() -> None:
    buffer = numbered(0)

    def loader() -> Iterator[Tensor]:
        yield from map(numbered, range(30))
        for number in range(30, 40):
            yield buffer.fill_(number)

    passing = iter(stream_of(loader()))
    assert [number_of(next(passing)[0]) for _ in range(30)] == list(range(30))
    with pytest.raises(InputError, match=r"loader must not change a batch that waits.*depth=1"):
        next(passing)
    assert take(stream_of(loader(), depth=1)) == list(range(40))


# --- The loader's state and attributes ------------------------------------------------------------------------------


class Stateful:
    """A loader with a state, which it goes on from once; the state is one object, which changes."""

    def __init__(self) -> None:
        self.state = {"next": 0}
        self.batch_size = 2

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[Tensor]:
        while self.state["next"] < 12:
            self.state["next"] += 1
            yield numbered(self.state["next"] - 1)
        self.state["next"] = 0

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = dict(state)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("wrap", [lambda stream: stream, TargetLoader], ids=["prefetch", "TargetLoader"])
def test_the_state_is_that_of_the_batch_delivered(depth: Any, wrap: Any) -> None:
    stream = wrap(stream_of(Stateful(), depth))
    for seen, _ in enumerate(stream, 1):
        assert stream.state_dict() == {"next": seen}
        if seen == 7:
            break
    assert stream.state_dict() == {"next": 7}, "after the loop too"
    other = wrap(stream_of(Stateful(), depth))
    other.load_state_dict(stream.state_dict())
    assert [number_of(batch) for batch, _ in other] == [7, 8, 9, 10, 11]
    assert other.state_dict() == {"next": 0}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_dataloader_resumes_where_the_loop_was(workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        return stateful.StatefulDataLoader(Numbers(), batch_size=2, num_workers=workers, shuffle=True)

    torch.manual_seed(3)
    stream = stream_of(loader(), depth=4)
    first = take(stream, 2)
    state = stream.state_dict()
    resumed = stream_of(loader(), depth=4)
    resumed.load_state_dict(state)
    assert len(first) + len(rest := take(resumed)) == 6
    torch.manual_seed(3)
    assert [*first, *rest] == [number_of(batch) for batch in loader()]


def test_attributes_are_the_loaders() -> None:
    loader = DataLoader(Numbers(), batch_size=4)
    stream = stream_of(loader)
    assert stream.dataset is loader.dataset
    assert (stream.batch_size, stream.sampler, len(stream)) == (4, loader.sampler, 3)
    assert not hasattr(stream, "state_dict")
    assert not hasattr(stream, "set_epoch")
    with pytest.raises(AttributeError, match="'DataLoader' object has no attribute 'speed'"):
        _ = stream.speed


# --- accelerate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("accumulation", [1, 4, 5, 12, 20])
def test_accelerate_steps_as_without_us(depth: Any, accumulation: int) -> None:
    accelerate = pytest.importorskip("accelerate")

    def steps(wrap: Callable[[Any], Iterable[Tensor]]) -> list[tuple[Any, ...]]:
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Numbers(), batch_size=5))
        seen = []
        for _ in range(3):
            for batch in wrap(loader):
                with accelerator.accumulate(model):
                    accelerator.backward(model(torch.ones(1, 1)).sum())
                    optimizer.step()
                    optimizer.zero_grad()
                gathered = len(accelerator.gather_for_metrics(batch))
                seen.append((number_of(batch), accelerator.sync_gradients, loader.end_of_dataloader, gathered))
            seen.append((loader.iteration, accelerator.gradient_state.in_dataloader))
        return seen

    assert steps(lambda loader: (batch for batch, _ in stream_of(loader, depth))) == steps(lambda loader: loader)


def test_accelerate_skips_and_saves_batches_as_without_us(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("torchdata.stateful_dataloader")
    configuration = accelerate.utils.DataLoaderConfiguration(use_stateful_dataloader=True)
    accelerator = accelerate.Accelerator(dataloader_config=configuration, cpu=True)
    loader = accelerator.prepare(DataLoader(Numbers(), batch_size=2))
    assert take(stream_of(accelerator.skip_first_batches(loader, 4))) == [8, 10]
    plain = accelerator.prepare(DataLoader(Numbers(), batch_size=2))
    for _, (_, _) in zip(range(3), zip(plain, stream := stream_of(loader), strict=True), strict=False):
        assert loader.state_dict() == stream.state_dict() == plain.state_dict()
    states = np.array([loader.state_dict()["_num_yielded"], plain.state_dict()["_num_yielded"]])
    assert (states == 3).all()
