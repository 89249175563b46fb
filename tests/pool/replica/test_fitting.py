"""A replica whose device has too little memory: all is answered, in parts that fit, and the size is remembered."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from sample_images import images_of
from small_device import PIXELS, SmallDevice, SmallTeacher, out_of_memory
from torch import Tensor
from waiting import until

from dinov3_ray import Features, FeatureSpec, TeacherPool
from dinov3_ray.errors import DeviceMemoryError
from dinov3_ray.images import ImageBatch, Images
from dinov3_ray.pool.messages import Answer, Array, Outcome, RequestHeader
from dinov3_ray.pool.replica.device_pipeline import ConcurrentPipeline, SynchronousPipeline
from dinov3_ray.pool.replica.hosted import HostedReplica
from dinov3_ray.pool.replica.kind_limits import ImageKind, KindLimits
from dinov3_ray.pool.replica.replica import Replica
from dinov3_ray.pool.spec import PoolOptions
from dinov3_ray.pool.transport.wire import pack_images, unpack_features
from dinov3_ray.testing import FakeTeacher

SPEC = FeatureSpec(cls=True, feature_map=True, dtype="int8")
WAIT = 30.0
Answered = Future[tuple[Answer, list[Array]]]


class Served:
    """A replica on a small device."""

    def __init__(self, device: SmallDevice, teacher: FakeTeacher | None = None, **options: object) -> None:
        self.device = device
        made = PoolOptions.of(options)
        self.replica = Replica("r7", lambda: teacher or FakeTeacher(), made, pipeline=lambda _: device)
        self.replica.start().result(WAIT)
        self._requests = 0

    def offer(self, images: Tensor, spec: FeatureSpec = SPEC) -> Answered:
        layout, arrays = pack_images(ImageBatch.of(images))
        self._requests += 1
        header = RequestHeader(f"request-{self._requests}", "client", spec, layout, len(images))
        answered: Answered = Future()
        self.replica.offer(header, arrays, lambda answer, arrays: answered.set_result((answer, arrays)))
        return answered

    def compute(self, images: Tensor, spec: FeatureSpec = SPEC) -> list[int]:
        """The passes that were tried for it."""
        before = len(self.device.tried)
        check(self.offer(images, spec), images, spec)
        assert self.replica.wait_idle(WAIT)
        return self.device.tried[before:]


def check(answered: Answered, images: Tensor, spec: FeatureSpec = SPEC) -> None:
    answer, arrays = answered.result(WAIT)
    assert answer.outcome is Outcome.DONE, answer
    found, expected = unpack_features(answer.layout, arrays, None), FakeTeacher().extract(images, spec)
    for (name, ours), (_, theirs) in zip(found.named(), expected.named(), strict=True):
        assert torch.equal(ours, theirs), name


@contextmanager
def served(device: SmallDevice, teacher: FakeTeacher | None = None, **options: object) -> Iterator[Served]:
    one = Served(device, teacher, **options)
    try:
        yield one
    finally:
        one.replica.stop()


@pytest.mark.parametrize("late", [False, True])
def test_a_batch_is_tried_again_alone_then_in_halves_and_the_next_in_parts_at_once(late: bool) -> None:
    with served(SmallDevice(3, late=late)) as one:
        assert one.compute(images_of(0, 8)) == [8, 8, 4, 2, 2, 2, 2]
        assert one.compute(images_of(1, 8)) == [2, 2, 2, 2]
        assert one.compute(images_of(2, 5)) == [2, 2, 1]
        assert one.compute(images_of(3, 1)) == [1]
        seen = one.replica.statistics()
    assert (seen.out_of_memory, seen.fitting_batch, seen.images, seen.batches) == (3, 2, 22, 12)
    assert (seen.errors, seen.errors_in_a_row) == (0, 0)


@pytest.mark.parametrize("late", [False, True])
def test_batches_that_do_not_fit_side_by_side_are_computed_one_after_the_other(late: bool) -> None:
    with served(SmallDevice(9, late=late)) as one:
        images = [images_of(number, 8) for number in range(12)]
        with one.device.held():
            answers = [one.offer(batch) for batch in images]
            until(lambda: len(one.device.tried) > 1, "two are in flight")
        for answered, batch in zip(answers, images, strict=True):
            check(answered, batch)
        assert one.replica.statistics().fitting_batch == 0, "each fits whole"
        assert late or one.device.alive[:3] == [0, 1, 0], "nothing is held when it is tried again"
        assert one.replica.wait_idle(WAIT)
        before = len(one.device.tried)
        for answered, batch in [(one.offer(batch), batch) for batch in images]:
            check(answered, batch)
        assert one.device.tried[before:] == [8] * 12, "none failed first"


def test_a_small_batch_that_does_not_fit_beside_a_large_one_does_not_make_that_small() -> None:
    with served(SmallDevice(8)) as one:
        with one.device.held():
            answers = [one.offer(images_of(0, 8)), one.offer(images_of(1, 1))]
            until(lambda: len(one.device.tried) > 1, "both were begun")
        for number, (answered, rows) in enumerate(zip(answers, (8, 1), strict=True)):
            check(answered, images_of(number, rows))
        assert one.compute(images_of(2, 8)) == [8]


@pytest.mark.parametrize("late", [False, True])
def test_requests_that_shared_a_pass_all_get_their_own_results(late: bool) -> None:
    with served(SmallDevice(3, late=late), batching="dynamic", max_batch=9, max_wait=WAIT) as one:
        for number in range(0, 12, 3):
            images = [images_of(number + rows, rows) for rows in (2, 3, 4)]
            for answered, batch in [(one.offer(batch), batch) for batch in images]:
                check(answered, batch)
        seen = one.replica.statistics()
    assert (seen.images, seen.errors) == (36, 0)
    assert seen.fitting_batch in (2, 3)


def test_padded_passes_are_padded_to_the_size_that_fits() -> None:
    with served(SmallDevice(3), batching="deterministic", max_batch=8, max_wait=0.0) as one:
        assert one.compute(images_of(0, 3)) == [8, 8, 4, 2, 2]
        assert one.compute(images_of(1, 1)) == [2]


def test_an_image_that_does_not_fit_alone_is_an_error_of_its_request_only() -> None:
    with served(SmallDevice(3.5)) as one:
        large = images_of(1, 2, size=(64, 96))  # four times the pixels
        answers = [one.offer(images_of(0, 2)), one.offer(large), one.offer(images_of(2, 2))]
        check(answers[0], images_of(0, 2))
        check(answers[2], images_of(2, 2))
        answer, _ = answers[1].result(WAIT)
        assert answer.outcome is Outcome.FAILED
        assert isinstance(answer.error, DeviceMemoryError)
        assert "one of 64 x 96 pixels with FeatureSpec(cls=True" in str(answer.error)
        assert "CUDA out of memory. Tried to allocate" in str(answer.error)
        assert "smaller map_size" in str(answer.error)
        assert one.replica.wait_idle(WAIT)
        assert one.compute(images_of(3, 3)) == [3], "smaller images are as free as before"
        for _ in range(4):
            one.offer(large).result(WAIT)
        assert one.replica.statistics().errors_in_a_row == 0, "the replica is not sick"


def test_what_was_found_holds_for_larger_images_and_for_those_outputs_only() -> None:
    with served(SmallDevice(3)) as one:
        one.compute(images_of(0, 8))
        larger = images_of(1, 3, size=(32, 64))
        assert one.compute(larger) == [2, 1]
        assert one.compute(images_of(1, 8), FeatureSpec(cls=True)) == [8, 8, 4, 2, 2, 2, 2]


def test_a_size_is_reported_once_with_the_remedy(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dinov3_ray"), served(SmallDevice(3)) as one:
        for number in range(3):
            one.compute(images_of(number, 8))
    (line,) = caplog.messages
    assert "replica r7" in line
    assert "did not suffice for 8 images of 1536 pixels" in line
    assert "in parts of 2" in line
    assert "smaller max_batch, fewer outputs" in line


class Hoarder(FakeTeacher):
    """Has too little memory for more than two images. Its frames hold tensors, and are parts of a cycle."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        self.alive.append(sum(tensor() is not None for tensor in self.held))
        activations = torch.zeros(8)
        self.held.append(weakref.ref(activations))
        if len(images) > 2:
            try:
                raise out_of_memory()
            except torch.OutOfMemoryError as error:
                kept = error  # noqa: F841 - the cycle
                raise
        return super().extract(images, spec)


