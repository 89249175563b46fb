"""What a training run sees when replicas, the controller or other clients fail: real processes, really killed."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import faulty
import pytest
import ray
import torch
from faulty import (
    FREEZE_ONCE,
    HANG_ONCE,
    KILL,
    KILL_ONCE,
    LOSE,
    LOSE_ONCE,
    NAN_ALWAYS,
    NAN_ONCE,
    OK,
    RAISE,
    CudaError,
    FaultyTeacher,
    HopelessTeacher,
    UnluckyTeacher,
    batch_of,
)
from waiting import until

from dinov3_ray import FeatureSpec, RemoteTeacher, TeacherPool
from dinov3_ray.errors import (
    ForkedProcessError,
    NumericsError,
    PoisonBatchError,
    PoolClosedError,
    PoolExistsError,
    PoolNotFoundError,
    PoolTimeoutError,
    ReplicaError,
)
from dinov3_ray.pool.address import NAMESPACE
from dinov3_ray.pool.client.request import Handle
from dinov3_ray.pool.cluster import controller_name
from dinov3_ray.testing import FakeTeacher

SPEC = FeatureSpec(cls=True, feature_map=True)
QUICK = {"health_interval": 0.2, "health_timeout": 6.0, "hang_timeout": 3.0}

ray.cloudpickle.register_pickle_by_value(faulty)  # replicas cannot import the tests


@pytest.fixture(scope="module")
def shared_pool(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherPool]:
    factory = functools.partial(FaultyTeacher, tmp_path_factory.mktemp("once"), delay=0.02)
    with TeacherPool.start(factory, name="faults", replicas=2, **QUICK) as pool:
        yield pool


@pytest.fixture
def pool(shared_pool: TeacherPool) -> TeacherPool:
    """A pool of two replicas, whole again after what the last test did to it.

    The controller may not have missed yet whom that test killed, and errors that it left behind would count with those
    of the next one.
    """
    with shared_pool.teacher() as remote:

        def is_whole() -> bool:
            for handle in [remote.submit(batch_of(number), SPEC) for number in range(8)]:
                handle.result(60)
            replicas = shared_pool.status().replicas
            known = [replica.statistics for replica in replicas if replica.state == "ready" and is_alive(replica.pid)]
            return len(replicas) == 2 and [one.errors_in_a_row for one in known if one] == [0, 0]

        until(is_whole, "the pool is whole")
    return shared_pool


def is_alive(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def equals_undisturbed(handle: Handle, number: int, mark: int = 0) -> bool:
    expected = FakeTeacher().extract(batch_of(number, mark), SPEC)
    features = handle.result(60)
    assert features.cls is not None
    assert expected.cls is not None
    assert features.feature_map is not None
    assert expected.feature_map is not None
    return torch.equal(features.cls, expected.cls) and torch.equal(features.feature_map, expected.feature_map)


def pids(pool: TeacherPool) -> list[int]:
    return [replica.pid for replica in pool.status().replicas if replica.pid and replica.state == "ready"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_replica_killed_under_load(pool: TeacherPool, number: signal.Signals) -> None:
    """SIGTERM is a scheduler's, such as Slurm's: Ray lets the methods that run end, and the rest goes elsewhere."""
    remote = pool.teacher()
    handles = [remote.submit(batch_of(index), SPEC) for index in range(60)]
    victim, restarts = pids(pool)[0], pool.status().restarts
    handles[5].result(60)
    os.kill(victim, number)
    assert all(equals_undisturbed(handle, index) for index, handle in enumerate(handles))
    until(lambda: len(pids(pool)) == 2 and victim not in pids(pool), "the replica is replaced")
    assert pool.status().restarts == restarts + 1
    assert "process died" in pool.status().recent_errors[-1]


def test_replica_that_loses_its_device(pool: TeacherPool) -> None:
    remote = pool.teacher()
    before, restarts = pids(pool), pool.status().restarts
    handles = [remote.submit(batch_of(number, LOSE_ONCE if number == 7 else OK), SPEC) for number in range(30)]
    assert all(
        equals_undisturbed(handle, number, LOSE_ONCE if number == 7 else OK) for number, handle in enumerate(handles)
    )
    until(lambda: len({*pids(pool), *before}) == 3, "the replica is replaced")
    status = pool.status()
    assert status.restarts == restarts + 1
    assert f"{CudaError.__name__}: CUDA error: an illegal memory access was encountered" in status.recent_errors[-1]
    until(lambda: sum(is_alive(pid) for pid in before) == 1, "its process is gone")


@pytest.mark.slow
def test_processes_that_end_while_they_load(pool: TeacherPool, tmp_path: Path) -> None:
    remote, before = pool.teacher(), pids(pool)
    pool.reload(functools.partial(UnluckyTeacher, tmp_path, delay=0.02))
    status = pool.status()
    assert status.ready == 2
    died, lost = status.recent_errors[-2:]
    assert "process died" in died
    assert "CUDA error: an illegal memory access" in lost
    assert equals_undisturbed(remote.submit(batch_of(3), SPEC), 3)
    assert not {*before} & {*pids(pool)}


def test_controller_killed_under_load(pool: TeacherPool) -> None:
    remote = pool.teacher()
    before = sorted(pids(pool))
    handles = [remote.submit(batch_of(number), SPEC) for number in range(40)]
    ray.kill(ray.get_actor(controller_name("faults"), namespace=NAMESPACE), no_restart=False)
    assert all(equals_undisturbed(handle, number) for number, handle in enumerate(handles)), "the data plane goes on"
    until(lambda: sorted(pids(pool)) == before, "the new controller has found the replicas")
    pool.scale(3, wait=True)
    assert len(pids(pool)) == 3
    assert equals_undisturbed(remote.submit(batch_of(99), SPEC), 99)
    pool.scale(2, wait=True)


def test_hung_forward_pass(pool: TeacherPool) -> None:
    remote, before = pool.teacher(), pids(pool)
    stuck = remote.submit(batch_of(1000, HANG_ONCE), SPEC)
    others = [remote.submit(batch_of(number), SPEC) for number in range(30)]
    assert all(equals_undisturbed(handle, number) for number, handle in enumerate(others))
    assert equals_undisturbed(stuck, 1000, HANG_ONCE)
    until(lambda: len(pids(pool)) == 2, "the hung replica is replaced")
    assert "forward pass has taken" in pool.status().recent_errors[-1]
    until(lambda: sum(is_alive(pid) for pid in before) == 1, "its process is gone")


def test_hung_pass_that_lets_no_thread_answer(pool: TeacherPool) -> None:
    remote, before = pool.teacher(), pids(pool)
    stuck = remote.submit(batch_of(1000, FREEZE_ONCE), SPEC)
    assert equals_undisturbed(stuck, 1000, FREEZE_ONCE)
    until(lambda: len(pids(pool)) == 2, "the hung replica is replaced")
    assert "no answer to health within 6 s" in pool.status().recent_errors[-1]
    until(lambda: sum(is_alive(pid) for pid in before) == 1, "its process is gone")


def test_stopped_process(pool: TeacherPool) -> None:
    remote = pool.teacher()
    victim = pids(pool)[0]
    os.kill(victim, signal.SIGSTOP)
    handles = [remote.submit(batch_of(number), SPEC) for number in range(20)]
    assert all(equals_undisturbed(handle, number) for number, handle in enumerate(handles))
    until(lambda: victim not in pids(pool) and len(pids(pool)) == 2, "the stopped replica is replaced")
    until(lambda: not Path(f"/proc/{victim}").exists(), "its process is gone")


@pytest.mark.parametrize("mark", [KILL, pytest.param(LOSE, marks=pytest.mark.slow)])
def test_poison_batch_is_failed_alone(pool: TeacherPool, mark: int) -> None:
    remote = pool.teacher()
    good = [remote.submit(batch_of(number), SPEC) for number in range(10)]
    poison = remote.submit(batch_of(1000, mark), SPEC)
    good += [remote.submit(batch_of(number), SPEC) for number in range(10, 20)]
    with pytest.raises(PoisonBatchError, match=r"batch 10 \(rows 0 to 1\)"):
        poison.result(120)
    assert all(equals_undisturbed(handle, number) for number, handle in enumerate(good))
    assert equals_undisturbed(remote.submit(batch_of(7), SPEC), 7), "the pool lives on"


def test_unlucky_batch_is_not_poison(pool: TeacherPool) -> None:
    handle = pool.teacher().submit(batch_of(3, KILL_ONCE), SPEC)
    assert equals_undisturbed(handle, 3, KILL_ONCE)


def test_values_that_are_not_finite(pool: TeacherPool) -> None:
    remote = pool.teacher()
    before = pids(pool)
    with pytest.raises(NumericsError, match="not finite"):
        remote.extract(batch_of(1, NAN_ALWAYS), SPEC)
    assert pids(pool) == before, "it is the batch's fault"
    assert equals_undisturbed(remote.submit(batch_of(2, NAN_ONCE), SPEC), 2, NAN_ONCE)
    until(lambda: len({*pids(pool), *before}) == 3, "the sick replica is replaced")
    assert len({*pids(pool), *before}) == 3, "and no other"
    assert "sick: " in pool.status().recent_errors[-1]


def test_exception_reaches_the_caller_as_itself(pool: TeacherPool) -> None:
    remote = pool.teacher()
    with pytest.raises(LookupError, match="scripted: this batch") as raised:
        remote.extract(batch_of(1, RAISE), SPEC)
    assert any("raised by replica" in note for note in raised.value.__notes__)
    assert equals_undisturbed(remote.submit(batch_of(2), SPEC), 2)


def test_empty_pool_raises_in_time(pool: TeacherPool) -> None:
    remote = pool.teacher(timeout=3.0)
    assert equals_undisturbed(remote.submit(batch_of(0), SPEC), 0)
    # Placed nowhere: the label is on no node.
    with pytest.raises(PoolTimeoutError, match=r"0 of 1 replicas ready.*wait for a place"):
        TeacherPool.start(FakeTeacher.factory(), name="nowhere", label_selector={"no": "such"}, timeout=1.0)
    with pytest.raises(PoolNotFoundError, match=r"'nowhere'.*'faults'"):
        TeacherPool.connect("nowhere")


def test_constructor_failure_says_why(ray_cluster: str) -> None:
    with pytest.raises(ReplicaError, match="no weights here"):
        TeacherPool.start(HopelessTeacher, name="hopeless", replicas=1)
    with pytest.raises(PoolNotFoundError):
        TeacherPool.connect("hopeless")


def test_a_reload_that_cannot_start_leaves_the_former_teacher_serving(pool: TeacherPool) -> None:
    remote, before = pool.teacher(), sorted(pids(pool))
    handles = [remote.submit(batch_of(number), SPEC) for number in range(20)]
    with pytest.raises(ReplicaError, match=r"gone back to the former teacher \(2 of 2 ready\).*no weights here"):
        pool.reload(HopelessTeacher)
    assert sorted(pids(pool)) == before
    assert all(equals_undisturbed(handle, number) for number, handle in enumerate(handles))
    assert equals_undisturbed(remote.submit(batch_of(99), SPEC), 99)
    status = pool.status()
    assert (status.fingerprint, status.newest_generation - status.generation) == ("fake", 1)


def test_names_and_ends(pool: TeacherPool, tmp_path: Path) -> None:
    with pytest.raises(PoolExistsError, match="'faults' is running already"):
        TeacherPool.start(FakeTeacher.factory(), name="faults")
    ending = TeacherPool.start(functools.partial(FaultyTeacher, tmp_path), name="ending", replicas=1)
    remote = ending.teacher()
    assert equals_undisturbed(remote.submit(batch_of(0), SPEC), 0)
    elsewhere = RemoteTeacher("ending")
    pending = elsewhere.submit(batch_of(1, HANG_ONCE), SPEC)
    processes = pids(ending)
    ending.shutdown()
    with pytest.raises(PoolClosedError):
        pending.result(30)
    with pytest.raises(PoolClosedError):
        remote.submit(batch_of(0), SPEC)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes), "the replica's process is gone")
    assert not [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "ending" in actor["name"]]
    elsewhere.close()


CLIENT = """
import sys, torch
from dinov3_ray import FeatureSpec, RemoteTeacher
remote = RemoteTeacher("crowd", address=sys.argv[1])
handles = [remote.submit(torch.zeros(2, 3, 32, 48, dtype=torch.uint8), FeatureSpec(cls=True)) for _ in range(400)]
handles[0].result(60)
print("under way", flush=True)
sys.stdin.read()
"""


def test_client_killed_frees_what_it_queued(ray_cluster: str) -> None:
    factory = FakeTeacher.factory(delay=0.3)
    with TeacherPool.start(factory, name="crowd", replicas=1, client_timeout=1.0, window=64, **QUICK) as pool:
        command = [sys.executable, "-c", CLIENT, ray_cluster]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "under way\n"
            until(lambda: waiting(pool) > 20, "its batches are queued")
            client.kill()
        # At 0.3 s a batch the 60 queued ones would take 18 s; dropped, the queue is empty as soon as it is noticed.
        until(lambda: pool.status().clients == 0, "the dead client is noticed", timeout=30)
        until(lambda: waiting(pool) == 0, "its queue is dropped", timeout=9)


def waiting(pool: TeacherPool) -> int:
    return sum(replica.statistics.waiting for replica in pool.status().replicas if replica.statistics)


@pytest.mark.parametrize("by_name", [False, True])
def test_forked_process_is_told_at_once(pool: TeacherPool, by_name: bool) -> None:
    remote = pool.teacher()
    remote.extract(batch_of(0), SPEC)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            (RemoteTeacher("faults") if by_name else remote).extract(batch_of(0), SPEC)
            os.write(writing, b"answered")
        except ForkedProcessError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    message = os.read(reading, 4096).decode()
    os.waitpid(child, 0)
    assert "multiprocessing_context='spawn'" in message
