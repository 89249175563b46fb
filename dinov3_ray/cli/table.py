"""A pool's status as text: a table, or one line. Pure: it gets snapshots and returns text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from dinov3_ray.pool.control.status import PoolStatus, ReplicaStatus
from dinov3_ray.pool.messages import ReplicaStatistics

__all__ = ["ReplicaRate", "is_healthy", "rates", "render", "summary"]

_STATE_STYLES = {"ready": "green", "starting": "yellow", "draining": "blue"}
_SHOWN_ERRORS = 5
_UNBOUNDED = 10_000  # columns

_COLUMNS: dict[str, JustifyMethod] = {
    "replica": "left",
    "state": "left",
    "node": "left",
    "pid": "right",
    "device": "left",
    "img/s": "right",
    "busy": "right",
    "queue": "right",
    "images": "right",
    "errors": "right",
    "golden": "right",
    "teacher": "left",
}
_DISPENSABLE = ("teacher", "device", "pid", "golden", "node", "images")  # left out of a narrow terminal, in this order
_NOTHING = "-"


@dataclass(frozen=True, slots=True)
class ReplicaRate:
    """A replica's images per second, and the share of the time that it was computing (0 to 1)."""

    images_per_second: float
    busy: float


def rates(before: PoolStatus | None, after: PoolStatus) -> dict[str, ReplicaRate]:
    """The rate of each replica between two snapshots of one pool, or since it started if ``before`` lacks it.

    A replica that has reported nothing new in between is left out. Time is measured by the replica's own clock: a
    snapshot holds its last report, which may be a moment old.
    """
    earlier = {replica.replica_id: replica.statistics for replica in before.replicas} if before else {}
    found = {}
    for replica in after.replicas:
        now, then = replica.statistics, earlier.get(replica.replica_id) or ReplicaStatistics()
        if now is None or now.uptime <= then.uptime:
            continue
        seconds = now.uptime - then.uptime
        # A pass is counted when it has ended, so one that is longer than the interval would give more than 100%.
        busy = min((now.busy_seconds - then.busy_seconds) / seconds, 1.0)
        found[replica.replica_id] = ReplicaRate((now.images - then.images) / seconds, busy)
    return found


def is_healthy(status: PoolStatus) -> bool:
    """Whether as many replicas as wanted take work."""
    return status.ready >= status.target


def summary(status: PoolStatus) -> str:
    """One line: how many of the wanted replicas are ready, and the states of the others."""
    counts: dict[str, int] = {}
    for replica in status.replicas:
        of = replica.generation
        other = "" if of == status.generation else f" with the {'former' if of < status.generation else 'new'} teacher"
        key = f"{replica.state}{other}"
        counts[key] = counts.get(key, 0) + 1
    parts = [f"{counts.pop('ready', 0)} of {status.target} ready"]
    parts += [f"{count} {state}" for state, count in sorted(counts.items())]
    return "; ".join(parts)


def render(status: PoolStatus, rate: Mapping[str, ReplicaRate]) -> RenderableType:
    """The whole of it: a headline, a row for each replica, totals, who waits for GPUs, and the last errors."""
    return Group(_headline(status), _ReplicaRows(status, rate), _troubles(status))


class _ReplicaRows:
    """The table, with as many columns as fit the terminal."""

    def __init__(self, status: PoolStatus, rate: Mapping[str, ReplicaRate]) -> None:
        self._rows = [_row(replica, rate.get(replica.replica_id)) for replica in status.replicas]
        self._totals = _totals(status, rate)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        columns = dict(_COLUMNS)
        table = self._table(columns)
        for name in _DISPENSABLE:
            if console.measure(table, options=options.update(width=_UNBOUNDED)).maximum <= options.max_width:
                break
            del columns[name]
            table = self._table(columns)
        yield table

    def _table(self, columns: Mapping[str, JustifyMethod]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_footer=len(self._rows) > 1, footer_style="bold", pad_edge=False)
        for name, justify in columns.items():
            table.add_column(name, self._totals.get(name, ""), justify=justify, no_wrap=True)
        for row in self._rows:
            table.add_row(*(row[name] for name in columns))
        return table


