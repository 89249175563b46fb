"""The time of one routing decision in pools of several sizes, on the client's routing table alone, without Ray."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from dinov3_ray.bench.printout import describe_machine, new_table
from dinov3_ray.pool.client.balancer import KnownReplica
from dinov3_ray.pool.client.routing_table import Limits, RoutingTable

__all__ = ["RoutingCost", "RoutingCosts", "measure_routing"]

_REPLICAS = (1, 4, 16, 100, 1000, 10_000)
_IN_FLIGHT = 12  # requests; usual for a client of a few replicas


@dataclass(frozen=True, slots=True)
class RoutingCost:
    """Seconds per request in the table, medians over the runs.

    Attributes:
        replicas: the size of the pool.
        whole: the whole request: its submission, the choice of a replica, and its answer.
        choice: the choice of a replica alone (``RoutingTable.next_sends``).
        choice_slowest: the same, in the slowest run.
    """

    replicas: int
    whole: float
    choice: float
    choice_slowest: float


@dataclass(frozen=True, slots=True)
class RoutingCosts:
    """The costs in pools of several sizes: medians of ``repeats`` runs of ``requests`` each."""

    requests: int
    repeats: int
    decisions: list[RoutingCost]

    def as_dict(self) -> dict[str, Any]:
        return {"machine": describe_machine(), "decisions": [asdict(decision) for decision in self.decisions]}

    def tables(self) -> list[Table]:
        """Microseconds per request, one row per size of the pool."""
        caption = f"medians of {self.repeats} runs of {self.requests} requests, after one to warm up"
        headings = ("replicas", "choice, \u00b5s", "slowest run", "with submission and answer, \u00b5s")
        table = new_table("One request in the routing table", f"{caption}\n{describe_machine()}", *headings)
        for one in self.decisions:
            columns = (f"{seconds * 1e6:.1f}" for seconds in (one.choice, one.choice_slowest, one.whole))
            table.add_row(f"{one.replicas:,}", *columns)
        return [table]


def measure_routing(requests: int, repeats: int) -> RoutingCosts:
    """Measure pools of 1 to 10,000 replicas: ``repeats`` runs of ``requests`` each, after one run to warm up."""
    return RoutingCosts(requests, repeats, [_decision(replicas, requests, repeats) for replicas in _REPLICAS])


def _decision(replicas: int, requests: int, repeats: int) -> RoutingCost:
    runs = [_run(replicas, requests, seed) for seed in range(repeats + 1)][1:]
    choices = [choice for choice, _ in runs]
    return RoutingCost(
        replicas, statistics.median(whole for _, whole in runs), statistics.median(choices), max(choices)
    )


def _run(replicas: int, requests: int, seed: int) -> tuple[float, float]:
    """(choice, whole) in seconds per request, of a client that keeps a few requests in flight."""
    table = RoutingTable(Limits(), window=3, seed=seed)
    table.set_replicas(KnownReplica(f"replica-{number}", False, "teacher") for number in range(replicas))
    clock = time.perf_counter
    choosing, in_flight = 0.0, []
    gc.collect()
    gc.disable()  # a collection is not the decision's cost
    begun = clock()
    for number in range(requests):
        now = number * 1e-3
        table.submit(str(number), rows=32, nbytes=1)
        before = clock()
        in_flight += table.next_sends(now)
        choosing += clock() - before
        if len(in_flight) >= min(_IN_FLIGHT, replicas):
            send = in_flight.pop(0)
            table.answered(send.request_id, send.replica_id, now, seconds=0.04, other_rows=number % 64)
    whole = clock() - begun
    gc.enable()
    return choosing / requests, whole / requests
