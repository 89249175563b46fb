"""What a pool is: the teacher, how many replicas of it, where they may run, and how they serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dinov3_ray.errors import ConfigError
from dinov3_ray.pool.options import PoolOptions

__all__ = ["Declaration", "Placement"]


@dataclass(frozen=True, slots=True)
class Placement:
    """What each replica asks of the cluster.

    Args:
        num_gpus: GPUs a replica; a fraction shares one.
        num_cpus: CPUs that a replica reserves; 0 reserves none.
        label_selector: node labels that a replica needs, such as ``{"ray.io/accelerator-type": "H200"}``.

    Raises:
        ConfigError: a negative number, or more than one GPU but not a whole number of them.
    """

    num_gpus: float = 0
    num_cpus: float = 0
    label_selector: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_gpus", "num_cpus"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ConfigError(f"{name} must be a number >= 0; got {value!r}")
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ConfigError(f"num_gpus above 1 must be a whole number; got {self.num_gpus!r}")

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus > 0 else "cpu"

    def __str__(self) -> str:
        parts = [f"{self.num_gpus:g} GPU" if self.num_gpus else "", f"{self.num_cpus:g} CPU" if self.num_cpus else ""]
        parts += [f"label {key}={value}" for key, value in self.label_selector.items()]
        return ", ".join(part for part in parts if part) or "no reserved resources"


@dataclass(frozen=True, slots=True)
class Declaration:
    """A pool as it was last declared; ``source`` is the pickled teacher, which its controller never unpickles."""

    source: bytes
    low: int
    high: int
    placement: Placement
    options: PoolOptions
    target: int
    generation: int = 0
    #: The number of the next replica: names are never used again, since clients remember the dead by them.
    serial: int = 0
