"""The architecture of a model in plain numbers: of a DINOv3, enough to build it, and to list the tensors that it has.

Tensor names and shapes are those of released checkpoints in transformers' layout (``models/dinov3_vit`` and
``models/dinov3_convnext``). D hidden size, R register tokens, p patch size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

__all__ = [
    "Architecture",
    "ConvNextArchitecture",
    "Family",
    "Shapes",
    "TransformersArchitecture",
    "ViTArchitecture",
    "heads_for",
    "infer_convnext",
    "infer_vit",
]

Family = Literal["vit", "convnext"]
Shapes = Mapping[str, tuple[int, ...]]

_BLOCK = re.compile(r"^layer\.(\d+)\.")
_STAGE_BLOCK = re.compile(r"^stages\.(\d+)\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ViTArchitecture:
    """A Vision Transformer with RoPE, LayerScale and register tokens."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    gated_mlp: bool = False
    num_register_tokens: int = 4
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    rope_theta: float = 100.0
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True

    family: ClassVar[Family] = "vit"

    @property
    def layer_strides(self) -> tuple[int, ...]:
        """Pixels per cell of each layer's map."""
        return (self.patch_size,) * self.num_layers

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint with its shape."""
        width, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.cls_token": (1, 1, width),
            "embeddings.mask_token": (1, 1, width),
            "embeddings.register_tokens": (1, self.num_register_tokens, width),
            "embeddings.patch_embeddings.weight": (width, 3, self.patch_size, self.patch_size),
            "embeddings.patch_embeddings.bias": (width,),
        }
        for block in range(self.num_layers):
            shapes |= {f"layer.{block}.{name}": shape for name, shape in self._block(width, inner).items()}
        return shapes | {"norm.weight": (width,), "norm.bias": (width,)}

    def _block(self, width: int, inner: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"layer_scale1.lambda1": (width,), "layer_scale2.lambda1": (width,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
        linears = {
            "attention.q_proj": (width, width, self.query_bias),
            "attention.k_proj": (width, width, self.key_bias),
            "attention.v_proj": (width, width, self.value_bias),
            "attention.o_proj": (width, width, self.proj_bias),
            "mlp.up_proj": (inner, width, self.mlp_bias),
            "mlp.down_proj": (width, inner, self.mlp_bias),
        }
        if self.gated_mlp:
            linears["mlp.gate_proj"] = (inner, width, self.mlp_bias)
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)
        return shapes

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors().values())


@dataclass(frozen=True, slots=True)
class ConvNextArchitecture:
    """A ConvNeXt of four stages; its "layers" are the stages, its "CLS" the normed global average."""

    hidden_sizes: tuple[int, ...]
    depths: tuple[int, ...]
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6

    family: ClassVar[Family] = "convnext"
    num_register_tokens: ClassVar[int] = 0

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.hidden_sizes[-1]

    @property
    def patch_size(self) -> int:
        """Pixels per cell of the final map: the stem divides by 4, each later stage by 2."""
        return self.layer_strides[-1]

    @property
    def num_layers(self) -> int:
        return len(self.depths)

    @property
    def layer_strides(self) -> tuple[int, ...]:
        """Pixels per cell of each stage's map."""
        return tuple(4 * 2**stage for stage in range(len(self.depths)))

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint with its shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        before = 3
        for stage, (width, depth) in enumerate(zip(self.hidden_sizes, self.depths, strict=True)):
            # The stem is convolution then norm; the later downsamplings are norm then convolution.
            conv, norm, kernel, normed = (0, 1, 4, width) if stage == 0 else (1, 0, 2, before)
            prefix = f"stages.{stage}.downsample_layers"
            shapes[f"{prefix}.{conv}.weight"] = (width, before, kernel, kernel)
            shapes[f"{prefix}.{conv}.bias"] = (width,)
            shapes |= {f"{prefix}.{norm}.weight": (normed,), f"{prefix}.{norm}.bias": (normed,)}
            for block in range(depth):
                inner = f"stages.{stage}.layers.{block}"
                shapes |= {
                    f"{inner}.gamma": (width,),
                    f"{inner}.depthwise_conv.weight": (width, 1, 7, 7),
                    f"{inner}.depthwise_conv.bias": (width,),
                    f"{inner}.layer_norm.weight": (width,),
                    f"{inner}.layer_norm.bias": (width,),
                    f"{inner}.pointwise_conv1.weight": (4 * width, width),
                    f"{inner}.pointwise_conv1.bias": (4 * width,),
                    f"{inner}.pointwise_conv2.weight": (width, 4 * width),
                    f"{inner}.pointwise_conv2.bias": (width,),
                }
            before = width
        return shapes | {"layer_norm.weight": (before,), "layer_norm.bias": (before,)}

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors().values())


