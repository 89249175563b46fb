"""Converts official checkpoints (facebookresearch/dinov3, ``.pth``) to transformers' layout.

What differs: query, key and value lie in one matrix there; the key's bias is stored but masked out; ``periods`` (RoPE),
``bias_mask`` and ``local_cls_norm`` (of the 7B's training crops) have no counterpart; the rest has other names.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3_ray.checkpoint.verify import Progress, check_shapes, ignore_progress
from dinov3_ray.checkpoint.write import DEFAULT_SHARD_BYTES, write_directory
from dinov3_ray.config.architecture import Architecture, infer_convnext, infer_vit
from dinov3_ray.config.variants import STATISTICS, preprocessing_for, variant_of
from dinov3_ray.errors import CheckpointError, ConfigError

__all__ = ["Conversion", "convert_checkpoint"]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was made: where, of which architecture, under which channel statistics ("lvd1689m" or "sat493m")."""

    directory: Path
    architecture: Architecture
    variant: str | None
    statistics: str


def convert_checkpoint(
    source: str | PathLike[str],
    directory: str | PathLike[str],
    *,
    statistics: str = "auto",
    image_size: int | tuple[int, int] = 224,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = ignore_progress,
) -> Conversion:
    """Write the official checkpoint ``source`` (a ``.pth``) as a model directory, keeping its dtype.

    The architecture comes from the shapes. A training checkpoint (``{"teacher": {"backbone....": ...}}``) gives its
    teacher's backbone. The file is read with ``weights_only=True``: it cannot run code.

    Args:
        source: the file.
        directory: must not exist, or be empty.
        statistics: ``lvd1689m`` (ImageNet's mean and std), ``sat493m``, or ``auto``: by the file's name.
        image_size: the size in preprocessor_config.json: one int, or (h, w).
        shard_bytes: the largest size of one file.
        progress: called with the bytes of each tensor written.

    Raises:
        CheckpointError: ``source`` is not an official DINOv3 checkpoint, or ``directory`` is in use.
        ConfigError: an option is wrong.
    """
    path = Path(source).expanduser()
    if statistics not in ("auto", *STATISTICS):
        raise ConfigError(f"statistics must be one of auto, {', '.join(STATISTICS)}; got {statistics!r}")
    if statistics == "auto":
        statistics = "sat493m" if "sat493m" in path.name.lower() else "lvd1689m"
    official = _read_pth(path)
    # Renamed and cut, but not read yet: the file is mapped, and each tensor is a view of it.
    if any(name.startswith("stages.") for name in official):
        tensors = _convnext_tensors(official, path)
        architecture: Architecture | None = infer_convnext(_shapes(tensors))
    else:
        tensors = _vit_tensors(official, path)
        architecture = _vit_architecture(tensors, official.get("rope_embed.periods"), path)
    if architecture is None:
        raise CheckpointError(f"{path} is not an official DINOv3 checkpoint; it holds {_some(official)}")
    check_shapes(str(path), architecture.tensors(), _shapes(tensors))
    write_directory(
        Path(directory),
        architecture,
        preprocessing_for(STATISTICS[statistics], image_size, architecture.patch_size),
        tensors.__getitem__,
        dtype=_common_dtype(path, tensors),
        shard_bytes=shard_bytes,
        progress=progress,
    )
    return Conversion(Path(directory), architecture, variant_of(architecture), statistics)


