"""A model of a pool's rate: from a few measured costs it predicts the rate of the slowest part. Pure.

The parts are the accelerators, the cores of the node, the client's process, the node's memory and the client's network.
Each part by itself allows a number of batches per second, and the prediction is the smallest of these numbers. Where
two parts are about equal, the prediction is a little too high.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COPIES", "Costs", "Line", "Spent", "Workload"]

#: Times that each byte of images and results is written: once, into the object store.
COPIES = 1


@dataclass(frozen=True, slots=True)
class Workload:
    """The work that a pool is given.

    Attributes:
        replicas: their number.
        clients: their number.
        rows: images per batch.
        nbytes: bytes of a batch, its images and its results together.
        accelerator_seconds: the time of a replica's device per batch.
    """

    replicas: int
    clients: int
    rows: int
    nbytes: int
    accelerator_seconds: float


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds per batch: ``fixed``, plus ``per_byte`` for each byte."""

    fixed: float
    per_byte: float

    @classmethod
    def through(cls, small: tuple[int, float], large: tuple[int, float]) -> Line:
        """The line through two points (bytes, seconds).

        A negative slope or start is noise: it becomes 0, and the line goes through the larger point.
        """
        per_byte = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
        fixed = max(0.0, large[1] - per_byte * large[0])
        return cls(fixed, per_byte if fixed else large[1] / large[0])

    def at(self, nbytes: int) -> float:
        """Seconds of a batch of ``nbytes``."""
        return self.fixed + self.per_byte * nbytes


@dataclass(frozen=True, slots=True)
class Spent:
    """The measured CPU seconds of a batch of ``nbytes``.

    Attributes:
        cpu: in all processes of the node.
        client: in the client's process, which is part of ``cpu``.
    """

    nbytes: int
    cpu: float
    client: float


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs of a batch on one node, and what the node has.

    Attributes:
        cores: those that replicas, clients and Ray share.
        cpu: core seconds per batch in all processes.
        client: core seconds per batch in the client's process, whose interpreter uses about one core at a time.
        copy_rate: bytes/s that all cores together copy in memory.
    """

    cores: int
    cpu: Line
    client: Line
    copy_rate: float

    @classmethod
    def calibrated(cls, cores: int, copy_rate: float, small: Spent, large: Spent) -> Costs:
        """The costs that follow from batches of two sizes."""
        return cls(
            cores,
            Line.through((small.nbytes, small.cpu), (large.nbytes, large.cpu)),
            Line.through((small.nbytes, small.client), (large.nbytes, large.client)),
            copy_rate,
        )

    def walls(self, load: Workload, network: float | None = None) -> dict[str, float]:
        """Batches/s that each part allows by itself.

        Args:
            load: the work.
            network: bytes/s between each client and the replicas; None if they share a node.
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
        """(Batches/s, the part that limits them)."""
        walls = self.walls(load, network)
        wall = min(walls, key=walls.__getitem__)
        return walls[wall], wall
