"""The model directory: configuration, preprocessing, and weights that fit them."""

from __future__ import annotations

from pathlib import Path

from dinov3_ray.checkpoint import verify
from dinov3_ray.config import DinoV3Config
from dinov3_ray.doctor.finding import Finding, fine, problem, skipped
from dinov3_ray.errors import CheckpointError, ConfigError

__all__ = ["check_model_root"]

_SUBJECT = "model"


def check_model_root(root: Path | None) -> Finding:
    """Reads the files' headers, not every weight: that is ``dinov3-ray checkpoint verify``."""
    if root is None:
        return skipped(_SUBJECT, "no model directory is named (--root)")
    try:
        config = DinoV3Config(root)
        weights = verify(config)
    except ConfigError as error:
        return problem(
            _SUBJECT, str(error), "name the directory with --root; it is needed at the same path on every node"
        )
    except CheckpointError as error:
        return problem(
            _SUBJECT, str(error), "copy the weights again, then `dinov3-ray checkpoint verify` the directory"
        )
    return fine(_SUBJECT, f"{config!r}, {weights.nbytes / 1e9:.3f} GB")
