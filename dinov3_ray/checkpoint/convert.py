"""Converts checkpoints to transformers' layout: Meta's, timm's, and pickles of transformers' own.

What a file is, its content decides, not its name. See :mod:`dinov3_ray.config.layouts` for how layouts differ.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from dinov3_ray.checkpoint.located import Located, locate
from dinov3_ray.checkpoint.tensors import check_shapes
from dinov3_ray.checkpoint.verify import Progress, ignore_progress
from dinov3_ray.checkpoint.wrapped import Backbone, find_backbone, read_files, shapes_of, weight_types
from dinov3_ray.checkpoint.write import DEFAULT_SHARD_BYTES, require_free, write_directory
from dinov3_ray.config.architecture import Architecture, ViTArchitecture, infer_convnext, infer_vit
from dinov3_ray.config.directory import CONFIG_FILE, PREPROCESSOR_FILE, statistics_named
from dinov3_ray.config.files import read_architecture, read_json, read_preprocessing
from dinov3_ray.config.layouts import MASK_TOKEN, StoredPart, translate
from dinov3_ray.config.license import DINOV3_LICENSE, stated_license
from dinov3_ray.config.preprocessing import Preprocessing
from dinov3_ray.config.timm import TimmFile, is_timm, read_timm, timm_heads
from dinov3_ray.config.variants import OFFICIAL_HASHES, STATISTICS, VARIANTS, preprocessing_for, variant_of
from dinov3_ray.errors import CheckpointError, ConfigError

__all__ = ["Conversion", "convert_checkpoint"]

_BLOCK = 16 << 20
_DEFAULT_SIZE = 224
_OFFICIAL_NAME = re.compile(r"dinov3_\w+_(?:lvd1689m|sat493m)\w*?(?:-([0-9a-f]{8}))?(?![0-9a-z])", re.IGNORECASE)
_HASH = re.compile(r"(?<![0-9a-z])[0-9a-f]{8}(?![0-9a-z])", re.IGNORECASE)
_TRAILING_HASH = re.compile(r"[-_.]([0-9a-f]{8})(?: \(\d+\)|-copy)?(?:\.[a-z]+)+$", re.IGNORECASE)
_EUPE_LICENSE = "fair-noncommercial-research-license"


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was made.

    Attributes:
        directory: where.
        variant: the published one with this architecture (biases of query, key and value may be left out), or None.
        statistics: "lvd1689m", "sat493m", or "own": mean and std that came with the weights, and are neither's.
        notes: what a user should know: which of several backbones was taken, what was left out.
    """

    directory: Path
    architecture: Architecture
    variant: str | None
    statistics: str
    notes: tuple[str, ...] = ()


