"""Measurements that anyone can repeat: this project and its peers do the same work in the same run.

NOTES.md records what was tried and what it gave, failures included.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

__all__ = ["describe_machine"]


def describe_machine() -> str:
    """The machine and the versions that a measurement ran with, in one line; imports none of them."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "transformers"))
    return f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, {versions}"
