"""Calls that fail: what is tried again and how often, deadlines, sizes, closing, and what the errors say."""

from __future__ import annotations

import pickle
import threading
import time
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import prediction_service_pb2_grpc

from stem_client import RankingClient, RankingError, RetryPolicy
from stem_client.retry import Budget

Given = dict[str, Any]
UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "The batch scheduling queue to which this task was submitted is full")
EXHAUSTED = (grpc.StatusCode.RESOURCE_EXHAUSTED, "Server Threadpool Exhausted")
HERE = Path(__file__).parent


@pytest.mark.parametrize("fault", [UNAVAILABLE, EXHAUSTED])
def test_busy_servers_are_tried_again(
    ranker: Any, client: RankingClient, user: Given, items: Given, fault: Any
) -> None:
    ranker.faults.extend([fault, fault])
    assert client.rank(user, items)["like"].tolist() == [1.5, 2, 30]
    assert len(ranker.requests) == 3
    assert ranker.requests[0] == ranker.requests[2]


def test_attempts_are_limited(ranker: Any, client: RankingClient, target: str, user: Given, items: Given) -> None:
    ranker.faults.extend([UNAVAILABLE] * 9)
    with pytest.raises(RankingError) as caught:
        client.rank(user, items)
    assert (caught.value.code, caught.value.details) == UNAVAILABLE
    assert str(caught.value) == f"rank of model 'ranker' at {target}, 4 attempts: UNAVAILABLE: {UNAVAILABLE[1]}"
    assert len(ranker.requests) == 4
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.code is caught.value.code


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
    ],
)
def test_nothing_else_is_tried_again(
    ranker: Any, client: RankingClient, user: Given, items: Given, code: grpc.StatusCode
) -> None:
    ranker.faults.append((code, "no"))
    with pytest.raises(RankingError) as caught:
        client.rank(user, items)
    assert (caught.value.code, caught.value.details) == (code, "no")
    assert "attempts" not in str(caught.value) and len(ranker.requests) == 1


def test_the_budget_is_shared_by_all_calls(ranker: Any, target: str, user: Given, items: Given) -> None:
    retry = RetryPolicy(attempts=3, first_backoff=0, budget=5, refill=0.5)
    with RankingClient(target, timeout=20, retry=retry) as client:
        client.metadata()
        ranker.faults.extend([UNAVAILABLE] * 9)
        for _ in range(4):  # 2 + 2 + 1 retries, and then none
            with pytest.raises(RankingError):
                client.rank(user, items)
        assert len(ranker.requests) == 4 + 5
        for _ in range(2):  # two good calls pay for one retry
            client.rank(user, items)
        ranker.faults.extend([UNAVAILABLE] * 3)
        with pytest.raises(RankingError):
            client.rank(user, items)
        assert len(ranker.requests) == 9 + 2 + 2


def test_a_budget_is_never_more_than_full() -> None:
    budget = Budget(RetryPolicy(budget=1, refill=1))
    for _ in range(5):
        budget.succeeded()
    assert [budget.take(), budget.take()] == [True, False]


def test_backoff_doubles_with_jitter() -> None:
    policy = RetryPolicy(first_backoff=0.1, max_backoff=0.3)
    for attempt, longest in ((1, 0.1), (2, 0.2), (3, 0.3), (4, 0.3), (5000, 0.3)):
        waits = [policy.backoff(attempt) for _ in range(200)]
        assert 0 <= min(waits) < longest / 3 and longest * 2 / 3 < max(waits) <= longest


