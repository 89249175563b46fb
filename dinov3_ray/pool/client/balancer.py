"""Chooses the replica for a request, from what one client has heard of each. Pure.

The choice is the best of a few replicas with a free place ("power of two choices", Mitzenmacher 2001): the one that
will be through with its rows first, counting what this client has there, the load that replicas report with their
answers, and their measured speeds. One of them is one of the few that won before, the rest are any, at random. That
memory (Mitzenmacher, Prabhakar and Shah 2002) matters where a pool is large and a client small: of a thousand replicas
it has heard of ten, and two random ones are nearly always two that it knows nothing of.

They are two for a client with nothing in flight, and one more for each request that it has, up to eight: a training
loop's first batches then go to as many replicas, and the second one does not wait behind the first.

What failed, in the simulation (tests/pool/client/test_simulation.py: replicas whose speeds differ by 10, 80% load). The
figures are mean latencies; a random choice has 114 ms with 1,000 replicas and 10,000 clients of 6 requests each, 270 ms
with 100 replicas and 64 clients.

- Two candidates always: of the first four batches of a training loop, two met at one of four replicas more often than
  not, and the loop waited a whole batch for it at the start of most epochs. The three tests of the simulation have 54,
  24 and 31 ms with it, now 54, 21 and 28.
- All of up to eight replicas, whatever a client has in flight: clients that know little agree on the same one. 16 of
  them at 4 replicas whose speeds differ by 10, 80% load: 49 ms, with two candidates 30, now 32.
- Two random candidates, a report that fades to nothing within two seconds: 72 ms in the smaller pool, and no better
  than a random replica in the larger one, because those that a client has not heard of look idle.
  With 16 replicas and 16 clients at 90% load it has 29 ms, now 28.
- The same with reports that fade to the mean of all reports: 114 and 45 ms.
- With a memory of 8: 91 and 22 ms; of 4: 74 and 24; of 2: 53 and 26. Few are best for a client that seldom sends, and
  many for one that sends much: as many as it has in flight, from 2 to 8, gives 54 and 24.
- With a memory whose gaps are filled from the end of the list, which is the same for all clients: one replica got the
  requests of 947 clients out of 1,000. Gaps are filled at random.
"""

from __future__ import annotations

import random
from collections.abc import Set
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

__all__ = ["Balancer", "KnownReplica"]


class KnownReplica(NamedTuple):
    """A replica as the pool's view lists it."""

    replica_id: str
    is_near: bool  # on this node
    fingerprint: str | None  # of its teacher


_SMOOTHING = 0.2  # weight of the newest answer in a replica's measured speed
_REPORT_LIFE = 2.0  # seconds after which a reported load says as little as the mean of all
_SPEED_LIFE = 60.0  # the same for a measured speed: one slow start must not keep work away for ever
_REMEMBERED = range(2, 9)  # winners: as many as the client has requests in flight, within these bounds
_MOST_OTHERS = 7  # looked at besides a winner: a client with much in flight would look at the whole pool
_NEAR = 0.95  # a replica on this node wins against one that would be done this much sooner: its bytes travel less


@dataclass(slots=True)
class _Record:
    """What this client has at one replica, and what it has learned of it."""

    requests: int = 0
    rows: int = 0
    other_rows: float = 0.0
    reported: float = -inf
    seconds_per_row: float | None = None


