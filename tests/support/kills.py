"""An extraction whose driver, teacher and decoders are killed with -9 at random moments, and which is resumed.

More kills by hand: ``python tests/support/kills.py --kills 10``. The test in test_extract.py makes three.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ray
from picturefiles import write_pictures

from dinov3_ray.datasets import FeatureStore, extract
from dinov3_ray.features import FeatureSpec
from dinov3_ray.testing import FakeTeacher

SPEC = FeatureSpec(cls=True, feature_map=True, layers=(1,), map_size=(2, 2))
BLOCK = 16
VICTIMS = ("driver", "teacher", "decoder")
_WAIT_SECONDS = 120


class Traced(FakeTeacher):
    """Leaves its process's id in a folder, and takes its time."""

    def __init__(self, folder: Path, delay: float) -> None:
        super().__init__(delay=delay)
        (folder / str(os.getpid())).touch()


@dataclass(frozen=True)
class TracedFactory:
    folder: Path
    delay: float

    def __call__(self) -> FakeTeacher:
        return Traced(self.folder, self.delay)


@dataclass
class Outcome:
    """What was killed after how many finished blocks, and how often a finished block was computed again."""

    kills: list[tuple[str, int]] = field(default_factory=list)
    drivers: int = 0
    recomputed: int = 0
    seconds: float = 0.0


def disturb(address: str, images: Path, folder: Path, *, kills: int, delay: float, seed: int = 0) -> Outcome:
    """Extract ``images`` into ``folder/out`` by drivers in processes of their own, until one comes to the end."""
    chance = random.Random(seed)
    out, pids = folder / "out", folder / "pids"
    pids.mkdir()
    command = [sys.executable, __file__, "--driver", str(images), str(out), str(pids), str(delay), address]
    outcome, begun = Outcome(), time.monotonic()
    seen: dict[str, tuple[int, int]] = {}
    total = -(-sum(1 for path in images.rglob("*") if path.is_file()) // BLOCK)
    driver = None
    try:
        for number in range(kills):
            # Each kind in turn; the rest of the work is shared out among the kills that are left.
            victim = VICTIMS[number % len(VICTIMS)]
            if driver is None or driver.poll() is not None:
                driver = subprocess.Popen(command)
                outcome.drivers += 1
            share = (total - len(seen)) / (kills - number + 1)
            goal = len(seen) + chance.uniform(0, share)
            next(_ for _ in _until(driver) if len(finished(out)) >= goal)
            time.sleep(chance.uniform(0, 3 * delay))  # within a block, not at its end
            targets = next(found for _ in _until(driver) if (found := _find(victim, pids, driver.pid)))
            outcome.recomputed += _changed(seen, finished(out))
            seen |= finished(out)
            os.kill(targets[0], signal.SIGKILL)
            if victim == "driver":
                driver.wait(30)
            outcome.kills.append((victim, len(seen)))
        if driver is None or driver.poll() is not None:
            driver = subprocess.Popen(command)
            outcome.drivers += 1
        assert driver.wait(_WAIT_SECONDS) == 0
    finally:
        if driver is not None:
            driver.kill()
            driver.wait(30)
    outcome.recomputed += _changed(seen, finished(out))
    outcome.seconds = time.monotonic() - begun
    return outcome


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """Blocks in the ledger, with the file of each entry: a block that is computed again has another."""
    found = {}
    for path in (out / "ledger").glob("*.json") if out.exists() else ():
        entry = path.stat()
        found[path.name] = entry.st_ino, entry.st_mtime_ns
    return found


def assert_equal(store: FeatureStore, expected: FeatureStore) -> None:
    """Row for row, bit for bit, errors included."""
    assert store.ids == expected.ids
    assert store.errors.equals(expected.errors)
    for id_ in expected.ids:
        mine, other = store.arrays(id_), expected.arrays(id_)
        assert mine.keys() == other.keys()
        assert all(np.array_equal(mine[name], other[name]) for name in other), id_
        assert store.view(id_) == expected.view(id_)
        assert store.original_size(id_) == expected.original_size(id_)


def _changed(before: dict[str, tuple[int, int]], now: dict[str, tuple[int, int]]) -> int:
    return sum(now.get(name) != entry for name, entry in before.items())


def _find(victim: str, pids: Path, driver: int) -> list[int]:
    """Processes of this kind that run now, the newest teacher first."""
    if victim == "driver":
        return [driver]
    if victim == "teacher":
        traced = sorted(pids.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return [int(path.name) for path in traced if Path(f"/proc/{path.name}").exists()]
    return [pid for pid in _descendants(os.getpid()) if _title(pid).startswith("ray::decode_piece")]


def _descendants(root: int) -> set[int]:
    """Of this Ray, which this process started: nobody else's processes."""
    parents = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended
    found, before = {root}, set()
    while found != before:
        before = set(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _until(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Moments while ``process`` runs, which must not end yet; with a deadline on all of them together."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        assert process.poll() is None, "the extraction ended before all were killed"
        assert time.monotonic() < deadline, "the extraction stands still"
        yield
        time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--driver", nargs=5, metavar=("IMAGES", "OUT", "PIDS", "DELAY", "ADDRESS"))
    options = parser.parse_args()
    if options.driver:
        images, out, pids, delay, address = options.driver
        extract(images, out, TracedFactory(Path(pids), float(delay)), SPEC, block_size=BLOCK, address=address)
        return
    with tempfile.TemporaryDirectory(prefix="dr-") as name:
        folder = Path(name)
        write_pictures(folder / "images", options.images)
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=f"{name}/ray")
        extract(folder / "images", folder / "undisturbed", FakeTeacher.factory(), SPEC, block_size=BLOCK)
        outcome = disturb(
            ray.get_runtime_context().gcs_address,
            folder / "images",
            folder,
            kills=options.kills,
            delay=0.02,
            seed=options.seed,
        )
        ray.shutdown()
        store, expected = FeatureStore(folder / "out"), FeatureStore(folder / "undisturbed")
        assert_equal(store, expected)
        print(
            f"{outcome.seconds:.0f} s, {outcome.drivers} drivers; killed (after blocks): "
            f"{', '.join(f'{victim} ({blocks})' for victim, blocks in outcome.kills)}; "
            f"{len(store)} rows and {len(store.errors)} errors equal the undisturbed run's; "
            f"{outcome.recomputed} of {len(finished(folder / 'out'))} finished blocks computed again"
        )


if __name__ == "__main__":
    main()
