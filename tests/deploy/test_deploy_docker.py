"""The Dockerfile, parsed and held to rules, since there may be no Docker where the tests run."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
from typing import NamedTuple

import pytest
from paths import REPOSITORY

DOCKERFILE = REPOSITORY / "deploy" / "docker" / "Dockerfile"
KNOWN = {"FROM", "ARG", "WORKDIR", "RUN", "ENV", "COPY", "USER", "CMD"}


class Instruction(NamedTuple):
    word: str
    value: str


def parse(text: str) -> list[Instruction]:
    """Instructions with their continued lines joined; comments and blank lines left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines()]


@pytest.fixture(scope="module")
def stages() -> list[list[Instruction]]:
    found: list[list[Instruction]] = [[]]
    for instruction in parse(DOCKERFILE.read_text()):
        if instruction.word == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found


def values(stage: list[Instruction], word: str) -> list[str]:
    return [instruction.value for instruction in stage if instruction.word == word]


def test_instructions(stages: list[list[Instruction]]) -> None:
    assert {instruction.word for stage in stages for instruction in stage} <= KNOWN
    before, build, final = stages
    assert values(before, "ARG") == ["PYTHON_IMAGE=python:3.11-slim-bookworm"], "the base has a version"
    assert values(build, "FROM") == ["${PYTHON_IMAGE} AS build"]
    assert values(final, "FROM") == ["${PYTHON_IMAGE}"]


def test_it_does_not_run_as_root(stages: list[list[Instruction]]) -> None:
    final = stages[-1]
    (user,) = values(final, "USER")
    assert int(user) > 0, "by number, so that Kubernetes can see that it is not root"
    assert any(f"useradd --uid {user}" in command for command in values(final, "RUN"))
    words = [instruction.word for instruction in final]
    assert words.index("USER") > max(index for index, word in enumerate(words) if word in ("RUN", "COPY"))
    (command,) = values(final, "CMD")
    assert json.loads(command) == ["dinov3-ray", "--help"], "a list, so that no shell stands between it and signals"


def test_it_is_small_and_holds_no_secret(stages: list[list[Instruction]]) -> None:
    for stage in stages:
        for command in values(stage, "RUN"):
            assert ("apt-get install" in command) == ("rm -rf /var/lib/apt/lists/*" in command)
            assert ("apt-get install" in command) == ("--no-install-recommends" in command)
            if "pip install" in command:
                assert "--no-cache-dir" in command
                assert "-c deploy/constraints.txt" in command
        text = " ".join(values(stage, "ENV") + values(stage, "ARG"))
        assert not re.search(r"AUTH_TOKEN=|PASSWORD|SECRET", text)
    assert any("RAY_AUTH_MODE=token" in value for value in values(stages[-1], "ENV"))
    copied = [value for value in values(stages[-1], "COPY") if "--from=build" in value]
    assert copied == ["--from=build /opt/venv /opt/venv"], "sources stay behind"


def test_it_can_compile_teachers(stages: list[list[Instruction]]) -> None:
    installed = " ".join(command for command in values(stages[-1], "RUN") if "apt-get install" in command).split()
    assert {"gcc", "libc6-dev"} <= set(installed), "Triton needs them; Python's headers are in the base image"


def test_shell_commands_parse(stages: list[list[Instruction]]) -> None:
    for stage in stages:
        for command in values(stage, "RUN"):
            done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, "")


def test_cpu_or_gpu_is_a_build_argument(stages: list[list[Instruction]]) -> None:
    build = stages[1]
    assert "TORCH_INDEX=https://pypi.org/simple" in values(build, "ARG")
    torch, package = (command for command in values(build, "RUN") if "pip install" in command)
    assert '--index-url "${TORCH_INDEX}"' in torch
    assert "index" not in package, "only torch comes from there"


def test_what_is_copied_is_there_and_in_the_context(stages: list[list[Instruction]]) -> None:
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*", "all stays out that is not named"
    let_in = [pattern[1:] for pattern in ignored if pattern.startswith("!")]
    for stage in stages:
        for value in values(stage, "COPY"):
            if value.startswith("--from"):
                continue
            for source in value.split()[:-1]:
                assert (REPOSITORY / source).exists(), source
                assert any(fnmatch.fnmatch(source, pattern) for pattern in let_in), f"{source} is ignored"
    assert all((REPOSITORY / path).exists() for path in let_in)
