"""What deploy/README.md says is there: files, options, commands, variables, and an entry for each alert."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml
from paths import DEPLOY

from dinov3_ray.cli import COMMANDS, main
from dinov3_ray.pool.metrics import METRICS

TEXT = (DEPLOY / "README.md").read_text()


def test_every_file_is_named_and_every_named_file_is_there() -> None:
    named = set(re.findall(r"`((?:deploy/)?(?:ray|kuberay|slurm|docker|monitoring)/[\w.-]*)`", TEXT))
    assert named
    for name in named:
        assert (DEPLOY / name.removeprefix("deploy/")).exists(), name
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.name not in ("README.md", "common.sh", "Dockerfile.dockerignore"):
            assert path.name in TEXT, f"{path.name} is not told of"


def test_each_alert_has_its_entry() -> None:
    (group,) = yaml.safe_load((DEPLOY / "monitoring" / "alerts.yml").read_text())["groups"]
    entries = set(re.findall(r"^### (\w+)$", TEXT, re.MULTILINE))
    assert entries == {rule["alert"] for rule in group["rules"]}


@pytest.mark.parametrize("script", ["head.sh", "worker.sh"])
def test_options_of_scripts(script: str) -> None:
    shown = subprocess.run([DEPLOY / "ray" / script, "--help"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"(--[a-z-]+)", shown))
    for line in re.findall(rf"deploy/ray/{script} (.*)", TEXT):
        assert set(re.findall(r"(--[a-z-]+)", line)) <= known
    for option in re.findall(r"\(`(--[a-z-]+)`\)", TEXT):
        assert option in known


def test_commands() -> None:
    for name, rest in re.findall(r"dinov3-ray (\w+)([^`\n]*)", TEXT):
        assert name in COMMANDS, name
        command = main.get_command(main.make_context("dinov3-ray", [name], resilient_parsing=True), name)
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"(--[a-z-]+)", rest)) <= known, rest


def test_ports_are_those_of_the_scripts() -> None:
    scripts = "".join(path.read_text() for path in (DEPLOY / "ray").glob("*.sh"))
    section = TEXT[TEXT.index("- **Ports.**") : TEXT.index("- **TLS**")]
    for port in ("6379", "6380", "20000", "20999", "8090", "10001", "8265"):
        assert port in scripts
        assert port in section


def test_metrics_and_sections() -> None:
    for name in re.findall(r"`(dinov3_\w+)`", TEXT):
        assert name in METRICS
    for section in ("From nothing to a pool on 3 nodes", "Sizing", "Upgrades", "SECURITY", "What to do when", "Logs"):
        assert f"## {section}\n" in TEXT
