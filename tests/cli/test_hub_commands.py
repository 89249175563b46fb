"""Every command that takes a model directory takes the id of a model on the hub, with its revision."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from commandline import run_command as run
from hub_server import HubServer, serving_hub, use_hub

from dinov3_ray.cli import main
from dinov3_ray.config import DinoV3Config
from dinov3_ray.doctor.machine_checks import Severity, check_model_root

TINY = "facebook/dinov3-tiny"


@pytest.fixture
def hub(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with a small model, whose branch ``broken`` has no weights."""
    with serving_hub() as running:
        use_hub(running, tmp_path / "home", monkeypatch)
        monkeypatch.chdir(tmp_path)
        repository = running.add(TINY, tiny_checkpoint)
        repository.commit({path.name: path for path in tiny_checkpoint.glob("*.json")}, "broken")
        yield running


def commands(group: click.Group, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*names, name))
        else:
            yield (*names, name), command


def test_whoever_takes_a_root_takes_a_revision() -> None:
    options: dict[tuple[str, ...], set[str]] = {}
    for names, command in commands(main):
        options[names] = {option for parameter in command.params for option in parameter.opts}
    takers = {names for names, known in options.items() if "--root" in known}
    commands_of_one_word = {(name,) for name in ("up", "reload", "extract", "distill", "show", "doctor", "demo")}
    assert takers == commands_of_one_word | {("bench", "teacher")}
    assert takers | {("checkpoint", "verify"), ("checkpoint", "info")} == {
        names for names, known in options.items() if "--revision" in known
    }


def test_checkpoint(hub: HubServer, tiny_checkpoint: Path) -> None:
    commit = hub.repositories[f"models/{TINY}"].revisions["main"]
    checked = run("checkpoint", "verify", TINY)
    assert (checked.exit_code, checked.stdout.split(": ")[0]) == (0, f"{TINY}@{commit}"), checked.output
    described = run("checkpoint", "info", TINY, "--revision", "main")
    assert described.exit_code == 0, described.output
    assert DinoV3Config(tiny_checkpoint).place.origin == str(tiny_checkpoint)
    broken = run("checkpoint", "verify", TINY, "--revision", "broken")
    assert (broken.exit_code, "must hold model.safetensors" in broken.output) == (1, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("up",),
        ("reload",),
        ("extract", "images", "out"),
        ("show", "--image", "IMAGE"),
        ("demo",),
        ("bench", "teacher"),
    ],
)
def test_an_id_reaches_the_hub(hub: HubServer, folder: Path, arguments: tuple[str, ...]) -> None:
    given: list[Any] = [folder / "0.png" if argument == "IMAGE" else argument for argument in arguments]
    done = run(*given, "--revision", "broken", "--root", TINY)
    assert done.exit_code == 1
    assert f"Error: {TINY} at commit " in done.output
    assert "must hold model.safetensors or model.safetensors.index.json; it has no weights" in done.output


def test_a_revision_without_a_root(hub: HubServer) -> None:
    for arguments in (("up",), ("extract", "images", "out"), ("doctor",), ("demo",)):
        done = run(*arguments, "--revision", "main")
        assert (done.exit_code, "--revision belongs to --root" in done.output) == (2, True), done.output
    assert hub.requests == []


@pytest.mark.slow
def test_doctor(hub: HubServer) -> None:
    done = run("doctor", "--json", "--root", TINY, "--revision", "v9", RAY_ADDRESS=None)
    (finding,) = [found for line in done.stdout.splitlines() if (found := json.loads(line))["subject"] == "model"]
    assert (finding["verdict"], "the hub has no 'v9' of it" in finding["message"]) == ("problem", True)
    hub.requests.clear()
    found, config = check_model_root(TINY, weights_here=False)
    assert (found.verdict, config is not None) == (Severity.FINE, True)
    assert not any(line.startswith("GET /stored/") for line in hub.requests)
    found, _ = check_model_root(TINY)
    assert found.message.endswith(" GB")
    assert any(line.startswith("GET /stored/") for line in hub.requests)
