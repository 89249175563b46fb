"""The command line ``dinov3-ray``: which commands there are, and where.

A command's module is imported when the command runs, so that ``dinov3-ray --help`` answers at once and imports
neither torch nor Ray.
"""

from __future__ import annotations

import click

from dinov3_ray import __version__
from dinov3_ray.lazycommands import Lazy, LazyGroup

__all__ = ["main"]


COMMANDS = {
    "bench": Lazy("dinov3_ray.bench.commands:bench", "Measure a pool beside its peers."),
    "checkpoint": Lazy("dinov3_ray.checkpoint.commands:checkpoint", "Make, convert, check and describe checkpoints."),
    "demo": Lazy("dinov3_ray.demo.commands:demo", "Teach a small student with a pool of teachers, in about a minute."),
    "doctor": Lazy("dinov3_ray.doctor.commands:doctor", "Look at this machine and a cluster as a pool would."),
    "extract": Lazy("dinov3_ray.datasets.commands:extract_command", "Extract the features of a whole data set."),
    "show": Lazy("dinov3_ray.datasets.commands:show_command", "Make a picture of a feature map."),
    "up": Lazy("dinov3_ray.pool.teacher_commands:up", "Start a pool in a running Ray, and leave it running."),
    "status": Lazy("dinov3_ray.pool.commands:status", "Show a pool: its replicas, their speed, their troubles."),
    "scale": Lazy("dinov3_ray.pool.commands:scale", "Change the number of replicas, or its range."),
    "reload": Lazy("dinov3_ray.pool.teacher_commands:reload", "Replace a pool's teacher while it serves."),
    "down": Lazy("dinov3_ray.pool.commands:down", "End a pool, all of it."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS)
@click.version_option(__version__, package_name="dinov3-ray")
def main() -> None:
    """A frozen DINOv3 teacher, local or served by a pool of Ray actors."""
