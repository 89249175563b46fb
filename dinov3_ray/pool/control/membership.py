"""Decides which replicas a pool starts, drains and replaces. Pure: no Ray, no clock.

The controller reports what happened, and carries out what :meth:`Membership.plan` returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from dinov3_ray.pool.messages import MemberState

__all__ = ["Action", "ActionKind", "Member", "Membership"]


_FIRST_BACKOFF = 1.0
_LONGEST_BACKOFF = 30.0
_MOST_DOUBLINGS = 8  # more than the longest takes; 2**1024 is not a float
_KEPT_ERRORS = 8
_PLACE_PATIENCE = 20.0  # seconds that a successor waits to be placed before an old replica makes room for it
_CROWDED_PATIENCE = 5.0  # the same, once the cluster has turned out to be full
_HOPELESS_WAVES = 3  # waves of failed starts, none between them having succeeded, after which a reload is given up


class ActionKind(StrEnum):
    """What a controller does with a replica."""

    START = "start"
    DRAIN = "drain"


@dataclass(frozen=True, slots=True)
class Action:
    """What the controller shall do next."""

    kind: ActionKind
    replica_id: str


@dataclass(slots=True)
class Member:
    """A replica, its teacher's generation, and its state since a time."""

    replica_id: str
    generation: int
    state: MemberState
    since: float


