"""Which replicas there shall be: whatever happens, the pool becomes what is wanted, without a gap on the way."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dinov3_ray.pool.control.membership import Action, ActionKind, Member, Membership
from dinov3_ray.pool.messages import MemberState

STARTING, READY, DRAINING = MemberState


class MembershipMachine(RuleBasedStateMachine):
    """Carries out what the membership plans, with replicas that start, fail, die and drain in any order."""

    @initialize(
        low=st.integers(1, 4),
        adopted=st.lists(st.tuples(st.integers(0, 1), st.sampled_from(MemberState)), max_size=4),
    )
    def begin(self, low: int, adopted: list[tuple[int, MemberState]]) -> None:
        """As a first controller, or as one that finds replicas of this and the last generation running."""
        self.members = Membership(low, low)
        self.now = 0.0
        self.low = self.high = low
        self.alive: dict[str, MemberState] = {}
        self.names: set[str] = set()
        self.generations = {1}
        self.served: set[int] = set()
        self.seen: tuple[int, object] = (-1, None)
        self.members.generation = self.members.newest = 1
        for index, (generation, state) in enumerate(adopted):
            name = f"r{3 * index}"
            self.members.adopt(name, generation, state, self.now)
            self.alive[name] = state
            self.names.add(name)

    def ready(self) -> list[Member]:
        return [one for one in self.members.members if one.state is READY]

    def started(self) -> list[str]:
        return [name for name, state in self.alive.items() if state is STARTING]

    @rule()
    def plan(self) -> None:
        serving, target = len(self.ready()), self.members.target
        members = {one.replica_id: one.generation for one in self.members.members}
        actions = self.members.plan(self.now)
        for action in actions:
            self.carry_out(action)
        # Whoever drains, as many go on serving as were, or as are wanted.
        assert len(self.ready()) >= min(serving, target)
        if any(one.generation != self.members.generation for one in self.ready()):
            current = self.members.generation
            successors = [name for name in self.started() if members.get(name, current) == current]
            before = [name for name in successors if name in members]
            # A rolling change takes one place more than the pool has, not twice as many.
            assert len(successors) <= max(1, len(before))
        assert not self.members.plan(self.now), "what is planned is booked: nothing is planned twice"

    def carry_out(self, action: Action) -> None:
        if action.kind is ActionKind.START:
            assert action.replica_id not in self.names, "names are never used again"
            self.names.add(action.replica_id)
            self.alive[action.replica_id] = STARTING
        else:
            assert self.alive[action.replica_id] is not DRAINING, "drained only once"
            self.alive[action.replica_id] = DRAINING

    @precondition(lambda self: self.started())
    @rule(data=st.data())
    def become_ready(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.started()))
        self.members.became_ready(name, self.now)
        self.alive[name] = READY

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.lose_one(data.draw(st.sampled_from(["r999", *self.alive])))

    def lose_one(self, name: str) -> None:
        assert self.members.lost(name, "killed", self.now) == (name in self.alive)
        self.alive.pop(name, None)

    @rule(data=st.data())
    def finish_draining(self, data: st.DataObject) -> None:
        names = [name for name, state in self.alive.items() if state is DRAINING]
        name = data.draw(st.sampled_from(["r999", *names]))
        assert self.members.drained(name) == (name in self.alive)
        self.alive.pop(name, None)

    @rule(low=st.integers(1, 5), more=st.integers(0, 3))
    def scale(self, low: int, more: int) -> None:
        self.members.scale(low, low + more)
        self.low, self.high = low, low + more

    @rule(count=st.integers(-1, 10))
    def resize(self, count: int) -> None:
        before, epoch = self.members.target, self.members.epoch
        self.members.resize(count)
        assert self.members.epoch == epoch + (self.members.target != before)
        assert self.members.target == min(max(count, self.low), self.high)

    @rule()
    def reload(self) -> None:
        alone = all(one.generation == self.members.generation for one in self.members.members) and self.ready()
        settled = self.members.reload()
        assert settled or not alone
        self.generations.add(self.members.generation)
        assert self.members.generation == max(self.generations), "numbers are never used again"

    @precondition(lambda self: self.members.is_hopeless)
    @rule()
    def go_back(self) -> None:
        assert self.members.generation != self.members.settled
        self.members.go_back()
        assert self.members.generation == self.members.settled
        assert self.members.generation in self.served
        assert not self.members.is_hopeless, "there is nothing further back"

    @precondition(lambda self: self.started())
    @rule(waves=st.integers(1, 3))
    def fail_to_start(self, waves: int) -> None:
        for _ in range(waves):
            for name in self.started():
                self.lose_one(name)
            self.now += 40.0
            self.plan()

    @rule(seconds=st.sampled_from([0.5, 2.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def the_books_are_exact(self) -> None:
        members = {one.replica_id: one.state for one in self.members.members}
        assert members == self.alive
        assert self.low <= self.members.target <= self.high
        assert [one.replica_id for one in self.members.ready()] == [name for name in members if members[name] is READY]

    @invariant()
    def only_what_has_served_is_gone_back_to(self) -> None:
        self.served |= {one.generation for one in self.members.ready()}
        assert self.members.settled in (None, *self.served)

    @invariant()
    def whatever_clients_see_has_an_epoch_of_its_own(self) -> None:
        seen = (sorted(one.replica_id for one in self.ready()), self.members.target, self.members.generation)
        assert self.members.epoch > self.seen[0] or seen == self.seen[1]
        assert self.members.epoch >= self.seen[0]
        self.seen = (self.members.epoch, seen)

    def teardown(self) -> None:
        """Once starts succeed and nothing else happens, the pool becomes what is wanted, and rests."""
        if not hasattr(self, "members"):
            return
        for _ in range(100):
            self.plan()
            if not self.started() and DRAINING not in self.alive.values():
                pause = self.members.next_change(self.now)
                if pause is None:
                    break
                assert pause > 0, "a busy loop: nothing to do, and no time to do it at"
                self.now += pause
            for name, state in list(self.alive.items()):
                if state is STARTING:
                    self.members.became_ready(name, self.now)
                    self.alive[name] = READY
                elif state is DRAINING:
                    self.members.drained(name)
                    del self.alive[name]
        assert [(one.generation, one.state) for one in self.members.members] == [
            (self.members.generation, READY)
        ] * self.members.target


MembershipMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyInterleaving = pytest.mark.slow(MembershipMachine.TestCase)


def a_pool(count: int) -> Membership:
    """One that has all it wants, ready."""
    members = Membership(count, count)
    for number, action in enumerate(members.plan(0.0)):
        members.became_ready(action.replica_id, float(number))
    assert len(members.ready()) == count
    return members


def test_a_reload_replaces_one_by_one_and_each_only_after_its_successor_is_ready() -> None:
    members = a_pool(3)
    members.reload()
    starts = members.plan(10.0)
    for old in ("r0", "r1", "r2"):  # the oldest first
        assert [action.kind for action in starts] == [ActionKind.START]
        assert members.plan(10.0) == []
        assert members.next_change(10.0) is None  # nothing to do until it is ready: no busy waiting
        members.became_ready(starts[0].replica_id, 11.0)
        *starts, drain = members.plan(11.0)
        assert drain == Action(ActionKind.DRAIN, old)
        assert len(members.ready()) == 3
        members.drained(old)
    assert starts == []
    assert [(member.generation, member.state) for member in members.members] == [(1, READY)] * 3


def test_a_reload_that_does_not_start_is_given_up_and_nobody_who_serves_is_missed() -> None:
    members, now = a_pool(3), 10.0
    assert members.plan(now) == []
    assert members.reload(), "the first generation has settled"
    for _ in range(3):
        assert not members.is_hopeless
        (start,) = members.plan(now)
        members.lost(start.replica_id, "no such file", now)
        now += members.next_change(now) or 0.0
    assert members.is_hopeless
    members.go_back()
    assert members.plan(now) == []
    assert [(one.replica_id, one.generation) for one in members.ready()] == [("r0", 0), ("r1", 0), ("r2", 0)]
    assert (members.generation, members.newest, members.settled) == (0, 1, 0)
    members.reload()
    assert members.generation == 2


def test_a_reload_that_is_given_up_halfway_is_undone_one_by_one() -> None:
    members, now = a_pool(2), 10.0
    members.reload()
    (first,) = members.plan(now)
    members.became_ready(first.replica_id, now)
    second, drain = members.plan(now)
    members.drained(drain.replica_id)
    for _ in range(3):
        members.lost(second.replica_id, "no such file", now)
        now += members.next_change(now) or 0.0
        second = next(iter(members.plan(now)), second)
    members.go_back()
    unready, start = members.plan(now)
    assert (unready.kind, start.kind) == (ActionKind.DRAIN, ActionKind.START)
    assert len(members.ready()) == 2, "one of each, until the one that is started takes over"
    members.became_ready(start.replica_id, now)
    assert members.plan(now) == [Action(ActionKind.DRAIN, first.replica_id)]


def test_a_reload_that_overtakes_another_falls_back_to_what_was_before_both() -> None:
    members = a_pool(1)
    assert members.reload()
    (start,) = members.plan(10.0)
    assert not members.reload()
    members.lost(start.replica_id, "no such file", 10.0)
    assert (members.generation, members.settled, members.is_hopeless) == (2, 0, False)


def test_replicas_of_an_earlier_generation_that_are_not_ready_give_way_at_once() -> None:
    members = Membership(2, 2)
    members.plan(0.0)
    members.reload()
    actions = members.plan(1.0)
    assert [(one.kind, one.replica_id) for one in actions] == [
        (ActionKind.DRAIN, "r0"),
        (ActionKind.DRAIN, "r1"),
        (ActionKind.START, "r2"),
        (ActionKind.START, "r3"),
    ]
    # And what becomes of them says nothing of the new ones.
    assert members.lost("r0", "no such file", 2.0)
    assert members.next_change(2.0) is None


def test_the_newest_go_when_the_pool_shrinks_and_those_not_ready_before_all() -> None:
    members = a_pool(3)
    members.scale(4, 4)
    (start,) = members.plan(5.0)
    members.scale(2, 2)
    assert [action.replica_id for action in members.plan(6.0)] == [start.replica_id, "r2"]


def test_failed_starts_are_tried_again_after_ever_longer_delays_up_to_half_a_minute() -> None:
    members, now, delays = Membership(1, 1), 0.0, []
    for _ in range(1100):  # a night of it: 2**1024 is not a float any more
        (start,) = members.plan(now)
        assert members.lost(start.replica_id, "no such file", now)
        assert members.plan(now) == []
        delay = members.next_change(now)
        assert delay is not None
        delays.append(delay)
        now += delay
    assert delays[:7] == [1, 2, 4, 8, 16, 30, 30]
    assert set(delays[6:]) == {30}
    assert len(members.recent_errors) == 8
    assert members.recent_errors[-1] == "r1099: no such file"
    assert members.restarts == 1100
    (start,) = members.plan(now)
    members.became_ready(start.replica_id, now)
    members.lost(start.replica_id, "killed", now)
    assert members.next_change(now) == 0.0  # it had worked: it is replaced at once


def test_a_wave_of_failed_starts_counts_once() -> None:
    members = Membership(8, 8)
    for action in members.plan(0.0):
        members.lost(action.replica_id, "no such file", 0.1)
    assert members.next_change(0.1) == 1.0


def test_what_is_lost_while_it_drains_is_no_error_and_is_not_drained_again() -> None:
    members = a_pool(2)
    members.scale(1, 1)
    (drain,) = members.plan(5.0)
    assert members.lost(drain.replica_id, "killed", 6.0)
    assert not members.drained(drain.replica_id)
    assert (members.restarts, len(members.recent_errors)) == (0, 0)


def test_an_adopted_pool_goes_on_where_it_was() -> None:
    members = Membership(3, 3)
    members.adopt("r4", 0, READY, 0.0)
    members.adopt("r7", 0, DRAINING, 0.0)
    assert [action.replica_id for action in members.plan(0.0)] == ["r8", "r9"]
    assert repr(members) == f"<Membership epoch {members.epoch}: 2 starting, 1 ready, 1 draining; target 3 of 3..3>"


@pytest.mark.parametrize("count", [1, 4])
def test_the_lost_are_replaced_at_once_by_new_names(count: int) -> None:
    members = a_pool(count)
    members.lost("r0", "killed", 100.0)
    assert members.plan(100.0) == [Action(ActionKind.START, f"r{count}")]


def test_in_a_full_cluster_an_old_replica_makes_room_for_its_successor() -> None:
    members = Membership(2, 2)
    for action in members.plan(0.0):
        members.became_ready(action.replica_id, 0.0)
    members.reload()
    (start,) = members.plan(1.0)
    assert members.plan(10.0, unplaced=[start.replica_id]) == [], "it may be placed yet"
    (drain,) = members.plan(30.0, unplaced=[start.replica_id])
    assert drain == Action(ActionKind.DRAIN, "r0")
    assert members.plan(60.0, unplaced=[start.replica_id]) == [], "one at a time"
    members.drained("r0")
    assert members.plan(65.0, unplaced=[start.replica_id]) == [], "it has not moved in yet"
    members.became_ready(start.replica_id, 70.0)
    assert len(members.ready()) == 2
    # By now it is known to be full.
    (start,) = members.plan(70.0)
    assert members.plan(75.0, unplaced=[start.replica_id]) == [Action(ActionKind.DRAIN, "r1")]
    members.drained("r1")
    assert members.plan(80.0, unplaced=[start.replica_id]) == []
    assert len(members.ready()) == 1


def test_in_a_full_cluster_room_that_somebody_else_took_is_made_again() -> None:
    members = a_pool(2)
    members.reload()
    (start,) = members.plan(10.0)
    (drain,) = members.plan(30.0, unplaced=[start.replica_id])
    members.plan(31.0, unplaced=[start.replica_id])
    members.drained(drain.replica_id)
    assert members.plan(50.0, unplaced=[start.replica_id]) == []
    assert members.plan(51.0, unplaced=[start.replica_id]) == [Action(ActionKind.DRAIN, "r1")]


def test_names_go_on_where_the_last_controller_was() -> None:
    members = Membership(1, 1)
    members.begin_at(7)
    members.adopt("r3", 0, READY, 0.0)
    members.lost("r3", "died", 1.0)
    assert [action.replica_id for action in members.plan(1.0)] == ["r7"]
