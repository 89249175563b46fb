"""The teacher that knows the scenes: an ordinary checkpoint, made once, whoever asks for it."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dinov3_ray import DinoV3Config, DinoV3Teacher
from dinov3_ray.errors import CheckpointError
from dinov3_ray.scenes import scene_teacher
from dinov3_ray.scenes.scene_teacher import SceneTeaching, cache_folder, cached_teacher, train_teacher

SMALL = SceneTeaching(side=32, scenes=6, steps=3, batch=4)


@pytest.mark.slow
def test_it_is_an_ordinary_checkpoint_and_the_same_again(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    train_teacher(tmp_path / "one", SMALL, lambda done, of: calls.append((done, of)))
    assert calls == [(done, 9) for done in range(1, 10)]
    train_teacher(tmp_path / "two", SMALL)
    train_teacher(tmp_path / "other", replace(SMALL, seed=1))
    one, two, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "other"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["layer.0.mlp.up_proj.weight"], other["layer.0.mlp.up_proj.weight"])
    teacher = DinoV3Teacher(DinoV3Config(tmp_path / "one"))
    teacher.prove()
    assert teacher.extract_feature_map(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 128, 2, 2)


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    teaching = SceneTeaching(side=32, scenes=32, steps=1, batch=8)
    train_teacher(tmp_path / "first", teaching)
    train_teacher(tmp_path / "later", replace(teaching, steps=2))
    first, later = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "later"))
    moved = {name for name in first if not torch.equal(first[name], later[name])}
    # All but the mask token, which no image meets.
    assert moved == set(first) - {"embeddings.mask_token"}


def test_the_key_changes_with_all_that_the_weights_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {SMALL.key, replace(SMALL, steps=4).key, replace(SMALL, seed=1).key, replace(SMALL, side=48).key}
    assert len(keys) == 4
    assert SceneTeaching(side=32, scenes=6, steps=3, batch=4).key == SMALL.key
    sources = scene_teacher.inspect.getsource
    monkeypatch.setattr(scene_teacher.inspect, "getsource", lambda module: sources(module) + "# a comment")
    assert SMALL.key in keys
    monkeypatch.setattr(scene_teacher.inspect, "getsource", lambda module: sources(module) + "more = 1")
    assert SMALL.key not in keys


def test_it_is_made_once_for_all_who_ask_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    really = scene_teacher.train_teacher

    def counting(*arguments: object) -> None:
        made.append(arguments)
        really(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(scene_teacher, "train_teacher", counting)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(cached_teacher(SMALL, folder=tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / f"scene-teacher-{SMALL.key}"] * 3
    assert len(made) == 1
    assert sorted(path.name for path in found[0].iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


def test_an_interrupted_one_leaves_nothing_and_is_made_anew(tmp_path: Path) -> None:
    def interrupt(done: int, of: int) -> None:
        if done == of:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_teacher(SMALL, interrupt, folder=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert cached_teacher(SMALL, folder=tmp_path).is_dir()


def test_the_cache_is_where_the_user_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dinov3_ray"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification has ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "dinov3_ray"
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="XDG_CACHE_HOME names another folder"):
        cached_teacher(SMALL, folder=tmp_path / "file" / "below")
