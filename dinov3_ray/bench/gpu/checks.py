"""Checks of correctness, not of speed: the CUDA sanitizer, and the tests that need a GPU; each in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dinov3_ray
from dinov3_ray.bench.gpu.sanitized import SWITCH
from dinov3_ray.bench.gpu.setting import PartSkippedError, Reporter, Workbench
from dinov3_ray.errors import DinoV3Error

__all__ = ["count_results", "files_with_marked_tests", "run_marked_tests", "run_sanitizer"]

_TESTS = Path(dinov3_ray.__file__).parent.parent / "tests"
_MARK = "pytest.mark.gpu"


def run_sanitizer(bench: Workbench, reporter: Reporter) -> None:
    """Drive a replica's pipeline under torch's CUDA sanitizer; on a CPU, without it.

    Raises:
        DinoV3Error: it found a race, or not the one that was planted.
    """
    reporter.step("a replica's pipeline")
    sizes = bench.sizes
    variant, batches = (sizes.large, 2) if bench.setting.quick else ("vits16", 20)
    arguments = [str(bench.checkpoint(variant)), bench.setting.device, str(batches)]
    # torch's own begins to look when it finds the variable, and fails where torch has no CUDA.
    done = _run(["-m", "dinov3_ray.bench.gpu.sanitized", *arguments], {SWITCH: "1"} if bench.on_gpu else {})
    if done.returncode:
        raise DinoV3Error(f"under the sanitizer: {_last_line(done)}")
    row = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    reporter.row(row)
    if row["finds a planted race"] is False:
        raise DinoV3Error("the sanitizer did not find the race that was planted, so it may have missed others")


def run_marked_tests(bench: Workbench, reporter: Reporter) -> None:
    """Run the tests that are marked gpu, where they and pytest are.

    Raises:
        PartSkippedError: they are not here, or each of them was skipped.
        DinoV3Error: one failed.
    """
    if find_spec("pytest") is None:
        raise PartSkippedError("pytest is not installed")
    files = files_with_marked_tests(_TESTS)
    if not files:
        raise PartSkippedError(f"{_TESTS} has no tests: run the command in a checkout of the repository")
    reporter.step(f"{len(files)} files")
    results = Path(bench.setting.folder) / "tests.xml"
    # Without the options of pyproject.toml, which need plugins.
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "gpu", f"--junitxml={results}"]
    done = _run(["-m", "pytest", *options, *map(str, files)], {})
    if not results.exists():
        raise DinoV3Error(f"pytest did not run: {_last_line(done)}")
    counts, unhappy = count_results(results.read_text(encoding="utf-8"))
    reporter.row(counts, unhappy)
    if counts["failed"] or done.returncode:
        raise DinoV3Error("; ".join(unhappy) or f"pytest: {_last_line(done)}")
    if not counts["passed"]:
        raise PartSkippedError(f"each of the {counts['skipped']} tests was skipped")


def files_with_marked_tests(folder: Path) -> list[Path]:
    """The files in ``folder`` that have such tests: others may need packages that are not here."""
    return [path for path in sorted(folder.rglob("test_*.py")) if _MARK in path.read_text(encoding="utf-8")]


def count_results(junit: str) -> tuple[dict[str, int], list[str]]:
    """(The number of tests by their result, the first line of each that failed) of a JUnit file."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    unhappy = []
    for case in ElementTree.fromstring(junit).iter("testcase"):  # noqa: S314 - pytest has just written it
        failures = [*case.iter("failure"), *case.iter("error")]
        skipped = next(case.iter("skipped"), None)
        counts["failed" if failures else "passed" if skipped is None else "skipped"] += 1
        for failure in failures:
            unhappy.append(f"{case.get('name')}: {(failure.get('message') or '').splitlines()[0]}")
    return counts, unhappy


def _run(arguments: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Python; what it writes goes to standard error too. The worker's end ends it as well: they share a group."""
    command = [sys.executable, *arguments]
    done = subprocess.run(  # noqa: S603 - this Python, and modules named here
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    sys.stderr.write(done.stdout)
    return done


def _last_line(done: subprocess.CompletedProcess[Any]) -> str:
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return lines[-1] if lines else f"it ended with {done.returncode}, without a word"
