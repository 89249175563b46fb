"""DINOv3's Vision Transformer.

Shapes: B images, N = 1 + R + h × w tokens (CLS, R registers, patches row by row), D channels in H heads of C each.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_ray.config.architecture import ViTArchitecture
from dinov3_ray.network.activation import activation

__all__ = ["Attend", "Turns", "ViT"]

Turns = tuple[Tensor, Tensor]
"""RoPE's cosines and sines of all patches, [N - 1 - R, C] each."""


class Attend(Protocol):
    """What computes attention: query, key and value [B,H,N,C] give one tensor of that shape."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor: ...


class ViT(nn.Module):
    """The whole network.

    Attributes:
        architecture: as given.
        has_cls, num_register_tokens, num_prefix_tokens: what comes before the patches: a CLS token, R, and 1 + R.
        attention: the name of what computes attention; see :meth:`use_attention`.
    """

    has_cls = True

    def __init__(self, architecture: ViTArchitecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.embeddings = _Embeddings(architecture)
        self.rope_embeddings = _Rope(architecture)
        self.layer = nn.ModuleList([_EncoderBlock(architecture) for _ in range(architecture.num_layers)])
        self.norm = nn.LayerNorm(architecture.hidden_size, eps=architecture.layer_norm_eps)
        self.attention = "sdpa"
        self.num_register_tokens = architecture.num_register_tokens
        self.num_prefix_tokens = 1 + self.num_register_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        """What ``FeatureSpec.layers`` counts; each takes tokens [B,N,D] and the :data:`Turns`, and gives tokens."""
        return self.layer

    def use_attention(self, name: str, attend: Attend) -> None:
        """Compute attention with ``attend`` in all blocks."""
        self.attention = name
        for module in self.modules():
            if isinstance(module, _Attention):
                module.attend = attend

    def begin(self, pixels_B3HW: Tensor) -> tuple[Tensor, Turns]:
        """The tokens before the first block, [B,N,D], and what else each block is given."""
        pixels_B3HW = pixels_B3HW.to(self.norm.weight.dtype)
        return self.embeddings(pixels_B3HW), self.rope_embeddings(pixels_B3HW)

    def step(self, block: nn.Module, hidden_BND: Tensor, turns: Turns) -> Tensor:
        """The tokens after ``block``."""
        moved_BND: Tensor = block(hidden_BND, turns)
        return moved_BND

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """All tokens after the final norm, [B,N,D]."""
        hidden_BND, turns = self.begin(pixels_B3HW)
        for block in self.layer:
            hidden_BND = self.step(block, hidden_BND, turns)
        tokens_BND: Tensor = self.norm(hidden_BND)
        return tokens_BND


class _Embeddings(nn.Module):
    """Pixels to tokens. The mask token is part of every checkpoint, and served pretraining only."""

    def __init__(self, architecture: ViTArchitecture) -> None:
        super().__init__()
        width, patch = architecture.hidden_size, architecture.patch_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_tokens = nn.Parameter(torch.empty(1, architecture.num_register_tokens, width))
        self.patch_embeddings = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        patches_BND = self.patch_embeddings(pixels_B3HW).flatten(2).transpose(1, 2)
        images = patches_BND.shape[0]  # not len(), which a trace takes for a constant
        first = [token.expand(images, -1, -1) for token in (self.cls_token, self.register_tokens)]
        return torch.cat([*first, patches_BND], dim=1)


class _Rope(nn.Module):
    """The angles by which queries and keys of a patch are turned: its place in the image, from -1 to 1 down and across,
    at several frequencies.
    """

    inv_freq: Tensor

    def __init__(self, architecture: ViTArchitecture) -> None:
        super().__init__()
        self._patch = architecture.patch_size
        channels = architecture.hidden_size // architecture.num_heads
        # Made on the CPU, and in float32, whatever the defaults are: no file has them, and no device may round them in
        # a way of its own.
        steps = torch.arange(0, 1, 4 / channels, dtype=torch.float32, device="cpu")
        self.register_buffer("inv_freq", 1 / architecture.rope_theta**steps, persistent=False)

    def forward(self, pixels_B3HW: Tensor) -> Turns:
        down, across = (self._centres(side // self._patch) for side in pixels_B3HW.shape[-2:])
        places = torch.stack(torch.meshgrid(down, across, indexing="ij"), dim=-1).flatten(0, 1)
        angles = 2 * math.pi * places[:, :, None] * self.inv_freq
        angles = angles.flatten(1, 2).tile(2)
        return angles.cos().to(pixels_B3HW.dtype), angles.sin().to(pixels_B3HW.dtype)

    def _centres(self, patches: int) -> Tensor:
        """Of the patches along one side, float32."""
        middles = torch.arange(0.5, patches, dtype=torch.float32, device=self.inv_freq.device)
        return 2.0 * (middles / patches) - 1.0


class _EncoderBlock(nn.Module):
    def __init__(self, architecture: ViTArchitecture) -> None:
        super().__init__()
        width, eps = architecture.hidden_size, architecture.layer_norm_eps
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = _Attention(architecture)
        self.layer_scale1 = _LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = _FeedForward(architecture)
        self.layer_scale2 = _LayerScale(width)

    def forward(self, hidden_BND: Tensor, turns: Turns) -> Tensor:
        hidden_BND = self.layer_scale1(self.attention(self.norm1(hidden_BND), turns)) + hidden_BND
        moved: Tensor = self.layer_scale2(self.mlp(self.norm2(hidden_BND))) + hidden_BND
        return moved


class _Attention(nn.Module):
    attend: Attend

    def __init__(self, architecture: ViTArchitecture) -> None:
        super().__init__()
        width = architecture.hidden_size
        self._heads = architecture.num_heads
        self._scale = (width // self._heads) ** -0.5
        self.q_proj = nn.Linear(width, width, bias=architecture.query_bias)
        self.k_proj = nn.Linear(width, width, bias=architecture.key_bias)
        self.v_proj = nn.Linear(width, width, bias=architecture.value_bias)
        self.o_proj = nn.Linear(width, width, bias=architecture.proj_bias)
        self.attend = F.scaled_dot_product_attention

    def forward(self, hidden_BND: Tensor, turns: Turns) -> Tensor:
        query, key, value = (
            # Not unflatten(), which torch.compile cannot trace where the process has a default device.
            project(hidden_BND).view(*hidden_BND.shape[:2], self._heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended_BHNC = self.attend(_turned(query, turns), _turned(key, turns), value, scale=self._scale)
        mixed: Tensor = self.o_proj(attended_BHNC.transpose(1, 2).flatten(2))
        return mixed


def _turned(tokens_BHNC: Tensor, turns: Turns) -> Tensor:
    """The tokens, those of patches turned: channel i together with i + C/2."""
    cosines, sines = turns
    patches = cosines.shape[0]  # not len(), as in the embeddings
    others, placed = torch.split(tokens_BHNC, [tokens_BHNC.shape[-2] - patches, patches], dim=-2)
    first, second = placed.chunk(2, dim=-1)
    return torch.cat((others, placed * cosines + torch.cat((-second, first), dim=-1) * sines), dim=-2)


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(width))

    def forward(self, hidden_BND: Tensor) -> Tensor:
        return hidden_BND * self.lambda1


class _FeedForward(nn.Module):
    """Two linear layers, or three if it is gated (SwiGLU)."""

    def __init__(self, architecture: ViTArchitecture) -> None:
        super().__init__()
        width, inner, bias = architecture.hidden_size, architecture.intermediate_size, architecture.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias) if architecture.gated_mlp else None
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act = activation(architecture.hidden_act)

    def forward(self, hidden_BND: Tensor) -> Tensor:
        up = self.up_proj(hidden_BND)
        inner = self.act(up) if self.gate_proj is None else self.act(self.gate_proj(hidden_BND)) * up
        down: Tensor = self.down_proj(inner)
        return down