class Balancer:
    """The replicas of a pool as one client sees them, with what it has in flight at each."""

    def __init__(self, window: int, seed: int | None) -> None:
        self._window = window
        self._random = random.Random(seed).random  # noqa: S311 - a load balancer's choice, not a secret
        self._known: dict[str, KnownReplica] = {}  # those that may get work, now or later
        # Only of replicas that this client has sent to; kept beyond their leaving while something is in flight there.
        self._records: dict[str, _Record] = {}
        # Those with a free place, the remembered ones first, the rest in no order: a random one is found, and removed,
        # at the same cost at any pool size.
        self._open: list[str] = []
        self._paused: dict[str, float] = {}  # until when
        self._resume_at = inf  # not after the first pause ends
        self._in_flight = 0  # at all replicas together
        # Over all answers; what is assumed of a replica that has not answered lately.
        self._mean_speed: float | None = None
        self._mean_other_rows = 0.0

    # Replicas -------------------------------------------------------------------------------------------------------

    def replace(self, replicas: dict[str, KnownReplica]) -> None:
        """Replace the replicas by these."""
        gone = self._known.keys() - replicas.keys()
        self._known = replicas
        for replica_id in gone:
            self._forget(replica_id)
        self._refresh()

    @property
    def window(self) -> int:
        """Requests that this client keeps at one replica."""
        return self._window

    @window.setter
    def window(self, window: int) -> None:
        self._window = window
        self._refresh()

    def remove(self, replica_id: str) -> None:
        """A replica is gone."""
        if self._known.pop(replica_id, None) is not None:
            self._forget(replica_id)
            if replica_id in self._open:
                self._close(self._open.index(replica_id))

    def pause(self, replica_id: str, until: float) -> None:
        """Do not choose a replica before ``until``."""
        if replica_id not in self._known:
            return
        self._paused[replica_id] = until
        self._resume_at = min(self._resume_at, until)
        if replica_id in self._open:
            self._close(self._open.index(replica_id))

    def resume(self, now: float) -> None:
        """End the pauses that are over."""
        if now < self._resume_at:
            return
        for replica_id in [name for name, until in self._paused.items() if until <= now]:
            self.unpause(replica_id)
        self._resume_at = min(self._paused.values(), default=inf)

    def unpause(self, replica_id: str) -> None:
        """End a replica's pause, if it has one: it gave a sign of life."""
        if self._paused.pop(replica_id, None) is not None and self._is_free(replica_id):
            self._open.append(replica_id)

    @property
    def resume_at(self) -> float:
        """When to call :meth:`resume` (perhaps too early, never too late); infinity if nothing is paused."""
        return self._resume_at if self._paused else inf

    # Requests -------------------------------------------------------------------------------------------------------

    def take(self, rows: int, now: float, fingerprint: str | None = None, tried: Set[str] = frozenset()) -> str | None:
        """Record a place for ``rows`` at the replica that is best for them; None if there is none now."""
        if not self._open:
            return None
        if fingerprint is None and not tried:
            position = self._choose(range(len(self._open)), rows, now)
        else:
            positions = self._suitable(fingerprint, tried)
            if not positions:
                return None
            position = self._choose(positions, rows, now)
        replica_id = self._open[position]
        record = self._record(replica_id)
        self._in_flight += 1
        record.requests += 1
        record.rows += rows
        if record.requests >= self._window:
            self._close(position)
        return replica_id

    def give_back(self, replica_id: str, rows: int) -> None:
        """End what :meth:`take` booked."""
        record = self._records[replica_id]
        was_free = self._is_free(replica_id)
        self._in_flight -= 1
        record.requests -= 1
        record.rows -= rows
        assert record.requests >= 0, "a place was given back twice"
        if replica_id in self._known:
            if not was_free and self._is_free(replica_id):
                self._open.append(replica_id)
        elif not record.requests:
            del self._records[replica_id]

    def learn(self, replica_id: str, rows: int, seconds: float, other_rows: int, now: float) -> None:
        """A replica answered: it was busy for ``seconds`` with ``rows``, and has ``other_rows`` of others waiting."""
        if replica_id not in self._known:
            return
        record = self._record(replica_id)
        sample = seconds / rows
        if self._mean_speed is None:
            self._mean_speed, self._mean_other_rows = sample, float(other_rows)
        self._mean_speed += _SMOOTHING * (sample - self._mean_speed)
        self._mean_other_rows += _SMOOTHING * (other_rows - self._mean_other_rows)
        known = record.seconds_per_row
        record.seconds_per_row = sample if known is None else known + _SMOOTHING * (sample - known)
        record.other_rows, record.reported = other_rows, now

    # Looking in -----------------------------------------------------------------------------------------------------

    @property
    def open(self) -> int:
        """How many have a free place."""
        return len(self._open)

    def __contains__(self, replica_id: str) -> bool:
        return replica_id in self._known

    def __len__(self) -> int:
        return len(self._known)

    # The choice -----------------------------------------------------------------------------------------------------

    def _choose(self, positions: range | list[int], rows: int, now: float) -> int:
        """The best of a few of the ``positions`` in the open list."""
        count = len(positions)
        if count == 1:
            return positions[0]
        names = self._open
        # random.sample costs ten times as much.
        first = int(self._random() * min(count, max(_REMEMBERED[0], min(self._in_flight, _REMEMBERED[-1]))))
        one = best = positions[first]
        least = self._cost(names[one], rows, now)
        # One more than this client has in flight: it finds a replica where it has nothing, if there is one.
        others = min(max(1, self._in_flight), count - 1, _MOST_OTHERS)
        skipped = int(self._random() * (count - 1))
        for step in range(others):
            place = positions[(first + 1 + (skipped + step) % (count - 1)) % count]
            cost = self._cost(names[place], rows, now)
            if cost < least:
                best, least = place, cost
        names[one], names[best] = names[best], names[one]
        return one

    def _cost(self, replica_id: str, rows: int, now: float) -> float:
        """Seconds until a replica would be through with ``rows`` more."""
        record = self._records.get(replica_id)
        seconds, others, own = self._mean_speed or 1.0, self._mean_other_rows, 0
        if record is not None:
            own, age = record.rows, now - record.reported
            if age < _REPORT_LIFE:
                others += (record.other_rows - others) * (1 - age / _REPORT_LIFE)
            if record.seconds_per_row is not None and age < _SPEED_LIFE:
                seconds += (record.seconds_per_row - seconds) * (1 - age / _SPEED_LIFE)
        cost = (others + own + rows) * seconds
        return cost * _NEAR if self._known[replica_id].is_near else cost

    def _suitable(self, fingerprint: str | None, tried: Set[str]) -> list[int]:
        """Positions of the open replicas that may compute a request: of the right teacher, and not tried yet."""
        known = self._known
        suitable = (
            {each.replica_id for each in known.values() if each.fingerprint == fingerprint} if fingerprint else set()
        )
        # Where the wanted teacher is gone, any other is better than to wait for ever: the answer says whose it is.
        suitable = suitable or set(known)
        # One on which it failed is the last resort: it is taken only if there is no other at all.
        suitable = suitable - tried or suitable
        return [position for position, name in enumerate(self._open) if name in suitable]

    # The tables ------------------------------------------------------------------------------------------------------

    def _record(self, replica_id: str) -> _Record:
        record = self._records.get(replica_id)
        if record is None:
            record = self._records[replica_id] = _Record()
        return record

    def _refresh(self) -> None:
        """List anew those with a free place."""
        closed = {replica_id for replica_id in self._records if not self._is_free(replica_id)} | self._paused.keys()
        free = dict.fromkeys(self._known)
        for replica_id in closed:
            free.pop(replica_id, None)
        remembered = [replica_id for replica_id in self._open[: _REMEMBERED[-1]] if replica_id in free]
        for replica_id in remembered:
            del free[replica_id]
        self._open = [*remembered, *free]
        for position in range(len(remembered), min(_REMEMBERED[-1], len(self._open))):
            self._swap(position, position + int(self._random() * (len(self._open) - position)))

    def _close(self, position: int) -> None:
        """Take one out of the open list, and put any other into its place."""
        last = len(self._open) - 1
        self._swap(last, position)
        self._open.pop()
        if position < min(_REMEMBERED[-1], last):
            self._swap(position, position + int(self._random() * (last - position)))

    def _swap(self, one: int, other: int) -> None:
        names = self._open
        names[one], names[other] = names[other], names[one]

    def _is_free(self, replica_id: str) -> bool:
        record = self._records.get(replica_id)
        return (record is None or record.requests < self._window) and replica_id not in self._paused

    def _forget(self, replica_id: str) -> None:
        """Drop what was learned of a replica that left; what is in flight there stays booked."""
        self._paused.pop(replica_id, None)
        record = self._records.get(replica_id)
        if record is not None and not record.requests:
            del self._records[replica_id]
