"""Passes on their way through a device: what a replica makes of several at once, and the real pipelines."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from sample_images import images_of

from dinov3_ray import DinoV3Config, DinoV3Teacher, Features, FeatureSpec
from dinov3_ray.errors import InputError
from dinov3_ray.images import ImageBatch, Images
from dinov3_ray.pool.messages import Answer, Array, Outcome, RequestHeader
from dinov3_ray.pool.replica.device_pipeline import DevicePass, Results, SynchronousPipeline, pipeline_for
from dinov3_ray.pool.replica.hosted import HostedReplica
from dinov3_ray.pool.replica.replica import Replica
from dinov3_ray.pool.spec import PoolOptions
from dinov3_ray.pool.transport.wire import pack_images, unpack_features
from dinov3_ray.teacher import Extractor
from dinov3_ray.testing import FakeTeacher

SPEC = FeatureSpec(cls=True, feature_map=True, dtype="int8")
WAIT = 30.0
TEACHER = FakeTeacher()


class HeldPass:
    """Is over when ``end`` is called; ``error`` is what its device then finds."""

    def __init__(self, results: Results, rows: int) -> None:
        self.rows = rows
        self._results = results
        self._ended = threading.Event()
        self._error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        self._error = error
        self._ended.set()

    def done(self) -> bool:
        return self._ended.is_set()

    def result(self) -> Results:
        assert self._ended.wait(WAIT)
        if self._error is not None:
            raise self._error
        return self._results


class HeldPipeline:
    """Three passes may be in flight; each stays so until the test ends it."""

    depth = 3

    def __init__(self, teacher: Extractor) -> None:
        self._real = SynchronousPipeline(teacher)
        self._changed = threading.Condition()
        self.passes: list[HeldPass] = []
        self.most = 0

    def begin(self, batch: ImageBatch, rows: int, spec: FeatureSpec) -> DevicePass:
        held = HeldPass(self._real.begin(batch, rows, spec).result(), rows)
        with self._changed:
            self.passes.append(held)
            self.most = max(self.most, sum(not one.done() for one in self.passes))
            self._changed.notify_all()
        return held

    def wait_for(self, count: int) -> list[HeldPass]:
        """The passes, as soon as ``count`` have begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.passes) >= count, WAIT), f"{len(self.passes)} passes began"
            return self.passes


class Bench:
    """A replica on a held pipeline."""

    def __init__(self, pipeline: HeldPipeline | None = None, **options: object) -> None:
        self.pipeline = pipeline or HeldPipeline(TEACHER)
        self.suspects: list[str] = []
        self.replica = Replica(
            "r",
            lambda: TEACHER,
            PoolOptions.of(options),
            pipeline=lambda _: self.pipeline,
            on_suspect=self.suspects.append,
        )
        self.replica.start().result(WAIT)

    def offer(self, number: int, rows: int = 2, suspect: bool = False) -> Future[tuple[Answer, list[Array]]]:
        layout, arrays = pack_images(ImageBatch.of(images_of(number, rows)))
        header = RequestHeader(f"request-{number}", f"client-{number}", SPEC, layout, rows, suspect, backlog=1)
        answered: Future[tuple[Answer, list[Array]]] = Future()
        self.replica.offer(header, arrays, lambda answer, arrays: answered.set_result((answer, arrays)))
        return answered


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    for one in bench.pipeline.passes:
        one.end()
    bench.replica.stop()


def check(answered: Future[tuple[Answer, list[Array]]], number: int, rows: int = 2) -> Answer:
    answer, arrays = answered.result(WAIT)
    assert answer.outcome is Outcome.DONE, answer
    found = unpack_features(answer.layout, arrays, None)
    expected = TEACHER.extract(images_of(number, rows), SPEC)
    for (name, ours), (_, theirs) in zip(found.named(), expected.named(), strict=True):
        assert torch.equal(ours, theirs), name
    return answer


def test_three_passes_are_under_way_and_each_request_gets_its_own_answer(bench: Bench) -> None:
    begun = time.monotonic()
    answers = [bench.offer(number) for number in range(7)]
    bench.pipeline.wait_for(3)
    assert bench.replica.statistics().busy_for > 0
    busy = 0.0
    for number, answered in enumerate(answers):
        bench.pipeline.wait_for(number + 1)[number].end()
        busy += check(answered, number).seconds.busy
    assert bench.replica.wait_idle(WAIT)
    assert busy <= time.monotonic() - begun, "what overlaps is counted once"
    statistics = bench.replica.statistics()
    assert bench.pipeline.most == 3
    assert (statistics.batches, statistics.images, statistics.errors) == (7, 14, 0)
    assert (statistics.busy_for, statistics.clients_backlog) == (0.0, 0)
    assert statistics.busy_seconds == pytest.approx(busy)


