"""The layouts in which others store DINOv3's tensors, Meta's and timm's, in terms of transformers' names.

Names and shapes are all that is needed here, whatever holds the tensors. What differs from transformers: query, key and
value lie in one matrix, and Meta's have a bias for the key that a mask takes away; the rest has other names. Meta's
``periods`` (RoPE), ``bias_mask`` and ``local_cls_norm`` (of training crops) have no counterpart. timm has no mask
token, which only training uses, and leaves out biases that are zero, unless a variant's name ends in ``qkvb``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dinov3_ray.config.architecture import Shapes
from dinov3_ray.errors import CheckpointError

__all__ = ["MASK_TOKEN", "ROOTS", "Layout", "StoredPart", "Translation", "foreign_model", "layout_of", "translate"]

Layout = Literal["transformers", "Meta", "timm"]

MASK_TOKEN = "embeddings.mask_token"  # noqa: S105
_QKV = ("q_proj", "k_proj", "v_proj")

ROOTS = (
    "embeddings.patch_embeddings.weight",
    "stages.0.downsample_layers.0.weight",
    "patch_embed.proj.weight",
    "downsample_layers.0.0.weight",
    "stem.0.weight",
)
"""In each layout of each family, the first tensor. What stands before such a name is the name of the backbone."""


@dataclass(frozen=True, slots=True)
class StoredPart:
    """Where one of transformers' tensors is in a file.

    Attributes:
        key: the name of the stored tensor.
        shape: of the part, as transformers has it.
        third: which third of the stored rows it is (0 query, 1 key, 2 value); None: all of them.
    """

    key: str
    shape: tuple[int, ...]
    third: int | None = None


@dataclass(frozen=True, slots=True)
class Translation:
    """Parts by transformers' names, and the names of stored tensors that a frozen backbone does not need.

    Attributes:
        mask_token: the shape of a mask token that the file does not have. No output depends on it: zeros will do.
        head: names of what was trained on top of the backbone (a classifier, a projector, ...).
    """

    parts: dict[str, StoredPart]
    head: tuple[str, ...]
    mask_token: tuple[int, ...] | None


def layout_of(names: Iterable[str]) -> Layout | None:
    """Whose names these are; None if they are nobody's that is known here."""
    known = set(names)
    if "embeddings.patch_embeddings.weight" in known or "stages.0.downsample_layers.0.weight" in known:
        return "transformers"
    if "pos_embed" in known:
        return None
    if "reg_token" in known or "stem.0.weight" in known:
        return "timm"
    if "storage_tokens" in known or "downsample_layers.0.0.weight" in known:
        return "Meta"
    return None


_NOT_NEEDED = re.compile(
    r"rope_embed\.periods$|local_cls_norm\.|blocks\.\d+\.attn\.qkv\.bias_mask$"
    r"|norms\.\d+\."  # of ConvNeXt: the final norm a second time
)
# EUPE's files have projectors; those of a fine-tuned timm model, a classifier.
_HEAD = re.compile(r"(dino_|ibot_|linear_)?head\.(?!norm\.)|projectors\.")
_VIT_RENAMES = (
    (re.compile(r"^cls_token$"), "embeddings.cls_token"),
    (re.compile(r"^mask_token$"), MASK_TOKEN),
    (re.compile(r"^(storage_tokens|reg_token)$"), "embeddings.register_tokens"),
    (re.compile(r"^patch_embed\.proj\."), "embeddings.patch_embeddings."),
    (re.compile(r"^norm\."), "norm."),
    (re.compile(r"^blocks\.(\d+)\.(norm[12])\."), r"layer.\1.\2."),
    (re.compile(r"^blocks\.(\d+)\.(?:ls([12])\.gamma|gamma_([12]))$"), r"layer.\1.layer_scale\2\3.lambda1"),
    (re.compile(r"^blocks\.(\d+)\.attn\.proj\."), r"layer.\1.attention.o_proj."),
    (re.compile(r"^blocks\.(\d+)\.attn\.([qv])_bias$"), r"layer.\1.attention.\2_proj.bias"),
    (re.compile(r"^blocks\.(\d+)\.mlp\.(w1|fc1_g)\."), r"layer.\1.mlp.gate_proj."),
    (re.compile(r"^blocks\.(\d+)\.mlp\.(fc1|fc1_x|w2)\."), r"layer.\1.mlp.up_proj."),
    (re.compile(r"^blocks\.(\d+)\.mlp\.(fc2|w3)\."), r"layer.\1.mlp.down_proj."),
)
_CONVNEXT_RENAMES = (
    (re.compile(r"^downsample_layers\.(\d+)\.(\d+)\."), r"stages.\1.downsample_layers.\2."),
    (re.compile(r"^stem\.(\d+)\."), r"stages.0.downsample_layers.\1."),
    (re.compile(r"^stages\.(\d+)\.downsample\.(\d+)\."), r"stages.\1.downsample_layers.\2."),
    (re.compile(r"^stages\.(\d+)\.(?:blocks\.)?(\d+)\.(?:dwconv|conv_dw)\."), r"stages.\1.layers.\2.depthwise_conv."),
    (re.compile(r"^stages\.(\d+)\.(?:blocks\.)?(\d+)\.norm\."), r"stages.\1.layers.\2.layer_norm."),
    (
        re.compile(r"^stages\.(\d+)\.(?:blocks\.)?(\d+)\.(?:pwconv|mlp\.fc)([12])\."),
        r"stages.\1.layers.\2.pointwise_conv\3.",
    ),
    (re.compile(r"^stages\.(\d+)\.(?:blocks\.)?(\d+)\.gamma$"), r"stages.\1.layers.\2.gamma"),
    (re.compile(r"^(?:head\.)?norm\."), "layer_norm."),
)
_STACKED = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")


