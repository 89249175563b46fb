"""Checkpoints: verify, load, fingerprint and write them, fill them at random, convert official ones."""

from dinov3_ray.checkpoint.convert import Conversion, convert_checkpoint
from dinov3_ray.checkpoint.fingerprint import fingerprint
from dinov3_ray.checkpoint.load import build_model, load_model, load_reference
from dinov3_ray.checkpoint.random_weights import init_checkpoint
from dinov3_ray.checkpoint.verify import verify
from dinov3_ray.config.variants import VARIANTS, find_variant, variant_of

__all__ = [
    "VARIANTS",
    "Conversion",
    "build_model",
    "convert_checkpoint",
    "find_variant",
    "fingerprint",
    "init_checkpoint",
    "load_model",
    "load_reference",
    "variant_of",
    "verify",
]
