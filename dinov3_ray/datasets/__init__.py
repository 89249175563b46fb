"""Teacher features of a whole data set: extracted once, stored as Parquet, read back while training.

Names are resolved on first use: a process that decodes images needs neither torch nor Ray Data.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinov3_ray.datasets.cache import CachedTeacher
    from dinov3_ray.datasets.exports.export import export
    from dinov3_ray.datasets.extraction.extract import extract
    from dinov3_ray.datasets.extraction.resources import Resources
    from dinov3_ray.datasets.limits import MAX_PIXELS
    from dinov3_ray.datasets.sources.open import SourceOptions
    from dinov3_ray.datasets.store.reader import FeatureStore
    from dinov3_ray.datasets.stored import StoredTeacher, TargetDataset

__all__ = [
    "MAX_PIXELS",
    "CachedTeacher",
    "FeatureStore",
    "Resources",
    "SourceOptions",
    "StoredTeacher",
    "TargetDataset",
    "export",
    "extract",
]

_HOMES = {
    "MAX_PIXELS": "dinov3_ray.datasets.limits",
    "CachedTeacher": "dinov3_ray.datasets.cache",
    "FeatureStore": "dinov3_ray.datasets.store.reader",
    "Resources": "dinov3_ray.datasets.extraction.resources",
    "SourceOptions": "dinov3_ray.datasets.sources.open",
    "StoredTeacher": "dinov3_ray.datasets.stored",
    "TargetDataset": "dinov3_ray.datasets.stored",
    "export": "dinov3_ray.datasets.exports.export",
    "extract": "dinov3_ray.datasets.extraction.extract",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dinov3_ray.datasets' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