def convert_checkpoint(
    source: str | PathLike[str],
    directory: str | PathLike[str],
    *,
    statistics: str = "auto",
    image_size: int | tuple[int, int] | None = None,
    backbone: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = ignore_progress,
) -> Conversion:
    """Write the checkpoint ``source`` as a model directory, keeping its dtype.

    The architecture comes from the shapes. In a training checkpoint the backbone is found in whatever dicts and names
    are around it (``model``, ``state_dict``, ``teacher.backbone``, ``module.``, ``_orig_mod.``); a teacher's is taken
    before a student's. Pickles are read with ``weights_only=True``: they cannot run code. Damage is found by the hash
    in an official name, and by the checksums in torch's files; torch's older format and safetensors have none.

    Args:
        source: a file in Meta's or timm's layout, or of transformers' (``pytorch_model.bin``); safetensors or torch's
            format; or a folder of the hub with such a file, and config.json if there is one.
        directory: must not exist, or be empty.
        statistics: of the images in training: ``lvd1689m`` (ImageNet's mean and std), ``sat493m``, or ``auto``: what
            comes with the weights (timm's pretrained_cfg, preprocessor_config.json, an official file's hash), or the
            file's name says. If nothing does, it must be given.
        image_size: the size in preprocessor_config.json: one int, or (h, w); by default what comes with the weights,
            or 224.
        backbone: the dotted name of the backbone to take, such as ``student.backbone``, where there are several.
        shard_bytes: the largest size of one file.
        progress: called with the bytes that were hashed, and with those of each tensor written.

    Raises:
        CheckpointError: ``source`` is not such a checkpoint, or damaged, or ``directory`` is in use.
        ConfigError: an option is wrong, or ``statistics`` must be given.
    """
    path = Path(source).expanduser()
    if statistics not in ("auto", *STATISTICS):
        raise ConfigError(f"statistics must be one of auto, {', '.join(STATISTICS)}; got {statistics!r}")
    require_free(Path(directory))  # before a large file is hashed
    located = locate(path)
    types = weight_types(located.files)
    digest, intact = _check_hash(located, progress)
    found = find_backbone(read_files(types, intact=intact), backbone, str(path))
    timm = _timm_of(located)
    head: tuple[str, ...] = ()
    if found.layout == "transformers":
        tensors = found.tensors
    else:
        _check_masks(found.tensors, path)
        translation = translate(shapes_of(found.tensors), str(path))
        # Renamed and cut, but not read yet: the file is mapped, and each tensor is a view of it.
        tensors = {name: _part(found.tensors[part.key], part) for name, part in translation.parts.items()}
        if translation.mask_token is not None:
            tensors[MASK_TOKEN] = torch.zeros(translation.mask_token, dtype=tensors["embeddings.cls_token"].dtype)
        head = translation.head
    architecture = _architecture(found, tensors, located, timm, path)
    _check_depth(architecture, located, path)
    check_shapes(str(path), architecture.tensors(), shapes_of(tensors))
    dtype = _common_dtype(path, tensors)
    evidence = _Evidence(path, located, found, architecture, digest)
    preprocessing, named = _preprocessing(evidence, timm, statistics, image_size)
    doubt = evidence.known_statistics not in (None, named) and statistics != "auto"
    write_directory(
        Path(directory),
        architecture,
        preprocessing,
        tensors.__getitem__,
        dtype=dtype,
        shard_bytes=shard_bytes,
        progress=progress,
        license=_license(evidence, timm),
    )
    notes = [*found.notes, *_unusual_depth(architecture)]
    if head:
        notes.append(f"left out, since a teacher has no head: {_some(head)}")
    if doubt:
        notes.append(f"what is in the file is Meta's model with statistics of {evidence.known_statistics}, not {named}")
    return Conversion(Path(directory), architecture, variant_of(architecture), named, tuple(notes))


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What is known of a checkpoint; ``digest`` is the SHA-256 of its file, if it is one."""

    path: Path
    located: Located
    found: Backbone
    architecture: Architecture
    digest: str | None

    @property
    def names(self) -> str:
        """What may say where the weights come from: the file's name, and its folders' if they are a model's."""
        path = self.path.absolute()
        return " ".join([path.name, *(folder.name for folder in path.parents[:3] if self.located.folder)]).lower()

    @property
    def known_statistics(self) -> str | None:
        """What the content says: an official file's hash, or tensors that one published model alone has."""
        if known := OFFICIAL_HASHES.get((self.digest or "")[:8]):
            return known
        # Of the published ViT-L, only the satellite one has a norm of its own for training crops.
        untied = any(name.startswith("local_cls_norm.") for name in self.found.tensors)
        return "sat493m" if untied and variant_of(self.architecture) == "vitl16" else None


def _check_hash(located: Located, progress: Progress) -> tuple[str | None, bool]:
    """The SHA-256 of a single file, and whether it begins with the digits of an official name, as it must."""
    if len(located.files) > 1:
        return None, False
    path = located.files[0]
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            progress(len(block))
    promised = _promised(path.name)
    if not digest.hexdigest().startswith(promised):
        raise CheckpointError(
            f"{path} is damaged or changed: the SHA-256 of the official file begins with {promised}, as its name says, "
            f"but this file's with {digest.hexdigest()[:8]}. Download it again; or, if it was changed on purpose, take "
            f"{promised} out of its name"
        )
    return digest.hexdigest(), bool(promised)


