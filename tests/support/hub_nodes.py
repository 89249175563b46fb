"""A pool, an extraction and doctor on two nodes, each with a cache of the hub of its own; prints what is seen.

A script, since a process can be connected to one Ray only. The nodes of this machine have HF_HOME alone: endpoint and
token are the driver's, which sets them after the nodes were started.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
from hub_server import serving_hub
from lean_ray import STORE_BYTES, lean_cluster
from picturefiles import write_pictures
from waiting import until

from dinov3_ray import DinoV3Config, TeacherPool
from dinov3_ray.checkpoint import fingerprint, init_checkpoint
from dinov3_ray.datasets import extract
from dinov3_ray.doctor.cluster_checks import check_model_on_nodes
from dinov3_ray.errors import ReplicaError

TINY = "facebook/dinov3-tiny"
OPTIONS: dict[str, Any] = {"num_cpus": 1, "threads": 1, "health_interval": 0.2}


def held(folder: Path, name: str) -> dict[str, list[str]]:
    """The commits that a node's cache holds, each with its files."""
    snapshots = folder / name / "hub" / f"models--{TINY.replace('/', '--')}" / "snapshots"
    return {path.name: sorted(file.name for file in path.iterdir()) for path in snapshots.glob("*")}


def look(folder: Path) -> dict[str, Any]:
    first, second = (init_checkpoint("vit-test", folder / f"model-{seed}", seed=seed) for seed in (1, 2))
    seen: dict[str, Any] = {"fingerprint": fingerprint(DinoV3Config(first))}
    with serving_hub() as hub:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "driver"), "HF_TOKEN": "hf_let_in"}
        hub.accounts = {"hf_let_in": {TINY}}
        repository = hub.add(TINY, first, gated=True)
        config = DinoV3Config(TINY)
        repository.commit({path.name: path for path in second.iterdir()})
        with TeacherPool.start(config, name="hub", replicas=2, **OPTIONS) as pool:
            seen["commit"], seen["origin"] = config.revision, pool.status().origin
            seen["served"] = [replica.fingerprint for replica in pool.status().replicas]
            pool.reload(config)
            seen["nodes"] = len({replica.node_id for replica in pool.status().replicas})
            seen["held"] = {name: held(folder, name) for name in ("a", "b", "driver")}

            moved = DinoV3Config(TINY)
            hub.accounts["hf_let_in"].clear()
            seen["doctor"] = check_model_on_nodes(moved, 120).message
            try:
                TeacherPool.start(moved, name="refused", replicas=1, **OPTIONS)
            except ReplicaError as error:
                seen["refused"] = str(error)

            hub.close()
            seen["doctor, later"] = check_model_on_nodes(config, 120).message
            replica = pool.status().replicas[0]
            assert replica.pid is not None
            os.kill(replica.pid, signal.SIGKILL)
            until(lambda: pool.status().restarts == 1 and pool.status().ready == 2, "the replica is back", 200)
            seen["served, later"] = [replica.fingerprint for replica in pool.status().replicas]
        write_pictures(folder / "images", 3)
        manifest = extract(folder / "images", folder / "out", config, progress=False).manifest
        assert manifest is not None
        seen["manifest"] = [manifest["fingerprint"], manifest["origin"]]
    return seen


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="dr-") as name, lean_cluster(Path(name)) as cluster:
        folder = Path(name)
        for node in ("a", "b"):
            home = {"HF_HOME": str(folder / node)}
            cluster.add_node(num_cpus=2, env_vars=home, object_store_memory=STORE_BYTES)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        print(json.dumps(look(folder)))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
