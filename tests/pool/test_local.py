"""What goes wrong in a pool ends neither a client's thread nor a replica's: shown in local mode, where it is quick."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch

from dinov3_ray import Features, FeatureSpec, RemoteTeacher, TeacherPool
from dinov3_ray.errors import ConfigError, InputError, PoolClosedError, PoolError, PoolExistsError, SpecError
from dinov3_ray.images import Images
from dinov3_ray.pool.client.request import Handle
from dinov3_ray.testing import FakeTeacher

CLS = FeatureSpec(cls=True)
IMAGES = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)


class Unpackable:
    """Its results have a dtype that NumPy lacks."""

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        return Features(cls=torch.zeros(len(images), 4).to(torch.float8_e4m3fn))


def test_results_that_cannot_be_packed_reach_the_caller_as_an_error() -> None:
    with TeacherPool.start(Unpackable, name="unpackable", replicas=1, local_mode=True) as pool:
        remote = pool.teacher()
        for _ in range(2):
            with pytest.raises((TypeError, RuntimeError), match=r"(?i)float8"):
                remote.submit(IMAGES, CLS).result(30)
        assert pool.status().ready == 1


def test_what_the_caller_did_wrong_says_nothing_of_a_replica(local_pool: TeacherPool) -> None:
    remote = local_pool.teacher()
    for _ in range(5):
        with pytest.raises(InputError, match="must be finite"):
            remote.extract(torch.full((1, 3, 32, 32), float("nan")), CLS)
    assert [one.statistics.errors_in_a_row for one in local_pool.status().replicas if one.statistics] == [0, 0]
    with pytest.raises(SpecError, match="FeatureSpec"):
        remote.extract(IMAGES, None)  # type: ignore[arg-type]


def test_one_bad_request_says_little_of_a_replica() -> None:
    """It is sent again, here to the same one; that shall not look like several requests that raised."""
    with TeacherPool.start(FakeTeacher.factory(fail_on=(0, 1, 2)), name="one", local_mode=True) as pool:
        remote = pool.teacher()
        with pytest.raises(RuntimeError):
            remote.extract(IMAGES, CLS)
        (replica,) = pool.status().replicas
        assert replica.statistics is not None
        assert (replica.statistics.errors, replica.statistics.errors_in_a_row) == (3, 1)
        remote.extract(IMAGES, CLS)
        (replica,) = pool.status().replicas
        assert replica.statistics is not None
        assert (replica.statistics.errors, replica.statistics.errors_in_a_row) == (3, 0)


@pytest.mark.slow
def test_a_handle_outlives_the_teacher_that_nobody_holds(local_pool: TeacherPool) -> None:
    handle = RemoteTeacher("local").submit(IMAGES, CLS)
    gc.collect()
    assert len(handle.result(30)) == 2


@pytest.mark.slow
def test_every_batch_submitted_while_a_client_closes_comes_to_an_end() -> None:
    for _ in range(20):
        with TeacherPool.start(FakeTeacher.factory(), name="closing", replicas=1, local_mode=True) as pool:
            remote = pool.teacher()
            remote.extract(IMAGES, CLS)
            handles: list[Handle] = []

            def submit(remote: RemoteTeacher = remote, handles: list[Handle] = handles) -> None:
                try:
                    while True:
                        handles.append(remote.submit(IMAGES, CLS))
                except PoolClosedError:
                    return

            thread = threading.Thread(target=submit)
            thread.start()
            remote.close()
            thread.join(30)
        for handle in handles:
            try:
                assert len(handle.result(30)) == 2
            except PoolClosedError:
                assert handle.done()


def test_namesakes_are_told_apart(local_pool: TeacherPool) -> None:
    with pytest.raises(PoolExistsError, match="'local'"):
        TeacherPool.start(FakeTeacher.factory(), name="local", local_mode=True)
    TeacherPool.connect("local").shutdown()
    with TeacherPool.start(FakeTeacher.factory(), name="local", local_mode=True) as successor:
        local_pool.shutdown()  # of the first, which is gone
        assert len(successor.teacher().extract(IMAGES, CLS)) == 2


def test_a_teacher_without_a_name_of_its_own_is_named_by_its_generation() -> None:
    class Nameless:
        def extract(self, images: Images, spec: FeatureSpec) -> Features:
            return Features(cls=torch.ones(len(images), 4))

    with TeacherPool.start(Nameless, name="nameless", local_mode=True) as pool:
        remote = pool.teacher()
        assert remote.extract(IMAGES, CLS).fingerprint == "generation-0"
        pool.reload(Nameless)
        assert remote.extract(IMAGES, CLS).fingerprint == "generation-1"


def test_a_client_that_has_not_heard_of_a_reload_asks_before_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    registers = FeatureSpec(registers=True)
    plain = FakeTeacher.factory(num_register_tokens=0, fingerprint="plain")
    with TeacherPool.start(plain, name="unheard", replicas=1, local_mode=True) as pool, pool.teacher() as remote:
        with pytest.raises(SpecError, match="no register tokens"):
            remote.extract(IMAGES, registers)
        with pytest.raises(InputError, match="16"):
            remote.extract(IMAGES[..., :8], CLS)
        router = remote._router
        assert router is not None
        monkeypatch.setattr(router, "_on_view", lambda view: None)  # what it is told from now on comes too late
        pool.reload(FakeTeacher.factory(patch_size=8, fingerprint="new"))
        assert remote.extract(IMAGES, registers).fingerprint == "new"
        assert len(remote.extract(IMAGES[..., :8], CLS)) == 2
        with pytest.raises(InputError, match="8"):
            remote.extract(IMAGES[..., :4], CLS)


def test_a_reload_is_told_that_another_has_overtaken_it(local_pool: TeacherPool) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> FakeTeacher:
        begun.set()
        assert go_on.wait(30)
        return FakeTeacher(fingerprint="slow")

    def overtake() -> None:
        assert begun.wait(30)
        local_pool.reload(FakeTeacher.factory(fingerprint="quick"), wait=False)
        go_on.set()

    overtaking = threading.Thread(target=overtake)
    overtaking.start()
    with pytest.raises(PoolError, match="another reload has overtaken"):
        local_pool.reload(slow)
    overtaking.join()
    local_pool.wait_ready(30, generation=2)
    assert local_pool.teacher().extract(IMAGES, CLS).fingerprint == "quick"


def test_scale_takes_no_auto(local_pool: TeacherPool) -> None:
    with pytest.raises(ConfigError, match="auto"):
        local_pool.scale("auto")
    assert local_pool.status().target == 2


def test_stages_of_the_local_teacher_are_told_apart(tiny_checkpoint: Path) -> None:
    """In local mode, where nothing is published, the same counters stand in the status."""
    with TeacherPool.start(tiny_checkpoint, name="stages", replicas=1, local_mode=True) as pool:
        pool.teacher().extract(torch.rand(4, 3, 300, 400), FeatureSpec(cls=True, feature_map=True))
        (replica,) = pool.status().replicas
    counters = replica.statistics
    assert counters is not None
    assert counters.images == 4
    assert min(counters.queue_seconds, counters.preprocess_seconds, counters.forward_seconds, counters.pack_seconds) > 0
    assert counters.busy_seconds < counters.uptime
    assert replica.images_per_second == 4 / counters.busy_seconds
