"""A pool under fire: replicas killed every few seconds, the controller twice, one client once.

Run longer by hand: ``python tests/support/soak.py --seconds 1800``. The test in test_soak.py runs it for half a
minute, and kills less often: a new replica every two seconds takes all of two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from torch import Tensor
from waiting import until

from dinov3_ray import Features, FeatureSpec, RemoteTeacher, TeacherPool
from dinov3_ray.pool.address import NAMESPACE
from dinov3_ray.pool.cluster import controller_name
from dinov3_ray.testing import FakeTeacher

SPEC = FeatureSpec(cls=True, feature_map=True, layers=(1,))
POOL = "soak"


@dataclass(frozen=True)
class Outcome:
    """What a soak did and saw."""

    seconds: float
    replica_kills: int
    controller_kills: int
    restarts: int
    lines: list[list[str]]
    #: What an undisturbed run gives for as many batches.
    expected: list[list[str]]


def view(client: int, number: int) -> Tensor:
    """The images of one client's batch; sizes differ from batch to batch."""
    generator = torch.Generator().manual_seed(client * 1_000_003 + number)
    rows, side = 1 + number % 5, 32 + 16 * (number % 3)
    return torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=generator)


def line(number: int, features: Features) -> str:
    """One batch's results as text: equal lines are equal bits."""
    digest = hashlib.sha256()
    for name, tensor in features.named():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return f"{number} {len(features)} {digest.hexdigest()}"


def client(address: str, number: int, batches: int, seconds: float, out: Path) -> None:
    """One trainer: prefetches its own batches and writes a line for each, in the order it gets them.

    It asks for at least so many batches, and goes on for at least so many seconds.
    """
    begun = time.monotonic()
    numbers = itertools.takewhile(lambda n: n < batches or time.monotonic() < begun + seconds, itertools.count())
    with RemoteTeacher(POOL, address=address) as remote, out.open("w") as file:
        stream = remote.prefetch(numbers, SPEC, images=lambda batch: view(number, batch))
        for batch, features in stream:
            print(line(batch, features), file=file, flush=True)


def soak(
    address: str,
    folder: Path,
    *,
    batches: int,
    seconds: float,
    every: float,
    delay: float = 0.1,
    clients: int = 3,
    replicas: int = 4,
) -> Outcome:
    """Run it, and kill a replica ``every`` so many seconds. The last client is the one that is killed."""
    chance = random.Random(0)
    outs = [folder / f"client{index}" for index in range(clients)]
    begun = time.monotonic()
    kills = controller_kills = 0
    with TeacherPool.start(
        FakeTeacher.factory(delay=delay), name=POOL, replicas=replicas, health_interval=0.5, health_timeout=20
    ) as pool:
        processes = [
            subprocess.Popen([sys.executable, __file__, "--client", *map(str, (index, batches, seconds, out)), address])
            for index, out in enumerate(outs)
        ]
        try:
            for tick in _ticks(every, while_running=processes[:-1]):
                ready = [one.pid for one in pool.status().replicas if one.state == "ready" and one.pid]
                victims = [pid for pid in ready if Path(f"/proc/{pid}").exists()]  # the last one may not be missed yet
                if victims:
                    os.kill(chance.choice(victims), signal.SIGKILL)
                    kills += 1
                if tick in (3, 8):
                    ray.kill(ray.get_actor(controller_name(POOL), namespace=NAMESPACE), no_restart=False)
                    controller_kills += 1
                if tick == 5:
                    until(lambda: outs[-1].exists() and outs[-1].stat().st_size, "the last client has an answer")
                    processes[-1].kill()
            failed = [process.args for process in processes[:-1] if process.wait() != 0]
            assert not failed, failed
            restarts = pool.status().restarts
        finally:
            for process in processes:
                process.kill()
                process.wait()
    teacher = FakeTeacher()
    lines = [out.read_text().splitlines() for out in outs]
    return Outcome(
        seconds=time.monotonic() - begun,
        replica_kills=kills,
        controller_kills=controller_kills,
        restarts=restarts,
        lines=lines,
        expected=[
            [line(number, teacher.extract(view(index, number), SPEC)) for number in range(len(found))]
            for index, found in enumerate(lines)
        ],
    )


def _ticks(seconds: float, while_running: list[subprocess.Popen[bytes]]) -> Iterator[int]:
    tick = 0
    while any(process.poll() is None for process in while_running):
        yield tick
        tick += 1
        try:
            while_running[0].wait(seconds)
        except subprocess.TimeoutExpired:
            continue
        time.sleep(seconds if any(process.poll() is None for process in while_running) else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--every", type=float, default=2.0)
    parser.add_argument("--client", nargs=5, metavar=("NUMBER", "BATCHES", "SECONDS", "OUT", "ADDRESS"))
    options = parser.parse_args()
    if options.client:
        number, batches, seconds, out, address = options.client
        client(address, int(number), int(batches), float(seconds), Path(out))
        return
    with tempfile.TemporaryDirectory(prefix="dr-") as folder:
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=f"{folder}/ray")
        outcome = soak(
            ray.get_runtime_context().gcs_address,
            Path(folder),
            batches=500,
            seconds=options.seconds,
            every=options.every,
        )
        ray.shutdown()
    print(
        f"{outcome.seconds:.0f} s, {outcome.replica_kills} replicas and {outcome.controller_kills} controllers killed; "
        f"{', '.join(str(len(lines)) for lines in outcome.lines)} batches, equal to the undisturbed: "
        f"{outcome.lines == outcome.expected}"
    )


if __name__ == "__main__":
    main()