def test_one_request_alone_is_answered_when_its_pass_ends(bench: Bench) -> None:
    answered = bench.offer(0)
    bench.pipeline.wait_for(1)[0].end()
    check(answered, 0)


def test_a_pass_that_fails_late_fails_its_request_only(bench: Bench) -> None:
    answers = [bench.offer(number) for number in range(3)]
    passes = bench.pipeline.wait_for(3)
    passes[1].end(LookupError("scripted"))
    passes[2].end()
    passes[0].end()
    check(answers[0], 0)
    check(answers[2], 2)
    answer, _ = answers[1].result(WAIT)
    assert (answer.outcome, type(answer.error)) == (Outcome.FAILED, LookupError)
    assert bench.replica.wait_idle(WAIT)
    assert bench.replica.statistics().errors == 1


def test_requests_that_shared_a_pass_that_failed_run_each_by_itself() -> None:
    bench = Bench(batching="dynamic", max_batch=5, max_wait=WAIT)
    answers = [bench.offer(number, rows=number + 1) for number in (0, 3)]
    (shared,) = bench.pipeline.wait_for(1)
    assert shared.rows == 5
    shared.end(LookupError("scripted"))
    alone = bench.pipeline.wait_for(3)[1:]
    assert [one.rows for one in alone] == [1, 4]
    alone[0].end()
    alone[1].end(LookupError("scripted again"))
    check(answers[0], 0, rows=1)
    assert answers[1].result(WAIT)[0].outcome is Outcome.FAILED
    bench.replica.stop()


def test_a_suspect_runs_with_nothing_beside_it(bench: Bench) -> None:
    answers = [bench.offer(0), bench.offer(1, suspect=True), bench.offer(2)]
    first = bench.pipeline.wait_for(1)[0]
    assert bench.suspects == []
    first.end()
    suspect = bench.pipeline.wait_for(2)[1]
    assert bench.suspects == ["request-1"]
    check(answers[0], 0)
    suspect.end()
    bench.pipeline.wait_for(3)[2].end()
    for number in (1, 2):
        check(answers[number], number)
    assert bench.pipeline.most == 1


def test_what_is_under_way_at_the_end_is_answered_and_what_waits_is_handed_back(bench: Bench) -> None:
    answers = [bench.offer(number) for number in range(5)]
    passes = bench.pipeline.wait_for(3)
    bench.replica.stop(timeout=0)
    assert [answered.result(WAIT)[0].outcome for answered in answers[3:]] == [Outcome.DRAINING] * 2
    for one in passes:
        one.end()
    for number in range(3):
        check(answers[number], number)


def test_the_next_pass_begins_while_results_are_packed() -> None:
    packing, packed = threading.Event(), threading.Event()

    class SlowToPack(HeldPass):
        def result(self) -> Results:
            packing.set()
            assert packed.wait(WAIT)
            return super().result()

    class Slow(HeldPipeline):
        depth = SynchronousPipeline.depth

        def begin(self, batch: ImageBatch, rows: int, spec: FeatureSpec) -> DevicePass:
            if self.passes:
                assert packing.wait(WAIT)
                packed.set()  # in the middle of the second pass: it would hang if it had to wait for the first
            one = SlowToPack(self._real.begin(batch, rows, spec).result(), rows)
            one.end()
            self.passes.append(one)
            return one

    pipeline = Slow(TEACHER)
    bench = Bench(pipeline)
    answers = [bench.offer(number) for number in range(2)]
    for number, answered in enumerate(answers):
        check(answered, number)
    bench.replica.stop()


class Plain:
    """A teacher that says nothing of itself."""

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        return TEACHER.extract(images, spec)


