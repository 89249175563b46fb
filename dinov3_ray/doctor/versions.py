"""The versions of the package and of what it stands on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version

from dinov3_ray.doctor.finding import Finding, fine, problem

__all__ = ["check_versions", "installed_versions"]

# Ray 2.54 mends CVE-2026-27482; transformers 4.57 norms the last hidden state as this package takes it.
_LEAST = {"ray": (2, 54), "torch": (2, 6), "transformers": (4, 57)}
_PACKAGES = ("dinov3-ray", *_LEAST)


def installed_versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


def check_versions(installed: Mapping[str, str]) -> Finding:
    for name, least in _LEAST.items():
        if tuple(int(part) for part in installed[name].split(".")[:2]) < least:
            wanted = ".".join(map(str, least))
            remedy = f"pip install '{name}>={wanted}', here and on every node"
            return problem("versions", f"{name} is {installed[name]}, older than {wanted}", remedy)
    told = ", ".join(f"{name} {installed[name]}" for name in _PACKAGES)
    return fine("versions", f"Python {platform.python_version()}, {told}")
