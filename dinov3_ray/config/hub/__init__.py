"""Models of the Hugging Face Hub, in place of a model directory; needs no torch, and no network for what is cached."""

from dinov3_ray.config.hub.access import HubAccess, carrying_access
from dinov3_ray.config.hub.downloads import arrived_bytes
from dinov3_ray.config.hub.place import ModelPlace, is_hub_id, resolve
from dinov3_ray.config.hub.snapshots import DESCRIPTION_FILES

__all__ = [
    "DESCRIPTION_FILES",
    "HubAccess",
    "ModelPlace",
    "arrived_bytes",
    "carrying_access",
    "is_hub_id",
    "resolve",
]