def _read_pth(path: Path) -> dict[str, Tensor]:
    """The flat state dict of a backbone."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's older file format cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a torch checkpoint of plain tensors: {reason}") from error
    if isinstance(content, Mapping) and isinstance(content.get("teacher"), Mapping):
        prefix = "backbone."
        content = {k.removeprefix(prefix): v for k, v in content["teacher"].items() if k.startswith(prefix)}
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} must hold a state dict of tensors; found {_some(content)}")
    return dict(content)


def _some(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return ", ".join([str(key) for key in content][:6]) + (", ..." if len(content) > 6 else "")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _common_dtype(path: Path, tensors: Mapping[str, Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        names = ", ".join(sorted(map(str, dtypes)))
        raise CheckpointError(f"{path} must hold one of float32, bfloat16 and float16 throughout; found {names}")
    return dtypes.pop()


_VIT_TOP = {
    "cls_token": "embeddings.cls_token",
    "storage_tokens": "embeddings.register_tokens",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
_VIT_BLOCK = {
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "attn.proj.": "attention.o_proj.",
    "mlp.fc1.": "mlp.up_proj.",
    "mlp.fc2.": "mlp.down_proj.",
    "mlp.w1.": "mlp.gate_proj.",
    "mlp.w2.": "mlp.up_proj.",
    "mlp.w3.": "mlp.down_proj.",
}
_WITHOUT_COUNTERPART = re.compile(r"rope_embed\.periods$|local_cls_norm\.|blocks\.\d+\.attn\.qkv\.bias_mask$")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)$")


def _vit_tensors(official: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in official.items():
        block = _BLOCK.match(name)
        if _WITHOUT_COUNTERPART.match(name):
            continue
        if name == "mask_token":
            tensors["embeddings.mask_token"] = tensor.reshape(1, 1, -1)
        elif name in _VIT_TOP:
            tensors[_VIT_TOP[name]] = tensor
        elif block and block[2].startswith("attn.qkv."):
            mask = official.get(f"blocks.{block[1]}.attn.qkv.bias_mask")
            tensors |= _split_qkv(f"layer.{block[1]}.attention", block[2].removeprefix("attn.qkv."), tensor, mask, path)
        elif block and (prefix := next((old for old in _VIT_BLOCK if block[2].startswith(old)), None)):
            tensors[f"layer.{block[1]}.{_VIT_BLOCK[prefix]}{block[2].removeprefix(prefix)}"] = tensor
        else:
            raise _unexpected(path, name, tensor)
    return tensors


def _unexpected(path: Path, name: str, tensor: Tensor) -> CheckpointError:
    return CheckpointError(f"{path} has a tensor that no published DINOv3 has: {name} {list(tensor.shape)}")


def _split_qkv(prefix: str, kind: str, tensor: Tensor, mask: Tensor | None, path: Path) -> dict[str, Tensor]:
    """Query's, key's and value's own ``kind`` (weight or bias); the key's bias only where no mask takes it away."""
    if tensor.shape[0] % 3:
        raise CheckpointError(f"{path}: {prefix}'s qkv.{kind} must stack three matrices; found {list(tensor.shape)}")
    query, key, value = tensor.chunk(3)
    parts = {"q_proj": query, "k_proj": key, "v_proj": value}
    if kind == "bias" and mask is not None:
        ones = torch.ones(len(query))
        if not torch.equal(mask.float(), torch.cat([ones, 0 * ones, ones])):
            raise CheckpointError(f"{path}: {prefix}'s qkv.bias_mask must be 1 for query and value, 0 for key")
        del parts["k_proj"]
    return {f"{prefix}.{name}.{kind}": part for name, part in parts.items()}


def _vit_architecture(tensors: Mapping[str, Tensor], periods: Tensor | None, path: Path) -> Architecture | None:
    """The architecture by the shapes, and the head count by RoPE's periods, of which each head has a quarter."""
    architecture = infer_vit(_shapes(tensors))
    if architecture is None or periods is None:
        return architecture
    count = periods.numel()
    expected = architecture.rope_theta ** (torch.arange(count, dtype=torch.float32) / count)
    # Released files store them as bfloat16, which has eight bits.
    if not torch.allclose(periods.float(), expected, rtol=2**-8):
        raise CheckpointError(
            f"{path}: rope_embed.periods must be those of base {architecture.rope_theta:g}; found {periods.tolist()}"
        )
    if architecture.hidden_size % (4 * count):
        raise CheckpointError(
            f"{path}: rope_embed.periods has {count} entries, which no number of heads of hidden size "
            f"{architecture.hidden_size} has"
        )
    return replace(architecture, num_heads=architecture.hidden_size // (4 * count))


_CONVNEXT_RENAMES = (
    (re.compile(r"^downsample_layers\.(\d+)\.(\d+)\."), r"stages.\1.downsample_layers.\2."),
    (re.compile(r"^stages\.(\d+)\.(\d+)\.dwconv\."), r"stages.\1.layers.\2.depthwise_conv."),
    (re.compile(r"^stages\.(\d+)\.(\d+)\.norm\."), r"stages.\1.layers.\2.layer_norm."),
    (re.compile(r"^stages\.(\d+)\.(\d+)\.pwconv([12])\."), r"stages.\1.layers.\2.pointwise_conv\3."),
    (re.compile(r"^stages\.(\d+)\.(\d+)\.gamma$"), r"stages.\1.layers.\2.gamma"),
    (re.compile(r"^norm\."), "layer_norm."),
)


def _convnext_tensors(official: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in official.items():
        if name.startswith("norms.3."):  # the final norm a second time: the same module under two names
            continue
        rename = next(((old, new) for old, new in _CONVNEXT_RENAMES if old.match(name)), None)
        if rename is None:
            raise _unexpected(path, name, tensor)
        tensors[rename[0].sub(rename[1], name)] = tensor
    return tensors
