"""The options that say how a teacher computes: the same values in every command, and those of a DinoV3Config."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click
import pytest
from click.testing import CliRunner
from commandline import run_command

from dinov3_ray.cli import main
from dinov3_ray.cli.teacher_options import computing_options
from dinov3_ray.config import CompileMode, ComputeDtype, DinoV3Config


def parsed(*arguments: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    @click.command()
    @computing_options(dtype="--compute-dtype")
    def command(computing: dict[str, Any]) -> None:
        seen.update(computing)

    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    return seen


@pytest.mark.parametrize(
    ("arguments", "compile"),
    [
        ((), "auto"),
        (("--compile", "auto"), "auto"),
        (("--compile",), True),
        (("--compile", "true"), True),
        (("--compile", "false"), False),
        *[(("--compile", mode), mode) for mode in get_args(CompileMode)],
    ],
)
def test_they_are_what_a_configuration_takes(tiny_checkpoint: Path, arguments: tuple[str, ...], compile: Any) -> None:
    options = parsed(*arguments)
    others = dict.fromkeys(("dtype", "attention", "backend"), "auto")
    assert options == {**others, "image_size": None, "compile": compile}
    assert DinoV3Config(tiny_checkpoint, **options).compile == compile


def options_of(command: tuple[str, ...]) -> dict[str, Any]:
    found: Any = main
    for name in command:
        found = found.get_command(click.Context(found), name)
    return {name: option for option in found.params for name in option.opts}


@pytest.mark.parametrize(
    "command",
    [("up",), ("reload",), ("extract",), ("show",), ("doctor",), ("checkpoint", "info"), ("bench", "teacher")],
    ids=" ".join,
)
def test_every_command_that_names_a_model_takes_the_images_own_size(command: tuple[str, ...]) -> None:
    convert = options_of(command)["--image-size"].type.convert
    given = {text: convert(text, None, None) for text in ("input", "input/2", "512", "384x640")}
    assert given == {"input": "input", "input/2": "input/2", "512": (512, 512), "384x640": (384, 640)}
    with pytest.raises(click.BadParameter, match="or input or input/2; got 'half'"):
        convert("half", None, None)


@pytest.mark.parametrize("command", [("up",), ("reload",), ("extract",), ("bench", "dataset")])
def test_every_command_that_makes_a_teacher_has_them(command: tuple[str, ...]) -> None:
    options = options_of(command)
    assert {"--compile", "--attention"} <= set(options)
    dtype = options.get("--compute-dtype", options.get("--dtype"))
    assert tuple(dtype.type.choices) == get_args(ComputeDtype)


@pytest.mark.parametrize("option", [("--compute-dtype", "float8"), ("--compile",), ("--attention", "eager")])
def test_a_pool_has_its_own(option: tuple[str, ...]) -> None:
    done = run_command("extract", "source", "out", "--pool", "dinov3", *option)
    assert done.exit_code == 2
    assert "belong to --root: a pool has its own settings" in done.output


def test_a_wrong_one_is_refused_with_all_that_there_are() -> None:
    done = run_command("up", "--root", "model", "--compile", "fast")
    assert done.exit_code == 2
    assert "must be one of auto, true, false, default, reduce-overhead" in done.output