class Membership:
    """Members, their states, and the number wanted.

    A generation is one teacher: :meth:`reload` begins the next one, and members of others are replaced one by one, each
    only after its successor is ready, so that the pool does not serve with fewer than it should; unless the cluster is
    full, where one of them has to make room first. A generation whose replicas do not start is given up
    (:attr:`is_hopeless`, :meth:`go_back`): the one before it, which did serve, is current again.

    Attributes:
        generation: the current one.
        newest: the highest that there has been; numbers are never used again.
        settled: the last one that served alone; differs from the current one while a reload runs.
    """

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.target = low
        self.generation = self.newest = 0
        self.settled: int | None = None
        self.epoch = 0
        self.recent_errors: deque[str] = deque(maxlen=_KEPT_ERRORS)
        self.restarts = 0
        self._members: dict[str, Member] = {}
        #: The number of the next replica.
        self.serial = 0
        self._failures = 0
        self._not_before = 0.0
        self._crowded = False
        self._last_leaving = float("-inf")  # when a member was last seen on its way out

    # What happened --------------------------------------------------------------------------------------------------

    def begin_at(self, serial: int) -> None:
        """Number the next replica ``serial`` or higher: a restarted controller continues the former one's numbers."""
        self.serial = max(self.serial, serial)

    def adopt(self, replica_id: str, generation: int, state: MemberState, now: float) -> None:
        """Add a replica that runs already: a restarted controller finds its pool again."""
        self._members[replica_id] = Member(replica_id, generation, state, now)
        self.serial = max(self.serial, serial_of(replica_id) + 1)
        self.epoch += 1

    def became_ready(self, replica_id: str, now: float) -> None:
        member = self._members.get(replica_id)
        if member is not None and member.state is MemberState.STARTING:
            member.state, member.since = MemberState.READY, now
            self.epoch += 1
            if member.generation == self.generation:
                self._failures, self._not_before = 0, 0.0

    def lost(self, replica_id: str, reason: str, now: float) -> bool:
        """A replica died, hung, failed to start or was reported sick. False if it is not a member.

        A failure before it was ready delays the next start, longer each time: the next replica is likely to fail the
        same way. Failures during that delay are of replicas that were started together, and count once.
        """
        member = self._members.pop(replica_id, None)
        if member is None:
            return False
        self.epoch += 1
        if member.state is MemberState.DRAINING:
            return True
        self.restarts += 1
        self.recent_errors.append(f"{replica_id}: {reason}")
        failed = member.state is MemberState.STARTING and member.generation == self.generation
        if failed and now >= self._not_before:
            self._not_before = now + min(_FIRST_BACKOFF * 2**self._failures, _LONGEST_BACKOFF)
            self._failures = min(self._failures + 1, _MOST_DOUBLINGS)
        return True

    def drained(self, replica_id: str) -> bool:
        """A replica has finished its requests. False if it is not a member (any longer)."""
        if self._members.pop(replica_id, None) is None:
            return False
        self.epoch += 1
        return True

    # What is wanted -------------------------------------------------------------------------------------------------

    def scale(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.target = min(max(self.target, low), high)
        self.epoch += 1

    def resize(self, target: int) -> None:
        """Move the target within the bounds."""
        target = min(max(target, self.low), self.high)
        changed, self.target = target != self.target, target
        self.epoch += changed

    def reload(self) -> bool:
        """Begin the next generation. Returns whether the last one had settled, and so is the one to go back to."""
        self._settle()
        had_settled = self.settled == self.generation
        self.newest += 1
        self._turn_to(self.newest)
        return had_settled

    @property
    def is_hopeless(self) -> bool:
        """Whether the current generation does not start, while there is one to go back to."""
        return self.settled not in (None, self.generation) and self._failures >= _HOPELESS_WAVES

    def go_back(self) -> None:
        """Give up a hopeless generation: the settled one is current again."""
        assert self.settled is not None
        self._turn_to(self.settled)

    def _settle(self) -> None:
        """Note whether the current generation serves alone by now."""
        alone = all(member.generation == self.generation for member in self.members)
        if alone and self.settled != self.generation and self.ready():
            self.settled = self.generation
            self.epoch += 1

    def _turn_to(self, generation: int) -> None:
        self.generation = generation
        self._failures, self._not_before, self._crowded = 0, 0.0, False
        self.epoch += 1

    def plan(self, now: float, unplaced: Collection[str] = ()) -> list[Action]:
        """The next actions towards what is wanted. They count as begun.

        Args:
            unplaced: members that Ray has not placed yet.
        """
        self._settle()
        actions: list[Action] = []
        old = [member for member in self.members if member.generation != self.generation]
        # Those that are not ready serve nobody, and hold resources that their successors need.
        unready = [member for member in old if member.state is MemberState.STARTING]
        actions += [self._drain(member, now) for member in unready]
        if now >= self._not_before:
            actions += [self._start(now) for _ in range(self._missing())]
        # The newest go first when the pool shrinks, and those that are not ready yet before all.
        current = self._of(self.generation, MemberState.STARTING, MemberState.READY)
        surplus = len(current) - self.target
        if surplus > 0:
            ranked = sorted(current, key=lambda member: (member.state is MemberState.READY, -member.since))
            actions += [self._drain(member, now) for member in ranked[:surplus]]
        serving = sorted(self._old_ready(), key=lambda member: member.since)
        leaving = len(self._of(self.generation, MemberState.READY)) + len(serving) - self.target
        if leaving <= 0 and self._is_stuck(now, unplaced):
            leaving, self._crowded = 1, True
        actions += [self._drain(member, now) for member in serving[: max(leaving, 0)]]
        if actions:
            self.epoch += 1
        return actions

    def _is_stuck(self, now: float, unplaced: Collection[str]) -> bool:
        """Whether a successor has waited long to be placed, and no old member is about to free its resources."""
        if any(member.state is MemberState.DRAINING for member in self.members):
            self._last_leaving = now
            return False
        for one in self._of(self.generation, MemberState.STARTING):
            # One that waited when the last member left has the room that this made: Ray needs seconds to place it.
            newer = one.since > self._last_leaving
            patience = _CROWDED_PATIENCE if self._crowded and newer else _PLACE_PATIENCE
            if one.replica_id in unplaced and now - max(one.since, self._last_leaving) >= patience:
                return True
        return False

    def next_change(self, now: float) -> float | None:
        """Seconds until a delayed start is due, if one is."""
        return max(0.0, self._not_before - now) if self._missing() else None

    def _missing(self) -> int:
        """Replicas to start: all that are missing, or one at a time while replicas of another generation serve."""
        current = self._of(self.generation, MemberState.STARTING, MemberState.READY)
        missing = self.target - len(current)
        if self._old_ready():
            starting = [member for member in current if member.state is MemberState.STARTING]
            missing = min(missing, 1 - len(starting))
        return max(missing, 0)

    def _old_ready(self) -> list[Member]:
        return [member for member in self.ready() if member.generation != self.generation]

    # Looking in -----------------------------------------------------------------------------------------------------

    @property
    def members(self) -> list[Member]:
        return list(self._members.values())

    def ready(self) -> list[Member]:
        return [member for member in self.members if member.state is MemberState.READY]

    def __repr__(self) -> str:
        counts = ", ".join(f"{len([m for m in self.members if m.state is state])} {state}" for state in MemberState)
        return f"<Membership epoch {self.epoch}: {counts}; target {self.target} of {self.low}..{self.high}>"

    def _of(self, generation: int, *states: MemberState) -> list[Member]:
        return [member for member in self.members if member.generation == generation and member.state in states]

    def _start(self, now: float) -> Action:
        replica_id = f"r{self.serial}"
        self.serial += 1
        self._members[replica_id] = Member(replica_id, self.generation, MemberState.STARTING, now)
        return Action(ActionKind.START, replica_id)

    def _drain(self, member: Member, now: float) -> Action:
        member.state, member.since = MemberState.DRAINING, now
        return Action(ActionKind.DRAIN, member.replica_id)


def serial_of(replica_id: str) -> int:
    """The running number in a replica's name, ``r17`` -> 17."""
    return int(replica_id.removeprefix("r"))
