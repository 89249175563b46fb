"""The GPU memory of a process that computes a teacher: in what way torch takes it from CUDA, and how much at most."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, MutableMapping
from importlib.metadata import version

from dinov3_ray.errors import ConfigError
from dinov3_ray.teacher import Extractor

__all__ = ["expand_segments", "memory_fraction", "within_share"]

# torch reads either; the first is its name since 2.9, and unknown before.
_NEW_NAME, _OLD_NAME = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
_RENAMED = (2, 9)
_SETTING = "expandable_segments"
# That CUDA takes of a GPU for each process, with the code of the kernels: torch's bound does not count it.
_CONTEXT_BYTES = 512 * 2**20


def expand_segments(num_gpus: float | None, environment: MutableMapping[str, str]) -> None:
    """Have torch enlarge its segments of GPU memory where they are (``expandable_segments``), if the process has a GPU.

    Batches of different sizes then share memory that would otherwise lie idle in segments too small for the next batch.
    torch reads the setting before it first takes GPU memory, and never again. What the user has set wins, and keeps its
    other settings.

    Left out where it fails: the first allocation raises "unknown error" in WSL (pytorch issue 192330), and the backend
    cudaMallocAsync has no segments. Tensors in such memory cannot be shared with processes of torch before 2.5 by CUDA
    IPC; nothing here does that.
    """
    if num_gpus and "microsoft" not in platform.release().lower():
        environment.update(_with_expandable_segments(environment, _torch_version()))


def _with_expandable_segments(environment: Mapping[str, str], torch_version: tuple[int, ...]) -> dict[str, str]:
    """The variables to set."""
    given = {name: environment[name].strip() for name in (_NEW_NAME, _OLD_NAME) if environment.get(name, "").strip()}
    if any(word in value for value in given.values() for word in (_SETTING, "cudaMallocAsync")):
        return {}
    # If both are given, which one torch reads depends on its version: each gets it.
    names = [*given] or [_NEW_NAME if torch_version >= _RENAMED else _OLD_NAME]
    return {name: ",".join(filter(None, (given.get(name, "").rstrip(","), f"{_SETTING}:True"))) for name in names}


def _torch_version() -> tuple[int, ...]:
    return tuple(int(number) for number in version("torch").split(".")[:2])


def within_share(build: Callable[[], Extractor], num_gpus: float | None) -> Callable[[], Extractor]:
    """``build`` in a process that takes no more than the share ``num_gpus`` of its GPU's memory; all of it from 1 on.

    So a replica that shares a GPU runs out of memory by itself, and not its neighbours or a trainer with it.
    """

    def build_within() -> Extractor:
        # Only here: the environment comes before it, and a controller, which imports this module, has none.
        import torch

        if num_gpus and num_gpus < 1 and torch.cuda.is_available():
            device = torch.cuda.current_device()
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(memory_fraction(num_gpus, total), device)
        return build()

    return build_within


def memory_fraction(num_gpus: float, total: int) -> float:
    """The fraction of a GPU's ``total`` bytes that torch may take, so that it and CUDA together take ``num_gpus``.

    Raises:
        ConfigError: CUDA alone takes that much.
    """
    fraction = num_gpus - _CONTEXT_BYTES / total
    if fraction <= 0:
        raise ConfigError(
            f"num_gpus must be more than {_CONTEXT_BYTES / total:.3f} on a GPU of {total / 2**30:.1f} GiB, since it is "
            f"the share of the GPU's memory too, of which CUDA takes 0.5 GiB for each process; got {num_gpus:g} (give "
            "each replica a larger share)"
        )
    return fraction
