"""A replica whose process can no longer use its device: the process ends, or every request is an error that says so."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait

import pytest
from faulty import CudaError
from sample_images import images_of
from small_device import out_of_memory

from dinov3_ray import Features, FeatureSpec, TeacherPool
from dinov3_ray.errors import DeviceLostError, ReplicaError
from dinov3_ray.images import ImageBatch, Images
from dinov3_ray.pool.replica.device_pipeline import DevicePass, Results, SynchronousPipeline
from dinov3_ray.pool.replica.hosted import HostedReplica
from dinov3_ray.teacher import Extractor
from dinov3_ray.testing import FakeTeacher

CLS = FeatureSpec(cls=True)
WAIT = 30.0


def sticky() -> Exception:
    return CudaError("CUDA error: an illegal memory access was encountered")


class LosesDevice(FakeTeacher):
    """Its third pass, and all that follow, raise what CUDA raises."""

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        features = super().extract(images, spec)
        if self.calls > 2:
            raise sticky()
        return features


class LosesDeviceLate:
    """A pipeline in which the device thread begins each pass well, and the thread for results finds out."""

    depth = 3

    def __init__(self, teacher: Extractor) -> None:
        self._real = SynchronousPipeline(teacher)
        self._begun = 0

    def begin(self, batch: ImageBatch, rows: int, spec: FeatureSpec) -> DevicePass:
        self._begun += 1
        real = self._real.begin(batch, rows, spec)
        return _LostPass() if self._begun > 2 else real


class _LostPass:
    def result(self) -> Results:
        raise sticky()


class ShortThenLost(FakeTeacher):
    """Runs out of memory at its third pass; the device is lost when that is tried again."""

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        features = super().extract(images, spec)
        if self.calls == 3:
            raise out_of_memory()
        if self.calls > 3:
            raise sticky()
        return features


PLACES = {
    "as a pass begins": (LosesDevice, SynchronousPipeline),
    "as a pass ends": (FakeTeacher, LosesDeviceLate),
    "as a pass is tried again": (ShortThenLost, SynchronousPipeline),
}


@pytest.mark.parametrize("place", PLACES)
def test_whoever_finds_out_ends_the_process_after_a_line_in_the_log(
    place: str, caplog: pytest.LogCaptureFixture
) -> None:
    teacher, pipeline = PLACES[place]
    ended: Future[tuple[str, list[str]]] = Future()

    def end(reason: str) -> None:
        if not ended.done():
            ended.set_result((reason, list(caplog.messages)))

    hosted = HostedReplica(teacher, max_batch=2, pipeline=pipeline, on_device_lost=end)
    with caplog.at_level(logging.CRITICAL, "dinov3_ray"):
        futures = [hosted.submit(images_of(number), CLS) for number in range(3)]
        assert len(futures[1].result(WAIT)) == 2
        reason, lines = ended.result(WAIT)
    assert reason == f"{CudaError.__name__}: CUDA error: an illegal memory access was encountered"
    assert lines == [f"replica hosted has lost its device: {reason}"]
    hosted.close()


@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_answered_while_the_process_ends(place: str) -> None:
    teacher, pipeline = PLACES[place]
    futures: list[Future[Features]] = []
    all_sent = threading.Event()
    answered: Future[int] = Future()

    def end(_reason: str) -> None:
        all_sent.wait(WAIT)
        # As long as it takes to leave the reason with a head that is slow to answer.
        answered.set_result(len(wait(futures[3:], timeout=0.3).done))

    hosted = HostedReplica(teacher, max_batch=2, pipeline=pipeline, on_device_lost=end)
    futures += [hosted.submit(images_of(number), CLS) for number in range(6)]
    all_sent.set()
    assert answered.result(WAIT) == 0, "an answer would fail in the caller's hands what another replica could compute"
    hosted.close()


@pytest.mark.parametrize("place", PLACES)
def test_without_a_process_to_end_every_later_request_is_an_error_that_says_so(place: str) -> None:
    teacher, pipeline = PLACES[place]
    made: list[FakeTeacher] = []

    def build() -> FakeTeacher:
        made.append(teacher())
        return made[-1]

    hosted = HostedReplica(build, max_batch=2, pipeline=pipeline)
    futures = [hosted.submit(images_of(number), CLS) for number in range(6)]
    assert [len(future.result(WAIT)) for future in futures[:2]] == [2, 2]
    for future in futures[2:]:
        with pytest.raises(
            DeviceLostError, match=r"must end with its process.*illegal memory access.*start the process"
        ):
            future.result(WAIT)
    calls = made[0].calls
    with pytest.raises(DeviceLostError):
        hosted.submit(images_of(0), CLS).result(WAIT)
    assert made[0].calls == calls, "the device is not asked any more"
    hosted.close()


PROGRAM = """
import sys, torch
sys.path[:0] = sys.argv[1:]
from test_lost_device import CLS, LosesDevice, images_of
from dinov3_ray.pool.replica.actor import end_process
from dinov3_ray.pool.replica.hosted import HostedReplica
hosted = HostedReplica(LosesDevice, max_batch=2, on_device_lost=end_process)
for number in range(3):
    print(len(hosted.submit(images_of(number), CLS).result(30)), flush=True)
"""


@pytest.mark.slow
def test_a_real_process_ends() -> None:
    folders = [path for path in sys.path if path.endswith(("tests/pool/replica", "tests/support"))]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *folders], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (70, "2\n2\n"), done.stderr
    assert f"replica hosted has lost its device: {CudaError.__name__}: CUDA error: an illegal" in done.stderr


class LostInWarmUp(LosesDevice):
    def warm_up_passes(self, rows: int) -> Iterator[tuple[Images, FeatureSpec]]:
        for number in range(3):
            yield images_of(number, rows), CLS


class LostInProof(FakeTeacher):
    def prove(self, *, rows: int) -> float:
        raise sticky()


class LostInBuild(FakeTeacher):
    def __init__(self) -> None:
        raise sticky()


@pytest.mark.parametrize("teacher", [LostInBuild, LostInProof, LostInWarmUp])
def test_a_teacher_that_loses_its_device_while_it_is_loaded_says_so(teacher: type[FakeTeacher]) -> None:
    ended: list[str] = []
    with pytest.raises(DeviceLostError, match=r"illegal memory access.*start the process again"):
        HostedReplica(teacher, max_batch=2, on_device_lost=ended.append)
    assert not ended, "whoever waits for it gets the reason, and ends the process"


def test_a_local_pool_says_at_once_that_its_process_must_be_started_again() -> None:
    made: list[LosesDevice] = []

    def build() -> LosesDevice:
        made.append(LosesDevice())
        return made[-1]

    with TeacherPool.start(build, name="lost", replicas=1, local_mode=True) as pool:
        remote = pool.teacher()
        for number in range(2):
            remote.extract(images_of(number), CLS)
        for number in range(4):
            with pytest.raises(ReplicaError, match=r"illegal memory access.*start the process again"):
                remote.extract(images_of(number), CLS)
        assert made[0].calls == 3, "it is not asked again"
        (replica,) = pool.status().replicas
        assert replica.statistics is not None
        assert replica.statistics.errors == 4, "nor are requests sent again"
