"""Checks of this machine: versions, shared memory, open files, folders, disk, GPUs, the model and the token."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path

import torch

from dinov3_ray import __version__
from dinov3_ray.checkpoint import verify
from dinov3_ray.config import ModelConfig, open_config
from dinov3_ray.config.preprocessing import Size, ViewSize, misfit_of
from dinov3_ray.errors import CheckpointError, ConfigError
from dinov3_ray.machine import locks
from dinov3_ray.machine.ray_folder import RayFolder

__all__ = [
    "Finding",
    "Severity",
    "check_descriptors",
    "check_disk",
    "check_gpus",
    "check_locks",
    "check_model_root",
    "check_ray_folder",
    "check_shared_memory",
    "check_token",
    "check_versions",
    "fine",
    "installed_versions",
    "problem",
    "skipped",
    "warning",
]


try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class Severity(StrEnum):
    """How bad a finding is."""

    FINE = "fine"
    WARNING = "warning"  # works, but not as well as it could
    PROBLEM = "problem"  # a pool would not work
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check.

    Attributes:
        subject: what was checked.
        verdict: how bad it is.
        message: what was found.
        remedy: what to do; empty if there is nothing to do.
    """

    subject: str
    verdict: Severity
    message: str
    remedy: str = ""


def fine(subject: str, message: str) -> Finding:
    return Finding(subject, Severity.FINE, message)


def warning(subject: str, message: str, remedy: str) -> Finding:
    return Finding(subject, Severity.WARNING, message, remedy)


def problem(subject: str, message: str, remedy: str) -> Finding:
    return Finding(subject, Severity.PROBLEM, message, remedy)


def skipped(subject: str, message: str) -> Finding:
    return Finding(subject, Severity.SKIPPED, message)


# With Ray 2.57, tests of how a pool ends fail (2.54 fixes CVE-2026-27482). With transformers 4.57, SigLIP2,
# ViT and DeiT have other results than here.
_LEAST_VERSIONS = {"ray": (2, 59), "torch": (2, 6), "transformers": (5, 10)}
_PACKAGES = ("dinov3-ray", *_LEAST_VERSIONS)


def installed_versions() -> dict[str, str]:
    """The versions of this package, Ray, torch and transformers in this process."""
    return {"dinov3-ray": __version__} | {name: version(name) for name in _LEAST_VERSIONS}


def check_versions(installed: Mapping[str, str]) -> Finding:
    """Check the versions that :func:`installed_versions` gives against the least that work."""
    for name, least in _LEAST_VERSIONS.items():
        if tuple(int(part) for part in installed[name].split(".")[:2]) < least:
            wanted = ".".join(map(str, least))
            remedy = f"pip install '{name}>={wanted}', here and on every node"
            return problem("versions", f"{name} is {installed[name]}, older than {wanted}", remedy)
    seen = ", ".join(f"{name} {installed[name]}" for name in _PACKAGES)
    return fine("versions", f"Python {platform.python_version()}, {seen}")


_LEAST_SHARED, _COMFORTABLE_SHARED = 2**30, 4 * 2**30  # bytes


def check_shared_memory(path: Path = Path("/dev/shm")) -> Finding:  # noqa: S108 (it is only checked)
    """Check the size of the shared memory at ``path``, where Ray keeps its objects."""
    if not path.is_dir():
        return warning("shared memory", f"there is no {path}: Ray keeps its objects on disk", "mount a tmpfs there")
    total = shutil.disk_usage(path).total
    seen = f"{path} has {total / 2**30:.1f} GiB"
    remedy = "docker run --shm-size=10g, an emptyDir of medium Memory in Kubernetes, or mount -o remount,size=10g"
    if total < _LEAST_SHARED:
        return problem("shared memory", f"{seen}, less than 1 GiB: Ray would keep its objects on disk", remedy)
    if total < _COMFORTABLE_SHARED:
        return warning("shared memory", f"{seen}; the queue of one replica alone may take 2 GiB", remedy)
    return fine("shared memory", seen)


_LEAST_FILES, _COMFORTABLE_FILES = 1024, 8192


def check_descriptors() -> Finding:
    """Check how many files a process may open."""
    if resource is None:
        return skipped("file descriptors", "this system has no limit of open files")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    seen = f"{soft} open files allowed (up to {hard})"
    remedy = "ulimit -n 65536 before ray start, or LimitNOFILE=65536 in its systemd unit"
    if soft < _LEAST_FILES:
        return problem("file descriptors", f"{seen}; Ray's processes need {_LEAST_FILES}", remedy)
    if soft < _COMFORTABLE_FILES:
        return warning("file descriptors", f"{seen}; a pool with many clients needs {_COMFORTABLE_FILES}", remedy)
    return fine("file descriptors", seen)


def check_ray_folder(environment: Mapping[str, str]) -> Finding:
    """Check the folder in which a Ray that is started with ``environment`` keeps its files and sockets."""
    folder = RayFolder(environment)
    remedy = "set RAY_TMPDIR to a short path of a folder that this user may write to (`ray start --temp-dir` alike)"
    if not folder.usable:
        return problem("Ray's folder", folder.trouble, remedy)
    if folder.trouble:
        return warning("Ray's folder", f"{folder.trouble}; this package takes {folder.path}", remedy)
    return fine("Ray's folder", str(folder.path))


