"""The table of requests and the choice of replicas: any interleaving keeps the tables exact; each rule by itself."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from routing_model import RoutingMachine

from dinov3_ray.pool.client.balancer import KnownReplica
from dinov3_ray.pool.client.routing_table import Failure, Limits, RoutingTable, Send, Verdict

RoutingMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestAnyInterleaving = pytest.mark.slow(RoutingMachine.TestCase)


def a_table(replicas: int = 3, *, window: int = 2, seed: int = 0, **limits: float) -> RoutingTable:
    table = RoutingTable(Limits(**limits), window=window, seed=seed)  # type: ignore[arg-type]
    table.set_replicas(KnownReplica(f"r{index}", False, "weights") for index in range(replicas))
    return table


def send_one(table: RoutingTable, now: float = 0.0) -> Send:
    (send,) = table.next_sends(now)
    return send


def answer(table: RoutingTable, send: Send, now: float = 0.0, *, seconds: float = 1.0, other_rows: int = 0) -> bool:
    return table.answered(send.request_id, send.replica_id, now, seconds=seconds, other_rows=other_rows)


# --- Budgets --------------------------------------------------------------------------------------------------------


def test_the_budgets_of_requests_and_bytes_are_kept_and_one_large_request_passes_alone() -> None:
    table = a_table(max_requests=4, max_bytes=100)
    for name, nbytes in (("large", 500), ("a", 40), ("b", 40), ("c", 40)):
        table.submit(name, rows=1, nbytes=nbytes)
    large = send_one(table)
    assert large.request_id == "large"  # or it could never run
    assert answer(table, large)
    assert [send.request_id for send in table.next_sends(0.0)] == ["a", "b"]  # a third would be 120 bytes
    assert table.statistics().peak_bytes == 500


def test_a_large_request_is_not_overtaken_by_small_ones_for_ever() -> None:
    table = a_table(max_bytes=100)
    for name, nbytes in (("a", 60), ("large", 90), ("small", 10)):
        table.submit(name, rows=1, nbytes=nbytes)
    first = send_one(table)
    assert table.next_sends(0.0) == []  # "small" would fit, and so would the next one, and the next
    answer(table, first)
    assert [send.request_id for send in table.next_sends(0.0)] == ["large", "small"]


def test_a_cancelled_request_frees_its_place_at_once() -> None:
    table = a_table(1, window=1)
    table.submit("a", rows=1, nbytes=1)
    table.submit("b", rows=1, nbytes=1)
    first = send_one(table)
    assert table.cancel("a")
    assert send_one(table).request_id == "b"
    assert not answer(table, first)  # its answer comes, and counts for nothing


# --- Failures -------------------------------------------------------------------------------------------------------


def test_a_request_whose_replica_dies_goes_elsewhere_and_before_all_others() -> None:
    table = a_table(2, window=1)
    for name in ("a", "b", "c"):
        table.submit(name, rows=1, nbytes=1)
    sends = {send.request_id: send for send in table.next_sends(0.0)}
    assert table.failed("a", sends["a"].attempt, Failure.DIED, 0.0) is Verdict.RESEND
    assert not table.knows(sends["a"].replica_id)
    assert answer(table, sends["b"])
    again = send_one(table)
    assert (again.request_id, again.replica_id) == ("a", sends["b"].replica_id)
    assert again.suspect
    assert again.urgent


def test_a_view_that_has_not_heard_of_a_death_does_not_bring_the_dead_back() -> None:
    table = a_table(1)
    table.submit("a", rows=1, nbytes=1)
    table.failed("a", send_one(table).attempt, Failure.DIED, 0.0)
    table.set_replicas([KnownReplica("r0", False, "weights")])
    assert not table.knows("r0")
    assert table.next_sends(0.0) == []


def test_where_replicas_die_anyway_poison_takes_more_proof() -> None:
    table = a_table(20)
    for number in range(2):
        table.submit(f"other{number}", rows=1, nbytes=1)
        send = send_one(table)
        table.failed(send.request_id, send.attempt, Failure.DIED, 0.0)
        table.cancel(send.request_id)
    table.submit("bad", rows=1, nbytes=1)
    verdicts = []
    while not verdicts or verdicts[-1] is Verdict.RESEND:
        verdicts.append(table.failed("bad", send_one(table).attempt, Failure.DIED, 0.0, computing=True))
    assert verdicts == [Verdict.RESEND] * 4 + [Verdict.POISON], "three, and one for each unrelated death"


def test_poison_is_what_kills_each_replica_that_computes_it_alone() -> None:
    table = a_table(5)
    table.submit("bad", rows=1, nbytes=1)
    verdicts = []
    for computing in (False, True, True, True):
        send = send_one(table)
        verdicts.append(table.failed("bad", send.attempt, Failure.DIED, 0.0, computing=computing))
    # The first death proves nothing: the request was in company.
    assert verdicts == [Verdict.RESEND, Verdict.RESEND, Verdict.RESEND, Verdict.POISON]
    assert table.statistics().replicas == 1
    assert table.statistics().waiting == table.statistics().in_flight == 0


def test_errors_are_tried_elsewhere_and_on_the_same_replica_only_if_there_is_no_other() -> None:
    table = a_table(2, max_errors=4)
    table.submit("a", rows=1, nbytes=1)
    tried = []
    for _ in range(3):
        send = send_one(table)
        tried.append(send.replica_id)
        assert table.failed("a", send.attempt, Failure.ERROR, 0.0) is Verdict.RESEND
    assert set(tried[:2]) == {"r0", "r1"} == table.history("a")
    assert table.failed("a", send_one(table).attempt, Failure.ERROR, 0.0) is Verdict.RAISE


def test_a_full_replica_is_left_alone_until_its_pause_ends_and_costs_no_attempt() -> None:
    table = a_table(1, max_attempts=1)
    table.submit("a", rows=1, nbytes=1)
    for start in (0.0, 1.0, 2.0):
        send = send_one(table, start)
        assert table.failed("a", send.attempt, Failure.FULL, start, pause=1.0) is Verdict.RESEND
        assert table.next_sends(start + 0.9) == []
        assert table.next_deadline() == start + 1.0
    assert table.statistics().resends == 0


def test_a_replica_that_answers_is_no_longer_paused() -> None:
    table = a_table(1)
    for name in ("a", "b"):
        table.submit(name, rows=1, nbytes=1)
    a, b = table.next_sends(0.0)
    table.failed("a", a.attempt, Failure.TIMEOUT, 0.0, pause=1000.0)
    assert table.next_sends(1.0) == []
    assert answer(table, b, 2.0)
    assert send_one(table, 2.0).request_id == "a"


def test_a_late_answer_counts_and_the_second_send_is_forgotten() -> None:
    table = a_table(2, attempt_timeout=5.0)
    table.submit("a", rows=1, nbytes=1)
    first = send_one(table)
    assert table.expired(5.0) == [("a", first.attempt, first.replica_id)]
    table.failed("a", first.attempt, Failure.TIMEOUT, 5.0, pause=60.0)
    second = send_one(table, 5.0)
    assert second.replica_id != first.replica_id
    assert answer(table, first, 6.0)
    assert not answer(table, second, 7.0)
    assert table.failed("a", second.attempt, Failure.DIED, 8.0) is Verdict.STALE
    assert table.expired(100.0) == []
    assert table.statistics().answered == 1


def test_what_is_submitted_again_under_its_name_owes_nothing_to_its_first_life() -> None:
    table = a_table(2, attempt_timeout=10.0)
    table.submit("a", rows=1, nbytes=1)
    first = send_one(table, 0.0)
    answer(table, first, 1.0)
    table.submit("a", rows=1, nbytes=1)
    second = send_one(table, 9.0)
    assert table.expired(10.0) == []  # the first life's deadline
    assert table.failed("a", first.attempt, Failure.DIED, 10.0) is Verdict.STALE
    assert table.expired(19.0) == [("a", second.attempt, second.replica_id)]


# --- Fingerprints ---------------------------------------------------------------------------------------------------


def test_a_request_for_one_teacher_waits_for_it_and_holds_up_nobody() -> None:
    table = RoutingTable(Limits(), window=1, seed=0)
    table.set_replicas([KnownReplica("old", False, "A"), KnownReplica("new", False, "B")])
    for name in ("a", "b"):
        table.submit(name, rows=1, nbytes=1, fingerprint="B")
    table.submit("c", rows=1, nbytes=1)
    assert [(send.request_id, send.replica_id) for send in table.next_sends(0.0)] == [("a", "new"), ("c", "old")]


@pytest.mark.parametrize("failed_before", [False, True])
def test_a_request_for_a_teacher_that_is_no_more_goes_to_another(failed_before: bool) -> None:
    table = RoutingTable(Limits(), window=1, seed=0)
    table.set_replicas([KnownReplica("old", False, "A"), KnownReplica("new", False, "B")])
    table.submit("a", rows=1, nbytes=1, fingerprint="A")
    if failed_before:
        send = send_one(table)
        assert send.replica_id == "old"
        table.failed("a", send.attempt, Failure.ERROR, 0.0)
        # Its only replica, though it failed there: the other has another teacher.
        send = send_one(table)
        assert send.replica_id == "old"
        table.failed("a", send.attempt, Failure.LEAVING, 0.0)
    else:
        table.set_replicas([KnownReplica("new", False, "B")])
    assert send_one(table).replica_id == "new"


# --- The choice -----------------------------------------------------------------------------------------------------


def test_a_replica_on_this_node_wins_a_tie_and_only_a_tie() -> None:
    chosen = []
    for seconds in (1.0, 2.0):
        table = RoutingTable(Limits(), window=10, seed=0)
        table.set_replicas([KnownReplica("far", False, None), KnownReplica("near", True, None)])
        for number in range(2):  # each is heard of once: both are as fast, or "near" is slower
            table.submit(f"first{number}", rows=4, nbytes=1)
        sends = table.next_sends(0.0)
        assert {send.replica_id for send in sends} == {"far", "near"}
        for send in sends:
            answer(table, send, seconds=seconds if send.replica_id == "near" else 1.0)
        table.submit("next", rows=4, nbytes=1)
        chosen.append(send_one(table).replica_id)
    assert chosen == ["near", "far"]


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_the_first_batches_of_a_client_go_to_as_many_replicas(replicas: int) -> None:
    for seed in range(20):
        table = a_table(replicas, seed=seed)
        for name in range(replicas):
            table.submit(str(name), rows=1, nbytes=1)
        assert len({send.replica_id for send in table.next_sends(0.0)}) == replicas


def test_what_others_have_waiting_counts_as_long_as_it_is_news() -> None:
    table = a_table(2, window=100)
    for number in range(2):
        table.submit(f"first{number}", rows=1, nbytes=1)
    one, other = table.next_sends(0.0)
    answer(table, one, 0.0, other_rows=20)
    answer(table, other, 0.0, other_rows=0)
    for number in range(10):
        table.submit(f"next{number}", rows=1, nbytes=1)
    assert {send.replica_id for send in table.next_sends(0.1)} == {other.replica_id}
    for number in range(10):
        table.submit(f"later{number}", rows=1, nbytes=1)
    assert {send.replica_id for send in table.next_sends(50.0)} == {one.replica_id}  # 10 of its own against old news


def test_one_slow_answer_does_not_keep_work_away_for_ever() -> None:
    table = a_table(2, window=100)
    for number in range(2):
        table.submit(f"first{number}", rows=1, nbytes=1)
    slow, fast = table.next_sends(0.0)
    answer(table, slow, 0.0, seconds=60.0)  # it was compiling
    served = Counter[str]()
    for number in range(200):
        now = float(number)
        table.submit(f"next{number}", rows=1, nbytes=1)
        send = send_one(table, now)
        served[send.replica_id] += 1
        answer(table, send, now, seconds=0.1)
    assert served[slow.replica_id] > 20, served
    assert answer(table, fast)


def test_a_saturated_client_gives_work_in_proportion_to_speed() -> None:
    """Replicas of 1, 2 and 4 rows per second, each working through what it has; the client always has more."""
    speeds = {"r0": 1.0, "r1": 2.0, "r2": 4.0}
    table = a_table(3, window=3)
    now, served, queues = 0.0, Counter[str](), {name: [] for name in speeds}
    free_at = dict.fromkeys(speeds, 0.0)
    for number in range(700):
        table.submit(str(number), rows=8, nbytes=1)
    while table.statistics().waiting:
        for send in table.next_sends(now):
            queue = queues[send.replica_id]
            free_at[send.replica_id] = max(free_at[send.replica_id], now) + 8 / speeds[send.replica_id]
            queue.append((free_at[send.replica_id], send))
        now, send = min((queue[0] for queue in queues.values() if queue), key=lambda pair: pair[0])
        queues[send.replica_id].pop(0)
        served[send.replica_id] += 1
        assert answer(table, send, now, seconds=8 / speeds[send.replica_id])
    assert [served[name] / sum(served.values()) for name in speeds] == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=0.02)