Architecture = ViTArchitecture | ConvNextArchitecture


@dataclass(frozen=True, slots=True)
class TransformersArchitecture:
    """A vision model of transformers in plain values.

    Attributes:
        model_type: transformers' name of the vision model; of a two-tower model, that of its vision tower.
        native_size: (h, w) of the images that its positions were learned for.
        settings: what else its configuration says other than its class's defaults, as JSON; for fingerprints.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    patch_size: int
    num_register_tokens: int
    native_size: tuple[int, int]
    settings: str

    @property
    def family(self) -> str:
        return self.model_type


# Of published models by hidden size: DINOv3's, EUPE's T (192), and the variants for tests (128).
_HEADS = {128: 2, 192: 3, 384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32}


def heads_for(hidden_size: int) -> int:
    """The number of heads of the published models of this size; 0 if there are none.

    RoPE leaves no trace of the head size in the weights: of other models, something else must say it.
    """
    return _HEADS.get(hidden_size, 0)


def infer_vit(shapes: Shapes) -> ViTArchitecture | None:
    """The architecture of a ViT checkpoint by its tensors' shapes; None where a needed tensor is missing.

    The number of heads is that of published models of its size, or 0 if there are none.
    """
    patches = shapes.get("embeddings.patch_embeddings.weight", ())
    registers = shapes.get("embeddings.register_tokens", ())
    up = shapes.get("layer.0.mlp.up_proj.weight", ())
    if len(patches) != 4 or len(registers) != 3 or len(up) != 2:
        return None
    blocks = {int(match[1]) for name in shapes if (match := _BLOCK.match(name))}
    gated = "layer.0.mlp.gate_proj.weight" in shapes
    return ViTArchitecture(
        hidden_size=patches[0],
        num_layers=max(blocks) + 1,
        num_heads=heads_for(patches[0]),
        intermediate_size=up[0],
        gated_mlp=gated,
        num_register_tokens=registers[1],
        patch_size=patches[-1],
        hidden_act="silu" if gated else "gelu",
        query_bias="layer.0.attention.q_proj.bias" in shapes,
        key_bias="layer.0.attention.k_proj.bias" in shapes,
        value_bias="layer.0.attention.v_proj.bias" in shapes,
        proj_bias="layer.0.attention.o_proj.bias" in shapes,
        mlp_bias="layer.0.mlp.up_proj.bias" in shapes,
    )


def infer_convnext(shapes: Shapes) -> ConvNextArchitecture | None:
    """The architecture of a ConvNeXt checkpoint by its tensors' shapes; None where a needed tensor is missing."""
    depths: dict[int, int] = {}
    for name in shapes:
        if match := _STAGE_BLOCK.match(name):
            stage, block = int(match[1]), int(match[2])
            depths[stage] = max(depths.get(stage, 0), block + 1)
    widths = [shapes.get(f"stages.{stage}.layers.0.gamma", (0,))[0] for stage in sorted(depths)]
    if not depths or sorted(depths) != list(range(len(depths))) or 0 in widths:
        return None
    return ConvNextArchitecture(tuple(widths), tuple(depths[stage] for stage in range(len(depths))))
