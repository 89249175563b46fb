"""An extraction on two worker nodes of this machine, one of which dies under way.

Run by hand, ``python tests/support/dying_node.py``; a script, since a process can be connected to one Ray only.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import kills
import ray
from kills import BLOCK, SPEC, TracedFactory, assert_equal, finished
from lean_ray import STORE_BYTES, lean_cluster
from picturefiles import write_pictures

from dinov3_ray.datasets import FeatureStore, extract
from dinov3_ray.testing import FakeTeacher


def kill_node(node: object) -> None:
    """End a node as a power cut would: its raylet and all its workers, at once, without a word."""
    raylets = [info.process for infos in node.all_processes.values() for info in infos]  # type: ignore[attr-defined]
    pids = {process.pid for process in raylets}
    children = {int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _parent(int(pid)) in pids}
    for pid in pids | children:
        os.kill(pid, signal.SIGKILL)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="dr-") as name, lean_cluster(Path(name)) as cluster:
        folder = Path(name)
        write_pictures(folder / "images", 600)
        (folder / "pids").mkdir()
        nodes = [cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES) for _ in range(2)]
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        extract(folder / "images", folder / "undisturbed", FakeTeacher.factory(), SPEC, block_size=BLOCK)
        out = folder / "out"
        factory = TracedFactory(folder / "pids", 0.05)
        run = threading.Thread(
            target=extract, args=(folder / "images", out, factory, SPEC), kwargs={"block_size": BLOCK}
        )
        begun = time.monotonic()
        run.start()
        while len(finished(out)) < 8:
            assert run.is_alive()
            time.sleep(0.01)
        before = finished(out)
        teachers = len(list((folder / "pids").iterdir()))
        kill_node(nodes[0])
        killed = time.monotonic()
        run.join(300)
        assert not run.is_alive()
        ended = time.monotonic()
        after = finished(out)
        assert_equal(FeatureStore(out), FeatureStore(folder / "undisturbed"))
        print(
            f"node killed {killed - begun:.1f} s after the start, {len(before)} of {len(after)} blocks finished by "
            f"{teachers - 1} actors; the same call ended {ended - killed:.1f} s later; "
            f"{len(FeatureStore(out))} rows equal the undisturbed run's; finished blocks computed again: "
            f"{sum(after.get(name) != entry for name, entry in before.items())}"
        )


if __name__ == "__main__":
    ray.cloudpickle.register_pickle_by_value(kills)
    main()
