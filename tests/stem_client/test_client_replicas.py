"""Several addresses: what goes where, replicas that restart, fail or hang, hedges; threads and forks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from stem_client import RankingClient, RankingError, RetryPolicy
from stem_client.addresses import Addresses

Given = dict[str, Any]
Serve = Callable[..., str]
FAST = RetryPolicy(first_backoff=0.001, max_backoff=0.005)
NOT_LOADED = (grpc.StatusCode.NOT_FOUND, "Servable not found for request: Latest(ranker)")
CANCELLED = (grpc.StatusCode.CANCELLED, "CANCELLED")
UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "no")


@pytest.fixture
def replicas(ranker: Any, serve: Serve) -> tuple[Any, Any, list[str]]:
    """Two servers of the same model, and their addresses."""
    other = type(ranker)()
    return ranker, other, [serve(ranker), serve(other)]


def test_calls_are_spread(replicas: Any, make: Any, user: Given, items: Given) -> None:
    one, other, targets = replicas
    with make(targets, timeout=20) as client:
        for _ in range(10):
            client.rank(user, items)
    assert abs(len(one.requests) - len(other.requests)) <= 1


@pytest.mark.parametrize("fault", [NOT_LOADED, CANCELLED, UNAVAILABLE])
def test_a_replica_that_restarts_is_left_for_another(
    replicas: Any, make: Any, user: Given, items: Given, fault: Any
) -> None:
    one, other, targets = replicas
    one.faults.extend([fault] * 30)
    with make(targets, timeout=20, retry=FAST) as client:
        for _ in range(30):
            assert client.rank(user, items)["like"].tolist() == [1.5, 2, 30]
    # One call in many tries it again: its failures cost no budget.
    assert len(other.requests) == 30 and 1 <= len(one.requests) <= 10


def test_a_dead_address_never_uses_up_the_budget(
    ranker: Any, serve: Serve, make: Any, user: Given, items: Given
) -> None:
    retry = RetryPolicy(first_backoff=0, budget=1, refill=0)
    with make([serve(ranker), "127.0.0.1:1"], timeout=20, retry=retry) as client:
        for _ in range(6):
            assert client.rank(user, items)["like"].tolist() == [1.5, 2, 30]
            time.sleep(0.15)  # after which somebody asks again whether it is back


def test_both_replicas_restart_one_after_the_other(ranker: Any, serve: Serve, user: Given, items: Given) -> None:
    targets = [serve(ranker), serve(ranker)]
    errors: list[Exception] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            try:
                assert client.rank(user, items)["like"].tolist() == [1.5, 2, 30]
            except Exception as error:
                errors.append(error)

    with RankingClient(targets, timeout=20, retry=FAST) as client:
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        serve.stop(targets[0])  # type: ignore[attr-defined]
        before = len(ranker.requests)
        time.sleep(0.3)
        ended.set()
        for thread in threads:
            thread.join()
    assert not errors and len(ranker.requests) > before


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_version_that_no_replica_has(ranker: Any, serve: Serve, user: Given, items: Given, count: int) -> None:
    targets = [serve(ranker) for _ in range(count)]
    with RankingClient(targets, timeout=20, retry=FAST) as client:
        client.metadata()
        asked = ranker.metadata_requests
        with pytest.raises(RankingError, match=r"attempts: NOT_FOUND: Servable not found for request: Specific"):
            client.rank(user, items, version=99)
        assert ranker.metadata_requests - asked == max(2, count) and not ranker.requests


def test_another_not_found_is_not_asked_again(replicas: Any, user: Given, items: Given) -> None:
    one, other, targets = replicas
    with RankingClient(targets, timeout=20) as client:
        client.metadata()
        one.faults.append((grpc.StatusCode.NOT_FOUND, "no such table"))
        other.faults.append((grpc.StatusCode.NOT_FOUND, "no such table"))
        with pytest.raises(RankingError):
            client.rank(user, items)
        assert len(one.requests) + len(other.requests) == 1


def test_a_hedge_takes_the_first_good_answer(replicas: Any, make: Any, user: Given, items: Given) -> None:
    one, other, targets = replicas
    with make(targets, timeout=20, hedge_after=0.05) as client:
        client.metadata()
        for slow in (one, other):
            slow.faults.append(3.0)
            start = time.monotonic()
            for _ in range(2):  # one of the two goes to the slow one
                assert client.rank(user, items)["like"].tolist() == [1.5, 2, 30]
            assert time.monotonic() - start < 2.5
            slow.faults.clear()


def test_a_hedge_that_fails_leaves_the_first(replicas: Any, make: Any, user: Given, items: Given) -> None:
    one, other, targets = replicas
    with make(targets, timeout=20, hedge_after=0.05, retry=RetryPolicy(attempts=1)) as client:
        client.metadata()
        for replica in (one, other):
            replica.faults.append(0.4)
        # Whichever is asked first is slow; its hedge is answered with garbage.
        for replica in (one, other):
            replica.faults.append(lambda answer: answer.outputs.clear())
        client.rank(user, items)
        assert len(one.requests) == len(other.requests) == 1
    one.faults.clear()
    other.faults.clear()


def test_hedges_are_paid_from_the_budget(replicas: Any, make: Any, user: Given, items: Given) -> None:
    one, other, targets = replicas
    retry = RetryPolicy(budget=2, refill=0)
    with make(targets, timeout=20, hedge_after=0.02, retry=retry) as client:
        client.metadata()
        for _ in range(4):
            for replica in (one, other):
                replica.faults.extend([0.2])
            client.rank(user, items)
            one.faults.clear()
            other.faults.clear()
        assert len(one.requests) + len(other.requests) == 4 + 2


@pytest.mark.parametrize("hedge_after", [None, 0.001])
def test_close_among_many_calls(replicas: Any, make: Any, user: Given, items: Given, hedge_after: float | None) -> None:
    """Whatever a call does just then: connecting, waiting, hedging."""
    unexpected: list[BaseException] = []

    def ask() -> None:
        try:
            while True:
                client.rank(user, items)
        except RankingError as error:
            if error.code is not grpc.StatusCode.CANCELLED:
                unexpected.append(error)
        except ValueError as error:
            if str(error) != "the client is closed":
                unexpected.append(error)
        except BaseException as error:
            unexpected.append(error)

    for seconds in (0.0, 0.03, 0.1):
        client = make(replicas[2], timeout=20, hedge_after=hedge_after)
        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        client.close()
        for thread in threads:
            thread.join(timeout=20)
        client.__exit__(None, None, None)  # ends the event loop too
    assert not unexpected


def test_a_hung_replica_costs_few_calls(replicas: Any, make: Any, user: Given, items: Given) -> None:
    one, _, targets = replicas
    with make(targets, timeout=20) as client:
        for _ in range(2):
            client.rank(user, items)
        one.faults.extend([1.0] * 50)
        failures = 0
        for _ in range(20):
            try:
                client.rank(user, items, timeout=0.1)
            except RankingError as error:
                assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
                failures += 1
        assert 1 <= failures <= 6
        one.faults.clear()


def test_versions_that_alternate(replicas: Any, make: Any, user: Given, items: Given) -> None:
    one, other, targets = replicas
    other.version = 4
    with make(targets, timeout=20, retry=FAST) as client:
        for _ in range(10):
            assert client.rank(user, items)["like"].tolist() == [1.5, 2, 30]
        assert one.metadata_requests + other.metadata_requests <= 4
        for version in (3, 4):  # whichever replica is asked first
            client.rank(user, items, version=version)


def test_a_channel_to_a_name(ranker: Any, serve: Serve, make: Any, user: Given, items: Given) -> None:
    port = serve(ranker).rpartition(":")[2]
    with make(f"dns:///localhost:{port}", timeout=20) as client:
        assert client.rank(user, items)["like"].tolist() == [1.5, 2, 30]


@pytest.mark.parametrize("target", [[], "", ["a:1", ""], [7], 7])
def test_targets_that_are_none(make: Any, target: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        make(target)


def test_the_places_of_calls() -> None:
    places = Addresses(3)
    assert [places.pick() for _ in range(4)] == [0, 1, 2, 0]
    assert places.pick([1, 2]) == 0 and sorted({places.pick([0, 1, 2]) for _ in range(3)}) == [0, 1, 2]
    places.failed(1, surely=True)
    assert {places.pick() for _ in range(9)} == {0, 2}
    assert places.is_probe(1) and not places.is_probe(0)
    assert places.pick([0, 2]) == 1  # better than one that was tried
    for _ in range(2):
        places.failed(0, surely=False)
    assert 0 in {places.pick() for _ in range(9)}
    places.failed(0, surely=False)
    assert {places.pick() for _ in range(9)} == {2}
    places.answered(0)
    assert {places.pick() for _ in range(9)} == {0, 2}
    time.sleep(0.11)
    assert [places.pick() for _ in range(9)].count(1) == 1


def test_many_threads(replicas: Any, user: Given, items: Given) -> None:
    wrong: list[Any] = []

    def ask(number: int) -> None:
        for round_ in range(5):
            seconds = [float(number), float(round_), 0.0]
            if client.rank(user, items | {"seconds": seconds})["like"].tolist() != seconds:
                wrong.append(number)

    with RankingClient(replicas[2], timeout=60, hedge_after=5) as client:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert not wrong and len(replicas[0].requests) + len(replicas[1].requests) == 64 * 5


def test_a_fork_is_refused(target: str, make: Any, user: Given, items: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(target, timeout=20) as client:
        client.rank(user, items)
        process = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: process + 1)  # what a child would see
        for call in (lambda: client.rank(user, items), client.metadata):
            with pytest.raises(ValueError, match="made before a fork.*make one in each worker"):
                call()
        monkeypatch.undo()
        client.rank(user, items)


def many(count: int) -> Given:
    return {
        "video_id": np.arange(count),
        "title": ["t"] * count,
        "topics": [[number % 7, 1] for number in range(count)],
        "seconds": np.arange(count, dtype=np.float32),
        "image": np.zeros((count, 2)),
    }


@pytest.mark.parametrize("count", [1, 10, 11, 25, 30])
def test_long_lists_go_in_several_requests(ranker: Any, target: str, make: Any, user: Given, count: int) -> None:
    items = many(count)
    with make(target, timeout=20, chunk_rows=10) as client:
        scores = client.rank(user, items)
        assert scores["like"].tolist() == list(range(count)) and scores["like"].dtype == np.float32
        requests = -(-count // 10)
        assert len(ranker.requests) == requests
        assert [request.model_spec.HasField("version") for request in ranker.requests] == [
            place > 0 for place in range(requests)
        ]
        sizes = [ranker.arrays(place)["video_id"].shape[1] for place in range(requests)]
        assert sum(sizes) == count and max(sizes) <= 10
        assert all(ranker.arrays(place)["interests"].tolist() == [[b"ski", b"jazz"]] for place in range(requests))
        rows = {name: [value] * count for name, value in user.items()} | items
        assert client.score(rows)["like"].tolist() == list(range(count))


def test_chunks_are_of_one_version(ranker: Any, target: str, make: Any, user: Given) -> None:
    def move(answer: Any) -> None:
        ranker.version += 1

    with make(target, timeout=20, chunk_rows=10, retry=FAST) as client:
        ranker.faults.extend([None, move])
        # Version 3 is gone after the second chunk: all three are asked of version 4.
        assert client.rank(user, many(30))["like"].tolist() == list(range(30))
        assert [request.model_spec.version.value for request in ranker.requests[-3:]] == [0, 4, 4]
        ranker.faults.extend([move, *[None] * 2, move])  # and once more while beginning again
        with pytest.raises(RankingError, match="NOT_FOUND"):
            client.rank(user, many(30))
        ranker.faults.clear()
        ranker.faults.append(move)
        with pytest.raises(RankingError, match="NOT_FOUND"):  # asked for by the caller: no other will do
            client.rank(user, many(30), version=ranker.version)


def test_chunks_share_one_deadline(ranker: Any, target: str, make: Any, user: Given) -> None:
    with make(target, timeout=20, chunk_rows=1) as client:
        client.metadata()
        ranker.faults.extend([0.1] * 30)
        start = time.monotonic()
        with pytest.raises(RankingError, match="DEADLINE_EXCEEDED"):
            client.rank(user, many(30), timeout=0.35)
        assert time.monotonic() - start < 2 and len(ranker.requests) < 15
        ranker.faults.clear()
