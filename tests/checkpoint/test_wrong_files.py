"""What people have in the place of weights: each is named for what it is, and each remedy that is named works."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from commandline import run_command as run
from file_changes import change_json
from reference_vit import random_vit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed

from dinov3_ray import DinoV3Config
from dinov3_ray.checkpoint import convert_checkpoint, fingerprint, init_checkpoint, load_model, verify
from dinov3_ray.errors import CheckpointError, ConfigError, DinoV3Error

TINY = {"width": 128, "heads": 2, "blocks": 1, "inner": 64, "swiglu": False, "registers": 4, "qkv_bias": True}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1213459\n"
PAGE = "\n<!DOCTYPE html>\n<html><head><title>Access to this  model is restricted</title></head><body>...</body></html>"
EXPIRED = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>Denied</Message></Error>'


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_vit(**TINY)


@pytest.fixture(scope="module")
def official(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in Meta's layout; not to be changed."""
    path = tmp_path_factory.mktemp("official") / "tiny_lvd1689m.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory; not to be changed."""
    return init_checkpoint("vit-test", tmp_path_factory.mktemp("made") / "model")


@pytest.fixture
def root(model: Path, tmp_path: Path) -> Path:
    """A copy of a model directory, to be spoilt."""
    return Path(shutil.copytree(model, tmp_path / "root"))


def refusal(source: Path, error: type[DinoV3Error] = CheckpointError) -> str:
    """What the conversion of ``source`` says; it leaves nothing, and never gives torch's own advice."""
    target = source.parent / "never made"
    with pytest.raises(error) as caught:
        convert_checkpoint(source, target)
    assert not target.exists()
    said = str(caught.value)
    assert str(source) in said
    assert "weights_only" not in said
    assert "Traceback" not in said
    return said


def follow(message: str, target: Path) -> Path:
    """Run the command that ``message`` names; it must make a model directory."""
    command = re.search(r"`dinov3-ray (checkpoint convert .*?)`", message)
    assert command, message
    done = run(*shlex.split(command[1].replace("NEW_DIRECTORY", str(target))))
    assert done.exit_code == 0, done.output
    verify(DinoV3Config(target), values=True)
    return target


