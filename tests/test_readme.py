"""What the README says is so: its commands exist, and each command is documented."""

from __future__ import annotations

import re

from paths import README

from dinov3_ray.cli import COMMANDS


def test_every_command_is_documented_and_every_documented_command_exists() -> None:
    named = set(re.findall(r"dinov3-ray ([a-z]+)", README.read_text(encoding="utf-8")))
    assert named == set(COMMANDS)


def test_both_set_up_commands_are_there_and_what_they_name_exists() -> None:
    text = README.read_text(encoding="utf-8")
    assert "pip install -c deploy/constraints.txt . && dinov3-ray demo" in text
    assert "pip install -c deploy/constraints.txt -e '.[test]' && pytest" in text
    assert (README.parent / "deploy" / "constraints.txt").is_file()


def test_what_it_is_and_is_not_fits_in_ten_lines() -> None:
    text = README.read_text(encoding="utf-8")
    section = text[text.index("**It is**") : text.index("## Set-up")]
    assert len([line for line in section.splitlines() if line.strip()]) <= 10
