"""The command line ``dinov3-ray``: which commands there are, and where.

A command's module is imported when the command runs, so that ``dinov3-ray --help`` answers at once and imports
neither torch nor Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import click

from dinov3_ray import __version__
from dinov3_ray.errors import DinoV3Error

__all__ = ["main"]


class Lazy(NamedTuple):
    """Where a command is (``module:attribute``), and its line in the help."""

    target: str
    help: str


COMMANDS = {
    "bench": Lazy("dinov3_ray.bench.commands:bench", "Measure a pool beside its peers."),
    "checkpoint": Lazy("dinov3_ray.checkpoint.commands:checkpoint", "Make, convert, check and describe checkpoints."),
    "demo": Lazy("dinov3_ray.demo.commands:demo", "Teach a small student with a pool of teachers, in about a minute."),
    "doctor": Lazy("dinov3_ray.doctor.commands:doctor", "Look at this machine and a cluster as a pool would."),
    "extract": Lazy("dinov3_ray.datasets.commands:extract_command", "Extract the features of a whole data set."),
    "show": Lazy("dinov3_ray.datasets.commands:show_command", "Make a picture of a feature map."),
    "up": Lazy("dinov3_ray.pool.commands:up", "Start a pool in a running Ray, and leave it running."),
    "status": Lazy("dinov3_ray.pool.commands:status", "Show a pool: its replicas, their speed, their troubles."),
    "scale": Lazy("dinov3_ray.pool.commands:scale", "Change the number of replicas, or its range."),
    "reload": Lazy("dinov3_ray.pool.commands:reload", "Replace a pool's teacher, replica by replica, while it serves."),
    "down": Lazy("dinov3_ray.pool.commands:down", "End a pool, all of it."),
}


class LazyGroup(click.Group):
    """A group that imports a command when it runs, and reports the package's own errors without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, attribute = COMMANDS[cmd_name].target.split(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 (click's)
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].help) for name in sorted(COMMANDS)])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DinoV3Error as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=LazyGroup)
@click.version_option(__version__, package_name="dinov3-ray")
def main() -> None:
    """A frozen DINOv3 teacher, local or served by a pool of Ray actors."""