def _headline(status: PoolStatus) -> Text:
    healthy = is_healthy(status)
    within = "" if status.low == status.high else f" ({status.low}-{status.high} allowed)"
    parts = [
        f"{status.ready} of {status.target} ready{within}",
        f"{status.teacher or 'teacher not known yet'} {_short(status.fingerprint)}".rstrip(f" {_NOTHING}"),
        f"{status.batching} batching",
        _count(status.clients, "client"),
        _count(status.restarts, "restart"),
    ]
    if status.newest_generation:
        given_up = ", the last one given up" if status.newest_generation > status.generation else ""
        running = ", one running" if status.reloading else given_up
        parts.append(_count(status.newest_generation, "reload") + running)
    return Text.assemble(
        (f"{status.name} ", "bold"),
        ("healthy" if healthy else "degraded", "bold green" if healthy else "bold yellow"),
        "  " + " · ".join(parts),
    )


def _row(replica: ReplicaStatus, rate: ReplicaRate | None) -> dict[str, str | Text]:
    counters = replica.statistics
    state = Text(replica.state, _STATE_STYLES.get(replica.state, ""))
    state.append(f" {_duration(replica.seconds_in_state)}", "dim")
    errors = Text(str(counters.errors), "red" if counters.errors else "") if counters else Text(_NOTHING)
    return {
        "replica": replica.replica_id,
        "state": state,
        "node": replica.node_id[:8] if replica.node_id else _NOTHING,
        "pid": str(replica.pid) if replica.pid else _NOTHING,
        "device": replica.device or _NOTHING,
        "img/s": _speed(rate.images_per_second) if rate else _NOTHING,
        "busy": f"{rate.busy:.0%}" if rate else _NOTHING,
        "queue": str(counters.waiting) if counters else _NOTHING,
        "images": f"{counters.images:,}" if counters else _NOTHING,
        "errors": errors,
        "golden": f"{replica.golden_cosine:.5f}" if replica.golden_cosine is not None else _NOTHING,
        "teacher": _short(replica.fingerprint),
    }


def _totals(status: PoolStatus, rate: Mapping[str, ReplicaRate]) -> dict[str, str]:
    reports = [replica.statistics for replica in status.replicas if replica.statistics]
    return {
        "replica": "all",
        "img/s": _speed(sum(one.images_per_second for one in rate.values())),
        "busy": f"{sum(one.busy for one in rate.values()) / len(rate):.0%}" if rate else _NOTHING,
        "queue": str(sum(one.waiting for one in reports)),
        "images": f"{status.images:,}",
        "errors": str(sum(one.errors for one in reports)),
    }


def _troubles(status: PoolStatus) -> Table:
    table = Table.grid("", "", padding=(0, 2))  # long ones wrap next to their headline, not below it
    if status.gpus and status.gpus.notice:
        table.add_row(Text("GPUs", "bold yellow", no_wrap=True), Text(status.gpus.notice))
    for index, (size, names) in enumerate(sorted(_memory_limits(status).items())):
        text = f"{', '.join(names)}: batches are computed in parts of {size}, since more did not fit the device"
        table.add_row("" if index else Text("memory", "bold yellow", no_wrap=True), Text(text))
    for index, error in enumerate(status.recent_errors[-_SHOWN_ERRORS:]):
        table.add_row("" if index else Text("last errors", "bold red", no_wrap=True), Text(error))
    return table


def _memory_limits(status: PoolStatus) -> dict[int, list[str]]:
    """Replicas by the number of images in the smallest parts that they compute batches in."""
    limits: dict[int, list[str]] = {}
    for replica in status.replicas:
        if replica.statistics and replica.statistics.fitting_batch:
            limits.setdefault(replica.statistics.fitting_batch, []).append(replica.replica_id)
    return limits


def _short(fingerprint: str | None) -> str:
    return fingerprint[:12] if fingerprint else _NOTHING


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _speed(images_per_second: float) -> str:
    return f"{images_per_second:,.1f}" if images_per_second < 100 else f"{images_per_second:,.0f}"


def _duration(seconds: float) -> str:
    """The two largest of days, hours, minutes and seconds."""
    whole = int(seconds)
    units = (("d", whole // 86400), ("h", whole // 3600 % 24), ("m", whole // 60 % 60), ("s", whole % 60))
    first = next((index for index, (_, number) in enumerate(units) if number), len(units) - 1)
    return "".join(f"{number}{unit}" for unit, number in units[first : first + 2])
