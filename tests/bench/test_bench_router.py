"""``bench router`` runs without Ray, and as its help does, without what takes seconds to import."""

from __future__ import annotations

import subprocess
import sys

import pytest
from commandline import run_bench


@pytest.mark.slow
def test_every_pool_is_measured() -> None:
    report = run_bench("router", "--quick")
    decisions = report["decisions"]
    assert isinstance(decisions, list)
    assert [row["replicas"] for row in decisions] == [1, 4, 16, 100, 1000, 10_000]
    assert all(0 < row["choice"] < row["whole"] for row in decisions)


@pytest.mark.slow
def test_it_imports_neither_torch_nor_ray() -> None:
    program = "import sys\nimport dinov3_ray.cli.bench, dinov3_ray.bench.routing\n"
    program += "print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
