"""The book of requests and the choice of replicas: any interleaving keeps the books exact; each rule by itself."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from routing_model import RoutingMachine

from dinov3_ray.pool.client.book import Failure, Limits, RoutingBook, Send, Verdict

RoutingMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestAnyInterleaving = RoutingMachine.TestCase


def a_book(replicas: int = 3, *, window: int = 2, seed: int = 0, **limits: float) -> RoutingBook:
    book = RoutingBook(Limits(**limits), window=window, seed=seed)  # type: ignore[arg-type]
    book.set_replicas((f"r{index}", False, "weights") for index in range(replicas))
    return book


def send_one(book: RoutingBook, now: float = 0.0) -> Send:
    (send,) = book.next_sends(now)
    return send


def answer(book: RoutingBook, send: Send, now: float = 0.0, *, seconds: float = 1.0, other_rows: int = 0) -> bool:
    return book.answered(send.request_id, send.replica_id, now, seconds=seconds, other_rows=other_rows)


# --- Budgets --------------------------------------------------------------------------------------------------------


def test_the_budgets_of_requests_and_bytes_are_kept_and_one_large_request_passes_alone() -> None:
    book = a_book(max_requests=4, max_bytes=100)
    for name, nbytes in (("large", 500), ("a", 40), ("b", 40), ("c", 40)):
        book.submit(name, rows=1, nbytes=nbytes)
    large = send_one(book)
    assert large.request_id == "large"  # or it could never run
    assert answer(book, large)
    assert [send.request_id for send in book.next_sends(0.0)] == ["a", "b"]  # a third would be 120 bytes
    assert book.statistics().peak_bytes == 500


def test_a_large_request_is_not_overtaken_by_small_ones_for_ever() -> None:
    book = a_book(max_bytes=100)
    for name, nbytes in (("a", 60), ("large", 90), ("small", 10)):
        book.submit(name, rows=1, nbytes=nbytes)
    first = send_one(book)
    assert book.next_sends(0.0) == []  # "small" would fit, and so would the next one, and the next
    answer(book, first)
    assert [send.request_id for send in book.next_sends(0.0)] == ["large", "small"]


def test_a_cancelled_request_frees_its_place_at_once() -> None:
    book = a_book(1, window=1)
    book.submit("a", rows=1, nbytes=1)
    book.submit("b", rows=1, nbytes=1)
    first = send_one(book)
    assert book.cancel("a")
    assert send_one(book).request_id == "b"
    assert not answer(book, first)  # its answer comes, and counts for nothing


# --- Failures -------------------------------------------------------------------------------------------------------


def test_a_request_whose_replica_dies_goes_elsewhere_and_before_all_others() -> None:
    book = a_book(2, window=1)
    for name in ("a", "b", "c"):
        book.submit(name, rows=1, nbytes=1)
    sends = {send.request_id: send for send in book.next_sends(0.0)}
    assert book.failed("a", sends["a"].attempt, Failure.DIED, 0.0) is Verdict.RESEND
    assert not book.knows(sends["a"].replica_id)
    assert answer(book, sends["b"])
    again = send_one(book)
    assert (again.request_id, again.replica_id) == ("a", sends["b"].replica_id)
    assert again.suspect
    assert again.urgent


def test_a_view_that_has_not_heard_of_a_death_does_not_bring_the_dead_back() -> None:
    book = a_book(1)
    book.submit("a", rows=1, nbytes=1)
    book.failed("a", send_one(book).attempt, Failure.DIED, 0.0)
    book.set_replicas([("r0", False, "weights")])
    assert not book.knows("r0")
    assert book.next_sends(0.0) == []


def test_where_replicas_die_anyway_poison_takes_more_proof() -> None:
    book = a_book(20)
    for number in range(2):
        book.submit(f"other{number}", rows=1, nbytes=1)
        send = send_one(book)
        book.failed(send.request_id, send.attempt, Failure.DIED, 0.0)
        book.cancel(send.request_id)
    book.submit("bad", rows=1, nbytes=1)
    verdicts = []
    while not verdicts or verdicts[-1] is Verdict.RESEND:
        verdicts.append(book.failed("bad", send_one(book).attempt, Failure.DIED, 0.0, computing=True))
    assert verdicts == [Verdict.RESEND] * 4 + [Verdict.POISON], "three, and one for each unrelated death"


def test_poison_is_what_kills_each_replica_that_computes_it_alone() -> None:
    book = a_book(5)
    book.submit("bad", rows=1, nbytes=1)
    verdicts = []
    for computing in (False, True, True, True):
        send = send_one(book)
        verdicts.append(book.failed("bad", send.attempt, Failure.DIED, 0.0, computing=computing))
    # The first death proves nothing: the request was in company.
    assert verdicts == [Verdict.RESEND, Verdict.RESEND, Verdict.RESEND, Verdict.POISON]
    assert book.statistics().replicas == 1
    assert book.statistics().waiting == book.statistics().in_flight == 0


def test_errors_are_tried_elsewhere_and_on_the_same_replica_only_if_there_is_no_other() -> None:
    book = a_book(2, max_errors=4)
    book.submit("a", rows=1, nbytes=1)
    tried = []
    for _ in range(3):
        send = send_one(book)
        tried.append(send.replica_id)
        assert book.failed("a", send.attempt, Failure.ERROR, 0.0) is Verdict.RESEND
    assert set(tried[:2]) == {"r0", "r1"} == book.history("a")
    assert book.failed("a", send_one(book).attempt, Failure.ERROR, 0.0) is Verdict.RAISE


def test_a_full_replica_is_left_alone_until_its_pause_ends_and_costs_no_attempt() -> None:
    book = a_book(1, max_attempts=1)
    book.submit("a", rows=1, nbytes=1)
    for start in (0.0, 1.0, 2.0):
        send = send_one(book, start)
        assert book.failed("a", send.attempt, Failure.FULL, start, pause=1.0) is Verdict.RESEND
        assert book.next_sends(start + 0.9) == []
        assert book.next_deadline() == start + 1.0
    assert book.statistics().resends == 0


def test_a_replica_that_answers_is_no_longer_paused() -> None:
    book = a_book(1)
    for name in ("a", "b"):
        book.submit(name, rows=1, nbytes=1)
    a, b = book.next_sends(0.0)
    book.failed("a", a.attempt, Failure.TIMEOUT, 0.0, pause=1000.0)
    assert book.next_sends(1.0) == []
    assert answer(book, b, 2.0)
    assert send_one(book, 2.0).request_id == "a"


def test_a_late_answer_counts_and_the_second_send_is_forgotten() -> None:
    book = a_book(2, attempt_timeout=5.0)
    book.submit("a", rows=1, nbytes=1)
    first = send_one(book)
    assert book.expired(5.0) == [("a", first.attempt, first.replica_id)]
    book.failed("a", first.attempt, Failure.TIMEOUT, 5.0, pause=60.0)
    second = send_one(book, 5.0)
    assert second.replica_id != first.replica_id
    assert answer(book, first, 6.0)
    assert not answer(book, second, 7.0)
    assert book.failed("a", second.attempt, Failure.DIED, 8.0) is Verdict.STALE
    assert book.expired(100.0) == []
    assert book.statistics().answered == 1


def test_what_is_submitted_again_under_its_name_owes_nothing_to_its_first_life() -> None:
    book = a_book(2, attempt_timeout=10.0)
    book.submit("a", rows=1, nbytes=1)
    first = send_one(book, 0.0)
    answer(book, first, 1.0)
    book.submit("a", rows=1, nbytes=1)
    second = send_one(book, 9.0)
    assert book.expired(10.0) == []  # the first life's deadline
    assert book.failed("a", first.attempt, Failure.DIED, 10.0) is Verdict.STALE
    assert book.expired(19.0) == [("a", second.attempt, second.replica_id)]


# --- Fingerprints ---------------------------------------------------------------------------------------------------


def test_a_request_for_one_teacher_waits_for_it_and_holds_up_nobody() -> None:
    book = RoutingBook(Limits(), window=1, seed=0)
    book.set_replicas([("old", False, "A"), ("new", False, "B")])
    for name in ("a", "b"):
        book.submit(name, rows=1, nbytes=1, fingerprint="B")
    book.submit("c", rows=1, nbytes=1)
    assert [(send.request_id, send.replica_id) for send in book.next_sends(0.0)] == [("a", "new"), ("c", "old")]


@pytest.mark.parametrize("failed_before", [False, True])
def test_a_request_for_a_teacher_that_is_no_more_goes_to_another(failed_before: bool) -> None:
    book = RoutingBook(Limits(), window=1, seed=0)
    book.set_replicas([("old", False, "A"), ("new", False, "B")])
    book.submit("a", rows=1, nbytes=1, fingerprint="A")
    if failed_before:
        send = send_one(book)
        assert send.replica_id == "old"
        book.failed("a", send.attempt, Failure.ERROR, 0.0)
        # Its only replica, though it failed there: the other has another teacher.
        send = send_one(book)
        assert send.replica_id == "old"
        book.failed("a", send.attempt, Failure.GONE, 0.0)
    else:
        book.set_replicas([("new", False, "B")])
    assert send_one(book).replica_id == "new"


# --- The choice -----------------------------------------------------------------------------------------------------


def test_a_replica_on_this_node_wins_a_tie_and_only_a_tie() -> None:
    chosen = []
    for seconds in (1.0, 2.0):
        book = RoutingBook(Limits(), window=10, seed=0)
        book.set_replicas([("far", False, None), ("near", True, None)])
        for number in range(2):  # each is heard of once: both are as fast, or "near" is slower
            book.submit(f"first{number}", rows=4, nbytes=1)
        sends = book.next_sends(0.0)
        assert {send.replica_id for send in sends} == {"far", "near"}
        for send in sends:
            answer(book, send, seconds=seconds if send.replica_id == "near" else 1.0)
        book.submit("next", rows=4, nbytes=1)
        chosen.append(send_one(book).replica_id)
    assert chosen == ["near", "far"]


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_the_first_batches_of_a_client_go_to_as_many_replicas(replicas: int) -> None:
    for seed in range(20):
        book = a_book(replicas, seed=seed)
        for name in range(replicas):
            book.submit(str(name), rows=1, nbytes=1)
        assert len({send.replica_id for send in book.next_sends(0.0)}) == replicas


def test_what_others_have_waiting_counts_as_long_as_it_is_news() -> None:
    book = a_book(2, window=100)
    for number in range(2):
        book.submit(f"first{number}", rows=1, nbytes=1)
    one, other = book.next_sends(0.0)
    answer(book, one, 0.0, other_rows=20)
    answer(book, other, 0.0, other_rows=0)
    for number in range(10):
        book.submit(f"next{number}", rows=1, nbytes=1)
    assert {send.replica_id for send in book.next_sends(0.1)} == {other.replica_id}
    for number in range(10):
        book.submit(f"later{number}", rows=1, nbytes=1)
    assert {send.replica_id for send in book.next_sends(50.0)} == {one.replica_id}  # 10 of its own against old news


def test_one_slow_answer_does_not_keep_work_away_for_ever() -> None:
    book = a_book(2, window=100)
    for number in range(2):
        book.submit(f"first{number}", rows=1, nbytes=1)
    slow, fast = book.next_sends(0.0)
    answer(book, slow, 0.0, seconds=60.0)  # it was compiling
    served = Counter[str]()
    for number in range(200):
        now = float(number)
        book.submit(f"next{number}", rows=1, nbytes=1)
        send = send_one(book, now)
        served[send.replica_id] += 1
        answer(book, send, now, seconds=0.1)
    assert served[slow.replica_id] > 20, served
    assert answer(book, fast)


def test_a_saturated_client_gives_work_in_proportion_to_speed() -> None:
    """Replicas of 1, 2 and 4 rows a second, each working through what it has; the client always has more."""
    speeds = {"r0": 1.0, "r1": 2.0, "r2": 4.0}
    book = a_book(3, window=3)
    now, served, queues = 0.0, Counter[str](), {name: [] for name in speeds}
    free_at = dict.fromkeys(speeds, 0.0)
    for number in range(700):
        book.submit(str(number), rows=8, nbytes=1)
    while book.statistics().waiting:
        for send in book.next_sends(now):
            queue = queues[send.replica_id]
            free_at[send.replica_id] = max(free_at[send.replica_id], now) + 8 / speeds[send.replica_id]
            queue.append((free_at[send.replica_id], send))
        now, send = min((queue[0] for queue in queues.values() if queue), key=lambda pair: pair[0])
        queues[send.replica_id].pop(0)
        served[send.replica_id] += 1
        assert answer(book, send, now, seconds=8 / speeds[send.replica_id])
    assert [served[name] / sum(served.values()) for name in speeds] == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=0.02)
