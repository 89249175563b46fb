"""Models of the Hugging Face Hub: found by id, revision and cache, with a hub on localhost and the real client."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hub_server import Fault, HubServer, Repository, serving_hub, use_hub
from paths import SUPPORT
from transformers_models import KINDS, write_transformers
from waiting import until

from dinov3_ray.checkpoint import fingerprint, init_checkpoint, verify
from dinov3_ray.config import DinoV3Config, TransformersConfig
from dinov3_ray.config.hub import arrived_bytes, carrying_access, downloads, repository, resolve
from dinov3_ray.config.weights import WeightFiles
from dinov3_ray.errors import CheckpointError, ConfigError
from dinov3_ray.model import DinoV3Teacher, TransformersTeacher

TINY = "facebook/dinov3-tiny"
NOT_FOR_US = {"pytorch_model.bin": b"a duplicate", "flax_model.msgpack": b"another", "LICENSE.md": b"a text"}


@pytest.fixture
def server() -> Iterator[HubServer]:
    with serving_hub() as running:
        yield running


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: HubServer) -> Path:
    """HF_HOME of a user who is not logged in, and whose hub is the test's own."""
    use_hub(server, tmp_path / "home", monkeypatch)
    monkeypatch.setattr(repository, "_PAUSES", (0.01,))
    return tmp_path / "home"


@pytest.fixture
def tiny(server: HubServer, tiny_checkpoint: Path) -> Repository:
    """A repository with a small model, and much that a teacher does not need."""
    return server.add(TINY, {**{path.name: path for path in tiny_checkpoint.iterdir()}, **NOT_FOR_US})


def commit_of(repository: Repository) -> str:
    return repository.revisions["main"]


def cache_folder(home: Path) -> Path:
    return home / "hub" / f"models--{TINY.replace('/', '--')}"


# What is found and downloaded ----------------------------------------------------------------------------------------


def test_an_id_is_its_directory_at_a_commit(
    home: Path, server: HubServer, tiny: Repository, tiny_checkpoint: Path
) -> None:
    config, local = DinoV3Config(TINY), DinoV3Config(tiny_checkpoint)
    assert (config.hub_id, config.revision) == (TINY, commit_of(tiny))
    assert (local.hub_id, local.revision) == (None, None)
    assert (config.architecture, config.preprocessing) == (local.architecture, local.preprocessing)
    assert config.root == cache_folder(home) / "snapshots" / commit_of(tiny)
    assert repr(config).startswith(f"DinoV3Config({TINY!r}, revision={commit_of(tiny)!r}, vit,")
    assert sorted(server.downloads()) == ["config.json", "preprocessor_config.json"]
    assert fingerprint(config) == fingerprint(local)
    assert not set(NOT_FOR_US) & {path.name for path in config.root.iterdir()}


def test_what_the_cache_has_is_not_downloaded_again(home: Path, server: HubServer, tiny: Repository) -> None:
    verify(DinoV3Config(TINY))
    server.requests.clear()
    verify(DinoV3Config(TINY))
    assert server.requests == [f"GET /api/models/{TINY}/revision/main"]  # whether it has moved
    server.requests.clear()
    verify(DinoV3Config(TINY, revision=commit_of(tiny)))
    assert server.requests == []  # what a commit is does not change


def test_a_model_in_shards(home: Path, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = init_checkpoint("vit-test", tmp_path / "sharded", seed=1, shard_bytes=500_000)
    server.add(TINY, {**{path.name: path for path in sharded.iterdir()}, "onnx-model.safetensors": b"no"})
    weights = verify(DinoV3Config(TINY))
    assert len(weights.files) > 1
    assert "onnx-model.safetensors" not in {path.name for path in weights.files[0].parent.iterdir()}
    weights.files[-1].unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=f"has a part of it, without {weights.files[-1].name} "):
        verify(DinoV3Config(TINY))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert verify(DinoV3Config(TINY)).files == weights.files


def test_a_model_of_timm(home: Path, server: HubServer) -> None:
    (folder, *_) = sorted((SUPPORT / "timm_models").glob("vit_*"))
    server.add("timm/small", folder)
    config, local = DinoV3Config("timm/small"), DinoV3Config(folder)
    assert (config.architecture, config.preprocessing) == (local.architecture, local.preprocessing)
    assert fingerprint(config) == fingerprint(local)


