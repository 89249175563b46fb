"""What stands for a teacher: each entrance refuses what does not, at once and in the same words."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import nn

from dinov3_ray import DinoV3Config, DinoV3Teacher, RemoteTeacher, TeacherPool
from dinov3_ray.datasets import CachedTeacher, StoredTeacher, TargetDataset, extract
from dinov3_ray.errors import ConfigError
from dinov3_ray.features import FeatureSpec
from dinov3_ray.pool.spec import check_teacher, pickle_teacher
from dinov3_ray.testing import FakeTeacher
from dinov3_ray.training.prefetch import prefetch

MADE: dict[str, Callable[[Path], Any]] = {
    "local": DinoV3Teacher,
    "fake": lambda _: FakeTeacher(),
    "remote": lambda _: RemoteTeacher("dinov3"),
    "of a checkpoint's model": lambda path: DinoV3Teacher(path).model,
    "a module of the user's": lambda _: nn.Conv2d(3, 3, 1),
}
NEITHER: dict[str, Any] = {
    "a number": 5,
    "nothing": None,
    "a tensor": torch.zeros(3),
    "a class that needs arguments": DinoV3Teacher,
    "a configuration's class": DinoV3Config,
    "a function that needs arguments": lambda device: FakeTeacher(),
}


@pytest.fixture(autouse=True)
def no_ray_is_started() -> Iterator[None]:
    before = ray.is_initialized()
    yield
    assert ray.is_initialized() == before


def entrances(teacher: Any, tmp_path: Path) -> dict[str, Callable[[], object]]:
    (tmp_path / "images").mkdir(exist_ok=True)

    def reload() -> None:
        with TeacherPool.start(FakeTeacher.factory(), name="reloaded", replicas=1, local_mode=True) as pool:
            pool.reload(teacher)

    return {
        "start": lambda: TeacherPool.start(teacher, name="entrance"),
        "start in local mode": lambda: TeacherPool.start(teacher, name="entrance", local_mode=True),
        "reload": reload,
        "extract": lambda: extract(tmp_path / "images", tmp_path / "out", teacher, FeatureSpec(cls=True)),
    }


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_teacher_that_is_made_already_is_refused(
    make: Callable[[Path], Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    found = set()
    for enter in entrances(make(tiny_checkpoint), tmp_path).values():
        with pytest.raises(ConfigError, match=r"teacher must be a DinoV3Config, a .*, which is made already") as caught:
            enter()
        found.add(str(caught.value))
    assert len(found) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("teacher", NEITHER.values(), ids=NEITHER)
def test_what_makes_no_teacher_is_refused(teacher: Any, tmp_path: Path) -> None:
    for name, enter in entrances(teacher, tmp_path).items():
        if teacher is None and name == "extract":
            continue  # it may name a pool instead
        with pytest.raises(
            ConfigError, match=r"teacher must be a DinoV3Config, a model directory, a hub id, or a callable"
        ):
            enter()


def test_what_makes_one_passes(tiny_checkpoint: Path) -> None:
    config = DinoV3Config(tiny_checkpoint)
    for source in (
        FakeTeacher,
        FakeTeacher.factory(hidden_size=8),
        functools.partial(DinoV3Teacher, config),
        lambda device="cpu": DinoV3Teacher(config, device),
        int,  # a builtin may not say what it takes: whoever calls it looks at what it gives
    ):
        assert check_teacher(source) is source  # type: ignore[arg-type]
        assert pickle_teacher(source)  # type: ignore[arg-type]
    assert check_teacher(str(tiny_checkpoint)) == config


def test_a_factory_that_cannot_be_pickled_is_refused_before_ray_starts(tmp_path: Path) -> None:
    lock = threading.Lock()

    def factory() -> FakeTeacher:
        with lock:
            return FakeTeacher()

    for name, enter in entrances(factory, tmp_path).items():
        if name in ("start", "extract"):
            with pytest.raises(ConfigError, match=r"teacher must be picklable, since .*; got .*lock"):
                enter()
    with TeacherPool.start(factory, name="threads", replicas=1, local_mode=True) as pool:  # no other process
        pool.reload(factory)


@pytest.mark.parametrize("wrong", [5, "dinov3", FakeTeacher, FakeTeacher.factory(), nn.Conv2d(3, 3, 1)], ids=repr)
def test_where_a_teacher_is_wanted_its_source_is_refused(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher must be .*\.extract\(images, spec\)"):
        CachedTeacher(wrong, tmp_path / "cache", 2**20)
    with pytest.raises(ConfigError, match=r"teacher must be .*\.extract\(images, spec\)"):
        prefetch(wrong, [], FeatureSpec(cls=True))
    with pytest.raises(ConfigError, match=r"root must be (a model directory|the path)"):
        DinoV3Teacher(wrong)


def test_other_things_in_each_others_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with TeacherPool.start(FakeTeacher, name="itself", replicas=1, local_mode=True) as pool:
        with pytest.raises(ConfigError, match="name must be"):
            extract(tmp_path / "images", tmp_path / "out", pool=pool)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="name must be"):
            RemoteTeacher(pool)  # type: ignore[arg-type]
    for reader in (StoredTeacher, TargetDataset):
        with pytest.raises(ConfigError, match=r"store must be a FeatureStore; got .* opens one\)"):
            reader(tmp_path / "features")  # type: ignore[arg-type]
