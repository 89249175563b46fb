"""Where a Ray that is started here keeps its files, if its own choice will not do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov3_ray.doctor.machine_checks import Severity, check_ray_folder
from dinov3_ray.machine.ray_folder import RayFolder

NOBODY = 65534


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose path is short."""
    monkeypatch.chdir(tmp_path)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


def test_rays_own_choice(short: Path) -> None:
    assert (RayFolder({}).path, RayFolder({}).variable) == (Path("/tmp/ray"), "")
    chosen = RayFolder({"TMPDIR": "elsewhere", "RAY_TMPDIR": str(short)})
    assert (chosen.path, chosen.trouble, chosen.usable) == (short / "ray", "", True)


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_an_empty_variable_is_not_set_and_a_relative_one_is_left(short: Path, name: str) -> None:
    empty = RayFolder({name: ""}, fallback=short)
    assert (empty.path, empty.variable, empty.trouble) == (Path("/tmp/ray"), "", "")
    assert RayFolder({"RAY_TMPDIR": "", "TMPDIR": str(short)}).path == short / "ray"
    relative = RayFolder({name: "tmp"}, fallback=short)
    assert "tmp/ray is relative" in relative.trouble
    taken = (True, short / f"ray-{os.getuid()}") if name == "TMPDIR" else (False, Path("tmp/ray"))
    assert (relative.usable, relative.path) == taken


def test_a_long_tmpdir_is_left_and_a_long_ray_tmpdir_is_refused(short: Path) -> None:
    long = "/" + 60 * "x"
    left = RayFolder({"TMPDIR": long}, fallback=short)
    assert left.usable
    assert left.path == short / f"ray-{os.getuid()}"
    assert "sockets are too long" in left.trouble
    obeyed = RayFolder({"RAY_TMPDIR": long}, fallback=short)
    assert (obeyed.usable, obeyed.path) == (False, Path(long, "ray"))


def test_the_longest_path_that_fits_makes_sockets() -> None:
    """Checked against Ray's own limit, 107 bytes: the folder is the longest that has no trouble."""
    session = f"/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    fits = next(n for n in range(90, 0, -1) if not RayFolder({"RAY_TMPDIR": "/" + n * "x"}).trouble.count("longer"))
    assert len("/" + fits * "x" + "/ray" + session) == 107


def test_a_file_is_no_folder(short: Path) -> None:
    (short / "file").touch()
    found = RayFolder({"RAY_TMPDIR": str(short / "file")})
    assert (found.usable, found.trouble) == (False, f"{(short / 'file').absolute()} is not a folder")
    finding = check_ray_folder({"RAY_TMPDIR": str(short / "file")})
    assert finding.verdict is Severity.PROBLEM
    assert "set RAY_TMPDIR" in finding.remedy


@pytest.mark.skipif(os.getuid() != 0, reason="root alone can make another user's folder")
def test_the_folder_of_another_user_is_left() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's folders are closed to other users
        shared = Path(name)
        shared.chmod(0o777)
        (shared / "ray").mkdir(mode=0o755)
        child = os.fork()
        if child == 0:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            found = RayFolder({"TMPDIR": name}, fallback=shared)
            right = found.usable and found.path == shared / f"ray-{NOBODY}" and "may not write to" in found.trouble
            os._exit(0 if right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