def of_bytes(content: bytes | str) -> Callable[[Path, Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda path, official: path.write_bytes(data)


def numpy_archive() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, weight=np.ones(3))
    return stream.getvalue()


WRONG: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "nothing": (lambda path, official: None, "cannot be read: it is missing"),
    "empty": (of_bytes(""), "empty, as if truncated to 0 bytes: download it again"),
    "three bytes": (of_bytes(b"\x01\x02\x03"), "truncated to 3 bytes: download it again"),
    "zeros": (of_bytes(bytes(5000)), "begins with zeros, as one that was not downloaded to its end"),
    "pointer": (of_bytes(POINTER), r"a Git LFS pointer of a file of 1,213,459 bytes: `git lfs pull`"),
    "page": (of_bytes(PAGE), r"a web page that says 'Access to this model is restricted': log in"),
    "page after a byte order mark": (of_bytes("\ufeff<html><h1>404</h1></html>"), "a web page that says '404'"),
    "long page": (of_bytes(PAGE + "é" * 9000), "a web page that says"),
    "expired link": (of_bytes(EXPIRED), "an answer of a server that says 'AccessDenied'.*ask for a new link"),
    "answer as JSON": (
        of_bytes('{"error": "Invalid credentials"}'),
        r"JSON that begins with '{\"error\": \"Invalid.*or, if this is a server's answer",
    ),
    "text": (of_bytes("Entry not found"), "text that begins with 'Entry not found': it may be a server's answer"),
    "noise": (of_bytes(bytes(range(255, 0, -1)) * 9), r"of no known format \(2,295 bytes, the first .* ff fe fd"),
    "NumPy's archive": (of_bytes(numpy_archive()), "an archive of NumPy arrays"),
    "NumPy": (of_bytes(b"\x93NUMPY\x01\x00" + bytes(90)), "a NumPy array: take the model's safetensors"),
    "HDF5": (of_bytes(b"\x89HDF\r\n\x1a\n" + bytes(90)), "an HDF5 file"),
    "compressed": (
        lambda path, official: path.write_bytes(gzip.compress(official.read_bytes(), 1)),
        "compressed by gzip: unpack it",
    ),
    "half of a torch file": (
        lambda path, official: path.write_bytes(official.read_bytes()[: official.stat().st_size // 2]),
        "a truncated or damaged torch file or zip archive .*: download it again",
    ),
    "a torch file without its last bytes": (
        lambda path, official: path.write_bytes(official.read_bytes()[:-20]),
        "a truncated or damaged torch file or zip archive .*: download it again",
    ),
    "half of an older torch file": (
        lambda path, official: (
            torch.save(torch.load(official), path, _use_new_zipfile_serialization=False),
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        ),
        "a pickle, torch's older format, but truncated or damaged; download it again",
    ),
    "half of the pickle in an older torch file": (
        lambda path, official: (
            torch.save(torch.load(official), path, _use_new_zipfile_serialization=False),
            path.write_bytes(path.read_bytes()[:300]),
        ),
        "truncated or damaged|or damaged",
    ),
    "half of a safetensors file": (
        lambda path, official: (
            save_file(torch.load(official), path),
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        ),
        "is truncated: expected .* bytes, found .*; download it again",
    ),
    "a safetensors file cut in its header": (
        lambda path, official: (save_file(torch.load(official), path), path.write_bytes(path.read_bytes()[:500])),
        "is truncated or not a safetensors file.*; download it again",
    ),
    "another pickle": (
        of_bytes(pickle.dumps({"weight": np.ones(3)}, protocol=4)),
        "cannot be read as a torch checkpoint of plain tensors: it is a pickle, but not as torch.save writes one",
    ),
    "a list": (lambda path, official: torch.save([1, 2], path), "must hold a state dict of tensors; found a list"),
    "numbers": (lambda path, official: torch.save({"epoch": 3}, path), "must hold a state dict .*; found epoch"),
    "an empty dict": (lambda path, official: torch.save({}, path), "must hold a state dict .*; found an empty dict"),
    "a classifier": (
        lambda path, official: torch.save({"linear_head.weight": torch.ones(5, 2)}, path),
        r"no DINOv3 backbone, but .* no published DINOv3 has: linear_head\.weight \[5, 2\]\. It may be a head",
    ),
    "a program": (
        lambda path, official: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path),
        r"a TorchScript program: it contains code; save the state_dict\(\)",
    ),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Detected pickle protocol")  # TorchScript's, torch's
def test_converted(kind: str, suffix: str, official: Path, tmp_path: Path) -> None:
    """By its content, whatever its name is, an official one too."""
    make, message = WRONG[kind]
    source = tmp_path / f"dinov3_vits16_pretrain_lvd1689m{suffix}"
    make(source, official)
    assert re.search(message, refusal(source), re.DOTALL), refusal(source)


@pytest.mark.parametrize("kind", ["empty", "pointer", "page", "text", "half of a torch file"])
def test_under_an_official_name_with_a_hash(kind: str, official: Path, tmp_path: Path) -> None:
    """It is named for what it is, not for its hash."""
    make, message = WRONG[kind]
    source = tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    make(source, official)
    assert re.search(message, refusal(source), re.DOTALL)


@pytest.mark.parametrize("kind", ["empty", "zeros", "pointer", "page", "expired link", "text", "half of a torch file"])
def test_in_a_model_directory(kind: str, official: Path, root: Path) -> None:
    make, message = WRONG[kind]
    make(root / "model.safetensors", official)
    config = DinoV3Config(root)
    for check in (verify, load_model, fingerprint):
        with pytest.raises(
            CheckpointError, match=rf"(?s)model\.safetensors is not a safetensors file, but .*{message}"
        ):
            check(config)


@pytest.mark.parametrize("kind", ["empty", "pointer", "page"])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_in_the_place_of_a_json_file(kind: str, name: str, official: Path, root: Path) -> None:
    make, message = WRONG[kind]
    make(root / name, official)
    with pytest.raises(ConfigError, match=rf"(?s){name} is not valid JSON: .*; it is .*{message}"):
        DinoV3Config(root)


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x4B50])
def test_a_header_whose_length_looks_like_another_format(official: Path, tmp_path: Path, length: int) -> None:
    """The length stands first, little endian: as b"\\x80\\x02" a pickle begins, as b"PK" a zip archive."""
    source = tmp_path / "lvd1689m.safetensors"
    save_file(torch.load(official), source)
    content = source.read_bytes()
    old = int.from_bytes(content[:8], "little")
    while length < old:
        length += 1 << 16
    source.write_bytes(length.to_bytes(8, "little") + content[8 : 8 + old].ljust(length) + content[8 + old :])
    convert_checkpoint(source, tmp_path / "model")


