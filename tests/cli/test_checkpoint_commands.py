"""`dinov3-ray checkpoint ...`, as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commandline import run_command as run
from reference_vit import random_vit

from dinov3_ray import DinoV3Config
from dinov3_ray.checkpoint import fingerprint, verify
from dinov3_ray.cli import COMMANDS


@pytest.mark.slow
def test_help_is_light() -> None:
    """What no `--help` imports, of any command, in a separate process."""
    program = """
import sys
import click
from dinov3_ray.cli import main
HEAVY = {"torch", "ray", "transformers", "rich", "numpy", "pandas", "pyarrow", "PIL", "matplotlib"}
def visit(command, names):
    main([*names, "--help"], standalone_mode=False)
    print("imported for", " ".join(names), sorted(HEAVY & set(sys.modules)))
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            visit(command.get_command(context, name), [*names, name])
visit(main, [])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("imported for")]
    assert len(said) > 2 * len(COMMANDS)  # with those of groups
    assert [line for line in said if not line.endswith("[]")] == []
    for name, command in COMMANDS.items():
        assert name in done.stdout
        assert command.help.split()[0] in done.stdout


def test_unknown_command() -> None:
    result = run("chekpoint")
    assert result.exit_code == 2
    assert "No such command" in result.output


def test_init_verify_info(tmp_path: Path) -> None:
    root = tmp_path / "model"
    made = run("checkpoint", "init", "ViT-test", root, "--seed", 3, "--image-size", "96x160", "--shard-size", "500KB")
    assert (made.exit_code, made.stdout) == (0, f"{root}: vit-test, random weights of seed 3\n")
    config = DinoV3Config(root)
    assert config.image_size == (96, 160)
    files = verify(config).files
    assert len(files) > 1
    assert all(path.stat().st_size < 510_000 for path in files)

    checked = run("checkpoint", "verify", root)
    assert checked.exit_code == 0
    assert f"sound; {len(config.architecture.tensors())} tensors in {len(files)} file(s)" in checked.output

    shown = run("checkpoint", "info", root)
    assert shown.exit_code == 0
    for fact in ("vit-test", fingerprint(config), "96 x 160", "6 x 10", "0.485, 0.456, 0.406", "2 of 64"):
        assert fact in " ".join(shown.output.replace("│", " ").split()), shown.output

    shown = run("checkpoint", "info", root, "--image-size", "input/2")
    facts = (
        "96 x 160 (h x w) where no image is there; else by the images (input/2)",
        "resize to half the size, down to",
    )
    for fact in (*facts, fingerprint(DinoV3Config(root, image_size="input/2"))):
        assert fact in " ".join(shown.output.replace("│", " ").split()), shown.output


def test_info_of_a_convnext(tmp_path: Path) -> None:
    assert run("checkpoint", "init", "convnext-test", tmp_path / "model").exit_code == 0
    shown = run("checkpoint", "info", tmp_path / "model")
    assert shown.exit_code == 0
    assert "16, 24, 32, 48" in shown.output


def test_convert(tmp_path: Path) -> None:
    source = tmp_path / "tiny_sat493m.pth"
    weights = random_vit(width=128, heads=2, blocks=2, inner=192, swiglu=True, registers=4, qkv_bias=False)
    torch.save(weights, source)
    made = run("checkpoint", "convert", source, tmp_path / "model")
    assert (made.exit_code, made.stdout) == (0, f"{tmp_path / 'model'}: vit-test-gated, statistics of sat493m\n")
    assert DinoV3Config(tmp_path / "model").preprocessing.mean == (0.430, 0.411, 0.296)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["init", "vitx", "model"], 1, "Error: variant must be one of vits16"),
        (["init", "vit-test", "model", "--image-size", "big"], 2, "must be SIZE or HEIGHTxWIDTH, at least 1"),
        (["init", "vit-test", "model", "--image-size", "1x2x3"], 2, "got '1x2x3'"),
        (["init", "vit-test", "model", "--image-size", "input"], 2, "got 'input'"),
        (["init", "vit-test", "model", "--image-size", "8"], 1, "Error: image_size must be"),
        (["init", "vit-test", "model", "--shard-size", "5 apples"], 2, "such as 500MB or 5GB; got '5 apples'"),
        (["init", "vit-test", "model", "--seed", "x"], 2, "--seed"),
        (["verify", "nowhere"], 1, "Error: root must be a model directory"),
        (["info", "nowhere"], 1, "Error: root must be a model directory"),
        (["convert", "nowhere.pth", "model"], 2, "does not exist"),
    ],
)
def test_mistakes_get_a_sentence_and_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("checkpoint", *arguments)
    assert result.exit_code == status
    assert message in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_verify_finds_damage(tmp_path: Path) -> None:
    assert run("checkpoint", "init", "vit-test", tmp_path / "model").exit_code == 0
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"  # a NaN
    weights.write_bytes(content)
    result = run("checkpoint", "verify", tmp_path / "model")
    assert result.exit_code == 1
    assert "must be finite; found 1 NaN" in result.output