def test_the_licence_on_the_card(home: Path, server: HubServer, tiny_checkpoint: Path) -> None:
    card = b"---\nlicense: other\nlicense_name: dinov3-license\n---\n# a model"
    server.add(TINY, {**{path.name: path for path in tiny_checkpoint.iterdir()}, "README.md": card})
    assert DinoV3Teacher(DinoV3Config(TINY)).license.startswith("dinov3-license: DINOv3 License")


def test_config_json_that_lacks_keys_is_completed_by_the_weights_of_the_hub(
    home: Path, server: HubServer, tiny_checkpoint: Path
) -> None:
    files = {path.name: path for path in tiny_checkpoint.iterdir()}
    server.add(TINY, {**files, "config.json": b'{"architectures": ["Dinov3Model"], "num_registers": 4}'})
    assert DinoV3Config(TINY).architecture == DinoV3Config(tiny_checkpoint).architecture


def test_a_directory_goes_before_an_id(
    home: Path, server: HubServer, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(TINY, tiny_checkpoint)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint, tmp_path / TINY)
    for spelling in (TINY, Path(TINY), f"./{TINY}"):
        assert DinoV3Config(spelling).root == tmp_path / TINY
    with pytest.raises(ConfigError, match=r"revision goes with the id .*got 'main' with the directory .*before an id"):
        DinoV3Config(TINY, revision="main")
    assert server.requests == []
    shutil.rmtree(tmp_path / "facebook")
    for id_spelling in (TINY, Path(TINY)):
        assert DinoV3Config(id_spelling).hub_id == TINY


def test_revisions(home: Path, tiny: Repository, tiny_checkpoint: Path) -> None:
    first = commit_of(tiny)
    tiny.revisions["v1"] = first
    second = tiny.commit({path.name: path for path in tiny_checkpoint.iterdir()})
    for revision, commit in ((None, second), ("main", second), ("v1", first), (first, first)):
        assert DinoV3Config(TINY, revision=revision).revision == commit
    with pytest.raises(ConfigError, match=r"revision must be a branch, a tag or a commit of facebook/.*'v9'"):
        DinoV3Config(TINY, revision="v9")
    del tiny.revisions["v1"]  # that the cache still knows it does not make it one
    with pytest.raises(ConfigError, match="the hub has no 'v1' of it"):
        DinoV3Config(TINY, revision="v1")
    with pytest.raises(ConfigError, match="the hub has no '" + "0" * 40):
        DinoV3Config(TINY, revision="0" * 40)
    for revision in ("", "a b", "../../etc", 3):
        with pytest.raises(ConfigError, match=r"revision must be a branch, a tag or a commit .*; got"):
            DinoV3Config(TINY, revision=revision)  # type: ignore[arg-type]


def test_a_configuration_keeps_its_commit_while_main_moves(
    home: Path, server: HubServer, tiny: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, first = DinoV3Config(TINY), commit_of(tiny)
    other = init_checkpoint("vit-test", tmp_path / "other", seed=2)
    tiny.commit({path.name: path for path in other.iterdir()})
    sent = pickle.dumps(config)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
    shutil.rmtree(home)  # another machine, which has no such folder
    received: DinoV3Config = pickle.loads(sent)
    assert received == config
    assert fingerprint(received) != fingerprint(DinoV3Config(other))
    assert received.place.with_weights() == tmp_path / "elsewhere/hub" / cache_folder(home).name / "snapshots" / first
    assert dataclasses.replace(received, dtype="float32").revision == first
    assert DinoV3Config(TINY).revision == commit_of(tiny) != first


def test_the_cache_of_the_process_that_sent_it_serves_where_it_is_at_hand(
    home: Path, server: HubServer, tiny: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with carrying_access():
        sent = pickle.dumps(DinoV3Config(TINY))
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "default"))
    assert pickle.loads(sent).place.with_weights() == cache_folder(home) / "snapshots" / commit_of(tiny)
    # A node that names a cache has it used; what is complete in the other one is not downloaded again, though.
    monkeypatch.setenv("HF_HOME", str(tmp_path / "named"))
    assert pickle.loads(sent).place.with_weights() == cache_folder(home) / "snapshots" / commit_of(tiny)
    (cache_folder(home) / "snapshots" / commit_of(tiny) / "model.safetensors").unlink()
    assert (tmp_path / "named") in pickle.loads(sent).place.with_weights().parents


# What the hub refuses ------------------------------------------------------------------------------------------------


