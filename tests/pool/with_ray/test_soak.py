"""Every promise at once: a pool under fire answers exactly once, in order, with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import soak


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pool_under_fire(ray_cluster: str, tmp_path: Path) -> None:
    outcome = soak(ray_cluster, tmp_path, batches=150, seconds=36, every=3)
    print(
        f"{outcome.seconds:.0f} s: {outcome.replica_kills} replicas killed, {outcome.controller_kills} controllers, "
        f"1 client after {len(outcome.lines[-1])} batches"
    )
    assert outcome.seconds >= 36
    assert outcome.replica_kills >= 10
    assert outcome.controller_kills == 2
    assert outcome.lines == outcome.expected, "each batch once, in order, with the bits of an undisturbed run"
    counts = [len(lines) for lines in outcome.lines]
    assert min(counts[:-1]) >= 150
    assert 0 < counts[-1] < min(counts[:-1]), "the third client was served too, until it was killed"