def translate(shapes: Shapes, where: str) -> Translation:
    """Find transformers' tensors among those of Meta's or timm's layout.

    Args:
        shapes: of the stored tensors, by name.
        where: what a message calls the file.

    Raises:
        CheckpointError: names a tensor that no model of this architecture has.
    """
    renames = _VIT_RENAMES if "patch_embed.proj.weight" in shapes else _CONVNEXT_RENAMES
    parts: dict[str, StoredPart] = {}
    head = []
    for key, shape in shapes.items():
        if _NOT_NEEDED.match(key):
            continue
        if _HEAD.match(key):
            head.append(key)
            continue
        stacked = _STACKED.match(key)
        if stacked and renames is _VIT_RENAMES:
            masked = f"blocks.{stacked[1]}.attn.qkv.bias_mask" in shapes
            parts |= _thirds(key, shape, f"layer.{stacked[1]}.attention", stacked[2], masked, where)
            continue
        rename = next(((old, new) for old, new in renames if old.match(key)), None)
        if rename is None:
            raise CheckpointError(f"{where} has a tensor that no published DINOv3 has: {key} {list(shape)}")
        name = rename[0].sub(rename[1], key)
        parts[name] = StoredPart(key, (1, 1, shape[-1]) if name == MASK_TOKEN and shape else shape)
    cls = parts.get("embeddings.cls_token")
    return Translation(parts, tuple(head), cls.shape if cls is not None and MASK_TOKEN not in parts else None)


def _thirds(
    key: str, shape: tuple[int, ...], prefix: str, kind: str, masked: bool, where: str
) -> dict[str, StoredPart]:
    """Query's, key's and value's own ``kind`` (weight or bias); the key's bias only where no mask takes it away."""
    if not shape or shape[0] % 3:
        raise CheckpointError(f"{where}: {key} must stack three matrices; found {list(shape)}")
    part = (shape[0] // 3, *shape[1:])
    names = enumerate(_QKV)
    kept = [(third, name) for third, name in names if not (kind == "bias" and masked and name == "k_proj")]
    return {f"{prefix}.{name}.{kind}": StoredPart(key, part, third) for third, name in kept}


_POSITIONS = re.compile(r"(^|\.)(pos_embed|position_embeddings?)(\.weight)?$")
_PATCHES = re.compile(r"patch_embed\w*\.(proj\w*\.)?weight$")
_DINOV2 = {384: "small", 768: "base", 1024: "large", 1536: "giant"}


def foreign_model(shapes: Shapes) -> str | None:
    """What other model has tensors of these names and shapes, and what to use for it; None if that is unknown."""
    learned = next((name for name in shapes if _POSITIONS.search(name)), "")
    if not learned:
        return None
    patches = next((shape for name, shape in shapes.items() if _PATCHES.search(name)), ())
    positions = f"learned positions ({learned} {list(shapes[learned])})"
    scaled = any(re.search(r"(ls1\.gamma|gamma_1|layer_scale1\.lambda1)$", name) for name in shapes)
    if len(patches) == 4 and patches[-1] == 14 and scaled:
        registers = any(re.search(r"(register_tokens|reg_token)$", name) for name in shapes)
        size = _DINOV2.get(patches[0])
        hub = f"facebook/dinov2-{'with-registers-' if registers else ''}{size}" if size else "facebook/dinov2-..."
        return (
            f"a DINOv2 model{' with registers' if registers else ''}: patches of 14 px, and {positions}. Take its "
            f"directory in transformers' layout ({hub} on the hub), with dinov3_ray.model.TransformersTeacher"
        )
    return (
        f"a Vision Transformer with {positions}, where DINOv3's are rotary. Take its directory in transformers' "
        "layout, with dinov3_ray.model.TransformersTeacher"
    )