def test_a_gated_model(home: Path, server: HubServer, tiny: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.gated = True
    server.accounts = {"hf_let_in": {TINY}, "hf_stranger": set()}
    with pytest.raises(CheckpointError, match=r"is gated: .* this process has no token \(ask for access at .*HF_TOKEN"):
        DinoV3Config(TINY)
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    with pytest.raises(CheckpointError, match=r"is gated: .* the account of the token in use is not one of them"):
        DinoV3Config(TINY)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(
        CheckpointError, match=r"refuses this token, it answers 401: Invalid credentials .*make another"
    ):
        DinoV3Config(TINY)
    monkeypatch.setenv("HF_TOKEN", "hf_let_in")
    verify(DinoV3Config(TINY))
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    verify(DinoV3Config(TINY))  # what was downloaded before may be used


def test_a_token_goes_to_other_processes_and_nowhere_else(
    home: Path, server: HubServer, tiny: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny.gated = True
    server.accounts = {"hf_let_in": {TINY}, "hf_stranger": set()}
    monkeypatch.setenv("HF_TOKEN", "hf_let_in")
    config = DinoV3Config(TINY)
    assert b"hf_let_in" not in pickle.dumps(config)
    with carrying_access():
        sent = pickle.dumps(config)
    for name in ("HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
    shutil.rmtree(home)
    received = pickle.loads(sent)
    assert "hf_let_in" not in repr(received.place) + repr(received)
    assert b"hf_let_in" not in pickle.dumps(received)
    WeightFiles.find(received.place.with_weights())
    shutil.rmtree(tmp_path / "elsewhere")
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")  # what a node says itself goes before
    with pytest.raises(CheckpointError, match="is not one of them"):
        received.place.with_weights()


def test_an_unknown_id(
    home: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch, tiny: Repository, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    server.accounts = {"hf_any": set()}
    where = rf"root must be a model directory or the id of a model .* has no model 'facebook/dinov3-vits61'; {tmp_path}"
    with pytest.raises(ConfigError, match=where + r"/facebook.* is missing, too \(.* this process has no token\)"):
        DinoV3Config("facebook/dinov3-vits61")
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    with pytest.raises(ConfigError, match=where + r".* the token in use must be allowed to read it"):
        DinoV3Config("facebook/dinov3-vits61")
    tiny.private = True
    with pytest.raises(ConfigError, match="if it is private, the token in use must be allowed to read it"):
        DinoV3Config(TINY)
    server.add("facebook/sa-1b", {"data.parquet": b""}, kind="datasets")
    with pytest.raises(ConfigError, match=r"root must be the id of a model; facebook/sa-1b is a data set of"):
        DinoV3Config("facebook/sa-1b")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("dinov3", "'dinov3' is not the id of a model on the hub, which has the form owner/name"),
        ("facebook/dinov3/vits16", "is not the id of a model"),
        ("facebook/dinov3 vits16", "is not the id of a model"),
        ("face--book/dinov3", "is not the id of a model"),
        ("facebook/dinov3.git", "is not the id of a model"),
        ("./facebook/dinov3", "is not the id of a model"),
        ("/models/dinov3", r"/models/dinov3 is missing$"),
        ("facebook/dinov3@v1", "give its id, 'facebook/dinov3', and revision 'v1'"),
        ("hf://facebook/dinov3", "give its id, 'facebook/dinov3'"),
        ("https://huggingface.co/facebook/dinov3", "give its id, 'facebook/dinov3'"),
        ("https://huggingface.co/facebook/dinov3/tree/v1", "give its id, 'facebook/dinov3', and revision 'v1'"),
    ],
)
def test_what_is_no_id(home: Path, server: HubServer, text: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=r"root must be a model directory .* is missing") as caught:
        DinoV3Config(text)
    assert re.search(hint, str(caught.value))
    assert server.requests == []


def test_a_repository_without_safetensors(home: Path, server: HubServer, tiny_checkpoint: Path) -> None:
    files = {path.name: path for path in tiny_checkpoint.iterdir() if path.suffix == ".json"}
    server.add(TINY, {**files, **NOT_FOR_US})
    with pytest.raises(CheckpointError, match=r"must hold model.safetensors.*it has flax_model.msgpack, pytorch_mod"):
        DinoV3Config(TINY)
    server.add(TINY, files)
    with pytest.raises(CheckpointError, match="it has no weights"):
        DinoV3Config(TINY)


def test_a_repository_that_lacks_a_shard(home: Path, server: HubServer, tmp_path: Path) -> None:
    sharded = init_checkpoint("vit-test", tmp_path / "sharded", shard_bytes=500_000)
    lost = sorted(sharded.glob("model-*"))[-1].name
    server.add(TINY, {path.name: path for path in sharded.iterdir() if path.name != lost})
    with pytest.raises(CheckpointError, match=rf"names \d+ shards; the repository lacks {lost}"):
        verify(DinoV3Config(TINY))


# Networks and disks --------------------------------------------------------------------------------------------------


def test_a_hub_that_is_away(
    home: Path, server: HubServer, tiny: Repository, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.WARNING, "dinov3_ray"):
        verify(DinoV3Config(TINY))
        assert not caplog.records
        server.close()
        assert DinoV3Config(TINY).revision == commit_of(tiny)
    (warned,) = [record.getMessage() for record in caplog.records if record.name == "dinov3_ray"]
    assert f"Going on with commit {commit_of(tiny)}, which the cache {home}/hub has for 'main'" in warned
    verify(DinoV3Config(TINY, revision=commit_of(tiny)))
    with pytest.raises(
        CheckpointError, match=rf"has other commits of it, to be named by revision: {commit_of(tiny)} \(check"
    ):
        DinoV3Config(TINY, revision="v1")
    shutil.rmtree(home)
    for revision in (None, commit_of(tiny)):
        with pytest.raises(
            CheckpointError, match=r"cannot be had from the hub: .*Connect(ion)?Error.*has nothing of it \(che"
        ):
            DinoV3Config(TINY, revision=revision)


def test_a_hub_that_is_ill(home: Path, server: HubServer, tiny: Repository, caplog: pytest.LogCaptureFixture) -> None:
    server.fault = Fault("/api/", status=503, times=1)
    config = DinoV3Config(TINY)  # it is asked again
    server.fault = Fault("/stored/", status=500)
    with pytest.raises(CheckpointError, match=r"it answers 500: .*a part of it, without model.safetensors"):
        verify(config)
    server.fault = Fault("", status=503)
    with caplog.at_level(logging.WARNING, "dinov3_ray"):
        assert DinoV3Config(TINY).revision == config.revision
    assert "it answers 503: the hub is not well. Going on with commit" in caplog.text
    shutil.rmtree(home)
    with pytest.raises(CheckpointError, match=r"it answers 503: the hub is not well; .*has nothing of it"):
        DinoV3Config(TINY)


def test_what_is_not_a_hub(home: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ("localhost", f"{server.url}/elsewhere"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises((CheckpointError, ConfigError), match=r"HF_ENDPOINT|has no model"):
            DinoV3Config(TINY)


@pytest.mark.slow
def test_a_connection_that_is_cut_is_taken_up_again(home: Path, server: HubServer, tiny: Repository) -> None:
    server.fault = Fault("/stored/", cut_after=100_000, times=1)
    verify(DinoV3Config(TINY), values=True)
    assert sum(line.startswith("GET /stored/") for line in server.requests) == 2


def test_a_slow_download_is_in_the_log(
    home: Path, server: HubServer, tiny: Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(downloads, "_EVERY", 0.02)
    config = DinoV3Config(TINY)
    server.fault = Fault("/stored/", delay=0.2)
    assert arrived_bytes() is None
    with caplog.at_level(logging.WARNING, "dinov3_ray"), ThreadPoolExecutor(1) as thread:
        downloading = thread.submit(verify, config)
        until(lambda: arrived_bytes() is not None, "it is being downloaded")
        downloading.result()
    assert arrived_bytes() is None
    assert f"{TINY}: 0.00 of 0.00 GB downloaded to {cache_folder(home)} in 0 s" in caplog.text


@pytest.mark.slow
def test_a_lost_download(home: Path, server: HubServer, tiny: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "_PAUSES", ())
    config = DinoV3Config(TINY)
    server.fault = Fault("/stored/", cut_after=1000)
    with pytest.raises(
        CheckpointError, match=r"cannot be had from the hub: .*(RemoteProtocol|ChunkedEncoding)Error.*without model.saf"
    ):
        verify(config)
    server.fault = None
    verify(config, values=True)


def test_offline(
    home: Path, server: HubServer, tiny: Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        CheckpointError, match=r"HF_HUB_OFFLINE is set; the cache .* has nothing of it \(unset HF_HUB_O"
    ):
        DinoV3Config(TINY)
    assert server.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    config = DinoV3Config(TINY)
    (cache_folder(home) / "blobs" / "0123.4567.incomplete").write_bytes(b"half")
    server.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"a part of it, without model.safetensors, whose download was interrup"):
        verify(config)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    verify(config)
    server.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with caplog.at_level(logging.WARNING, "dinov3_ray"):
        verify(DinoV3Config(TINY))
    assert (server.requests, caplog.records) == ([], [])


def test_a_dangling_link_is_downloaded_again(home: Path, server: HubServer, tiny: Repository) -> None:
    config = DinoV3Config(TINY)
    weights = verify(config).files[0]
    weights.resolve().unlink()
    verify(config, values=True)


@pytest.mark.slow
def test_no_room(home: Path, server: HubServer, tiny: Repository) -> None:
    program = """
import resource, sys
from dinov3_ray.config import DinoV3Config
place = DinoV3Config(sys.argv[1]).place
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    place.with_weights()
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", program, TINY], capture_output=True, text=True, timeout=120)
    assert f"CheckpointError {TINY} cannot be stored in the cache {home}/hub: OSError: [Errno 27]" in done.stdout
    assert "make room there, or name another with HF_HOME or HF_HUB_CACHE" in done.stdout


def test_a_cache_that_cannot_be_written(home: Path, tiny: Repository, caplog: pytest.LogCaptureFixture) -> None:
    home.write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot be stored in the cache .*HF_HOME or HF_HUB_CACHE"):
        DinoV3Config(TINY)
    assert "the token of `hf auth login` cannot be read, so none is used" in caplog.text


# Caches as directories -----------------------------------------------------------------------------------------------


def test_a_folder_of_the_cache_is_the_model_that_it_holds(
    home: Path, server: HubServer, tiny: Repository, tiny_checkpoint: Path
) -> None:
    verify(DinoV3Config(TINY))
    server.close()
    for folder in (cache_folder(home), cache_folder(home) / "snapshots" / commit_of(tiny)):
        config = DinoV3Config(folder)
        verify(config)
        assert (config.hub_id, config.revision) == (TINY, commit_of(tiny))
    assert resolve(cache_folder(home), commit_of(tiny)).commit == commit_of(tiny)
    with pytest.raises(ConfigError, match=r"revision must be one that .* holds, which has the commits .*; got 'v1'"):
        DinoV3Config(cache_folder(home), revision="v1")
    with pytest.raises(ConfigError, match=r"revision must be that of the snapshot .*; got 'v1'"):
        DinoV3Config(cache_folder(home) / "snapshots" / commit_of(tiny), revision="v1")
    for whole in (home, home / "hub"):
        with pytest.raises(ConfigError, match=rf"is a cache of the hub with {TINY} \(give the id"):
            DinoV3Config(whole)
    shutil.rmtree(cache_folder(home) / "refs")
    assert DinoV3Config(cache_folder(home)).revision == commit_of(tiny)  # there is one only


def test_a_cache_with_one_commit_and_no_branch(
    home: Path, server: HubServer, tiny: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify(DinoV3Config(TINY))
    folder, commit = cache_folder(home), commit_of(tiny)
    shutil.rmtree(folder / "refs")
    assert DinoV3Config(folder / "snapshots").revision == commit
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=f"other commits of it, to be named by revision: {commit}"):
        DinoV3Config(TINY)
    assert DinoV3Config(TINY, revision=commit).revision == commit
    (folder / "snapshots" / commit / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has a snapshot of it without config\.json"):
        DinoV3Config(TINY, revision=commit)


def test_a_cache_without_snapshots(home: Path, tiny: Repository) -> None:
    DinoV3Config(TINY)
    shutil.rmtree(cache_folder(home) / "snapshots")
    with pytest.raises(CheckpointError, match=rf"the hub's cache for {TINY}, but holds no snapshot of it.*give the id"):
        DinoV3Config(cache_folder(home))


def test_a_cache_of_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "datasets--facebook--sa-1b" / "snapshots").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is the hub's cache for a data set"):
        DinoV3Config(tmp_path / "datasets--facebook--sa-1b")


@pytest.mark.slow
def test_another_model_of_transformers_is_found_by_its_id(home: Path, server: HubServer, tmp_path: Path) -> None:
    root = write_transformers(tmp_path / "model", *KINDS["siglip2"])
    repository = server.add("google/siglip2-tiny", {path.name: path for path in root.iterdir()})
    teacher = TransformersTeacher("google/siglip2-tiny", dtype="float32")
    assert teacher.config.revision == commit_of(repository)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = TransformersTeacher(root, dtype="float32").extract_feature_map(images)
    assert torch.equal(teacher.extract_feature_map(images), expected)
    factory = pickle.loads(pickle.dumps(TransformersTeacher.factory("google/siglip2-tiny", revision="main")))
    assert factory.stands_for.revision == commit_of(repository)
    assert teacher.fingerprint == fingerprint(TransformersConfig(root))
