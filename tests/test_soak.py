"""Every promise at once: a pool under fire answers exactly once, in order, with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import soak


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pool_under_fire(ray_cluster: str, tmp_path: Path) -> None:
    outcome = soak(ray_cluster, tmp_path, batches=500, delay=0.1)
    print(
        f"{outcome.seconds:.0f} s: {outcome.replica_kills} replicas killed, {outcome.controller_kills} controllers, "
        f"1 client after {len(outcome.lines[-1])} batches"
    )
    assert outcome.replica_kills >= 10
    assert outcome.controller_kills == 2
    for lines, expected in zip(outcome.lines[:-1], outcome.expected[:-1], strict=True):
        assert lines == expected
    killed = outcome.lines[-1]
    assert killed == outcome.expected[-1][: len(killed)], "until it was killed, the third client was served as well"
    assert len(killed) < 500
