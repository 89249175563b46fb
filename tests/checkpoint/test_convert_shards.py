"""A shard is not a model: all of a model's files are converted, or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinov3_ray.checkpoint import convert_checkpoint, fingerprint, init_checkpoint
from dinov3_ray.config import DinoV3Config
from dinov3_ray.errors import CheckpointError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_checkpoint("vit-test", tmp_path_factory.mktemp("model") / "whole")


def cut(whole: Path, folder: Path, suffix: str) -> list[Path]:
    """The model of ``whole`` in two shards, the first of which is a model of fewer layers."""
    folder.mkdir()
    tensors = load_file(whole / "model.safetensors")
    last = max(name.split(".")[1] for name in tensors if name.startswith("layer."))
    later = {name: tensor for name, tensor in tensors.items() if name.startswith(f"layer.{last}.")}
    stem = {"bin": "pytorch_model", "safetensors": "model"}[suffix]
    paths = [folder / f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    for path, part in zip(paths, ({name: tensors[name] for name in tensors.keys() - later.keys()}, later), strict=True):
        torch.save(part, path) if suffix == "bin" else save_file(part, path)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(whole / name, folder)
    return paths


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("named", ["folder", "first", "second"])
def test_a_shard_stands_for_all(whole: Path, tmp_path: Path, suffix: str, named: str) -> None:
    first, second = cut(whole, tmp_path / "shards", suffix)
    if named == "folder" and suffix == "safetensors":
        index = {"weight_map": {name: path.name for path in (first, second) for name in load_file(path)}}
        (first.parent / "model.safetensors.index.json").write_text(json.dumps(index))
        assert fingerprint(DinoV3Config(first.parent)) == fingerprint(DinoV3Config(whole))
        return
    source = {"folder": first.parent, "first": first, "second": second}[named]
    convert_checkpoint(source, tmp_path / "made", statistics="lvd1689m")
    assert fingerprint(DinoV3Config(tmp_path / "made")) == fingerprint(DinoV3Config(whole))


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("described", [True, False])
def test_a_shard_without_the_others_is_refused(whole: Path, tmp_path: Path, suffix: str, described: bool) -> None:
    first, second = cut(whole, tmp_path / "shards", suffix)
    second.unlink()
    if not described:
        (first.parent / "config.json").unlink()
    with pytest.raises(CheckpointError, match=second.name):
        convert_checkpoint(first, tmp_path / "made", statistics="lvd1689m")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [("pytorch_model.bin", r"layer\.2\..* is missing"), ("weights.pth", r"2 layers, but .*says num_hidden_layers 3")],
)
def test_weights_of_fewer_layers_than_config_json_are_refused(
    whole: Path, tmp_path: Path, name: str, said: str
) -> None:
    first, _ = cut(whole, tmp_path / "shards", "bin")
    source = first.rename(first.parent / name)
    with pytest.raises(CheckpointError, match=said):
        convert_checkpoint(source, tmp_path / "made", statistics="lvd1689m")


@pytest.mark.parametrize(
    "name", ["dinov3_vit7b16_pretrain_lvd1689m_bf16-{}.pth", "dinov3-vits16-pretrain-lvd1689m-{}.pth"]
)
def test_the_hash_is_checked_wherever_it_stands_in_a_name(whole: Path, tmp_path: Path, name: str) -> None:
    source = tmp_path / name.format("0a1b2c3d")
    torch.save(load_file(whole / "model.safetensors"), source)
    with pytest.raises(CheckpointError, match="0a1b2c3d"):
        convert_checkpoint(source, tmp_path / "made")