@pytest.mark.parametrize("passes", [0, 1])
def test_what_a_failed_pass_held_is_free_before_the_next(passes: int) -> None:
    teacher = Hoarder()
    pipeline = partial(ConcurrentPipeline, passes=passes, threads=1) if passes else SynchronousPipeline
    hosted = HostedReplica(lambda: teacher, max_batch=8, pipeline=pipeline)
    gc.disable()
    try:
        hosted.submit(images_of(0, 8), SPEC).result(WAIT)
    finally:
        gc.enable()
    assert teacher.alive == [0] * 7
    hosted.close()


def test_an_error_holds_no_tensors() -> None:
    hosted = HostedReplica(partial(SmallTeacher, 0), max_batch=1)
    with pytest.raises(DeviceMemoryError) as raised:
        hosted.submit(images_of(0, 1), SPEC).result(WAIT)
    assert raised.value.__cause__ is not None
    assert raised.value.__cause__.__traceback__ is None
    hosted.close()


class Warmed(FakeTeacher):
    """Asks for three batches before it serves."""

    def warm_up_passes(self, rows: int) -> Iterator[tuple[Images, FeatureSpec]]:
        for size in (rows, 2, 1):
            yield images_of(size, size), SPEC


def test_a_warm_up_runs_as_many_passes_at_once_as_requests_will_the_largest_first() -> None:
    with served(SmallDevice(21), Warmed(), max_batch=7) as one:
        assert one.device.tried == [7, 7, 7, 2, 2, 2, 1, 1, 1]
        assert one.compute(images_of(0, 7)) == [7]
        assert one.replica.statistics().out_of_memory == 0


