"""config.json and preprocessor_config.json of an architecture and a preprocessing rule, with transformers' keys."""

from __future__ import annotations

from typing import Any

from dinov3_ray.config.architecture import Architecture, ConvNextArchitecture
from dinov3_ray.config.preprocessing import Preprocessing

__all__ = ["config_json", "model_keys", "preprocessor_json"]


def model_keys(architecture: Architecture) -> dict[str, Any]:
    """The keys of config.json that decide what the model computes, all of them spelt out."""
    if isinstance(architecture, ConvNextArchitecture):
        return {
            "hidden_sizes": list(architecture.hidden_sizes),
            "depths": list(architecture.depths),
            "hidden_act": architecture.hidden_act,
            "layer_norm_eps": architecture.layer_norm_eps,
            "num_channels": 3,
        }
    return {
        "hidden_size": architecture.hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_heads,
        "intermediate_size": architecture.intermediate_size,
        "use_gated_mlp": architecture.gated_mlp,
        "num_register_tokens": architecture.num_register_tokens,
        "patch_size": architecture.patch_size,
        "hidden_act": architecture.hidden_act,
        "layer_norm_eps": architecture.layer_norm_eps,
        "rope_theta": architecture.rope_theta,
        "query_bias": architecture.query_bias,
        "key_bias": architecture.key_bias,
        "value_bias": architecture.value_bias,
        "proj_bias": architecture.proj_bias,
        "mlp_bias": architecture.mlp_bias,
        "num_channels": 3,
    }


def config_json(architecture: Architecture, dtype: str, license: str | None = None) -> dict[str, Any]:
    """config.json for ``architecture``, with weights stored as ``dtype``, and their licence if it is known."""
    vit = architecture.family == "vit"
    return {
        "architectures": ["DINOv3ViTModel" if vit else "DINOv3ConvNextModel"],
        "model_type": "dinov3_vit" if vit else "dinov3_convnext",
        "image_size": 224,
        # The name of released files; later versions, which call it dtype, read it too.
        "torch_dtype": dtype,
        **model_keys(architecture),
        **({} if license is None else {"license": license}),
    }


def preprocessor_json(preprocessing: Preprocessing) -> dict[str, Any]:
    """preprocessor_config.json for ``preprocessing``."""
    resized = preprocessing.size or preprocessing.image_size
    size = {"height": resized[0], "width": resized[1]}
    crop = preprocessing.crop_size
    return {
        # The name of released files; transformers 5, which has no "Fast" any more, takes it too.
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "do_rescale": True,
        "rescale_factor": preprocessing.rescale_factor,
        "do_resize": preprocessing.size is not None or preprocessing.shortest_edge is not None,
        "size": {"shortest_edge": preprocessing.shortest_edge} if preprocessing.shortest_edge is not None else size,
        "resample": 2,
        "do_center_crop": crop is not None,
        **({} if crop is None else {"crop_size": {"height": crop[0], "width": crop[1]}}),
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
