"""Checkpoints: variants, weight files, verification, loading, fingerprints, random ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from file_changes import change_json, change_weights
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from dinov3_ray.checkpoint import (
    VARIANTS,
    build_model,
    find_variant,
    fingerprint,
    init_checkpoint,
    load_model,
    variant_of,
    verify,
)
from dinov3_ray.checkpoint.hf import config_json
from dinov3_ray.checkpoint.write import write_directory
from dinov3_ray.config import DinoV3Config
from dinov3_ray.config.weights import WeightFiles, canonical_name
from dinov3_ray.errors import CheckpointError, ConfigError

TINY = ("vit-test", "vit-test-gated", "convnext-test")
PUBLISHED_MILLIONS = {
    "vits16": 21.60,
    "vits16plus": 28.69,
    "vitb16": 85.66,
    "vitl16": 303.13,
    "vith16plus": 840.59,
    "vit7b16": 6716.0,
    "convnext-tiny": 27.8,
    "convnext-small": 49.5,
    "convnext-base": 87.6,
    "convnext-large": 196.2,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint of each tiny variant; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    for variant in TINY:
        init_checkpoint(variant, folder / variant)
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of the tiny ViT's directory, to be spoilt."""
    return Path(shutil.copytree(made / "vit-test", tmp_path / "model"))


