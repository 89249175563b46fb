"""A teacher's fingerprint: a hash of its weights, architecture and preprocessing, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from dinov3_ray.checkpoint.verify import Progress, ignore_progress, verify
from dinov3_ray.config import ModelConfig
from dinov3_ray.config.weights import StoredTensor
from dinov3_ray.machine.cpus import usable_cpus

__all__ = ["fingerprint"]

_FORMAT = "dinov3-ray fingerprint 1"
_BLOCK = 4 << 20
_HEX_DIGITS = 24  # 96 bits: no two teachers that anyone has ever made will share one


def fingerprint(config: ModelConfig, *, progress: Progress = ignore_progress) -> str:
    """24 hexadecimal digits of a SHA-256 over weights, architecture and preprocessing (with ``config.image_size``).

    It is the same on every machine and path, however the tensors are split into files and however config.json is
    spelled. It differs as soon as one byte of a weight or one image statistic differs. ``dtype``, ``compile`` and
    ``attention`` are not part of it: they change how exactly a function is computed, not which function.

    Reads all weights once, on up to eight threads.

    Raises:
        CheckpointError: the weights are not what the configuration says; see :func:`verify`.
    """
    weights = verify(config)
    description = {
        "format": _FORMAT,
        "architecture": {"family": config.family, **asdict(config.architecture)},
        "preprocessing": config.preprocessing.described(),
    }
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for stored, tensor_digest in _digests(weights.tensors.values(), progress):
        line = f"\n{stored.name} {stored.dtype} {list(stored.shape)} {tensor_digest}"
        digest.update(line.encode())
    return digest.hexdigest()[:_HEX_DIGITS]


def _digests(tensors: Iterable[StoredTensor], progress: Progress) -> Iterable[tuple[StoredTensor, str]]:
    """Each tensor with the SHA-256 of its bytes, in order. Hashing releases the GIL, so threads share the work."""
    ordered = list(tensors)
    with ThreadPoolExecutor(max_workers=min(8, usable_cpus()), thread_name_prefix="fingerprint") as threads:
        for stored, tensor_digest in zip(ordered, threads.map(_digest, ordered), strict=True):
            progress(stored.nbytes)
            yield stored, tensor_digest


def _digest(stored: StoredTensor) -> str:
    digest = hashlib.sha256()
    block = memoryview(bytearray(min(_BLOCK, stored.nbytes)))
    for offset in range(0, stored.nbytes, _BLOCK):
        part = block[: stored.nbytes - offset]
        stored.read_into(part, offset)
        digest.update(part)
    return digest.hexdigest()
