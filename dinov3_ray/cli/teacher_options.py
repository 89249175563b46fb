"""The options that say which teacher computes, and how: the same for all commands that make one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast, get_args

import click

from dinov3_ray.cli.values import Command, CompileValue, InputSize
from dinov3_ray.config import Backend, ComputeDtype

__all__ = ["computing_options", "image_size_option", "model_options"]

image_size_option = click.option(
    "--image-size",
    type=InputSize(),
    help="The model's input size: 512, or 384x640 (height x width); input: that of each batch; input/2: half of it. "
    "[default: the directory's]",
)


def model_options(what: str = "The teacher's model", *, required: bool = False) -> Callable[[Command], Command]:
    """``--root`` and ``--revision``, as a DinoV3Config takes them.

    Args:
        what: begins the help.
        required: whether the command needs a model.
    """

    def decorate(command: Command) -> Command:
        command = click.option(
            "--revision", help="With a hub id: a branch, a tag or a commit. [default: main]", callback=_needs_root
        )(command)
        return click.option(
            "--root",
            type=click.Path(),  # as text: a path would lose the second slash of a URL, for which there is a hint
            required=required,
            is_eager=True,  # --revision looks whether it is there
            help=f"{what}: a directory, or a hub id (owner/name).",
        )(command)

    return decorate


def _needs_root(context: click.Context, _: click.Parameter, revision: str | None) -> str | None:
    if revision is not None and context.params.get("root") is None:
        raise click.UsageError("--revision belongs to --root")
    return revision


def computing_options(*, dtype: str = "--dtype", image_size: bool = True) -> Callable[[Command], Command]:
    """``--dtype``, ``--image-size``, ``--compile``, ``--attention`` and ``--backend``.

    The command gets them as one argument, ``computing``: a dict of the options of a DinoV3Config by name.

    Args:
        dtype: the name of the first, where a command calls something else ``--dtype``.
        image_size: whether the command has that option.
    """
    options = [
        click.option(
            dtype,
            "compute_dtype",
            type=click.Choice(get_args(ComputeDtype)),
            default="auto",
            show_default=True,
            help="The dtype to compute in.",
        ),
        click.option(
            "--compile",
            type=CompileValue(),
            is_flag=False,
            flag_value="true",
            default="auto",
            show_default=True,
            help="Compile the model with torch.compile. auto: on CUDA, if it works there; true (--compile alone), or a "
            "mode: on any device, or it is an error; false: never.",
        ),
        click.option(
            "--attention", default="auto", show_default=True, help="The attention kernel: auto, sdpa, eager ..."
        ),
        click.option(
            "--backend",
            type=click.Choice(get_args(Backend)),
            default="auto",
            show_default=True,
            help="What computes. auto: OpenVINO in bfloat16 on a CPU, where it is installed; else torch.",
        ),
    ]
    names = {"dtype": "compute_dtype"} | {name: name for name in ("compile", "attention", "backend")}
    if image_size:
        options.insert(1, image_size_option)
        names["image_size"] = "image_size"

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def grouped(*args: Any, **values: Any) -> Any:
            computing = {name: values.pop(value) for name, value in names.items()}
            return command(*args, computing=computing, **values)

        for option in reversed(options):
            grouped = option(grouped)
        return cast(Command, grouped)

    return decorate
