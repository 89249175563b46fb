"""Scaling, reloading and autoscaling while a stream runs; sharing between clients; nothing left behind."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Iterator

import pytest
import ray
import torch
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from resident import growth, resident
from streams import numbered
from torch.utils.data import DataLoader, Dataset
from waiting import until

from dinov3_ray import Features, FeatureSpec, RemoteTeacher, TeacherPool
from dinov3_ray.machine.cpus import usable_cpus
from dinov3_ray.testing import FakeTeacher

SPEC = FeatureSpec(cls=True, feature_map=True)
CLS = FeatureSpec(cls=True)


class Stream:
    """A trainer that takes targets until it is told to stop, and remembers what it saw."""

    def __init__(self, remote: RemoteTeacher) -> None:
        self._remote = remote
        self._stop = threading.Event()
        self.numbers: list[int] = []
        self.features: list[Features] = []
        self.longest_gap = 0.0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            last = time.monotonic()
            for number, features in self._remote.prefetch(self._views(), CLS, images=numbered):
                now = time.monotonic()
                self.longest_gap, last = max(self.longest_gap, now - last), now
                self.numbers.append(number)
                self.features.append(features)
        except BaseException as error:  # noqa: BLE001 - the test shall see it, whatever it is
            self.error = error

    def _views(self):  # type: ignore[no-untyped-def]
        number = 0
        while not self._stop.is_set():
            yield number
            number += 1

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)


@pytest.mark.slow
def test_scale_and_reload_while_a_stream_runs(ray_cluster: str) -> None:
    factory = FakeTeacher.factory(delay=0.02)
    with TeacherPool.start(factory, name="elastic", replicas=2) as pool, Stream(pool.teacher()) as stream:
        until(lambda: len(stream.numbers) > 20, "the stream runs")
        pool.scale(4, wait=True)
        images = [replica.replica_id for replica in pool.status().replicas]
        until(lambda: all(one.statistics and one.statistics.images for one in pool.status().replicas), "all four work")
        pool.scale(1, wait=True)
        assert len(pool.status().replicas) == 1
        pool.reload(FakeTeacher.factory(delay=0.02, fingerprint="second"))
        # The reload has ended, so whatever is sent from now on is the second teacher's.
        until(lambda: stream.features[-1].fingerprint == "second", "the new teacher's targets arrive")
        assert len(images) == 4
    assert stream.error is None
    assert stream.numbers == list(range(len(stream.numbers)))
    teachers = [features.fingerprint for features in stream.features]
    assert set(teachers) == {"fake", "second"}
    assert teachers == sorted(teachers), "one change, and no way back"
    print(f"{len(stream.numbers)} batches, longest gap {stream.longest_gap:.2f} s")


@pytest.mark.slow
def test_range_grows_with_the_load_and_shrinks_without(ray_cluster: str) -> None:
    options = {"busy_seconds": 0.2, "idle_seconds": 1.0, "health_interval": 0.2}
    with TeacherPool.start(FakeTeacher.factory(delay=0.2), name="range", replicas=(1, 2), **options) as pool:
        assert pool.status().target == 1
        with Stream(pool.teacher()) as stream:
            until(lambda: pool.status().ready == 2, "it grows")
        assert stream.error is None
        until(lambda: pool.status().ready == 1 and len(pool.status().replicas) == 1, "it shrinks")


@pytest.fixture(scope="module")
def one_replica(ray_cluster: str) -> Iterator[TeacherPool]:
    """A pool that takes 0.05 s for each batch."""
    with TeacherPool.start(FakeTeacher.factory(delay=0.05), name="one", replicas=1) as pool:
        yield pool


def test_client_with_a_hundred_batches_does_not_starve_one_with_one(one_replica: TeacherPool) -> None:
    small, large = one_replica.teacher(), one_replica.teacher()
    alone = [ask(small, large)[0] for _ in range(9)]
    # More than a hundred, so that a hundred are left at the end even where this process is slow.
    handles = [large.submit(numbered(number), SPEC) for number in range(400)]
    handles[0].result(60)
    crowded = [ask(small, large) for _ in range(9)]
    waiting = sum(not handle.done() for handle in handles)
    large.close()
    ratio = statistics.median(seconds for seconds, _ in crowded) / statistics.median(alone)
    served_before = [others for _, others in crowded]
    print(f"beside a hundred batches it takes {ratio:.2f} times as long; of the others' were served: {served_before}")
    assert waiting > 100, "the crowd was there all the time"
    # Served in turn, it waits for what is being computed and for one batch more. In order of arrival it would be three.
    assert statistics.median(served_before) <= 2


def ask(small: RemoteTeacher, large: RemoteTeacher) -> tuple[float, int]:
    """Seconds that one request takes, and how many of the other client's are answered meanwhile."""
    begun, answered = time.perf_counter(), large.statistics().answered
    small.extract(numbered(0), SPEC)
    return time.perf_counter() - begun, large.statistics().answered - answered


@pytest.mark.slow
def test_ten_thousand_small_batches_leave_nothing_behind(ray_cluster: str) -> None:
    before = [thread.name for thread in threading.enumerate() if thread.name.startswith("dinov3")]
    with TeacherPool.start(FakeTeacher.factory(), name="flat", replicas=2) as pool:
        remote = pool.teacher()
        processes = [replica.pid for replica in pool.status().replicas if replica.pid]
        # The larger ones are above what travels inside a call, and take twice as long.
        sizes = [torch.zeros(1, 3, side, side, dtype=torch.uint8) for side in (160, 64)]
        memory: list[list[float]] = []
        for thousand in range(10):
            images = sizes[thousand % 2]
            for _ in remote.prefetch(range(1000), SPEC, images=lambda _, images=images: images):
                pass
            gc.collect()
            memory.append([resident(), *map(resident, processes), stored()])
        assert remote.statistics().answered == 10_000
        assert remote.statistics().in_flight == remote.statistics().in_flight_bytes == 0
    *kept, stores = zip(*memory, strict=True)
    print("MiB of the client, of each replica, in the object store, after each thousand:", *kept, stores)
    # 2 KiB per batch are less than any image that is sent.
    assert max(map(growth, kept)) < 4
    until(lambda: stored() <= stores[0], "the object store is as empty as before")
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("dinov3")]
    assert left == before, "its threads have ended"


def stored() -> int:
    """MiB in the object store."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.object_store_bytes_used) // 2**20


class Views(Dataset[torch.Tensor]):
    """A data set that asks the pool itself, in the DataLoader's worker."""

    def __init__(self, remote: RemoteTeacher) -> None:
        self._remote = remote

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._remote.extract_features(numbered(index, rows=1))[0]


def test_a_replica_takes_no_more_threads_than_its_machine_has_cpus(ray_cluster: str) -> None:
    def teacher() -> FakeTeacher:
        return FakeTeacher(fingerprint=f"computes with {torch.get_num_threads()} threads")

    with TeacherPool.start(teacher, name="crowded", replicas=1, threads=1000) as pool:
        assert pool.status().replicas[0].fingerprint == f"computes with {usable_cpus()} threads"


@pytest.mark.slow
def test_spawned_workers_connect_for_themselves(one_replica: TeacherPool) -> None:
    remote = one_replica.teacher()
    remote.extract(numbered(0), SPEC)
    loader = DataLoader(Views(remote), batch_size=2, num_workers=1, multiprocessing_context="spawn")
    tokens = torch.cat(list(loader))
    expected = torch.cat([FakeTeacher().extract_features(numbered(index, rows=1)) for index in range(4)])
    assert torch.equal(tokens, expected)
