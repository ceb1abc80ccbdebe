"""Answers that are none: what a client of threads and one of asyncio say to them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf

from stem_client import FeatureError, RankingError, RetryPolicy

Given = dict[str, Any]
Change = Callable[[Any], Any]


def output(**tasks: np.ndarray) -> Change:
    """An answer that has other outputs."""

    def change(answer: Any) -> None:
        for task, scores in tasks.items():
            answer.outputs[task].CopyFrom(tf.make_tensor_proto(np.asarray(scores)))

    return change


def without(task: str) -> Change:
    return lambda answer: answer.outputs.pop(task)


def version(number: int) -> Change:
    def change(answer: Any) -> None:
        answer.model_spec.version.value = number

    return change


def half(answer: Any) -> None:
    del answer.outputs["like"].float_val[:]
    answer.outputs["like"].tensor_content = b"\0" * 6


def empty(answer: Any) -> None:
    del answer.outputs["like"].float_val[:]
    answer.outputs["like"].tensor_content = b""


GOOD = np.ones((1, 3), np.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda answer: answer.outputs.clear(), "the answer has no scores"),
        (without("like"), "the model's tasks are click, like; the answer lacks like"),
        (output(share=GOOD), "the answer has share beside them"),
        (output(like=np.array([[1, np.nan, 3]], np.float32)), "output 'like' holds nan at 1; scores are finite"),
        (output(like=np.array([[1, 2, -np.inf]], np.float32)), "output 'like' holds -inf at 2; scores are finite"),
        (output(like=GOOD[:, :2]), r"output 'like' has data type 1, shape \[1, 2\]; float \[1, 3\] was expected"),
        (output(like=GOOD[0]), r"shape \[3\]; float \[1, 3\] was expected"),
        (output(like=GOOD.astype(np.float64)), "output 'like' has data type 2"),
        (half, "output 'like' has 6 bytes for 3 elements"),
        (empty, "output 'like' has 0 values for 3 elements"),
    ],
)
def test_no_scores_of_the_model(
    ranker: Any, target: str, make: Any, user: Given, items: Given, change: Change, words: str
) -> None:
    with make(target, timeout=20) as client:
        client.metadata()
        ranker.faults.append(change)
        with pytest.raises(RankingError, match=words) as caught:
            client.rank(user, items)
        assert caught.value.code is grpc.StatusCode.INTERNAL and len(ranker.requests) == 1
        assert str(caught.value).startswith(f"rank of model 'ranker' at {target}: INTERNAL: ")
        assert client.rank(user, items)["like"].tolist() == [1.5, 2, 30]


def test_large_scores_are_scores(ranker: Any, target: str, make: Any, user: Given, items: Given) -> None:
    ranker.faults.append(output(like=np.array([[1e38, -3e38, 0]], np.float32)))
    with make(target, timeout=20) as client:
        assert client.rank(user, items)["like"].tolist() == np.array([1e38, -3e38, 0], np.float32).tolist()


def test_another_version_than_was_asked_for(ranker: Any, target: str, make: Any, user: Given, items: Given) -> None:
    ranker.faults.append(version(4))
    with make(target, timeout=20) as client:
        with pytest.raises(RankingError, match="INTERNAL: version 4 answered; version 3 was asked for"):
            client.rank(user, items, version=3)
        client.rank(user, items, version=3)


def test_a_version_of_other_tasks(ranker: Any, target: str, make: Any, user: Given, items: Given) -> None:
    """Its answers are taken as they are by the client that learns of it, and held to its tasks from then on."""
    with make(target, timeout=20) as client:
        client.rank(user, items)
        tasks, ranker.version = ranker.tasks, 4
        ranker.tasks = ("click", "like", "share")
        ranker.faults.extend([output(share=GOOD)] * 2)
        assert list(client.rank(user, items)) == list(client.rank(user, items)) == ["click", "like", "share"]
        with pytest.raises(RankingError, match="the answer lacks share"):
            client.rank(user, items)
        ranker.version, ranker.tasks = 5, tasks
        ranker.faults.append(output(other=GOOD))  # neither of version 4 nor of version 5
        with pytest.raises(RankingError, match="has other beside them"):
            client.rank(user, items)


class Bytes(grpc.GenericRpcHandler):
    """Answers every call with the same bytes."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer

    def service(self, call: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(lambda request, context: self.answer)


@pytest.mark.parametrize("payload", [b"", b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", b"<html>502</html>"])
def test_bytes_that_are_no_answer(make: Any, user: Given, items: Given, payload: bytes) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Bytes(payload),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with make(f"127.0.0.1:{port}", timeout=20, retry=RetryPolicy(attempts=1)) as client:
        with pytest.raises(RankingError) as caught:
            client.rank(user, items)
        assert caught.value.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.FAILED_PRECONDITION)
        if payload:
            assert "the answer is not readable" in caught.value.details
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("timeout", "error"),
    [
        (float("inf"), ValueError), (float("nan"), ValueError), (1e300, ValueError), (10**400, ValueError),
        (0, ValueError), (-1, ValueError), (86401, ValueError), (True, TypeError), ("1", TypeError), ([1], TypeError),
    ],
)  # fmt: skip
def test_timeouts_that_make_no_sense(
    ranker: Any, target: str, make: Any, user: Given, items: Given, timeout: Any, error: type[Exception]
) -> None:
    with make(target, timeout=np.float32(20)) as client:
        for call in (lambda: client.rank(user, items, timeout=timeout), lambda: client.metadata(timeout=timeout)):
            with pytest.raises(error, match=r"timeout is .*(number of seconds)"):
                call()
        with pytest.raises(error, match="hedge_after is"):
            make(target, hedge_after=timeout)
        assert not ranker.metadata_requests and not ranker.requests


@pytest.mark.parametrize(
    ("version", "error"),
    [
        ("1", TypeError),
        (True, TypeError),
        (1.0, TypeError),
        (-1, ValueError),
        (2**63, ValueError),
        (10**40, ValueError),
    ],
)
def test_versions_that_make_no_sense(
    ranker: Any, target: str, make: Any, user: Given, items: Given, version: Any, error: type[Exception]
) -> None:
    with make(target, timeout=20) as client:
        for call in (lambda: client.rank(user, items, version=version), lambda: client.metadata(version=version)):
            with pytest.raises(error, match="version is"):
                call()
        assert not ranker.metadata_requests
        client.rank(user, items, version=np.int64(3))


def test_lists_that_no_memory_holds(ranker: Any, target: str, make: Any, user: Given, items: Given) -> None:
    ranker.features["topics"] = (tf.int64, [2**50], True)
    with make(target, timeout=20) as client:
        with pytest.raises(RankingError, match="an input 'topics' of 1125899906842624 elements a row"):
            client.rank(user, items)


def test_metadata_tells_features_and_tasks(target: str, make: Any, user: Given, items: Given) -> None:
    with make(target, timeout=20) as client:
        model = client.metadata()
    assert (model.model, model.version, model.tasks) == ("ranker", 3, ("click", "like"))
    assert {feature.name for feature in model.features} == {*user, *items}


def test_what_is_no_feature(ranker: Any, target: str, make: Any, user: Given, items: Given) -> None:
    more = items | {"rank": [1, 2, 3], "hour": [4, 5, 6]}
    with make(target, timeout=20) as client:
        for extra in (None, "refuse"):
            with pytest.raises(
                FeatureError, match="'rank' is no feature of the model, 'hour' is a feature of the user"
            ):
                client.rank(user, more, extra=extra)
        client.rank(user | {"video_id": 7}, more, extra="ignore")
        assert set(ranker.arrays()) == {*user, *items}
        rows = [user | dict(zip(items, row, strict=True)) | {"x": 1} for row in zip(*items.values(), strict=True)]
        client.score(rows, extra="ignore")
        with pytest.raises(FeatureError, match="items: 'title' is missing"):
            client.rank(user, {name: values for name, values in more.items() if name != "title"}, extra="ignore")
        with pytest.raises(ValueError, match="extra is 'drop'; 'refuse' or 'ignore' is expected"):
            client.rank(user, items, extra="drop")
    with make(target, timeout=20, extra="ignore") as client:
        client.rank(user, more)
        with pytest.raises(FeatureError):
            client.rank(user, more, extra="refuse")
