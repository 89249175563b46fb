"""Directories with small vision models of transformers, as the hub has them, but of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

__all__ = [
    "BIT",
    "KINDS",
    "OTHERS",
    "SIGLIP",
    "TOWERS",
    "last_hidden_state",
    "transformers_model",
    "write_transformers",
]

_RESCALE = {"do_rescale": True, "rescale_factor": 0.00392156862745098}
_IMAGENET = {"do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_HALVES = {"do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}

BIT: dict[str, Any] = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_resize": True,
    "image_processor_type": "BitImageProcessor",
    "resample": 3,
    "size": {"shortest_edge": 256},
    **_IMAGENET,
    **_RESCALE,
}
"""preprocessor_config.json of DINOv2."""

SIGLIP: dict[str, Any] = {
    "do_convert_rgb": None,
    "do_resize": True,
    "image_processor_type": "SiglipImageProcessor",
    "processor_class": "SiglipProcessor",
    "resample": 2,
    "size": {"height": 224, "width": 224},
    **_HALVES,
    **_RESCALE,
}
"""preprocessor_config.json of SigLIP2."""

_BLOCKS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
_TOWER = {**_BLOCKS, "intermediate_size": 64}
_AT_64 = {**_TOWER, "image_size": 64, "patch_size": 16}
_TEXT = {**_TOWER, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
_SMALL_BIT = BIT | {"crop_size": {"height": 56, "width": 56}, "size": {"shortest_edge": 64}}
_SMALL_SIGLIP = SIGLIP | {"size": {"height": 64, "width": 64}}

# Of each kind: the class that is saved, its configuration, and preprocessor_config.json. DINOv2's positions are those
# of a larger size than its processor gives, as in the released ones.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dinov2": ("Dinov2Model", {**_BLOCKS, "image_size": 126, "patch_size": 14}, _SMALL_BIT),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        {**_BLOCKS, "image_size": 126, "patch_size": 14, "num_register_tokens": 4},
        _SMALL_BIT,
    ),
    "siglip2": ("SiglipModel", {"vision_config": _AT_64, "text_config": _TEXT}, _SMALL_SIGLIP),
    "clip": (
        "CLIPModel",
        {"vision_config": _AT_64, "text_config": _TEXT},
        {**_SMALL_BIT, "image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"}
        | {"crop_size": 64, "size": 64},
    ),
    "vit": ("ViTForImageClassification", _AT_64, _SMALL_SIGLIP | {"image_processor_type": "ViTImageProcessor"}),
    "deit": (
        "DeiTModel",
        _AT_64,
        _SMALL_SIGLIP | {"image_processor_type": "DeiTImageProcessor", "do_center_crop": False},
    ),
    "contract": (
        "Dinov2WithRegistersModel",
        {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 224, "patch_size": 16}
        | {"num_register_tokens": 4},
        SIGLIP,
    ),
}

_TOWERS = {"vision_config": _AT_64, "text_config": _TEXT}
_OPT = {
    "model_type": "opt",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 64,
    "vocab_size": 50,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 64,
}
_LLAMA = {**_TOWER, "model_type": "llama", "vocab_size": 50}
_BLIP2 = {
    "vision_config": _AT_64,
    "qformer_config": {**_TOWER, "encoder_hidden_size": 32, "vocab_size": 50},
    "text_config": _OPT,
}

TOWERS: dict[str, tuple[dict[str, Any], str]] = {
    "MetaClip2Model": (_TOWERS, "vision_model"),
    "BlipModel": (_TOWERS, "vision_model"),
    "BlipForConditionalGeneration": (_TOWERS, "vision_model"),
    "AltCLIPModel": (
        {"vision_config": _AT_64, "text_config": {**_TEXT, "project_dim": 16, "pad_token_id": 1}},
        "vision_model",
    ),
    "CLIPSegModel": (_TOWERS, "vision_model"),
    "OwlViTModel": (_TOWERS, "vision_model"),
    "OwlViTForObjectDetection": (_TOWERS, "owlvit.vision_model"),
    "Owlv2Model": (_TOWERS, "vision_model"),
    "Blip2Model": (_BLIP2, "vision_model"),
    "Aimv2Model": (_TOWERS, "vision_model"),
    "LlavaForConditionalGeneration": (
        {"vision_config": {**_AT_64, "model_type": "clip_vision_model"}, "text_config": _LLAMA},
        "model.vision_tower",
    ),
    "BlipVisionModel": (_AT_64, ""),
    "CLIPSegVisionModel": (_AT_64, ""),
    "MetaClip2VisionModel": (_AT_64, ""),
}
"""Classes whose vision tower AutoModel does not open alone: the configuration, and where the tower is."""

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "RadioModel": (_AT_64, ""),
    "BeitForMaskedImageModeling": (_AT_64, "beit"),
    "ViTForMaskedImageModeling": (_AT_64, "vit"),
    "DeiTForMaskedImageModeling": (_AT_64, "deit"),
    "IJepaModel": (_AT_64, ""),
    "BeitModel": (_AT_64, ""),
}
"""Classes whose files hold more than AutoModel's parameters, and others that README names."""


def write_transformers(
    directory: Path, architecture: str, config: dict[str, Any], processor: dict[str, Any] | None
) -> Path:
    """Save a model of ``architecture`` with random weights, all of which have an effect."""
    kind = getattr(transformers, architecture)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = kind(kind.config_class(**config))
        for parameter in model.parameters():
            # Biases, norms and LayerScale are 0 or 1 in a fresh model: a mistake with them would not show.
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    if processor is not None:
        (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


def transformers_model(directory: Path) -> nn.Module:
    """The vision model in ``directory`` as transformers itself loads it, in float32."""
    config = transformers.AutoConfig.from_pretrained(directory)
    vision = getattr(config, "vision_config", None) or config
    return transformers.AutoModel.from_pretrained(directory, config=vision).eval()  # type: ignore[no-any-return]


def last_hidden_state(model: nn.Module, pixels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """transformers' last hidden state [B,N,D] for ``pixels``, and what its blocks gave."""
    config = model.config
    resized = {"interpolate_pos_encoding": True} if pixels.shape[-2:] != (config.image_size, config.image_size) else {}
    options = {} if "dinov2" in config.model_type else resized  # which resizes its positions without being asked
    with torch.no_grad():
        found = model(pixel_values=pixels, output_hidden_states=True, **options)
    return found.last_hidden_state, found.hidden_states[1:]
