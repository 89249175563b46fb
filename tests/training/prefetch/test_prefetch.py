"""Prefetch in one process: real teachers, real pools in local mode, real interrupts."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from failing_loops import MistakeError, batches, fail_in_body, fail_in_images, fail_in_loader, idle
from resident import growth, resident
from sample_features import same
from stores import build, views
from torch import Tensor

from dinov3_ray import Features, FeatureSpec, RemoteTeacher, TeacherPool
from dinov3_ray.datasets import CachedTeacher, FeatureStore, StoredTeacher
from dinov3_ray.errors import ConfigError, InputError, PoolError, SpecError
from dinov3_ray.images import Images
from dinov3_ray.testing import FakeTeacher
from dinov3_ray.training.prefetch import AnyTeacher, find_images, prefetch

SPEC = FeatureSpec(cls=True, feature_map=True)


def expected(images: Images, spec: FeatureSpec = SPEC) -> Features:
    return FakeTeacher().extract(images, spec)


@pytest.fixture
def remote(local_pool: TeacherPool) -> RemoteTeacher:
    return local_pool.teacher()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dinov3-prefetch")]


@pytest.fixture(params=["remote", "fake", "cached", "stored"])
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AnyTeacher]:
    if request.param == "remote":
        yield request.getfixturevalue("remote")
    elif request.param == "fake":
        yield FakeTeacher()
    elif request.param == "cached":
        with CachedTeacher(FakeTeacher(), tmp_path, 2**24) as cached:
            yield cached
    else:
        build(tmp_path, SPEC, FakeTeacher())
        yield StoredTeacher(FeatureStore(tmp_path))


def test_every_kind_of_teacher_gives_its_targets_in_order_epoch_after_epoch(teacher: AnyTeacher) -> None:
    loader = list(views().split(3))
    stream = prefetch(teacher, loader, SPEC)
    assert len(stream) == len(loader) == 17
    for _ in range(3):
        seen = [(batch, targets) for batch, targets in stream]
        assert all(got is given for (got, _), given in zip(seen, loader, strict=True))
        assert all(same(targets, expected(batch)) for batch, targets in seen)
    assert stream.statistics().steps == 51
    assert stream.statistics().resends == 0
    assert not threads()


def test_several_teachers_in_one_pass(remote: RemoteTeacher) -> None:
    drawn = 0

    def loader() -> Iterator[Tensor]:
        nonlocal drawn
        for batch in batches():
            drawn += 1
            yield batch

    small = FakeTeacher(hidden_size=8, fingerprint="small")
    specs = {"lvd": SPEC, "sat": FeatureSpec(layers=(1,), map_size=(2, 2))}
    for batch, targets in prefetch({"lvd": remote, "sat": small}, loader(), specs):
        assert list(targets) == ["lvd", "sat"]
        assert same(targets["lvd"], expected(batch))
        assert same(targets["sat"], small.extract(batch, specs["sat"]))
    assert drawn == 20
    both = prefetch({"a": remote, "b": FakeTeacher()}, batches(3), SPEC)
    assert all(same(targets["a"], targets["b"]) for _, targets in both)


@pytest.mark.parametrize("depth", [1, 3, "auto"])
def test_memory_is_bounded_by_the_depth(remote: RemoteTeacher, depth: Any) -> None:
    drawn = delivered = 0

    def loader() -> Iterator[Tensor]:
        nonlocal drawn
        for batch in batches(60):
            drawn += 1
            assert drawn - delivered <= stream.statistics().depth
            yield batch

    stream = prefetch(remote, loader(), SPEC, depth=depth)
    for _ in stream:
        delivered += 1
    assert delivered == 60
    assert stream.statistics().depth <= 2 * remote.parallelism
    assert remote.statistics().peak_in_flight <= 2 * remote.parallelism


@pytest.mark.parametrize("fail", [fail_in_loader, fail_in_body, fail_in_images])
def test_an_error_is_raised_as_itself_and_leaves_nothing_in_flight(
    remote: RemoteTeacher, fail: Callable[[RemoteTeacher, Exception], None]
) -> None:
    error = MistakeError("here")
    with pytest.raises(MistakeError) as raised:
        fail(remote, error)
    assert raised.value is error
    assert idle(remote)
    assert not threads()


@pytest.mark.parametrize("local", [True, False], ids=["local", "pool"])
def test_a_teachers_error_is_raised_as_itself(local: bool) -> None:
    factory = FakeTeacher.factory(fail_on=range(5, 100), error=MistakeError("no"))
    with TeacherPool.start(factory, name="failing", replicas=1, local_mode=True) as pool:
        teacher = factory() if local else pool.teacher()
        seen = []
        with pytest.raises(MistakeError, match="no"):
            seen.extend(batch for batch, _ in prefetch(teacher, batches(), SPEC))
        assert len(seen) == 5, "batches before it were delivered"
        assert local or idle(teacher)
    assert not threads()


def test_bad_images_are_refused_before_they_are_sent(remote: RemoteTeacher) -> None:
    with pytest.raises(InputError, match="3 channels"):
        list(remote.prefetch([*batches(3), torch.zeros(2, 4, 48, 80)], SPEC))
    assert idle(remote)


def test_leaving_the_loop_ends_the_loader_and_gives_up_what_is_in_flight(remote: RemoteTeacher) -> None:
    ended = threading.Event()

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            try:
                yield from batches()
            finally:
                ended.set()

    stream = remote.prefetch(Loader(), SPEC)
    for _ in stream:
        break
    assert ended.is_set()
    assert idle(remote)
    assert not threads()
    held = iter(remote.prefetch(batches(), SPEC))
    next(held)
    held.close()  # type: ignore[attr-defined] # an iterator of ours has it
    assert idle(remote)


class Stuck:
    """Does not answer before it is told to."""

    def __init__(self, begun: threading.Event, go_on: threading.Event) -> None:
        self._begun, self._go_on = begun, go_on

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        self._begun.set()
        self._go_on.wait(60)
        return expected(images, spec)


@pytest.mark.slow
@pytest.mark.parametrize("receiver", ["whichever", "another"])
def test_ctrl_c_while_waiting_for_the_teacher(receiver: str) -> None:
    """Whichever thread the system hands the signal to: where it is not the one that waits, it does not end its wait."""
    begun, go_on = threading.Event(), threading.Event()

    def interrupt() -> None:
        begun.wait(60)
        time.sleep(0.1)  # until all that can be sent is, and the main thread waits
        if receiver == "another":
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        else:
            os.kill(os.getpid(), signal.SIGINT)

    with TeacherPool.start(lambda: Stuck(begun, go_on), name="stuck", replicas=1, local_mode=True) as pool:
        remote = pool.teacher()
        assert remote.parallelism  # connected: what follows waits for an answer and for nothing else
        thread = threading.Thread(target=interrupt)
        thread.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            list(remote.prefetch(batches(), SPEC))
        assert time.monotonic() - started < 30
        thread.join()
        assert idle(remote)
        assert not threads()
        go_on.set()
        assert same(remote.extract(batches(1)[0], SPEC), expected(batches(1)[0]))


@pytest.mark.slow
def test_waits_are_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    stream = prefetch(FakeTeacher(delay=0.01), batches(), SPEC)
    with caplog.at_level(logging.WARNING, "dinov3_ray"):
        for _ in range(3):
            for _ in stream:
                pass
    statistics = stream.statistics()
    assert statistics.steps == 60
    assert statistics.wait_seconds >= 0.01 * 50  # all but the epochs' first batches, roughly
    assert statistics.fill_seconds >= 0.01 * 3, "which are counted apart"
    assert statistics.wait_share > 0.5
    said = [record.getMessage() for record in caplog.records if record.module == "stream"]
    assert len(said) == 1
    assert all(remedy in said[0] for remedy in ("pool.scale", "map_size", "int8"))


@pytest.mark.slow
def test_the_loaders_time_is_no_wait_nor_is_that_of_taking_the_images_out() -> None:
    def slow() -> Iterator[Tensor]:
        for batch in batches(10):
            time.sleep(0.05)
            yield batch

    def images(batch: Tensor) -> Tensor:
        time.sleep(0.05)
        return batch

    stream = prefetch(FakeTeacher(), slow(), SPEC, images=images)
    assert len(list(stream)) == 10
    assert stream.statistics().seconds + stream.statistics().fill_seconds < 0.5


def pool_with_reload(remote: RemoteTeacher, pool: TeacherPool, **options: Any) -> list[str | None]:
    seen = []
    for number, (_, targets) in enumerate(remote.prefetch(batches(), SPEC, depth=2, **options)):
        seen.append(targets.fingerprint)
        if number == 5:
            pool.reload(FakeTeacher.factory(fingerprint="second"))
    return seen


def test_a_change_of_teacher_is_never_silent(caplog: pytest.LogCaptureFixture) -> None:
    first = FakeTeacher.factory(fingerprint="first")
    with TeacherPool.start(first, name="reload", replicas=1, local_mode=True) as pool:
        remote = pool.teacher()
        with caplog.at_level(logging.WARNING, "dinov3_ray"):
            seen = pool_with_reload(remote, pool)
        assert set(seen) == {"first", "second"}
        (said,) = [record.getMessage() for record in caplog.records if record.module == "stream"]
        assert "changed from first to second" in said
        pool.reload(first)
        with pytest.raises(PoolError, match="changed from first to second"):
            pool_with_reload(remote, pool, on_reload="raise")
        assert idle(remote)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depth": 0}, ConfigError, 'depth must be "auto" or a whole number >= 1; got 0'),
        ({"depth": True}, ConfigError, "depth"),
        ({"on_reload": "ignore"}, ConfigError, "'warn' or 'raise'"),
        ({"images": "img"}, ConfigError, "function of a batch"),
        ({"teacher": {}}, ConfigError, "at least one"),
        ({"teacher": torch.nn.Identity()}, ConfigError, r"\.extract\(images, spec\)"),
        ({"spec": {"a": SPEC}}, ConfigError, "one FeatureSpec per teacher"),
        ({"spec": FeatureSpec()}, SpecError, "at least one of"),
    ],
)
def test_options_that_cannot_be(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prefetch(**{"teacher": FakeTeacher(), "loader": [], "spec": SPEC, **arguments})


@pytest.mark.slow
def test_host_memory_does_not_grow(remote: RemoteTeacher) -> None:
    image = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    stream = remote.prefetch((image.clone() for _ in range(2300)), SPEC)
    memory = []
    for step, (batch, targets) in enumerate(stream):
        assert targets.nbytes
        batch.add_(1)
        if step % 200 == 0:
            memory.append(resident())
    print("MiB after each 200 steps:", memory)
    # A kept batch per step would be 24 KiB, 9.4 MiB in 400 steps; a kept answer 0.8 MiB.
    assert growth(memory) < 0.5


@pytest.mark.parametrize(
    "batch",
    [
        (image := torch.zeros(2, 3, 32, 32)),
        image.numpy(),
        {"img": image, "cls": torch.zeros(2)},
        {"pixel_values": image},
        (image, torch.zeros(2)),
        [{"images": image}, "rest"],
        [image[0], torch.zeros(3, 16, 16)],
        ((image[0], image[1]), ({"boxes": 1}, {"boxes": 2})),
    ],
)
def test_images_are_found(batch: Any) -> None:
    found = find_images(batch)
    assert np.shape(found[0]) == (3, 32, 32)


@pytest.mark.parametrize(
    "batch", [{"x": image}, {"img": image, "images": image}, (torch.zeros(2), image), [], "img", 3, (image[0], 1)]
)
def test_images_that_cannot_be_found(batch: Any) -> None:
    with pytest.raises(ConfigError, match="images must be given"):
        find_images(batch)
