"""File systems that have no locks, and systems that have none: each user of locks says so, or does without."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dinov3_ray.datasets.cache_db import FeatureCache
from dinov3_ray.datasets.folder import Folder
from dinov3_ray.doctor.machine_checks import Severity, check_locks
from dinov3_ray.errors import PoolError, StoreError
from dinov3_ray.pool.shared_ray import connect_or_share


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the system says of the lack. Lustre and NFS cannot be mounted for a test: their answer is given instead."""

    def refuse(*_: Any) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    return os.strerror(request.param)


def test_an_extraction_writes_there_with_a_warning(
    no_locks: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dinov3_ray"), Folder.at(tmp_path).exclusive():
        pass
    assert f"{tmp_path} is on a file system without locks ({no_locks}): see to it that no other run" in caplog.text


def test_a_cache_needs_another_disk(no_locks: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="path must be a folder on a disk with file locks") as caught:
        FeatureCache(tmp_path, 2**20)
    assert no_locks in str(caught.value)


def test_ranks_need_another_folder(no_locks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "lockless"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(PoolError, match=f"cannot be locked \\({no_locks}\\). Remedy: set TMPDIR to a local disk"):
        connect_or_share(None, "connect")


def test_doctor_tells(no_locks: str) -> None:
    assert check_locks().verdict is Severity.WARNING
    assert no_locks in check_locks().message


def test_another_failure_to_lock_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(StoreError, match=r"cannot be locked against other runs: .*Input/output error"):
        Folder.at(tmp_path).exclusive().__enter__()


def test_two_runs_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    with Folder.at(tmp_path).exclusive():
        with pytest.raises(StoreError, match="is being written by another run"):
            Folder.at(tmp_path).exclusive().__enter__()
        assert check_locks(tmp_path).verdict is Severity.FINE


@pytest.mark.slow
def test_a_system_without_them_is_named_where_they_are_needed() -> None:
    """As on Windows: no fcntl, no resource, no forks. What needs none of them is imported there."""
    program = """
import os, sys
import ray, torch  # built for this system, they use its forks
sys.modules["fcntl"] = sys.modules["resource"] = None
del os.register_at_fork, os.fork
from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec, RemoteTeacher
import dinov3_ray.training.losses, dinov3_ray.training.prefetch, dinov3_ray.cli, dinov3_ray.testing
for module, name in {"dinov3_ray": "TeacherPool", "dinov3_ray.datasets": "extract"}.items():
    try:
        exec(f"from {module} import {name}")
    except ImportError as error:
        assert "has no module fcntl: use Linux, or WSL on Windows" in str(error), error
    else:
        raise AssertionError(name)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
