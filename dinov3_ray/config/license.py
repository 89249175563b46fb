"""The licence of a model's weights, as far as its directory says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dinov3_ray.config.directory import CONFIG_FILE

__all__ = ["DINOV3_LICENSE", "license_text", "stated_license"]

DINOV3_LICENSE = "dinov3-license"
"""As the hub and timm call it."""

_TITLE = "DINOv3 License (https://ai.meta.com/resources/models-and-libraries/dinov3-license/)"
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---", re.DOTALL)


def stated_license(root: Path) -> str | None:
    """The licence's identifier in a model directory: in config.json (ours, or timm's), or in the card, README.md.

    None if neither says one.
    """
    try:
        values = json.loads((root / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        values = {}  # whoever needs the file itself says what is wrong with it
    described = values.get("pretrained_cfg") if isinstance(values, dict) else None
    for mapping in (values, described):
        if isinstance(mapping, dict) and isinstance(mapping.get("license"), str) and mapping["license"]:
            return str(mapping["license"])
    return _card_license(root / "README.md")


def _card_license(card: Path) -> str | None:
    try:
        matter = _FRONT_MATTER.match(card.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    found = dict(re.findall(r"^(license(?:_name)?):[ \t]*[\"']?([^\"'\s]+)", matter[1], re.MULTILINE)) if matter else {}
    return found.get("license_name") or found.get("license")


def license_text(root: Path, *, dinov3: bool) -> str:
    """What a model directory says of its weights' licence, in words; more is not known.

    Args:
        root: the directory.
        dinov3: whether it is a DINOv3.
    """
    stated = stated_license(root)
    if stated is None:
        meta = f"; weights that Meta released as DINOv3 are under the {_TITLE}" if dinov3 else ""
        return f"not stated in the model directory{meta}"
    return f"{stated}: {_TITLE}" if stated == DINOV3_LICENSE else stated