class Surprise:
    """Makes a folder, if its code is run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.folder),))


class TestPythonObjects:
    @pytest.mark.parametrize("new_format", [True, False])
    def test_code_is_not_run(self, tmp_path: Path, new_format: bool) -> None:
        source, folder = tmp_path / "lvd1689m.pth", tmp_path / "made by a pickle"
        torch.save({"weights": Surprise(folder)}, source, _use_new_zipfile_serialization=new_format)
        said = refusal(source)
        assert re.search(r"of plain tensors: it holds Python objects \((\w+\.)?mkdir\)", said), said
        assert not folder.exists()

    def test_a_whole_module_and_what_to_do(self, official: Path, tmp_path: Path) -> None:
        """A module in place of its state_dict(), which the message asks for, and which converts."""
        module = nn.ModuleDict({"backbone": nn.Linear(2, 2)})
        torch.save({"model": module}, tmp_path / "model.pth")
        said = refusal(tmp_path / "model.pth")
        assert "torch.nn.modules" in said
        assert "save the tensors alone: torch.save(model.state_dict(), 'weights.pth'), and convert that" in said

    def test_lightly_train(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its training checkpoints hold the model itself."""
        kind = type("ModelWrapper", (), {"__module__": "lightly_train.wrapper"})
        for name in ("lightly_train", "lightly_train.wrapper"):
            module = ModuleType(name)
            module.ModelWrapper = kind  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, module)
        torch.save({"lightly_train": {"models": kind()}, "state_dict": {}}, tmp_path / "last.ckpt")
        assert re.search(
            r"a training checkpoint of LightlyTrain.*exported_models/exported_last\.pt: convert that",
            refusal(tmp_path / "last.ckpt"),
        )


