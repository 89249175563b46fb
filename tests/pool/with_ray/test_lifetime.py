"""A pool ends with the process that started it, however that ends; unless it is detached."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
import torch
from paths import SUPPORT
from waiting import until

from dinov3_ray import FeatureSpec, RemoteTeacher, TeacherPool
from dinov3_ray.errors import ConfigError, PoolClosedError
from dinov3_ray.pool.address import NAMESPACE
from dinov3_ray.pool.cluster import controller_name, list_actors
from dinov3_ray.testing import FakeTeacher

IMAGES = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
SPEC = FeatureSpec(cls=True)
NAME = "living"


def actors() -> list[str]:
    """Everything that belongs to a pool of this name."""
    return [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if f"/{NAME}" in one["name"]]


def is_gone() -> bool:
    return not actors() and ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]


@contextmanager
def started(address: str, who: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that has had ``who`` start the pool; and the number of the process that did it."""
    environment = {**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"}
    command = [sys.executable, str(SUPPORT / "starter.py"), NAME, who]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            line = process.stdout.readline()
            assert line.strip().isdecimal(), "it could not start the pool"
            yield process, int(line)
        finally:
            process.kill()


def test_killed_with_a_fork_a_stopped_replica_a_restarted_controller_and_a_client(ray_cluster: str) -> None:
    with started(ray_cluster, "parent") as (process, pid), RemoteTeacher(NAME) as client:
        forks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert client.extract(IMAGES, SPEC).cls is not None
        status = TeacherPool.connect(NAME).status()
        (replica,) = status.replicas
        assert replica.pid is not None
        assert status.lifetime == "process"
        ray.kill(ray.get_actor(controller_name(NAME), namespace=NAMESPACE), no_restart=False)
        until(lambda: TeacherPool.connect(NAME).status().ready == 1, "the next controller has found the pool")
        os.kill(replica.pid, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGKILL)
        until(is_gone, lambda: f"nothing is left of the pool: {actors()}")
        until(lambda: not Path(f"/proc/{replica.pid}").exists(), "the stopped replica's process is gone")
        until(lambda: _error_of(client) != "", "the client has heard of it")
        assert f"process {pid} on" in _error_of(client)
        assert "lifetime='detached' outlives that" in _error_of(client)
        (fork,) = [int(one) for one in forks if Path(f"/proc/{one}").exists()]
        os.kill(fork, signal.SIGKILL)  # it was there all the time


def test_killed_while_a_restarted_controller_waits_for_a_stopped_replica(ray_cluster: str) -> None:
    with started(ray_cluster, "parent") as (process, _):
        (replica,) = TeacherPool.connect(NAME).status().replicas
        assert replica.pid is not None
        os.kill(replica.pid, signal.SIGSTOP)
        ray.kill(ray.get_actor(controller_name(NAME), namespace=NAMESPACE), no_restart=False)
        os.kill(process.pid, signal.SIGKILL)
        until(is_gone, lambda: f"nothing is left of the pool: {actors()}")
        until(lambda: not Path(f"/proc/{replica.pid}").exists(), "the stopped replica's process is gone")


def test_a_restarted_controller_ends_and_replaces_a_replica_that_does_not_answer(ray_cluster: str) -> None:
    with TeacherPool.start(FakeTeacher.factory(), name=NAME, replicas=1, health_timeout=1.0) as pool:
        (replica,) = pool.status().replicas
        assert replica.pid is not None
        os.kill(replica.pid, signal.SIGSTOP)
        ray.kill(ray.get_actor(controller_name(NAME), namespace=NAMESPACE), no_restart=False)
        until(lambda: not Path(f"/proc/{replica.pid}").exists(), "the stopped replica's process is gone")
        until(lambda: pool.status().ready == 1, "another replica serves")
        assert [one.replica_id for one in pool.status().replicas] == ["r1"]


def _error_of(client: RemoteTeacher) -> str:
    try:
        client.submit(IMAGES, SPEC).cancel()
    except PoolClosedError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("who", ["actor", "task"])
def test_started_by_an_actor_or_a_task_it_ends_with_that(ray_cluster: str, who: str) -> None:
    with started(ray_cluster, who) as (process, pid):
        assert pid != process.pid
        os.kill(pid, signal.SIGKILL)
        until(is_gone, lambda: f"nothing is left of the pool: {actors()}")
        assert process.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize("end", ["return", "os._exit", "ray.shutdown"])
def test_the_other_ways_to_end(ray_cluster: str, end: str) -> None:
    with started(ray_cluster, "thread" if end == "return" else "driver") as (process, _):
        print(end, file=process.stdin, flush=True)
        until(is_gone, lambda: f"nothing is left of the pool: {actors()}")
        if end == "ray.shutdown":
            assert process.poll() is None, "the pool has ended with the connection"
        else:
            process.wait(60)


def test_a_detached_pool_outlives_its_process_and_its_context(ray_cluster: str) -> None:
    with started(ray_cluster, "detached") as (process, _):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with TeacherPool.connect(NAME) as pool:
        assert pool.status().lifetime == "detached"
        with TeacherPool.start(FakeTeacher.factory(), name=NAME, exist="connect", lifetime="detached") as again:
            assert again.status().ready == 1
        with TeacherPool.start(FakeTeacher.factory(), name=NAME, exist="connect") as again:
            assert again.teacher().extract(IMAGES, SPEC).cls is not None
        again.shutdown()
        assert pool.status().ready == 1, "those who join it do not end it"
        pool.shutdown()
    assert list_actors(NAMESPACE, NAME) == []
    until(is_gone, "nothing is left of it")


@pytest.mark.parametrize(("argument", "value"), [("lifetime", "forever"), ("exist", "replace"), ("exist", None)])
def test_words_that_it_does_not_know(argument: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{argument} must be one of .*; got {value!r}"):
        TeacherPool.start(FakeTeacher.factory(), name=NAME, **{argument: value})  # type: ignore[arg-type]
