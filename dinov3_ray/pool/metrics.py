"""A pool's metrics for Prometheus: their names and meanings, and how they are published through Ray.

Ray exports each name with the prefix ``ray_``, and counters with the suffix ``_total``, at every node's metrics port.
It adds the labels process (``WorkerId``) and node. This package adds few, since each combination is a series that
somebody stores: the pool, the replica, and the stage or state where there is one.

Nothing is published while a request is served. Every few seconds, each process publishes by how much its counters have
grown. A counter begins at 0, since Prometheus sees no growth in a series that begins with its first event. Ray collects
samples every 10 seconds (``metrics_report_interval_ms``); a process that is killed loses those since. Only pools in Ray
publish: local mode has no Prometheus.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from ray.util.metrics import Counter, Gauge

__all__ = ["METRICS", "ClientSeconds", "Kind", "Metric", "Publisher", "Sample"]


class Kind(StrEnum):
    """A metric's type, as Prometheus has it."""

    COUNTER = "counter"  # only grows; ask Prometheus for its rate
    GAUGE = "gauge"  # how things stand now


@dataclass(frozen=True, slots=True)
class Metric:
    """One name, and what it means.

    Args:
        name: as given to Ray.
        by: a third label besides pool and replica, if there is one.
        per_replica: whether replicas publish it. Otherwise the controller or clients do, without the label ``replica``.
    """

    name: str
    kind: Kind
    help: str
    per_replica: bool = False
    by: str | None = None

    @property
    def tag_keys(self) -> tuple[str, ...]:
        keys = ("pool", "replica" if self.per_replica else None, self.by)
        return tuple(key for key in keys if key is not None)


def _by_name(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


METRICS = _by_name(
    # Of replicas.
    Metric("dinov3_images", Kind.COUNTER, "Images answered", per_replica=True),
    Metric("dinov3_batches", Kind.COUNTER, "Forward passes", per_replica=True),
    Metric("dinov3_errors", Kind.COUNTER, "Requests on which the teacher raised", per_replica=True),
    Metric("dinov3_rejected", Kind.COUNTER, "Requests refused because the queue was full", per_replica=True),
    Metric(
        "dinov3_out_of_memory",
        Kind.COUNTER,
        "Forward passes for which the device's memory did not suffice; each was computed again in smaller parts",
        per_replica=True,
    ),
    Metric(
        "dinov3_fitting_batch",
        Kind.GAUGE,
        "Images in the smallest parts that batches are computed in so that they fit the device; 0 if all fit whole",
        per_replica=True,
    ),
    Metric(
        "dinov3_stage_seconds",
        Kind.COUNTER,
        "Seconds that requests spent in each stage: queue, preprocess, forward and pack at the replica, and transfer, "
        "which clients report (with no replica): the rest of the round trip",
        per_replica=True,
        by="stage",
    ),
    Metric("dinov3_queued", Kind.GAUGE, "Requests that wait at the replica", per_replica=True),
    # Of clients.
    Metric("dinov3_answers", Kind.COUNTER, "Requests answered to the client"),
    Metric("dinov3_retries", Kind.COUNTER, "Requests sent again, since a replica died, hung, raised or left"),
    Metric("dinov3_in_flight", Kind.GAUGE, "Requests sent and not answered yet"),
    Metric("dinov3_in_flight_bytes", Kind.GAUGE, "Bytes of their images and expected results"),
    Metric("dinov3_waiting", Kind.GAUGE, "Requests that wait at the client for a free place"),
    Metric("dinov3_trainer_seconds", Kind.COUNTER, "Seconds of training loops over prefetch(), waits included"),
    Metric("dinov3_trainer_wait_seconds", Kind.COUNTER, "Of these, seconds that they waited for the teacher"),
    # Of the controller.
    Metric("dinov3_replicas", Kind.GAUGE, "Replicas, by state: starting, ready, draining", by="state"),
    Metric("dinov3_replicas_target", Kind.GAUGE, "Replicas wanted"),
    Metric("dinov3_clients", Kind.GAUGE, "Clients connected"),
    Metric("dinov3_restarts", Kind.COUNTER, "Replicas lost and replaced"),
)


class Sample(NamedTuple):
    """A counter's total or a gauge's level, at one moment; ``label`` is the value of the metric's ``by``."""

    name: str
    value: float
    label: str = ""


class Publisher:
    """Publishes the samples of one part of this process: a replica, a controller or one client.

    A process may have several parts of one pool, such as a trainer with two teachers. Their gauges are added up: Ray
    keeps one value per process, and would show the last one published.

    Args:
        pool: the pool's name.
        replica: the replica's id; empty for others. (Prometheus treats an empty label as none.)
    """

    def __init__(self, pool: str, replica: str = "") -> None:
        self._tags = {"pool": pool, "replica": replica}
        self._totals: dict[tuple[str, str], float] = {}
        self._levels: dict[tuple[str, str], float] = {}

    def publish(self, samples: Iterable[Sample]) -> None:
        """Publish a snapshot. Cheap, but not for every request."""
        for name, value, label in samples:
            if METRICS[name].kind is Kind.GAUGE:
                self._level(name, value, label)
            else:
                self._count(name, value, label)

    def close(self) -> None:
        """Take back this part's share of the gauges: what has ended has nothing in flight."""
        for name, label in list(self._levels):
            self._level(name, 0.0, label)

    def _count(self, name: str, value: float, label: str) -> None:
        before = self._totals.get((name, label))
        self._totals[name, label] = value
        if before is None:
            # First sample. inc() rejects 0, so the value is recorded directly; anything above 0 was counted before this
            # publisher first ran. _record is private, seen in Ray 2.60.0.
            _instrument(name)._record(value, self._tags_of(name, label))
        elif value > before:
            _instrument(name).inc(value - before, self._tags_of(name, label))

    def _level(self, name: str, value: float, label: str) -> None:
        tags = self._tags_of(name, label)
        change = value - self._levels.get((name, label), 0.0)
        self._levels[name, label] = value
        key = (name, *tags.values())
        instrument = _instrument(name)
        with _lock:
            _sums[key] = _sums.get(key, 0.0) + change
            instrument.set(_sums[key], tags)

    def _tags_of(self, name: str, label: str) -> dict[str, str]:
        return {key: label if key == METRICS[name].by else self._tags[key] for key in METRICS[name].tag_keys}


_lock = threading.Lock()
_instruments: dict[str, Any] = {}
_sums: dict[tuple[str, ...], float] = {}  # each gauge's level in this process, over all publishers


def _instrument(name: str) -> Any:
    """Ray's object for a metric, one per process, made when it is first used."""
    with _lock:
        if name not in _instruments:
            metric = METRICS[name]
            made = Counter if metric.kind is Kind.COUNTER else Gauge
            _instruments[name] = made(name, description=metric.help, tag_keys=metric.tag_keys)
        return _instruments[name]


@dataclass(slots=True)
class ClientSeconds:
    """How one client has spent its time so far, in seconds.

    Attributes:
        transfer: of requests, between this client and their replicas: the round trip without the replica's own time.
        trainer: of loops over ``prefetch``.
        trainer_wait: of these, waiting for the teacher.
    """

    transfer: float = 0.0
    trainer: float = 0.0
    trainer_wait: float = 0.0

    def add_step(self, waited: float, seconds: float) -> None:
        """Count one step of a training loop."""
        self.trainer += seconds
        self.trainer_wait += waited
