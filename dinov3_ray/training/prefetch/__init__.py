"""Targets ahead of the training loop: :func:`prefetch`, and what it is made of."""

from dinov3_ray.training.prefetch.stream import (
    AnyTeacher,
    OnReload,
    Prefetch,
    PrefetchOptions,
    PrefetchStatistics,
    Route,
    find_images,
    prefetch,
)

__all__ = [
    "AnyTeacher",
    "OnReload",
    "Prefetch",
    "PrefetchOptions",
    "PrefetchStatistics",
    "Route",
    "find_images",
    "prefetch",
]
