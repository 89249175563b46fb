"""What one routing decision takes, whatever the size of the pool: the book alone, without Ray."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from dinov3_ray.bench.machine import describe_machine
from dinov3_ray.pool.client.book import Limits, RoutingBook

__all__ = ["Decision", "RoutingCosts", "measure_routing"]

_REPLICAS = (1, 4, 16, 100, 1000, 10_000)
_IN_FLIGHT = 12  # what a client of a few replicas has under way


@dataclass(frozen=True, slots=True)
class Decision:
    """Seconds of one request in the book, from its submission through the choice of a replica to its answer.

    Attributes:
        choice: of these, the choice and its booking (``RoutingBook.next_sends``) alone.
        choice_slowest: of the slowest of the runs.
    """

    replicas: int
    whole: float
    choice: float
    choice_slowest: float


@dataclass(frozen=True, slots=True)
class RoutingCosts:
    """The decisions of pools of several sizes, medians of ``repeats`` runs of ``requests``."""

    requests: int
    repeats: int
    decisions: list[Decision]

    def as_dict(self) -> dict[str, Any]:
        return {"machine": describe_machine(), "decisions": [asdict(decision) for decision in self.decisions]}

    def tables(self) -> list[Table]:
        """Microseconds per request, one row per size of the pool."""
        table = Table(
            title="One request in the routing book",
            caption=f"medians of {self.repeats} runs of {self.requests} requests, after one to warm up\n"
            f"{describe_machine()}",
        )
        for heading in ("replicas", "choice, \u00b5s", "slowest run", "with submission and answer, \u00b5s"):
            table.add_column(heading, justify="right")
        for one in self.decisions:
            columns = (f"{seconds * 1e6:.1f}" for seconds in (one.choice, one.choice_slowest, one.whole))
            table.add_row(f"{one.replicas:,}", *columns)
        return [table]


def measure_routing(requests: int, repeats: int) -> RoutingCosts:
    """Measure pools of 1 to 10,000 replicas: ``repeats`` runs of ``requests`` each, after one run to warm up."""
    return RoutingCosts(requests, repeats, [_decision(replicas, requests, repeats) for replicas in _REPLICAS])


def _decision(replicas: int, requests: int, repeats: int) -> Decision:
    runs = [_run(replicas, requests, seed) for seed in range(repeats + 1)][1:]
    choices = [choice for choice, _ in runs]
    return Decision(replicas, statistics.median(whole for _, whole in runs), statistics.median(choices), max(choices))


def _run(replicas: int, requests: int, seed: int) -> tuple[float, float]:
    """(choice, whole) a request, of a client that keeps a few requests under way, each answered in its turn."""
    book = RoutingBook(Limits(), window=3, seed=seed)
    book.set_replicas((f"replica-{number}", False, "teacher") for number in range(replicas))
    clock = time.perf_counter
    choosing, under_way = 0.0, []
    gc.collect()
    gc.disable()  # a collection is not the decision's cost
    begun = clock()
    for number in range(requests):
        now = number * 1e-3
        book.submit(str(number), rows=32, nbytes=1)
        before = clock()
        under_way += book.next_sends(now)
        choosing += clock() - before
        if len(under_way) >= min(_IN_FLIGHT, replicas):
            send = under_way.pop(0)
            book.answered(send.request_id, send.replica_id, now, seconds=0.04, other_rows=number % 64)
    whole = clock() - begun
    gc.enable()
    return choosing / requests, whole / requests
