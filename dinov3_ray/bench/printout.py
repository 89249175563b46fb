"""What each bench prints: the machine that it ran on, and a table."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING

from dinov3_ray.machine.cpus import usable_cpus

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["describe_machine", "new_table"]


def describe_machine() -> str:
    """The machine and the versions that a measurement ran with, in one line; imports none of them."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "transformers"))
    return f"{usable_cpus()} CPUs ({platform.machine()}), Python {platform.python_version()}, {versions}"


def new_table(title: str, caption: str, *headings: str) -> Table:
    """A table without rows. A column without a heading holds names, all others hold numbers."""
    from rich.table import Table  # here, so that the command's help answers at once

    table = Table(title=title, caption=caption)
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    return table
