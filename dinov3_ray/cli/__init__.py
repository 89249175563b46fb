"""The command line ``dinov3-ray``: its commands, each in a module of this folder, the only one that imports click.

A command's module is imported when the command runs, so that ``dinov3-ray --help`` answers at once and imports
neither torch nor Ray.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import click

from dinov3_ray import __version__
from dinov3_ray.errors import DinoV3Error
from dinov3_ray.interrupts import Interrupts

__all__ = ["Lazy", "LazyGroup", "main"]


class Lazy(NamedTuple):
    """Where a command is defined (``module:attribute``), and its line in the help."""

    target: str
    help: str


# The recipe of click's documentation: thirty lines cost less than a dependency.
class LazyGroup(click.Group):
    """A group that imports a command when it runs, and reports the package's own errors without a traceback.

    What asks a command to end, Ctrl-C or a scheduler's SIGTERM, lets it clean up; the exit status names the signal.
    """

    def __init__(self, *arguments: Any, lazy: Mapping[str, Lazy], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's)
        return sorted(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return super().get_command(ctx, cmd_name)
        module, attribute = self._lazy[cmd_name].target.split(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 (click's)
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._lazy[name].help) for name in sorted(self._lazy)])

    def invoke(self, ctx: click.Context) -> Any:
        interrupts = Interrupts.of_schedulers()
        try:
            # The outermost group alone: a command may have reasons to handle signals in another way.
            with interrupts if ctx.parent is None else nullcontext():
                return super().invoke(ctx)
        except DinoV3Error as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            if ctx.parent is not None:
                raise
            raise SystemExit(interrupts.exit_code or 128 + signal.SIGINT) from None


COMMANDS = {
    "bench": Lazy("dinov3_ray.cli.bench:bench", "Measure, and compare with peers that do the same work."),
    "checkpoint": Lazy("dinov3_ray.cli.checkpoint:checkpoint", "Make, convert, check and describe checkpoints."),
    "demo": Lazy("dinov3_ray.cli.demo:demo", "Train a small student with a pool of teachers, in about a minute."),
    "distill": Lazy("dinov3_ray.cli.distill:distill", "Distil a student backbone on images without labels."),
    "doctor": Lazy("dinov3_ray.cli.doctor:doctor", "Check this machine and a cluster before a pool uses them."),
    "export": Lazy("dinov3_ray.cli.datasets:export_command", "Copy features to Lance, WebDataset or NumPy files."),
    "extract": Lazy("dinov3_ray.cli.datasets:extract_command", "Extract the features of a whole data set."),
    "show": Lazy("dinov3_ray.cli.datasets:show_command", "Draw a feature map."),
    "up": Lazy("dinov3_ray.cli.up:up", "Start a pool in a running Ray, and leave it running."),
    "status": Lazy("dinov3_ray.cli.pool:status", "Show a pool: its replicas, their speed, their errors."),
    "scale": Lazy("dinov3_ray.cli.pool:scale", "Change the number of replicas, or its range."),
    "reload": Lazy("dinov3_ray.cli.up:reload", "Replace a pool's teacher while it serves."),
    "down": Lazy("dinov3_ray.cli.pool:down", "End a pool."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS)
@click.version_option(__version__, package_name="dinov3-ray")
def main() -> None:
    """A frozen DINOv3 teacher, local or served by a pool of Ray actors."""
