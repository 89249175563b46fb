"""What a pool delivers as work grows, from a few measured costs: the slowest of its parts sets the rate. Pure.

Each part by itself could do so many batches a second: the accelerators, the cores of the node that everything shares,
each client's process, the node's memory, a client's network. The prediction is the least of these, with nothing lost
where two are about equal, so that it is a little too high there.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COPIES", "Costs", "Line", "Spent", "Workload"]

#: Times that each byte of images and results is written: once, into the object store.
COPIES = 1


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of a pool.

    Attributes:
        rows: images a batch.
        nbytes: of a batch's images and results together.
        accelerator_seconds: that a replica's device takes for a batch.
    """

    replicas: int
    clients: int
    rows: int
    nbytes: int
    accelerator_seconds: float


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds a batch: ``fixed``, and so much more for each byte."""

    fixed: float
    per_byte: float

    @classmethod
    def through(cls, small: tuple[int, float], large: tuple[int, float]) -> Line:
        """The line through two points (bytes, seconds).

        A slope or a start below nothing is noise: it is taken for nothing, and the line goes through the larger point.
        """
        per_byte = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
        fixed = max(0.0, large[1] - per_byte * large[0])
        return cls(fixed, per_byte if fixed else large[1] / large[0])

    def at(self, nbytes: int) -> float:
        return self.fixed + self.per_byte * nbytes


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU seconds that a batch of ``nbytes`` was seen to take.

    Attributes:
        cpu: in all processes of the node.
        client: of these, in the client's.
    """

    nbytes: int
    cpu: float
    client: float


@dataclass(frozen=True, slots=True)
class Costs:
    """What the parts of one node can do.

    Attributes:
        cores: that replicas, clients and Ray share.
        cpu: seconds of one core for a batch, in all processes.
        client: of these, in the client's process, whose interpreter runs on about one core at a time.
        copy_rate: bytes/s that all cores together copy in memory.
    """

    cores: int
    cpu: Line
    client: Line
    copy_rate: float

    @classmethod
    def calibrated(cls, cores: int, copy_rate: float, small: Spent, large: Spent) -> Costs:
        """From what batches of two sizes took."""
        return cls(
            cores,
            Line.through((small.nbytes, small.cpu), (large.nbytes, large.cpu)),
            Line.through((small.nbytes, small.client), (large.nbytes, large.client)),
            copy_rate,
        )

    def walls(self, load: Workload, network: float | None = None) -> dict[str, float]:
        """Batches/s that each part could do by itself.

        Args:
            load: what is asked.
            network: bytes/s between each client and the replicas; None where they share a node.
        """
        walls = {
            "accelerators": load.replicas / load.accelerator_seconds if load.accelerator_seconds else float("inf"),
            "CPU": self.cores / self.cpu.at(load.nbytes),
            "client": load.clients / self.client.at(load.nbytes),
            "memory": self.copy_rate / (COPIES * load.nbytes),
        }
        if network is not None:
            walls["network"] = load.clients * network / load.nbytes
        return walls

    def predict(self, load: Workload, network: float | None = None) -> tuple[float, str]:
        """Batches/s, and the part that allows no more."""
        walls = self.walls(load, network)
        wall = min(walls, key=walls.__getitem__)
        return walls[wall], wall
