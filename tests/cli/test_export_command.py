"""``dinov3-ray export`` as a user types it: what it says, and how signals end it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commandline import failure
from commandline import run_command as run
from stores import COUNT, SPEC, build
from waiting import until

from dinov3_ray.datasets import FeatureStore
from dinov3_ray.testing import FakeTeacher


@pytest.fixture
def out(tmp_path: Path) -> Path:
    build(tmp_path / "out", SPEC, FakeTeacher())
    return tmp_path / "out"


def test_it_says_what_it_writes_and_where(out: Path) -> None:
    result = run("export", out, "--to", "npy")
    assert result.exit_code == 0, result.output
    assert "50 images, 3.2 kB each, 160.0 kB to write; " in " ".join(result.stderr.split())
    assert result.stdout == (
        f"{out}.npy: 50 rows\n  1 images could not be read, and have no row: see {out}.npy/errors.parquet\n"
    )
    again = run("export", out, "--to", "npy")
    assert "0 B to write for the 0 that remain" in " ".join(again.stderr.split())
    assert (again.exit_code, again.stdout) == (0, result.stdout)


def test_options_reach_the_export(out: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    result = run("export", out, dest, "--to", "npy", "--dtype", "float16", "--shard-size", "20", "--quiet", "--force")
    assert result.exit_code == 0, result.output
    assert np.load(dest / "cls.npy").dtype == np.float16
    assert json.loads((dest / "export.json").read_text())["shard_size"] == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "out"], "Missing option '--to'"),
        (["export", "out", "--to", "csv"], "'csv' is not one of 'lance', 'webdataset', 'npy'"),
        (["export", "out", "--to", "npy", "--shard-size", "0"], "0 is not in the range x>=1"),
        (["export", "nowhere", "--to", "npy"], "is not a feature store"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str) -> None:
    assert message in failure(*arguments)


# Each row takes its time, so that the signal finds the export at work.
SLOWLY = """
import sys, time
from dinov3_ray.cli import main
from dinov3_ray.datasets import FeatureStore

arrays = FeatureStore.arrays

def slowly(store, id_):
    time.sleep(0.1)
    return arrays(store, id_)

FeatureStore.arrays = slowly
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to", ["npy", "webdataset", "lance"])
def test_a_signal_keeps_what_is_whole(number: int, to: str, out: Path) -> None:
    if to == "lance":
        pytest.importorskip("lance")
    dest, partial = Path(f"{out}.{to}"), Path(f"{out}.{to}.partial")

    def written() -> int:
        said = partial / "export.json"
        return int(json.loads(said.read_text())["rows"]) if said.exists() else 0

    words = [sys.executable, "-c", SLOWLY, "export", str(out), "--to", to, "--shard-size", "5"]
    with subprocess.Popen(words, text=True, stderr=subprocess.PIPE) as process:
        until(lambda: written() >= 10 or process.poll() is not None, "rows are written")
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert "interrupted: what is whole stays, and the same command continues" in said
    assert "Traceback" not in said
    kept = written()
    assert 10 <= kept < COUNT
    assert not dest.exists()
    result = run("export", out, "--to", to)
    assert result.exit_code == 0, result.output
    assert f"for the {COUNT - kept} that remain" in " ".join(result.stderr.split())
    assert result.stdout.startswith(f"{dest}: {COUNT} rows\n")
    assert len(FeatureStore(out)) == COUNT
