"""The published DINOv3 variants with their image statistics, and tiny variants for tests and demonstrations."""

from __future__ import annotations

import re
from dataclasses import replace

from dinov3_ray.config.architecture import Architecture, ConvNextArchitecture, ViTArchitecture, heads_for
from dinov3_ray.config.preprocessing import Preprocessing
from dinov3_ray.errors import ConfigError

__all__ = [
    "IMAGENET",
    "OFFICIAL_HASHES",
    "SAT493M",
    "STATISTICS",
    "VARIANTS",
    "find_variant",
    "preprocessing_for",
    "variant_of",
]


def _vit(hidden_size: int, layers: int, inner: int, *, swiglu: bool = False, qkv_bias: bool = True) -> ViTArchitecture:
    return ViTArchitecture(
        hidden_size=hidden_size,
        num_layers=layers,
        num_heads=heads_for(hidden_size),
        intermediate_size=inner,
        gated_mlp=swiglu,
        hidden_act="silu" if swiglu else "gelu",
        query_bias=qkv_bias,
        value_bias=qkv_bias,
    )


VARIANTS: dict[str, Architecture] = {
    "vits16": _vit(384, 12, 1536),
    "vits16plus": _vit(384, 12, 1536, swiglu=True),
    "vitb16": _vit(768, 12, 3072),
    "vitl16": _vit(1024, 24, 4096),
    "vith16plus": _vit(1280, 32, 5120, swiglu=True),
    "vit7b16": _vit(4096, 40, 8192, swiglu=True, qkv_bias=False),
    "convnext-tiny": ConvNextArchitecture((96, 192, 384, 768), (3, 3, 9, 3)),
    "convnext-small": ConvNextArchitecture((96, 192, 384, 768), (3, 3, 27, 3)),
    "convnext-base": ConvNextArchitecture((128, 256, 512, 1024), (3, 3, 27, 3)),
    "convnext-large": ConvNextArchitecture((192, 384, 768, 1536), (3, 3, 27, 3)),
    # Not published: small enough for a forward pass of milliseconds on a CPU.
    "vit-test": _vit(128, 3, 256),
    "vit-test-gated": _vit(128, 2, 192, swiglu=True, qkv_bias=False),
    "convnext-test": ConvNextArchitecture((16, 24, 32, 48), (1, 1, 2, 1)),
}
"""Architectures by name; the names are those of Hugging Face's directories (``dinov3-vits16-pretrain-lvd1689m``)."""

_SHORT = {
    "small": "vits",
    "s": "vits",
    "splus": "vitsplus",
    "base": "vitb",
    "b": "vitb",
    "large": "vitl",
    "l": "vitl",
    "vith": "vithplus",  # no other H was published
    "h": "vithplus",
    "hplus": "vithplus",
    "7b": "vit7b",
    "convnextt": "convnexttiny",
    "convnexts": "convnextsmall",
    "convnextb": "convnextbase",
    "convnextl": "convnextlarge",
}


def find_variant(name: str) -> str:
    """The variant that ``name`` means, however it is spelt: ``vitl16``, ``ViT-L/16``, ``L``, ``dinov3_vitl16``, ...

    Raises:
        ConfigError: lists the names that there are.
    """
    names = {_plain(known): known for known in VARIANTS}
    plain = re.sub(r"^dinov3(?=.)|pretrain.*$", "", _plain(name))
    plain = _SHORT.get(plain, plain)
    if plain not in names:
        raise ConfigError(f"variant must be one of {', '.join(VARIANTS)}; got {name!r}")
    return names[plain]


def _plain(name: str) -> str:
    """Without case, punctuation and the patch size, which is 16 throughout."""
    return re.sub(r"[^a-z0-9]|16", "", name.lower().replace("+", "plus"))


def variant_of(architecture: Architecture) -> str | None:
    """The name of the variant with this architecture; None if there is none.

    Biases of query, key and value do not count: timm leaves out those that are zero.
    """
    return next((name for name, known in VARIANTS.items() if _biased(known) == _biased(architecture)), None)


def _biased(architecture: Architecture) -> Architecture:
    if isinstance(architecture, ConvNextArchitecture):
        return architecture
    return replace(architecture, query_bias=True, key_bias=True, value_bias=True)


Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""(mean, std) of R, G and B in [0, 1]"""

IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Of everything trained on LVD-1689M."""

SAT493M: Statistics = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
"""Of the satellite models, ViT-L and ViT-7B."""

STATISTICS: dict[str, Statistics] = {"lvd1689m": IMAGENET, "sat493m": SAT493M}
"""By the name of the training set, as checkpoint files are named."""

OFFICIAL_HASHES = {
    "08c60483": "lvd1689m",  # ViT-S
    "4057cbaa": "lvd1689m",  # ViT-S+
    "73cec8be": "lvd1689m",  # ViT-B
    "8aa4cbdd": "lvd1689m",  # ViT-L
    "eadcf0ff": "sat493m",  # ViT-L
    "7c1da9a5": "lvd1689m",  # ViT-H+
    "a955f4ea": "lvd1689m",  # ViT-7B
    "a6675841": "sat493m",  # ViT-7B
    "21b726bb": "lvd1689m",  # ConvNeXt tiny
    "296db49d": "lvd1689m",  # ConvNeXt small
    "801f2ba9": "lvd1689m",  # ConvNeXt base
    "61fa432d": "lvd1689m",  # ConvNeXt large
}
"""The training set of Meta's files, by the first digits of their SHA-256, which end their names.

Source: facebookresearch/dinov3, hub/backbones.py.
"""


def preprocessing_for(statistics: Statistics, image_size: int | tuple[int, int], patch_size: int) -> Preprocessing:
    """The rule of the published models: rescale by 1/255, resize to ``image_size``, normalize.

    Raises:
        ConfigError: ``image_size`` is not a size, or smaller than a patch.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(type(side) is int and side >= patch_size for side in size):
        raise ConfigError(f"image_size must be an integer or a pair (h, w), >= {patch_size} each; got {image_size!r}")
    return Preprocessing((size[0], size[1]), None, None, 1 / 255, *statistics, (size[0], size[1]))
