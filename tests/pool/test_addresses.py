"""Addresses that name no running Ray's head are refused at every entrance, with what to use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from commandline import run_command

from dinov3_ray import RemoteTeacher, TeacherPool
from dinov3_ray.datasets import extract
from dinov3_ray.errors import ConfigError
from dinov3_ray.pool.cluster import connect
from dinov3_ray.testing import FakeTeacher

ENTRANCES: dict[str, Callable[[str], object]] = {
    "RemoteTeacher": lambda address: RemoteTeacher(address=address),
    "connect": lambda address: TeacherPool.connect(address=address),
    "start": lambda address: TeacherPool.start(FakeTeacher.factory(), address=address),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265", "https://head:8265/"])
def test_another_kind_of_address(entrance: str, address: str) -> None:
    with pytest.raises(ConfigError, match=r"address must be HOST:PORT of a running Ray's head.*'head:6379'") as caught:
        ENTRANCES[entrance](address)
    assert repr(address) in str(caught.value)


def test_one_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests of this process may be connected
    with pytest.raises(ConfigError, match="RAY_ADDRESS must be HOST:PORT"):
        RemoteTeacher().info  # noqa: B018 - it connects
    assert "RAY_ADDRESS must be HOST:PORT" in run_command("status").output
    (tmp_path / "image.png").touch()
    with pytest.raises(ConfigError, match="RAY_ADDRESS must be HOST:PORT"):
        extract(tmp_path, tmp_path / "out", pool="dinov3")


def test_a_new_ray_is_none_that_a_pool_runs_in() -> None:
    with pytest.raises(ConfigError, match="that names no running Ray"):
        connect("local")
