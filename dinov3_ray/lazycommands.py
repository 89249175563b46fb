"""Commands whose modules are imported when they run, so that help answers at once."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import click

from dinov3_ray.errors import DinoV3Error

__all__ = ["Lazy", "LazyGroup"]


class Lazy(NamedTuple):
    """Where a command is (``module:attribute``), and its line in the help."""

    target: str
    help: str


class LazyGroup(click.Group):
    """A group that imports a command when it runs, and reports the package's own errors without a traceback."""

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
        try:
            return super().invoke(ctx)
        except DinoV3Error as error:
            raise click.ClickException(str(error)) from error