def _promised(name: str) -> str:
    """The first digits of the SHA-256 that the file of this name has; empty if it names none.

    A number alone may be a date, and is taken for a hash in Meta's own names only.
    """
    official = _OFFICIAL_NAME.search(name)
    if official and official[1]:
        return official[1].lower()
    words = [word.lower() for word in _HASH.findall(name)]
    known = [word for word in words if word in OFFICIAL_HASHES]
    trailing = _TRAILING_HASH.search(name) if "dinov3" in name.lower() else None
    if trailing and not known and not trailing[1].isdecimal():
        return trailing[1].lower()
    return known[-1] if known else ""


def _timm_of(located: Located) -> TimmFile | None:
    if located.folder is None or not is_timm(located.config):
        return None
    return read_timm(located.config, located.folder / CONFIG_FILE)


def _part(tensor: Tensor, part: StoredPart) -> Tensor:
    return (tensor if part.third is None else tensor.chunk(3)[part.third]).reshape(part.shape)


def _check_masks(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, mask in tensors.items():
        if name.endswith(".attn.qkv.bias_mask"):
            ones = torch.ones(len(mask) // 3)
            if not torch.equal(mask.float(), torch.cat([ones, 0 * ones, ones])):
                raise CheckpointError(f"{path}: {name} must be 1 for query and value, 0 for key")


def _architecture(
    found: Backbone, tensors: Mapping[str, Tensor], located: Located, timm: TimmFile | None, path: Path
) -> Architecture:
    shapes = shapes_of(tensors)
    vit = infer_vit(shapes)
    architecture: Architecture | None = vit or infer_convnext(shapes)
    if architecture is None:
        raise CheckpointError(
            f"{path} is not an official DINOv3 checkpoint, nor timm's, as a whole; it holds {_some(found.tensors)}"
        )
    periods = found.tensors.get("rope_embed.periods")
    if vit is not None and periods is not None:
        return _with_heads(vit, periods, path)
    if located.folder and located.config and found.layout == "transformers":
        return read_architecture(located.folder, lambda: shapes)
    if timm is not None:
        return timm_heads(timm, architecture)
    if vit is not None and not vit.num_heads:
        raise CheckpointError(
            f"{path} does not say the number of heads of its hidden size {vit.hidden_size}, which no published model "
            "has: put it in a folder, as model.safetensors or pytorch_model.bin, with the config.json that does"
        )
    return architecture


def _check_depth(architecture: Architecture, located: Located, path: Path) -> None:
    """Refuse a part of a model: weights of fewer, or more, layers than the config.json beside them has."""
    described = located.files[0].parent / CONFIG_FILE
    try:
        values = located.config or read_json(described, remedy="")
    except ConfigError:  # it is not there, or another program's: the file stands for itself
        return
    if isinstance(values.get("model_args"), dict):
        values = values["model_args"]
    sizes: tuple[object, object]
    keys: tuple[str, ...]
    if isinstance(architecture, ViTArchitecture):
        sizes, keys = (architecture.hidden_size, architecture.num_layers), ("num_hidden_layers", "depth")
        width = values.get("hidden_size", values.get("embed_dim"))
    else:
        sizes, keys = (list(architecture.hidden_sizes), list(architecture.depths)), ("depths",)
        width = values.get("hidden_sizes", values.get("dims"))
    for key in keys:
        if key in values and width == sizes[0] and values[key] != sizes[1]:
            raise CheckpointError(
                f"{path} has {sizes[1]} layers, but {described} says {key} {values[key]}: take all files of the model; "
                "or, if they belong to two models, move one of them"
            )


def _unusual_depth(architecture: Architecture) -> Iterator[str]:
    """What a user should know where the shapes alone say how deep the model is, and may say it of a part of one."""
    kind, width = type(architecture), architecture.hidden_size
    known = {_depth(other) for other in VARIANTS.values() if isinstance(other, kind) and other.hidden_size == width}
    if not known:  # a width of its own
        known = {_depth(other) for name, other in VARIANTS.items() if isinstance(other, kind) and "test" not in name}
    if _depth(architecture) not in known:
        listed = " or ".join(_listed(depth) for depth in sorted(known))
        yield (
            f"it has {_listed(_depth(architecture))} layers, where published models have {listed}: if the "
            "file is a part of a model, convert the whole"
        )


def _listed(depth: tuple[int, ...]) -> str:
    return "-".join(map(str, depth))


def _depth(architecture: Architecture) -> tuple[int, ...]:
    return (architecture.num_layers,) if isinstance(architecture, ViTArchitecture) else architecture.depths


def _with_heads(architecture: ViTArchitecture, periods: Tensor, path: Path) -> Architecture:
    """With the head count that RoPE's periods tell, of which each head has a quarter."""
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


def _preprocessing(
    evidence: _Evidence, timm: TimmFile | None, statistics: str, image_size: int | tuple[int, int] | None
) -> tuple[Preprocessing, str]:
    """The rule to write, and the name of its statistics."""
    folder, patch_size = evidence.located.folder, evidence.architecture.patch_size
    if statistics == "auto" and timm is not None:
        rule = timm.preprocessing(image_size, patch_size)
    elif statistics == "auto" and folder and (folder / PREPROCESSOR_FILE).is_file():
        rule = read_preprocessing(folder, evidence.architecture)
        if image_size is not None:
            rule = rule.resized_to((image_size, image_size) if isinstance(image_size, int) else image_size)
    else:
        name = _statistics(evidence) if statistics == "auto" else statistics
        if image_size is None:
            image_size = _DEFAULT_SIZE if timm is None else timm.pretrained_cfg.input_size[1:]
        return preprocessing_for(STATISTICS[name], image_size, patch_size), name
    return rule, next((name for name, known in STATISTICS.items() if known == (rule.mean, rule.std)), "own")


def _statistics(evidence: _Evidence) -> str:
    if (evidence.digest or "")[:8] in OFFICIAL_HASHES:
        return OFFICIAL_HASHES[(evidence.digest or "")[:8]]
    named, known = statistics_named(evidence.names), evidence.known_statistics
    said = named | {known} if known else named
    if len(said) == 1:
        return said.pop()
    choice = (
        "lvd1689m (ImageNet's mean and std: all models but two) or sat493m (the satellite ViT-L and 7B); "
        "statistics='lvd1689m' or --statistics lvd1689m, for instance"
    )
    if said:
        what = (
            "its name says both" if len(named) > 1 else "its name says lvd1689m, but it has a satellite model's tensors"
        )
        raise ConfigError(f"statistics must be given for {evidence.path}, since {what}: {choice}")
    raise ConfigError(
        f"statistics must be given: neither the name of {evidence.path} nor anything in it says which mean and std its "
        f"training images had. Give {choice}"
    )


def _license(evidence: _Evidence, timm: TimmFile | None) -> str | None:
    if timm is not None and timm.pretrained_cfg.license:
        return timm.pretrained_cfg.license
    if evidence.located.folder and (stated := stated_license(evidence.located.folder)):
        return stated
    if (evidence.digest or "")[:8] in OFFICIAL_HASHES or _OFFICIAL_NAME.search(evidence.path.name):
        return DINOV3_LICENSE
    return _EUPE_LICENSE if "eupe" in evidence.names else None


def _common_dtype(path: Path, tensors: Mapping[str, Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        names = ", ".join(sorted(map(str, dtypes)))
        raise CheckpointError(f"{path} must hold one of float32, bfloat16 and float16 throughout; found {names}")
    return dtypes.pop()


def _some(names: Mapping[str, Tensor] | tuple[str, ...]) -> str:
    return ", ".join(list(names)[:6]) + (", ..." if len(names) > 6 else "")
