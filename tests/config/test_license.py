"""The licence of a model's weights: what its directory states, and where it is shown."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from commandline import run_command as run
from file_changes import change_json

from dinov3_ray import DinoV3Config, DinoV3Teacher, TeacherPool
from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.config.license import license_text, stated_license

CARD = """---
license: other
license_name: dinov3-license
license_link: https://ai.meta.com/resources/models-and-libraries/dinov3-license
tags:
- dinov3
---

# Model card
license: mit
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return init_checkpoint("vit-test", tmp_path / "model")


def test_a_card_states_it(root: Path) -> None:
    (root / "README.md").write_text(CARD)
    assert stated_license(root) == "dinov3-license"
    assert license_text(root, dinov3=True).startswith("dinov3-license: DINOv3 License (https://ai.meta.com/")
    (root / "README.md").write_text(CARD.replace("license_name: dinov3-license\n", ""))
    assert license_text(root, dinov3=True) == "other"
    (root / "README.md").write_text('---\r\nlicense: "apache-2.0"\r\n---\r\n')
    assert license_text(root, dinov3=True) == "apache-2.0"


@pytest.mark.parametrize("card", ["", "license: mit", "---\nlanguage: en\n---\nlicense: mit\n", b"\xff\xfe"])
def test_what_is_not_stated_is_not_claimed(root: Path, card: str | bytes) -> None:
    (root / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    assert stated_license(root) is None
    assert license_text(root, dinov3=True).startswith(
        "not stated in the model directory; weights that Meta released as DINOv3 are"
    )


def test_config_json_goes_first(root: Path) -> None:
    (root / "README.md").write_text(CARD)
    change_json(root / "config.json", license="mine")
    assert license_text(root, dinov3=True) == "mine"
    assert "mine" in run("checkpoint", "info", root).output


def test_teacher_and_pool_say_it(root: Path) -> None:
    (root / "README.md").write_text(CARD)
    config = DinoV3Config(root, image_size=32)
    said = DinoV3Teacher(config, "cpu").license
    assert "DINOv3 License" in said
    with TeacherPool.start(config, name="licensed", replicas=1, local_mode=True) as pool:
        assert pool.teacher().info.license == said


def test_a_configuration_keeps_it_where_its_directory_is_not(root: Path, tmp_path: Path) -> None:
    """As on another node, which finds the weights elsewhere."""
    (root / "README.md").write_text(CARD)
    config = DinoV3Config(root)
    root.rename(tmp_path / "elsewhere")
    assert pickle.loads(pickle.dumps(config)).license.startswith("dinov3-license: DINOv3 License")
    assert DinoV3Config(tmp_path / "elsewhere").license == config.license
