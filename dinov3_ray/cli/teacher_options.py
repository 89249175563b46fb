"""The options that say how a teacher computes, the same for all commands that make one."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import click

from dinov3_ray.cli.values import Command, CompileValue, ImageSize
from dinov3_ray.config import ComputeDtype

__all__ = ["computing_options"]


def computing_options(*, dtype: str = "--dtype", image_size: bool = True) -> Callable[[Command], Command]:
    """``--dtype``, ``--image-size``, ``--compile`` and ``--attention``, with the values of a DinoV3Config.

    Args:
        dtype: the name of the first, where a command calls something else ``--dtype``.
        image_size: whether the command has that option.
    """
    options = [
        click.option(
            dtype,
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
    ]
    if image_size:
        options.insert(
            1,
            click.option(
                "--image-size",
                type=ImageSize(),
                help="The model's input size: 512, or 384x640 (height x width). [default: the directory's]",
            ),
        )

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
