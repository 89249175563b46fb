"""How deep a prefetch goes, from what it is told of waits."""

from __future__ import annotations

from dinov3_ray.training.prefetch.depth import Depth


def test_depth_grows_with_waits_and_shrinks_after_calm() -> None:
    depth = Depth("auto")
    depth.begin(6)
    assert depth.batches == 6
    for _ in range(20):
        depth.learn(0.1, 0.2, 6)
    assert depth.batches == 12, "bounded by twice the parallelism"
    for _ in range(1000):
        depth.learn(0.0, 0.2, 6)
    assert depth.batches == 2
    depth.learn(0.1, 0.2, 6)
    assert depth.batches == 3
    for _ in range(99):
        depth.learn(0.0, 0.2, 6)
    assert depth.batches == 3, "after a wait, giving back takes twice the calm"
    depth.learn(0.0, 0.2, 6)
    assert depth.batches == 2
    depth.learn(0.0005, 0.2, 6)
    assert depth.batches == 2, "half a millisecond is not a wait"
    for _ in range(10):
        depth.learn(0.1, 0.2, 1)
    assert depth.batches == 2, "the pool shrank"
    depth.begin(6)
    assert depth.batches == 2, "the next pass goes on from what was found"


def test_a_fixed_depth_stays() -> None:
    depth = Depth(4)
    depth.begin(100)
    for _ in range(100):
        depth.learn(1.0, 1.0, 100)
    assert depth.batches == 4