class TestOtherModels:
    @pytest.mark.parametrize(
        ("width", "registers", "expected"),
        [(384, 0, "facebook/dinov2-small"), (1024, 4, "facebook/dinov2-with-registers-large")],
    )
    @pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
    def test_dinov2(self, tmp_path: Path, width: int, registers: int, expected: str, prefix: str) -> None:
        tensors = {
            "cls_token": torch.empty(1, 1, width),
            "pos_embed": torch.empty(1, 1370, width),
            "mask_token": torch.empty(1, width),
            "patch_embed.proj.weight": torch.empty(width, 3, 14, 14),
            "blocks.0.ls1.gamma": torch.empty(width),
        }
        if registers:
            tensors["register_tokens"] = torch.empty(1, registers, width)
        torch.save({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "dinov2_pretrain.pth")
        said = refusal(tmp_path / "dinov2_pretrain.pth")
        named = "a DINOv2 model with registers" if registers else "a DINOv2 model"
        assert f"is {named}: patches of 14 px, and learned positions (" in said
        assert f"[1, 1370, {width}])" in said
        assert f"({expected} on the hub), with dinov3_ray.model.TransformersTeacher" in said

    def test_dinov2_of_transformers(self, tmp_path: Path) -> None:
        tensors = {
            "embeddings.position_embeddings": torch.empty(1, 1370, 768),
            "embeddings.patch_embeddings.projection.weight": torch.empty(768, 3, 14, 14),
            "encoder.layer.0.layer_scale1.lambda1": torch.empty(768),
        }
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        assert "is a DINOv2 model: patches of 14 px" in refusal(tmp_path / "pytorch_model.bin")

    def test_other_vision_transformers(self, tmp_path: Path) -> None:
        patches = "vision_model.embeddings.patch_embedding.weight"
        for position, name in (
            ("pos_embed", "patch_embed.proj.weight"),
            ("vision_model.position_embedding.weight", patches),
        ):
            torch.save({position: torch.empty(1, 197, 64), name: torch.empty(64, 3, 16, 16)}, tmp_path / "vit.pth")
            assert f"is a Vision Transformer with learned positions ({position}" in refusal(tmp_path / "vit.pth")


class TestFolders:
    def test_empty_and_without_weights(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        assert "is a folder without weights (.pth" in refusal(tmp_path / "folder")
        (tmp_path / "folder" / "notes.txt").touch()
        assert refusal(tmp_path / "folder").endswith("it has notes.txt")

    def test_with_one_file_it_is_that(self, official: Path, tmp_path: Path) -> None:
        made = convert_checkpoint(official.parent, tmp_path / "a", statistics="lvd1689m")
        assert fingerprint(DinoV3Config(made.directory)) == fingerprint(
            DinoV3Config(convert_checkpoint(official, tmp_path / "b").directory)
        )

    def test_with_several_it_asks(self, official: Path, tmp_path: Path) -> None:
        for name in ("a_lvd1689m.pth", "b_lvd1689m.pth"):
            shutil.copy(official, tmp_path / name)
        said = refusal(tmp_path)
        assert said.endswith("a folder with several files of weights: name one of a_lvd1689m.pth, b_lvd1689m.pth")
        convert_checkpoint(tmp_path / "a_lvd1689m.pth", tmp_path / "model")

    def test_a_model_directory_needs_no_conversion(self, model: Path) -> None:
        assert f"is a model directory already: give it as it is (`--root {model}`)" in refusal(model)

    def test_the_hub_s_cache(self, model: Path, tmp_path: Path) -> None:
        snapshot = tmp_path / "models--facebook--dinov3" / "snapshots" / "0123abc"
        shutil.copytree(model, snapshot)
        said = refusal(snapshot.parent.parent)
        assert said.endswith(f"a repository in the hub's cache: name a snapshot in it, such as {snapshot}")
        verify(DinoV3Config(snapshot))
        shutil.rmtree(snapshot)
        assert refusal(snapshot.parent.parent).endswith("it has no snapshots: download it again")

    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
    @pytest.mark.slow
    def test_a_distributed_checkpoint(self, weights: dict[str, Tensor], official: Path, tmp_path: Path) -> None:
        folder = tmp_path / "lvd1689m"
        state = {"teacher": {f"backbone.{name}": tensor for name, tensor in weights.items()}}
        distributed.save(state, checkpoint_id=folder, no_dist=True)
        said = refusal(folder)
        command = re.search(r"is a distributed checkpoint: `python (-m torch\S* dcp_to_torch \S+ )merged\.pth`", said)
        assert command, said
        merged = tmp_path / "merged_lvd1689m.pth"
        subprocess.run([sys.executable, *shlex.split(command[1]), str(merged)], check=True, timeout=120)
        made = [convert_checkpoint(source, tmp_path / source.stem).directory for source in (merged, official)]
        assert fingerprint(DinoV3Config(made[0])) == fingerprint(DinoV3Config(made[1]))

    @pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
    def test_archives_name_what_to_take(self, official: Path, tmp_path: Path, kind: str) -> None:
        archive = tmp_path / f"download.{kind}"
        if kind == "zip":
            with zipfile.ZipFile(archive, "w") as packed:
                packed.writestr("model/README.md", "a card")
                packed.write(official, f"model/{official.name}")
        else:
            with tarfile.open(archive, "w:gz" if kind == "tar.gz" else "w") as packed:
                packed.add(official, f"model/{official.name}")
        said = refusal(archive)
        assert said.endswith(f"archive: unpack it, and take model/{official.name}")
        shutil.unpack_archive(archive, tmp_path / "unpacked")
        convert_checkpoint(tmp_path / "unpacked" / "model" / official.name, tmp_path / "model")

    def test_an_archive_without_weights(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "code.zip", "w") as packed:
            packed.writestr("setup.py", "")
        assert refusal(tmp_path / "code.zip").endswith("a zip archive: it holds no weights (setup.py)")


class TestHints:
    """Whoever follows what a message says gets a model directory, not another refusal."""

    def test_a_pickle_named_safetensors(self, root: Path, tmp_path: Path) -> None:
        """transformers' tensors under another format's name, beside their preprocessor_config.json."""
        before = fingerprint(DinoV3Config(root))
        tensors = load_file(root / "model.safetensors")
        (root / "model.safetensors").unlink()  # they are views of it
        torch.save(tensors, root / "model.safetensors")
        with pytest.raises(CheckpointError, match="is not a safetensors file, but a torch file: `dinov3-ray") as caught:
            verify(DinoV3Config(root))
        made = follow(str(caught.value), tmp_path / "made")
        assert fingerprint(DinoV3Config(made)) == before

    @pytest.mark.parametrize("shards", [1, 2])
    def test_pytorch_model_bin(self, root: Path, tmp_path: Path, shards: int) -> None:
        before = fingerprint(DinoV3Config(root))
        tensors = load_file(root / "model.safetensors")
        (root / "model.safetensors").unlink()
        if shards == 1:
            torch.save(tensors, root / "pytorch_model.bin")
        else:
            places = {name: f"pytorch_model-{index % 2}.bin" for index, name in enumerate(sorted(tensors))}
            for name in set(places.values()):
                torch.save({key: tensors[key] for key in tensors if places[key] == name}, root / name)
            (root / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
        with pytest.raises(CheckpointError, match=r"found neither \(it has pytorch_model") as caught:
            verify(DinoV3Config(root))
        made = follow(str(caught.value), tmp_path / "made")
        assert fingerprint(DinoV3Config(made)) == before

    def test_an_incomplete_config_beside_a_pickle(self, root: Path, tmp_path: Path) -> None:
        """The pickle's shapes complete it, and what it does say, such as the heads, stays."""
        values = json.loads((root / "config.json").read_text())
        kept = {"hidden_size": values["hidden_size"], "num_attention_heads": 4}
        (root / "config.json").write_text(json.dumps({"architectures": ["Dinov3Model"], **kept}))
        before = fingerprint(DinoV3Config(root))
        tensors = load_file(root / "model.safetensors")
        (root / "model.safetensors").unlink()
        torch.save(tensors, root / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"lacks num_hidden_layers, .*the weights cannot tell") as caught:
            DinoV3Config(root)
        assert fingerprint(DinoV3Config(follow(str(caught.value), tmp_path / "made"))) == before

    @pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
    def test_an_index_stands_for_its_shards(self, model: Path, tmp_path: Path, name: str) -> None:
        root = init_checkpoint("vit-test", tmp_path / "root", shard_bytes=400_000)
        if name.startswith("pytorch"):
            index = json.loads((root / "model.safetensors.index.json").read_text())
            (root / "model.safetensors.index.json").rename(root / name)
            for shard in set(index["weight_map"].values()):
                tensors = {key: tensor.clone() for key, tensor in load_file(root / shard).items()}
                torch.save(tensors, root / shard)
        made = convert_checkpoint(root / name, tmp_path / "made")
        assert fingerprint(DinoV3Config(made.directory)) == fingerprint(DinoV3Config(model))
        (root / sorted(root.glob("model-*"))[1].name).unlink()
        assert "which is missing: download it again" in refusal(root / name)

    def test_links_to_nothing(self, root: Path) -> None:
        """As a copy of the hub's cache without its blobs has them."""
        (root / "model.safetensors").unlink()
        (root / "model.safetensors").symlink_to("../../blobs/0123")
        said = "model.safetensors is a link to ../../blobs/0123, which is missing: download it again"
        with pytest.raises(CheckpointError, match=said):
            verify(DinoV3Config(root))
        assert said.removeprefix("model.safetensors ") in refusal(root / "model.safetensors")

    def test_a_crop_stays(self, root: Path, tmp_path: Path) -> None:
        """All of the rule in preprocessor_config.json is kept."""
        rule = {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 192}}
        change_json(root / "preprocessor_config.json", **rule)
        before = DinoV3Config(root)
        torch.save(load_file(root / "model.safetensors"), root / "pytorch_model.bin")
        made = convert_checkpoint(root / "pytorch_model.bin", tmp_path / "made")
        assert DinoV3Config(made.directory).preprocessing == before.preprocessing

    @pytest.mark.parametrize("name", ["weights.pth", "weights_lvd1689m.pth"])
    def test_weights_without_a_config(self, official: Path, tmp_path: Path, name: str) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        shutil.copy(official, folder / name)
        with pytest.raises(ConfigError, match=rf"config\.json is missing: it has {name}: `dinov3-ray") as caught:
            DinoV3Config(folder)
        follow(str(caught.value), tmp_path / "made")

    @pytest.mark.parametrize("name", ["weights.pth", "weights_lvd1689m.pth"])
    def test_a_file_as_root(self, official: Path, tmp_path: Path, name: str) -> None:
        shutil.copy(official, tmp_path / name)
        with pytest.raises(ConfigError, match=rf"{name} is a file: `dinov3-ray checkpoint convert") as caught:
            DinoV3Config(tmp_path / name)
        follow(str(caught.value), tmp_path / "made")

    def test_a_file_of_a_model_directory_as_root(self, root: Path) -> None:
        with pytest.raises(ConfigError, match=r"model\.safetensors is a file: name its folder"):
            DinoV3Config(root / "model.safetensors")

    def test_what_contradicts_the_content_is_said(
        self, official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Such as the satellite model under a hint's --statistics lvd1689m."""
        from dinov3_ray.checkpoint import convert

        monkeypatch.setattr(convert._Evidence, "known_statistics", "sat493m")
        made = run("checkpoint", "convert", official, tmp_path / "made", "--statistics", "lvd1689m")
        assert made.exit_code == 0
        assert "note: what is in the file is Meta's model with statistics of sat493m, not lvd1689m" in made.stderr