def test_the_synchronous_pipeline_packs_and_checks_when_results_are_asked_for() -> None:
    pipeline = pipeline_for(Plain())
    batch = ImageBatch.of(images_of(1, rows=3))
    results = pipeline.begin(batch, 2, SPEC).result()
    expected = TEACHER.extract(batch.tensors[0][:2], SPEC)
    found = unpack_features(results.layout, results.arrays, results.fingerprint)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found.named(), expected.named(), strict=True))
    assert found.fingerprint == "fake"
    one = pipeline.begin(ImageBatch.of(torch.full((1, 3, 32, 32), float("nan"))), 1, SPEC)
    with pytest.raises(InputError, match="finite"):
        one.result()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    @pytest.fixture(scope="class")
    def teacher(self, tiny_checkpoint: Path) -> DinoV3Teacher:
        return DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="bfloat16"), "cuda:0")

    @pytest.mark.parametrize("dtype", ["native", "int8", "float32"])
    def test_results_equal_the_local_teachers_bit_for_bit(self, teacher: DinoV3Teacher, dtype: str) -> None:
        spec = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(0,), map_size=(7, 9), dtype=dtype)  # type: ignore[arg-type]
        pipeline = pipeline_for(teacher)
        assert pipeline.depth == 3
        batches = [images_of(number, rows=4) for number in range(9)]
        ragged = [images_of(20, 1)[0], torch.zeros(3, 64, 80, dtype=torch.uint8), images_of(21, 1)[0]]
        inputs: list[Images] = [*batches, ragged, torch.rand(2, 3, 48, 48, dtype=torch.float64)]
        passes = [pipeline.begin(ImageBatch.of(images), len(images), spec) for images in inputs]
        for images, one in zip(inputs, passes, strict=True):
            results = one.result()
            assert results.preprocess > 0
            found = unpack_features(results.layout, results.arrays, results.fingerprint)
            expected = teacher.extract(images, spec).to("cpu")
            assert found.fingerprint == expected.fingerprint
            for (name, ours), (_, theirs) in zip(found.named(), expected.named(), strict=True):
                assert torch.equal(ours, theirs), name

    def test_a_pass_is_enqueued_and_not_waited_for(self, teacher: DinoV3Teacher) -> None:
        pipeline = pipeline_for(teacher)
        spec = FeatureSpec(feature_map=True)
        batch = ImageBatch.of(images_of(0, rows=4))
        pipeline.begin(batch, 4, spec).result()  # memory is had, kernels are loaded
        matrix = torch.rand(8192, 8192, device="cuda:0")
        torch.cuda.synchronize()
        for _ in range(50):
            matrix @ matrix
        passes = [pipeline.begin(batch, 4, spec) for _ in range(3)]
        assert not passes[0].event.query(), "it waited for the device"
        arrays = [one.result().arrays[0] for one in passes]
        assert (arrays[0] == arrays[1]).all()
        assert (arrays[0] == arrays[2]).all()

    def test_values_that_are_not_finite_are_found_when_the_pass_ends(self, teacher: DinoV3Teacher) -> None:
        pipeline = pipeline_for(teacher)
        one = pipeline.begin(ImageBatch.of(torch.full((1, 3, 32, 32), float("nan"))), 1, FeatureSpec(cls=True))
        with pytest.raises(InputError, match="finite"):
            one.result()

    def test_a_replica_serves_through_it(self, teacher: DinoV3Teacher) -> None:
        replica = Replica("gpu", lambda: teacher, PoolOptions())
        replica.start().result(120)
        layout, arrays = pack_images(ImageBatch.of(images_of(1)))
        answers: list[Future[tuple[Answer, list[Array]]]] = [Future() for _ in range(8)]
        for number, answered in enumerate(answers):
            header = RequestHeader(str(number), "client", FeatureSpec(cls=True), layout, 2)
            replica.offer(header, arrays, lambda answer, arrays, to=answered: to.set_result((answer, arrays)))
        expected = teacher.extract(images_of(1), FeatureSpec(cls=True)).cls
        assert expected is not None
        for answered in answers:
            answer, results = answered.result(60)
            found = unpack_features(answer.layout, results, None).cls
            assert found is not None
            assert torch.equal(found, expected.cpu())
        replica.stop()

    def test_a_batch_that_does_not_fit_is_computed_in_parts(
        self, teacher: DinoV3Teacher, caplog: pytest.LogCaptureFixture
    ) -> None:
        spec, images = FeatureSpec(cls=True, feature_map=True), images_of(1, rows=512)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
        hosted = HostedReplica(lambda: teacher, max_batch=32)
        try:
            found = hosted.submit(images, spec).result(60).cls
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            hosted.close()
        said = re.search(r"in parts of (\d+)", caplog.text)
        assert said is not None
        size = int(said[1])
        assert 0 < size < 512
        expected = [teacher.extract(part, spec).cls for part in images.split(size)]
        assert found is not None
        assert torch.equal(found, torch.cat([part.cpu() for part in expected if part is not None]))

    def test_a_device_side_assert_ends_the_process(self) -> None:
        done = subprocess.run([sys.executable, "-c", ASSERT], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 70, done.stderr
        assert "has lost its device" in done.stderr


ASSERT = """
import torch
from dinov3_ray import Features, FeatureSpec
from dinov3_ray.pool.replica.actor import end_process
from dinov3_ray.pool.replica.hosted import HostedReplica

class Asserts:
    device = torch.device("cuda:0")
    def extract(self, images, spec):
        return Features(cls=torch.zeros(4, 4, device="cuda")[torch.tensor([7] * len(images), device="cuda")])

hosted = HostedReplica(Asserts, max_batch=2, on_device_lost=end_process)
hosted.submit(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), FeatureSpec(cls=True)).result(60)
"""
