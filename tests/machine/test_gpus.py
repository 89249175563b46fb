"""GPUs told by device files, in file systems as drivers make them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinov3_ray.machine.gpus import has_gpus


@pytest.mark.parametrize(
    ("devices", "there"),
    [
        ((), False),
        (("nvidia0", "nvidiactl", "nvidia-uvm"), True),
        (("nvidia12",), True),  # a container with one of many
        (("nvidiactl", "nvidia-uvm"), False),  # one with none of them
        (("kfd", "dri"), True),
        (("dri", "null"), False),  # a screen
        (("dxg",), True),
    ],
)
def test_device_files(devices: tuple[str, ...], there: bool, tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    for name in devices:
        (tmp_path / "dev" / name).touch()
    assert has_gpus(tmp_path) is there


def test_a_system_without_device_files(tmp_path: Path) -> None:
    assert not has_gpus(tmp_path)