@pytest.mark.parametrize("setting", [{"attempts": 0}, {"first_backoff": -1}, {"budget": float("nan")}])
def test_policies_that_make_no_sense(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .*; it should be"):
        RetryPolicy(**setting)


def test_deadline_of_a_slow_answer(ranker: Any, client: RankingClient, user: Given, items: Given) -> None:
    client.metadata()
    ranker.faults.append(1.0)
    start = time.monotonic()
    with pytest.raises(RankingError) as caught:
        client.rank(user, items, timeout=0.1)
    assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - start < 0.8


def test_deadline_covers_all_attempts(ranker: Any, target: str, user: Given, items: Given) -> None:
    retry = RetryPolicy(attempts=1000, first_backoff=0.05, max_backoff=0.05, budget=1000)
    with RankingClient(target, timeout=20, retry=retry) as client:
        client.metadata()
        ranker.faults.extend([UNAVAILABLE] * 1000)
        start = time.monotonic()
        with pytest.raises(RankingError) as caught:
            client.rank(user, items, timeout=0.4)
        # What the server said is kept, unless the deadline passed during a call.
        assert caught.value.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        assert time.monotonic() - start < 1.5
        assert 2 < len(ranker.requests) < 1000


def test_deadline_covers_waiting_for_another_threads_metadata(
    ranker: Any, target: str, user: Given, items: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = ranker.signature

    def slow_answer(name: str) -> Any:
        time.sleep(0.5)
        return answer(name)

    monkeypatch.setattr(ranker, "signature", slow_answer)
    with RankingClient(target, timeout=20) as client:
        slow = threading.Thread(target=client.rank, args=(user, items))
        slow.start()
        time.sleep(0.1)
        with pytest.raises(RankingError, match="DEADLINE_EXCEEDED: waited for the model's metadata"):
            client.rank(user, items, timeout=0.1)
        slow.join(timeout=30)
    assert len(ranker.requests) == 1


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_timeouts_that_are_none(client: RankingClient, user: Given, items: Given, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout is .*; it should be a positive number of seconds"):
        client.rank(user, items, timeout=timeout)
    with pytest.raises(ValueError, match="timeout is"):
        RankingClient("localhost:1", timeout=timeout)


def test_nobody_listens(user: Given, items: Given) -> None:
    with RankingClient("127.0.0.1:1", retry=RetryPolicy(first_backoff=0)) as client:
        with pytest.raises(RankingError, match="at 127.0.0.1:1, 4 attempts") as caught:
            client.rank(user, items)
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE


def test_a_server_that_comes_back_is_found_again(ranker: Any, user: Given, items: Given) -> None:
    def serve(port: int) -> tuple[Any, int]:
        server = grpc.server(futures.ThreadPoolExecutor(2))
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(ranker, server)
        port = server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()
        return server, port

    server, port = serve(0)
    retry = RetryPolicy(attempts=200, first_backoff=0.05, max_backoff=0.1, budget=200)
    with RankingClient(f"127.0.0.1:{port}", timeout=20, retry=retry) as client:
        client.rank(user, items)
        server.stop(None).wait()
        back: list[Any] = []
        timer = threading.Timer(0.3, lambda: back.append(serve(port)))
        timer.start()
        start = time.monotonic()
        client.rank(user, items)
        assert 0.2 < time.monotonic() - start < 10
        timer.join()
        back[0][0].stop(None).wait()


def many(count: int) -> Given:
    return {
        "video_id": np.arange(count),
        "title": ["t"] * count,
        "topics": np.zeros((count, 1), np.int64),
        "seconds": np.arange(count, dtype=np.float32),
        "image": np.zeros((count, 2)),
    }


def test_answers_over_4_mb_are_taken(ranker: Any, client: RankingClient, user: Given) -> None:
    # 50 items padded to 700,000: 5.6 MB in two outputs.
    ranker.encode = lambda scores: tf.make_tensor_proto(np.pad(scores, [(0, 0), (0, 700_000)]))
    assert client.rank(user, many(50))["like"].tolist() == list(range(50))


def test_an_answer_over_the_limit_is_not_asked_for_again(ranker: Any, target: str, user: Given) -> None:
    with RankingClient(target, timeout=20, max_message_bytes=10_000) as client:
        assert client.rank(user, many(10))["like"].shape == (10,)
        with pytest.raises(RankingError, match="larger than max") as caught:
            client.rank(user, many(5000))
        assert caught.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED and len(ranker.requests) == 2


def test_a_request_over_the_servers_limit_is_not_sent_again(target: str, user: Given) -> None:
    with RankingClient(target, timeout=20, chunk_rows=10**6) as client:
        with pytest.raises(RankingError, match="larger than max") as caught:
            client.rank(user, many(200_000))
    assert caught.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED and "attempts" not in str(caught.value)


def test_closed_clients(ranker: Any, client: RankingClient, user: Given, items: Given) -> None:
    client.metadata()
    ranker.faults.append(1.0)
    errors: list[RankingError] = []

    def call() -> None:
        try:
            client.rank(user, items)
        except RankingError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    while not ranker.requests:
        time.sleep(0.01)
    client.close()
    thread.join(timeout=10)
    assert errors[0].code == grpc.StatusCode.CANCELLED
    client.close()
    for method in (client.metadata, lambda: client.rank(user, items), lambda: client.score([])):
        with pytest.raises(ValueError, match="the client is closed"):
            method()


def test_closing_ends_the_wait_before_a_retry(ranker: Any, target: str, user: Given, items: Given) -> None:
    client = RankingClient(target, timeout=60, retry=RetryPolicy(first_backoff=40, max_backoff=40))
    client.metadata()
    ranker.faults.extend([UNAVAILABLE] * 4)
    threading.Timer(0.2, client.close).start()
    start = time.monotonic()
    with pytest.raises(RankingError):
        client.rank(user, items)
    assert time.monotonic() - start < 20


def test_tls(ranker: Any, user: Given, items: Given) -> None:
    # Made for this test, until 2126: openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes
    # -keyout localhost.key.pem -out localhost.certificate.pem -days 36500 -subj /CN=localhost
    # -addext subjectAltName=DNS:localhost
    key, certificate = ((HERE / f"localhost.{kind}.pem").read_bytes() for kind in ("key", "certificate"))
    server = grpc.server(futures.ThreadPoolExecutor(2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(ranker, server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    credentials = grpc.ssl_channel_credentials(certificate)
    with RankingClient(f"localhost:{port}", timeout=20, credentials=credentials) as client:
        assert client.rank(user, items)["like"].tolist() == [1.5, 2, 30]
    with RankingClient(f"localhost:{port}", retry=RetryPolicy(attempts=1)) as client:
        with pytest.raises(RankingError):
            client.rank(user, items)
    # A certificate for another name: the name to expect is a channel option.
    options = [("grpc.ssl_target_name_override", "localhost")]
    with RankingClient(f"127.0.0.1:{port}", timeout=20, credentials=credentials, options=options) as client:
        assert client.rank(user, items)["like"].shape == (3,)
    server.stop(None).wait()
