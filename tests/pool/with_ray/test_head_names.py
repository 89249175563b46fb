"""A process that is connected to a head under one of its addresses may name another one of them."""

from __future__ import annotations

import pytest

from dinov3_ray.errors import PoolError
from dinov3_ray.pool.cluster import connect


def test_a_head_by_its_other_names(ray_cluster: str) -> None:
    port = ray_cluster.rpartition(":")[2]
    for name in (f"localhost:{port}", f"127.0.0.1:{port}", ray_cluster, "auto", None):
        assert connect(name).address == ray_cluster
    with pytest.raises(PoolError, match="disconnect first"):
        connect(f"192.0.2.1:{port}")