def images(height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def output(model: torch.nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        tokens = model(pixels)
        return tokens if isinstance(tokens, Tensor) else tokens.last_hidden_state


class TestVariants:
    @pytest.mark.slow
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_tensors_are_those_of_the_transformers_model(self, variant: str) -> None:
        architecture = VARIANTS[variant]
        with torch.device("meta"):
            theirs = AutoModel.from_config(AutoConfig.for_model(**config_json(architecture, "float32")))
        for model in (theirs, build_model(architecture)):
            found = {canonical_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            assert architecture.tensors() == found

    @pytest.mark.parametrize("variant", PUBLISHED_MILLIONS)
    def test_parameter_counts_are_the_published_ones(self, variant: str) -> None:
        assert VARIANTS[variant].num_parameters / 1e6 == pytest.approx(PUBLISHED_MILLIONS[variant], rel=2e-3)

    @pytest.mark.parametrize(
        ("spelling", "variant"),
        [
            ("S", "vits16"),
            ("vit-s", "vits16"),
            ("ViT-S+/16", "vits16plus"),
            ("vitl16", "vitl16"),
            ("ViT-H+", "vith16plus"),
            ("vith16plus", "vith16plus"),
            ("7B", "vit7b16"),
            ("dinov3-vitb16-pretrain-lvd1689m", "vitb16"),
            ("dinov3_convnext_tiny", "convnext-tiny"),
            ("ConvNeXt-L", "convnext-large"),
        ],
    )
    def test_spellings(self, spelling: str, variant: str) -> None:
        assert find_variant(spelling) == variant

    def test_unknown_name_lists_the_known(self) -> None:
        with pytest.raises(ConfigError, match=r"variant must be one of vits16, .*convnext-large.*got 'vitx'"):
            find_variant("vitx")

    def test_variant_of(self) -> None:
        for name, architecture in VARIANTS.items():
            assert variant_of(architecture) == name
        assert variant_of(replace(VARIANTS["vits16"], num_register_tokens=0)) is None  # type: ignore[call-arg]


class TestInit:
    @pytest.mark.parametrize("variant", TINY)
    def test_transformers_reads_the_directory(self, made: Path, variant: str) -> None:
        config = AutoConfig.from_pretrained(made / variant)
        _, report = AutoModel.from_pretrained(made / variant, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert config.hidden_act == VARIANTS[variant].hidden_act
        assert DinoV3Config(made / variant).architecture == VARIANTS[variant]

    def test_weights_depend_on_the_seed_alone(self, tmp_path: Path, made: Path) -> None:
        init_checkpoint("vit-test", tmp_path / "a", shard_bytes=300_000)
        init_checkpoint("vit-test", tmp_path / "b", seed=1)
        same, other = (DinoV3Config(tmp_path / name) for name in "ab")
        assert len(verify(same).files) > 3
        assert fingerprint(same) == fingerprint(DinoV3Config(made / "vit-test")) != fingerprint(other)

    def test_nothing_is_trivial(self, made: Path) -> None:
        for name, tensor in load_file(made / "vit-test" / "model.safetensors").items():
            assert tensor.std() > 0.01, name

    def test_image_size(self, tmp_path: Path) -> None:
        init_checkpoint("vit-test", tmp_path / "model", image_size=(96, 160))
        assert DinoV3Config(tmp_path / "model").image_size == (96, 160)
        with pytest.raises(ConfigError, match=r"image_size must be .*>= 16 each; got 8"):
            init_checkpoint("vit-test", tmp_path / "small", image_size=8)

    def test_never_overwrites(self, root: Path) -> None:
        before = fingerprint(DinoV3Config(root))
        with pytest.raises(CheckpointError, match="is in use already"):
            init_checkpoint("vit-test", root, seed=5)
        assert fingerprint(DinoV3Config(root)) == before

    def test_an_interrupted_one_leaves_nothing(self, tmp_path: Path) -> None:
        def interrupt(nbytes: int) -> None:
            assert list(tmp_path.iterdir()) != []
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            init_checkpoint("vit-test", tmp_path / "model", progress=interrupt)
        assert list(tmp_path.iterdir()) == []

    def test_progress_adds_up(self, tmp_path: Path) -> None:
        done: list[int] = []
        init_checkpoint("vit-test", tmp_path / "model", progress=done.append)
        assert sum(done) == 4 * VARIANTS["vit-test"].num_parameters
        with pytest.raises(ConfigError, match="shard_bytes must be >= 1; got 0"):
            init_checkpoint("vit-test", tmp_path / "other", shard_bytes=0)


class TestLoad:
    @pytest.mark.parametrize("variant", TINY)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_from_pretrained_bit_for_bit(self, made: Path, variant: str, dtype: torch.dtype) -> None:
        model = load_model(DinoV3Config(made / variant), dtype=dtype)
        reference = AutoModel.from_pretrained(made / variant, dtype=dtype).eval()
        pixels = images().to(dtype)
        assert torch.equal(output(model, pixels), output(reference, pixels))

    def test_is_frozen_and_frequencies_stay_float32(self, made: Path) -> None:
        model = load_model(DinoV3Config(made / "vit-test"), dtype=torch.bfloat16)
        assert not model.training
        assert all(not p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
        buffers = dict(model.named_buffers())
        assert [buffer.dtype for buffer in buffers.values()] == [torch.float32]
        expected = 100.0 ** (-torch.arange(16) / 16)
        torch.testing.assert_close(buffers["rope_embeddings.inv_freq"], expected)

    def test_shards_load_like_one_file(self, made: Path, tmp_path: Path) -> None:
        init_checkpoint("vit-test", tmp_path / "model", shard_bytes=300_000)
        one, many = (load_model(DinoV3Config(path)) for path in (made / "vit-test", tmp_path / "model"))
        assert torch.equal(output(one, images()), output(many, images()))

    def test_seed_spelling(self, made: Path, root: Path) -> None:
        seed = {"architectures": ["Dinov3Model"], "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
        (root / "config.json").write_text(json.dumps({**seed, "patch_size": 16, "num_registers": 4}))
        config, whole = DinoV3Config(root), DinoV3Config(made / "vit-test")
        assert torch.equal(output(load_model(config), images()), output(load_model(whole), images()))
        assert fingerprint(config) == fingerprint(whole)

    def test_names_with_the_inner_model(self, made: Path, root: Path) -> None:
        """transformers 5.5 calls the blocks `model.layer.N` in memory, and some writers in files too."""
        whole = load_model(DinoV3Config(root))

        def rename(tensors: dict[str, Tensor]) -> None:
            for name in [name for name in tensors if name.startswith("layer.")]:
                tensors[f"model.{name}"] = tensors.pop(name)

        change_weights(root, rename)
        assert torch.equal(output(load_model(DinoV3Config(root)), images()), output(whole, images()))
        assert fingerprint(DinoV3Config(root)) == fingerprint(DinoV3Config(made / "vit-test"))

    def test_the_model_outlives_its_files(self, root: Path) -> None:
        model = load_model(DinoV3Config(root))
        before = output(model, images())
        with (root / "model.safetensors").open("r+b") as stream:
            stream.truncate(100)
            stream.write(bytes(400_000))
        assert torch.equal(output(model, images()), before)

    def test_without_registers(self, root: Path) -> None:
        change_json(root / "config.json", num_register_tokens=0)
        change_weights(root, lambda tensors: tensors.update({"embeddings.register_tokens": torch.empty(1, 0, 128)}))
        assert output(load_model(DinoV3Config(root)), images()).shape == (2, 1 + 4 * 6, 128)

    def test_unknown_activation(self, root: Path) -> None:
        change_json(root / "config.json", hidden_act="no-such")
        with pytest.raises(ConfigError, match=r"hidden_act must be .*'no-such'"):
            load_model(DinoV3Config(root))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_gpu(self, made: Path) -> None:
        model = load_model(DinoV3Config(made / "vit-test"), "cuda", torch.bfloat16)
        reference = AutoModel.from_pretrained(made / "vit-test", dtype=torch.bfloat16).to("cuda").eval()
        pixels = images().to("cuda", torch.bfloat16)
        assert torch.equal(output(model, pixels), output(reference, pixels))


class TestDamage:
    """Each of these is found by `verify` and stops `load_model`, with what was expected and what was found."""

    def refused(self, root: Path, message: str) -> None:
        config = DinoV3Config(root)
        for check in (verify, load_model, fingerprint):
            with pytest.raises(CheckpointError, match=message):
                check(config)

    def test_no_weights(self, root: Path) -> None:
        (root / "model.safetensors").rename(root / "weights.pth")
        self.refused(root, r"must hold model\.safetensors or .*found neither \(it has weights\.pth: `dinov3-ray")

    @pytest.mark.parametrize("size", [0, 5, 1000, 100_000])
    def test_truncated(self, root: Path, size: int) -> None:
        with (root / "model.safetensors").open("r+b") as stream:
            stream.truncate(size)
        self.refused(root, r"truncated.*bytes")

    def test_longer_than_its_header_says(self, root: Path) -> None:
        with (root / "model.safetensors").open("ab") as stream:
            stream.write(b"rest")
        self.refused(root, "longer than its header says: expected .* bytes, found")

    def test_garbage(self, root: Path) -> None:
        (root / "model.safetensors").write_bytes((9).to_bytes(8, "little") + b"no header" + bytes(20))
        self.refused(root, "damaged safetensors header")

    def test_missing_tensor(self, root: Path) -> None:
        change_weights(root, lambda tensors: tensors.pop("layer.1.mlp.up_proj.bias"))
        self.refused(root, r"layer\.1\.mlp\.up_proj\.bias is missing: expected \[256\]")

    def test_unexpected_tensor(self, root: Path) -> None:
        change_weights(root, lambda tensors: tensors.update({"layer.3.norm1.weight": torch.ones(128)}))
        self.refused(root, r"layer\.3\.norm1\.weight is unexpected: found \[128\]")

    def test_wrong_shape(self, root: Path) -> None:
        change_weights(root, lambda tensors: tensors.update({"norm.bias": torch.ones(64)}))
        self.refused(root, r"norm\.bias has the wrong shape: expected \[128\], found \[64\]")

    def test_config_against_weights(self, root: Path) -> None:
        change_json(root / "config.json", num_register_tokens=0)
        self.refused(root, r"register_tokens has the wrong shape: expected \[1, 0, 128\], found \[1, 4, 128\]")
        change_json(root / "config.json", num_register_tokens=4, hidden_size=256)
        self.refused(root, r"\.\.\. and \d+ more")

    def test_wrong_dtype(self, root: Path) -> None:
        change_weights(root, lambda tensors: tensors.update({"norm.bias": torch.ones(128, dtype=torch.float64)}))
        self.refused(root, r"tensor norm\.bias must be one of F32, BF16, F16; found F64")

    def test_not_finite(self, root: Path) -> None:
        change_weights(root, lambda tensors: tensors["layer.0.norm2.weight"][3:5].fill_(float("nan")))
        config = DinoV3Config(root)
        verify(config)  # headers are as they should be
        message = r"tensor layer\.0\.norm2\.weight must be finite; found 2 NaN or infinite values of 128"
        with pytest.raises(CheckpointError, match=message):
            verify(config, values=True)
        with pytest.raises(CheckpointError, match=message):
            load_model(config)

    def test_too_large_for_float16(self, root: Path) -> None:
        change_weights(root, lambda tensors: tensors["norm.weight"].fill_(1e6))
        with pytest.raises(CheckpointError, match=r"norm\.weight must be finite.*as torch\.float16"):
            load_model(DinoV3Config(root), dtype=torch.float16)

    def test_stored_twice(self, root: Path) -> None:
        change_weights(root, lambda tensors: tensors.update({"model.layer.0.norm1.bias": torch.ones(128)}))
        self.refused(root, r"tensor layer\.0\.norm1\.bias must be stored once")


class TestShards:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return init_checkpoint("vit-test", tmp_path / "model", shard_bytes=400_000)

    def test_missing_shard(self, root: Path) -> None:
        shards = sorted(path.name for path in root.glob("model-*"))
        (root / shards[1]).unlink()
        with pytest.raises(CheckpointError, match=f"names {len(shards)} shards; missing: {shards[1]}"):
            verify(DinoV3Config(root))

    def test_truncated_shard(self, root: Path) -> None:
        shard = max(root.glob("model-*"))
        with shard.open("r+b") as stream:
            stream.truncate(shard.stat().st_size - 4)
        with pytest.raises(CheckpointError, match=f"{shard.name} is truncated"):
            verify(DinoV3Config(root))

    def test_index_against_shards(self, root: Path) -> None:
        change_json(root / "model.safetensors.index.json", lambda index: index["weight_map"].pop("norm.weight"))
        with pytest.raises(CheckpointError, match=r"disagree on norm\.weight: expected in no shard, found in model-"):
            verify(DinoV3Config(root))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{}", "must be a JSON object with a weight_map"),
            ('{"weight_map": {}}', "weight_map must map tensor names to files"),
            ('{"weight_map": {"norm.weight": "../model.safetensors"}}', "must be a file name in that directory"),
        ],
    )
    def test_broken_index(self, root: Path, content: str, message: str) -> None:
        (root / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            WeightFiles.find(root)


class TestFingerprint:
    def test_is_the_same_everywhere(self, made: Path, tmp_path: Path) -> None:
        """Weights without a random generator, whose last bits may differ between CPUs."""
        architecture = VARIANTS["vit-test"]
        shapes = architecture.tensors()
        rule = DinoV3Config(made / "vit-test").preprocessing
        write_directory(tmp_path / "model", architecture, rule, lambda name: torch.full(shapes[name], 0.5))
        # Another value here orphans every stored feature: raise the format's number then, on purpose.
        assert fingerprint(DinoV3Config(tmp_path / "model")) == "c289ce5a58a14682c819444e"

    def test_how_it_is_computed_does_not_matter(self, made: Path) -> None:
        config = DinoV3Config(made / "vit-test", image_size=224)
        assert fingerprint(config) == fingerprint(replace(config, dtype="bfloat16", compile=True, attention="eager"))

    def test_path_does_not_matter(self, made: Path, root: Path) -> None:
        assert fingerprint(DinoV3Config(root)) == fingerprint(DinoV3Config(made / "vit-test"))

    def test_every_weight_matters(self, root: Path) -> None:
        before = fingerprint(DinoV3Config(root))
        path = root / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert fingerprint(DinoV3Config(root)) != before

    def test_preprocessing_matters(self, root: Path) -> None:
        config = DinoV3Config(root)
        change_json(root / "preprocessor_config.json", image_std=[0.229 + 1e-3, 0.224, 0.225])
        seen = [fingerprint(config), fingerprint(replace(config, image_size=96)), fingerprint(DinoV3Config(root))]
        assert len(set(seen)) == 3

    def test_architecture_matters(self, root: Path) -> None:
        """The same weights under other head counts are another model."""
        before = fingerprint(DinoV3Config(root))
        change_json(root / "config.json", num_attention_heads=4)
        assert fingerprint(DinoV3Config(root)) != before

    def test_progress_adds_up(self, root: Path) -> None:
        done: list[int] = []
        fingerprint(DinoV3Config(root), progress=done.append)
        assert sum(done) == verify(DinoV3Config(root)).nbytes