def check_locks(folder: Path | None = None) -> Finding:
    """Check that files in ``folder`` (None: that of temporary files) can be locked."""
    folder = folder or Path(tempfile.gettempdir())
    with tempfile.TemporaryFile("w", dir=folder) as file:
        try:
            locks.hold(file)
        except OSError as error:
            remedy = "set TMPDIR to a local disk, or mount it with locks (Lustre: -o flock)"
            return warning("file locks", f"files in {folder} cannot be locked: {error.strerror}", remedy)
    return fine("file locks", f"files in {folder} can be locked")


_PROBE_BYTES = 64 * 2**20
_LEAST_FREE = 5 * 2**30
_SLOW = 50e6  # bytes/s


def check_disk(folder: Path | None = None) -> Finding:
    """Check the free space, and write 64 MiB to ``folder`` (None: that of temporary files) to measure its speed."""
    folder = folder or Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    other = "give `ray start` a --temp-dir on another disk"
    if free < _LEAST_FREE:
        remedy = f"make room, or {other}: Ray stops at 95% of a disk"
        return problem("disk", f"{folder} has {free / 2**30:.1f} GiB free; Ray's logs need {_LEAST_FREE >> 30}", remedy)
    chunk = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.monotonic()
        for _ in range(_PROBE_BYTES // len(chunk)):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        speed = _PROBE_BYTES / (time.monotonic() - began)
    seen = f"{folder} has {free / 2**30:.0f} GiB free and takes {speed / 1e6:.0f} MB/s"
    if speed < _SLOW:
        return warning("disk", f"{seen}: objects that Ray spills there make trainers wait", other)
    return fine("disk", seen)


def check_gpus(wanted: int) -> Finding:
    """Check that torch sees at least ``wanted`` GPUs."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if len(names) < wanted:
        built = f"PyTorch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch has no CUDA"
        return problem(
            "GPUs",
            f"--gpus {wanted} asks for more than the {len(names)} that torch sees; {built}",
            "run nvidia-smi: if it fails, the driver is missing (in a container: --gpus all); if it shows them, check "
            "CUDA_VISIBLE_DEVICES, and install PyTorch for CUDA; or ask for fewer with --gpus",
        )
    return fine("GPUs", ", ".join(names) or "none; replicas compute on CPUs")


def check_model_root(
    root: str | Path | None,
    revision: str | None = None,
    image_size: Size | ViewSize | None = None,
    *,
    weights_here: bool = True,
) -> tuple[Finding, ModelConfig | None]:
    """Check the files of a model by their headers; ``dinov3-ray checkpoint verify`` reads every weight.

    Args:
        weights_here: whether a model of the hub is needed on this machine, and downloaded if it is not here.

    Returns:
        What was found, and the model if it can be used.
    """
    if root is None:
        return skipped("model", "no model is named (--root)"), None
    hint = "a directory is needed at the same path on every node"
    try:
        config = open_config(root, revision=revision, image_size=image_size)
        seen = repr(config)
        if weights_here or config.hub_id is None:
            seen += f", {verify(config).nbytes / 1e9:.3f} GB"
    except ConfigError as error:
        return problem("model", str(error), f"name a directory or a hub id with --root; {hint}"), None
    except CheckpointError as error:
        remedy = "where a file is damaged, copy or download it again, then try `dinov3-ray checkpoint verify`"
        return problem("model", str(error), remedy), None
    misfit = misfit_of(config.nominal_size, config.patch_size)
    if misfit is None or config.preprocessing.follows is not None:
        return fine("model", seen), config
    return warning("model", f"{seen}; {misfit.problem}", misfit.remedy), config


def check_token(environment: Mapping[str, str], address: str | None) -> Finding:
    """Check that a client with ``environment`` has a token for the cluster at ``address``."""
    if address is None:
        return skipped("token", "no cluster is named (--address, RAY_ADDRESS)")
    mode = environment.get("RAY_AUTH_MODE", "")
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path(environment.get("HOME", "/")) / ".ray" / "auth_token"
    # Where it is not set, this package's clients show a token that is there to a cluster that asks for one.
    if mode != "token" and (mode or not (environment.get("RAY_AUTH_TOKEN") or os.access(path, os.R_OK))):
        return problem(
            "token",
            f"RAY_AUTH_MODE is {mode or 'not set'}: a client that joins {address} shows no token",
            "export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH=FILE with the cluster's token",
        )
    if environment.get("RAY_AUTH_TOKEN"):
        remedy = "put it in a file of mode 0600 and name that in RAY_AUTH_TOKEN_PATH"
        return warning("token", "it is in RAY_AUTH_TOKEN, which /proc and logs may show", remedy)
    try:
        text, permissions = path.read_text().strip(), stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        remedy = f"copy the cluster's token to {path}, mode 0600, or name its file in RAY_AUTH_TOKEN_PATH"
        return problem("token", f"{path} cannot be read: {error.strerror}", remedy)
    if not text:
        return problem("token", f"{path} is empty", f"copy the cluster's token to {path}, mode 0600")
    if permissions & 0o077:
        return warning("token", f"others may read {path} (mode {permissions:o})", f"chmod 600 {path}")
    return fine("token", f"in {path}")
