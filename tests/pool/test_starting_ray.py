"""What this package tells a Ray that it starts, and what Ray's own start must not change; no Ray is started."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from commandline import run_command

from dinov3_ray import TeacherPool
from dinov3_ray.datasets import extract
from dinov3_ray.errors import PoolError
from dinov3_ray.feature_spec import FeatureSpec
from dinov3_ray.interrupts import Interrupts
from dinov3_ray.pool.cluster import connect, starts_ray, without_uv
from dinov3_ray.testing import FakeTeacher


@pytest.fixture(autouse=True)
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests of this process may be connected
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to CPUs")
def test_it_has_the_cpus_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        told.append(options)
        raise ConnectionError

    monkeypatch.setattr(ray, "init", init)
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        for chosen in ({}, {"num_cpus": 3}):
            with pytest.raises(PoolError):
                connect(may_start=True, **chosen)
    finally:
        os.sched_setaffinity(0, before)
    assert [options["num_cpus"] for options in told] == [1, 3]


@pytest.mark.parametrize(
    ("address", "variable", "starts"),
    [
        (None, None, True),
        ("local", None, True),
        ("local", "127.0.0.1:6379", True),
        (None, "local", True),
        ("127.0.0.1:6379", None, False),
        ("auto", None, False),
        (None, "127.0.0.1:6379", False),
    ],
)
def test_it_is_known_whether_one_will_be_started(
    address: str | None, variable: str | None, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert starts_ray(address) is starts
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")  # of jobs; nobody reads it where Ray is connected
    assert not starts_ray(address)


def test_a_handler_of_sigterm_hears_what_comes_while_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(number))  # as ray.init() does
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    with Interrupts("") as interrupts, pytest.raises(KeyboardInterrupt):
        connect(may_start=True)
    assert interrupts.exit_code == 143


def test_a_handler_of_sigterm_is_back_when_ray_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(number))
        raise ConnectionError

    monkeypatch.setattr(ray, "init", init)
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: heard.append(number))
    try:
        with pytest.raises(PoolError):
            connect(may_start=True)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


@pytest.mark.parametrize(
    "failure",
    [
        NotADirectoryError(20, "Not a directory"),
        OSError(28, "No space left on device"),
        Exception("the node timed out\nduring startup."),
        ValueError("The configured object store size (200 GB) exceeds /dev/shm size (0.06 GB)"),
        ray.exceptions.RaySystemError("System error: no ports"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_whatever_fails_is_said_in_one_sentence_with_the_logs(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def init(**_: Any) -> None:
        raise failure

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(PoolError, match="Ray does not start on this machine: ") as caught:
        connect(may_start=True, _temp_dir=str(tmp_path))
    assert " ".join(str(failure).split()).rstrip(".") in str(caught.value)
    assert f"Its logs are in {tmp_path}/session_latest/logs" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["a file", "too long"])
def test_a_ray_tmpdir_that_will_not_do_is_named_at_each_entrance(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "image.png").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("file" if kind == "a file" else "long" * 30)))
    with pytest.raises(PoolError, match="Remedy: set RAY_TMPDIR to a short path"):
        TeacherPool.start(FakeTeacher.factory())
    with pytest.raises(PoolError, match="Remedy: set RAY_TMPDIR to a short path"):
        extract(tmp_path, tmp_path / "out", FakeTeacher.factory(), FeatureSpec(cls=True))
    shown = run_command("bench", "transport")
    assert (shown.exit_code, "Remedy: set RAY_TMPDIR" in " ".join(shown.output.split())) == (1, True)


def test_under_uv_run_a_ray_on_this_machine_is_sent_no_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray's own decision is asked where ``ray.init`` asks it; a process that uv started is all that is made up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ray._private.runtime_env.uv_runtime_env_hook._get_uv_run_cmdline", lambda: ["uv", "run", "x"])
    decided: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        decided.append(ray._private.worker._maybe_modify_runtime_env({}, False))
        if options["address"] == "auto":
            raise ray.exceptions.RuntimeEnvSetupError("Package size (600MiB) exceeds the maximum size of 512MiB.")
        raise ConnectionError

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(PoolError, match="Ray does not start"):
        connect(may_start=True)
    with pytest.raises(
        PoolError, match=r"auto, as Ray does under `uv run`: .* exceeds .*set RAY_ENABLE_UV_RUN"
    ) as caught:
        connect("auto")
    assert str(tmp_path) in str(caught.value)
    with without_uv(), pytest.raises(PoolError):  # ranks of a node that join the one that they share
        connect("auto")
    assert [one.get("working_dir") for one in decided] == [None, str(tmp_path), None]