@pytest.mark.parametrize("late", [False, True])
def test_a_warm_up_that_does_not_fit_finds_the_size_that_does(late: bool) -> None:
    with served(SmallDevice(4, late=late), Warmed(), max_batch=8) as one:
        assert one.device.tried[-4:] == [2, 1, 1, 1] if late else [8, 8, 4, 4, 2, 2, 2, 1, 1, 1]
        assert one.replica.statistics().fitting_batch <= 4
        assert one.replica.statistics().out_of_memory >= 2
        assert 8 not in one.compute(images_of(0, 8))


def test_a_teacher_that_does_not_fit_at_all_is_not_loaded() -> None:
    replica = Replica("r", Warmed, PoolOptions(max_batch=8), pipeline=lambda _: SmallDevice(0.5))
    with pytest.raises(DeviceMemoryError, match="one by one"):
        replica.start().result(WAIT)


def test_a_warm_up_that_fails_otherwise_says_why() -> None:
    class Broken(Warmed):
        def extract(self, images, spec):  # type: ignore[no-untyped-def]
            raise LookupError("no kernel")

    with pytest.raises(LookupError, match="no kernel"):
        Replica("r", Broken, PoolOptions()).start().result(WAIT)


@pytest.mark.parametrize("passes", [1, 3])
def test_an_extractions_teacher_computes_in_parts_too(passes: int) -> None:
    pipeline = partial(ConcurrentPipeline, passes=passes, threads=1)
    hosted = HostedReplica(lambda: SmallTeacher(3), max_batch=8, pipeline=pipeline)
    futures = [hosted.submit(images_of(number, 8), SPEC) for number in range(6)]
    for number, future in enumerate(futures):
        expected = FakeTeacher().extract(images_of(number, 8), SPEC).cls
        assert expected is not None
        found = future.result(WAIT).cls
        assert found is not None
        assert torch.equal(found, expected)
    with pytest.raises(DeviceMemoryError):
        hosted.submit(images_of(1, 1, size=(64, 96)), SPEC).result(WAIT)
    hosted.close()


def test_a_pool_answers_all_and_shows_the_size() -> None:
    teachers: list[SmallTeacher] = []

    def make() -> SmallTeacher:
        teachers.append(SmallTeacher(3))
        return teachers[-1]

    with TeacherPool.start(make, name="small", replicas=1, max_batch=8, local_mode=True) as pool:
        remote = pool.teacher()
        found = remote.extract(images_of(0, 20), SPEC).feature_map
        expected = FakeTeacher().extract(images_of(0, 20), SPEC).feature_map
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)
        (replica,) = pool.status().as_dict()["replicas"]
        assert replica["statistics"]["fitting_batch"] == 2
        assert replica["statistics"]["out_of_memory"] >= 3
        teachers[0].tried.clear()
        with pytest.raises(DeviceMemoryError, match="one of 64 x 96 pixels"):
            remote.extract(images_of(1, 1, size=(64, 96)), FeatureSpec(cls=True))
        assert teachers[0].tried == [1, 1], "once beside others, once alone, and never again"
        assert pool.status().restarts == 0


def kind(pixels: int, spec: FeatureSpec = SPEC, dtype: str = "uint8") -> ImageKind:
    return ImageKind(spec, dtype, pixels)


def test_sizes_hold_for_images_of_as_many_pixels_or_more() -> None:
    limits = KindLimits()
    assert limits.of(kind(100)) is limits.lowest() is None
    assert limits.learn(kind(100), 8)
    assert [limits.of(kind(pixels)) for pixels in (99, 100, 101)] == [None, 8, 8]
    assert limits.of(kind(100, FeatureSpec(cls=True))) is limits.of(kind(100, dtype="float32")) is None
    assert limits.learn(kind(200), 2)
    assert not limits.learn(kind(300), 4), "fewer are known not to fit"
    assert [limits.of(kind(pixels)) for pixels in (100, 199, 200, 300)] == [8, 8, 2, 2]
    assert limits.learn(kind(50), 1)
    assert repr(limits) == "<KindLimits: 1 limits, the lowest 1>", "it makes the others needless"


def test_after_many_batches_a_larger_size_is_tried() -> None:
    limits = KindLimits()
    limits.learn(kind(PIXELS), 4)
    for _ in range(1000):
        assert limits.of(kind(PIXELS)) == 4
        limits.use(kind(PIXELS), 12)
    assert limits.of(kind(PIXELS)) == 8
    assert limits.learn(kind(PIXELS), 4), "it does not fit still"
    for _ in range(2000):
        limits.use(kind(PIXELS), 12)
    assert limits.of(kind(PIXELS)) is limits.lowest() is None, "it may be tried whole"


def test_images_of_several_sizes_count_as_the_largest() -> None:
    batch = ImageBatch.of([torch.zeros(3, 10, 10), torch.zeros(3, 20, 5), torch.zeros(3, 9, 20)])
    assert ImageKind.of(batch, SPEC) == kind(180, dtype="float32")
