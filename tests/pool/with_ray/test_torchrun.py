"""torchrun around a script that starts its own pool: one Ray, one pool, whoever comes first and whoever leaves last."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import SUPPORT
from waiting import until

from dinov3_ray.pool.cluster import list_pools


@pytest.fixture
def apart() -> Iterator[dict[str, str]]:
    """The environment of a user who has no Ray, in a folder that is removed again."""
    folder = Path(tempfile.mkdtemp(prefix="dr-"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(secrets.token_hex(32))
    yield {
        **kept,
        "TMPDIR": str(folder),
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100 * 2**20),
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path]),
    }
    shutil.rmtree(folder, ignore_errors=True)


def torchrun(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, str(SUPPORT / "rank_pool.py"), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def processes_in(folder: str) -> list[str]:
    """Command lines of processes that have ``folder`` in theirs, as all of a Ray's have."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text().replace("\0", " ")
        except OSError:
            continue
        if folder in line:
            found.append(line[:80])
    return found


def reports(folder: Path) -> list[dict[str, object]]:
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [one["right"] for one in found] == [5, 5]
    return found


@pytest.mark.slow
def test_ranks_without_a_ray_share_one_that_ends_with_the_last_of_them(apart: dict[str, str], tmp_path: Path) -> None:
    ran = torchrun(apart, tmp_path, "connect")
    assert ran.returncode == 0, ran.stderr[-4000:]
    first, second = reports(tmp_path)
    assert first["ray"] == second["ray"]
    assert first["replica"] == second["replica"]
    until(lambda: not processes_in(apart["TMPDIR"]), lambda: f"all have ended: {processes_in(apart['TMPDIR'])}")


@pytest.mark.slow
def test_ranks_in_a_running_ray_share_a_pool(ray_cluster: str, tmp_path: Path) -> None:
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster, "RAY_AUTH_MODE": "token"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), *sys.path])
    ran = torchrun(environment, tmp_path, "connect")
    assert ran.returncode == 0, ran.stderr[-4000:]
    first, second = reports(tmp_path)
    assert first["ray"] == second["ray"] == ray_cluster
    assert first["replica"] == second["replica"]
    until(lambda: "ranks" not in list_pools(), "the pool has ended with the last of them")


@pytest.mark.slow
def test_ranks_that_would_each_start_a_ray_are_told_what_to_do(apart: dict[str, str], tmp_path: Path) -> None:
    ran = torchrun(apart, tmp_path, "error")
    assert ran.returncode != 0
    assert "this is rank 1 of several on this node, and each would start a Ray and a pool" in ran.stderr
    assert "exist='connect'" in ran.stderr
    until(lambda: not processes_in(apart["TMPDIR"]), lambda: f"all have ended: {processes_in(apart['TMPDIR'])}")
