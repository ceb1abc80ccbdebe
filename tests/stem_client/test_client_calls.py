"""Calls that go well: what arrives at the server and what comes back, in every form; and errors before a call."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2

from stem_client import FeatureError, RankingClient, RankingError, metadata

EMPTY = -(2**63)
Given = dict[str, Any]


def float_val(scores: np.ndarray) -> Any:
    tensor = tf.make_tensor_proto(0.0, shape=scores.shape)
    del tensor.float_val[:]
    tensor.float_val.extend(scores.ravel().tolist())
    return tensor


def tensor_content(scores: np.ndarray) -> Any:
    tensor = tf.make_tensor_proto(scores)
    del tensor.float_val[:]
    tensor.tensor_content = scores.tobytes()
    return tensor


def padded(scores: np.ndarray) -> Any:
    """As a server answers that batched this request with one of 50 more items."""
    return tensor_content(np.pad(scores, [(0, 0), (0, 50)], constant_values=-1))


# ranking


def test_rank_sends_what_the_signature_takes(ranker: Any, client: RankingClient, user: Given, items: Given) -> None:
    scores = client.rank(user, items)
    assert list(scores) == ["click", "like"]
    assert all(array.dtype == np.float32 and array.shape == (3,) for array in scores.values())
    np.testing.assert_array_equal(scores["like"], np.array([1.5, 2, 30], np.float32))
    np.testing.assert_array_equal(scores["click"], np.array([0.007, 0.008, 2**62 / 1000], np.float32))
    request, sent = ranker.requests[0], ranker.arrays()
    assert request.model_spec.name == "ranker" and request.model_spec.signature_name == "rank"
    assert not request.model_spec.HasField("version")
    assert {name: array.dtype.name for name, array in sent.items()} == {
        "user_id": "int64", "interests": "object", "taste": "float32", "hour": "int64", "video_id": "int64",
        "title": "object", "topics": "int64", "seconds": "float32", "image": "float32",
    }  # fmt: skip
    np.testing.assert_array_equal(sent["user_id"], [42])
    np.testing.assert_array_equal(sent["interests"], [[b"ski", b"jazz"]])
    np.testing.assert_array_equal(sent["taste"], [[0.5, 1, -1]])
    np.testing.assert_array_equal(sent["video_id"], [[7, 8, 2**62]])
    np.testing.assert_array_equal(sent["title"], [["un été".encode(), b"b", b"c"]])
    np.testing.assert_array_equal(sent["topics"], [[[1, 2], [EMPTY, EMPTY], [3, EMPTY]]])
    np.testing.assert_array_equal(sent["image"], [[[1, 2], [3, 4], [5, 6]]])
    assert request.inputs["video_id"].tensor_content and request.inputs["seconds"].tensor_content


def as_arrays(items: Given) -> Any:
    return {name: values if name == "topics" else np.array(values) for name, values in items.items()}


def as_rows(items: Given) -> Any:
    return [dict(zip(items, values, strict=True)) for values in zip(*items.values(), strict=True)]


def as_frame(items: Given) -> Any:
    return pd.DataFrame(as_rows(items), index=[30, 10, 20])


def as_structured(items: Given) -> Any:
    types = [("video_id", "i8"), ("title", "U9"), ("topics", "O"), ("seconds", "f8"), ("image", "f4", 2)]
    return np.array([tuple(row[name] for name, *_ in types) for row in as_rows(items)], types)


@pytest.mark.parametrize("form", [as_arrays, as_rows, as_frame, as_structured])
def test_items_in_every_form_are_the_same_request(
    ranker: Any, client: RankingClient, user: Given, items: Given, form: Callable[[Given], Any]
) -> None:
    client.rank(user, items)
    client.rank(user, form(items))
    first, second = ranker.arrays(0), ranker.arrays(1)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_missing_values_are_the_models_empty_ones(
    ranker: Any, client: RankingClient, user: Given, items: Given
) -> None:
    user |= {"user_id": None, "interests": None, "taste": None, "hour": np.float64("nan")}
    client.rank(user, items | {"title": [None, "b", ""], "topics": [None] * 3, "seconds": [None, 1, 2]})
    sent = ranker.arrays()
    assert sent["user_id"].tolist() == [EMPTY] and sent["hour"].tolist() == [EMPTY]
    assert sent["interests"].tolist() == [[b""]] and np.isnan(sent["taste"]).all()
    assert sent["title"].tolist() == [[b"", b"b", b""]] and sent["topics"].tolist() == [[[EMPTY]] * 3]
    assert np.isnan(sent["seconds"][0, 0])


@pytest.mark.parametrize("encode", [tf.make_tensor_proto, float_val, tensor_content, padded])
def test_answers_in_both_encodings_and_padded(
    ranker: Any, client: RankingClient, user: Given, items: Given, encode: Any
) -> None:
    ranker.encode = encode
    scores = client.rank(user, items)["like"]
    np.testing.assert_array_equal(scores, np.array([1.5, 2, 30], np.float32))
    scores.sort()  # the caller's own


def test_one_value_stands_for_all(ranker: Any, client: RankingClient, user: Given, items: Given) -> None:
    ranker.encode = lambda scores: tf.make_tensor_proto(0.5, shape=scores.shape)
    assert client.rank(user, items)["like"].tolist() == [0.5] * 3


@pytest.mark.parametrize(
    "encode, message",
    [
        (lambda scores: tensor_content(scores[:, :2]), "output 'click' has data type 1, shape [1, 2]; float [1, 3]"),
        (lambda scores: tensor_content(scores[0]), "shape [3]"),
        (lambda scores: tf.make_tensor_proto(scores.astype(np.float64)), "data type 2"),
        (lambda scores: predict_pb2.PredictResponse().outputs["x"], "data type 0, shape []"),
    ],
)
def test_answers_of_another_shape_or_type_are_refused(
    ranker: Any, client: RankingClient, user: Given, items: Given, encode: Any, message: str
) -> None:
    ranker.encode = encode
    with pytest.raises(RankingError) as caught:
        client.rank(user, items)
    assert caught.value.code == grpc.StatusCode.INTERNAL and message in str(caught.value)


def test_truncated_answers_are_refused(ranker: Any, client: RankingClient, user: Given, items: Given) -> None:
    def short(scores: np.ndarray) -> Any:
        tensor = tensor_content(scores)
        tensor.tensor_content = tensor.tensor_content[:-1]
        return tensor

    ranker.encode = short
    with pytest.raises(RankingError, match="output 'click' has 11 bytes for 3 elements"):
        client.rank(user, items)


@pytest.mark.parametrize("none", ["mapping", "rows", "frame", "arrays"])
def test_no_items_need_no_call(ranker: Any, client: RankingClient, user: Given, items: Given, none: str) -> None:
    empty: Any = {
        "mapping": {name: [] for name in items},
        "rows": [],
        "frame": pd.DataFrame(columns=list(items)),
        "arrays": {name: np.empty((0, 2) if name == "image" else 0) for name in items} | {"topics": []},
    }[none]
    scores = client.rank(user, empty)
    assert list(scores) == ["click", "like"]
    assert all(array.shape == (0,) and array.dtype == np.float32 for array in scores.values())
    assert not ranker.requests
    with pytest.raises(FeatureError, match="user feature 'hour'"):
        client.rank(user | {"hour": "x"}, empty)


def test_score_sends_rows(ranker: Any, client: RankingClient, user: Given, items: Given) -> None:
    rows = [user | row for row in as_rows(items)]
    scores = client.score(rows)
    np.testing.assert_array_equal(scores["like"], np.array([1.5, 2, 30], np.float32))
    assert ranker.requests[0].model_spec.signature_name == "serving_default"
    sent = ranker.arrays()
    assert sent["user_id"].shape == (3,) and sent["interests"].shape == (3, 2) and sent["taste"].shape == (3, 3)
    assert sent["topics"].shape == (3, 2) and sent["image"].shape == (3, 2)
    np.testing.assert_array_equal(client.score(pd.DataFrame(rows))["click"], scores["click"])
    assert client.score([])["click"].shape == (0,)


def test_score_does_not_trim(ranker: Any, client: RankingClient, user: Given, items: Given) -> None:
    ranker.encode = lambda scores: tensor_content(np.pad(scores, (0, 1)))
    with pytest.raises(RankingError, match=r"shape \[4\]; float \[3\] was expected"):
        client.score([user | row for row in as_rows(items)])


# features that do not fit


@pytest.mark.parametrize(
    "change_user, change_items, message",
    [
        ({"hour": ...}, {}, "user: 'hour' is missing; the model takes hour, interests, taste, user_id"),
        ({"hours": 1}, {}, "user: 'hours' is no feature of the model (did you mean 'hour'?)"),
        ({"hour": ..., "huor": 1}, {}, "'hour' is missing, 'huor' is no feature of the model (did you mean 'hour'?)"),
        ({"video_id": 1}, {}, "user: 'video_id' is a feature of items: pass it in items"),
        ({}, {"hour": [1, 2, 3]}, "items: 'hour' is a feature of the user or the context: pass it in user"),
        ({}, {"title": ...}, "items: 'title' is missing"),
        ({}, {"zzz": [1, 2, 3]}, "items: 'zzz' is no feature of the model; the model takes image, seconds"),
        ({}, {"title": ["a", "b"]}, "item feature 'image' has 3 items and 'title' has 2"),
        ({}, {"video_id": [1, 2.5, 3]}, "item feature 'video_id', item 1 is 2.5 (float)"),
        ({"user_id": [1]}, {}, "user feature 'user_id' is [1] (list); the model takes int64"),
        ({"user_id": np.array([1, 2])}, {}, "user feature 'user_id' is array([1, 2]) (ndarray)"),
        ({"interests": "ski"}, {}, "user feature 'interests' is 'ski' (str); a list or an array is expected"),
        ({"interests": ["ski", 3]}, {}, "user feature 'interests', element 1 is 3 (int); the model takes strings"),
        ({"taste": [1, 2]}, {}, "user feature 'taste' has 2 elements; the model takes 3"),
    ],
)  # fmt: skip
def test_features_that_do_not_fit(
    ranker: Any, client: RankingClient, user: Given, items: Given, change_user: Given, change_items: Given, message: str
) -> None:
    for given, change in ((user, change_user), (items, change_items)):
        given |= change
        for name in [name for name, value in change.items() if value is ...]:
            del given[name]
    with pytest.raises(FeatureError) as caught:
        client.rank(user, items)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError) and not ranker.requests


def test_rows_name_the_one_that_differs(client: RankingClient, user: Given, items: Given) -> None:
    rows = as_rows(items)
    del rows[1]["title"]
    with pytest.raises(FeatureError, match="^item 1: 'title' is missing; the model takes "):
        client.rank(user, rows)


def test_lists_of_one_length(ranker: Any, client: RankingClient, user: Given, items: Given) -> None:
    ranker.features |= {"interests": (tf.string, [1], False), "topics": (tf.int64, [4], True)}
    # [1, 1] of the user beside [1, N] of the items, N = 1 too: neither is taken for the other.
    one = {name: values[:1] for name, values in items.items()}
    client.rank(user, one)
    sent = ranker.arrays()
    assert sent["interests"].tolist() == [[b"ski"]] and sent["video_id"].tolist() == [[7]]
    assert sent["topics"].tolist() == [[[1, 2, EMPTY, EMPTY]]]
    kinds = {feature.name: (feature.kind, feature.length, feature.per_item) for feature in client.metadata().features}
    assert kinds["interests"] == ("list", 1, False) and kinds["topics"] == ("list", 4, True)
    assert kinds["taste"] == ("vector", 3, False) and kinds["hour"] == ("value", None, False)
    client.score([user | {name: values[row] for name, values in items.items()} for row in range(3)])
    assert ranker.arrays()["interests"].shape == (3, 1) and ranker.arrays()["topics"].shape == (3, 4)


@pytest.mark.parametrize("table", [7, "abc", [[1, 2]], np.ones((3, 2)), None])
def test_items_of_no_known_form(client: RankingClient, user: Given, table: Any) -> None:
    with pytest.raises(FeatureError, match="items are .*; a mapping of arrays, a list of mappings or a DataFrame"):
        client.rank(user, table)


def test_a_user_is_a_mapping(client: RankingClient, items: Given) -> None:
    with pytest.raises(FeatureError, match="user is int; a mapping of feature to value is expected"):
        client.rank(42, items)  # type: ignore[arg-type]


# metadata


def test_metadata_is_fetched_once(ranker: Any, client: RankingClient, user: Given, items: Given) -> None:
    for _ in range(3):
        client.rank(user, items)
    assert ranker.metadata_requests == 1
    model = client.metadata()
    assert (model.model, model.version, sorted(model.signatures)) == ("ranker", 3, ["rank", "serving_default"])
    assert model.signatures["rank"].inputs["image"] == metadata.Tensor("float32", (None, None, 2))
    assert {feature.name for feature in model.features if feature.per_item} == set(items)


def test_threads_that_start_together_fetch_metadata_once(
    ranker: Any, client: RankingClient, user: Given, items: Given
) -> None:
    answers: list[Any] = []

    def call(number: int) -> None:
        answers.append((number, client.rank(user, items | {"seconds": [number] * 3})))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(answers) == 16 and ranker.metadata_requests == 1
    assert all(scores["like"].tolist() == [i] * 3 for i, scores in answers)


def deploy(ranker: Any, version: int, **features: Any) -> None:
    ranker.version = version
    ranker.features = {name: kind for name, kind in (ranker.features | features).items() if kind is not None}


def test_a_new_version_is_noticed_by_its_answer(ranker: Any, client: RankingClient, user: Given, items: Given) -> None:
    client.rank(user, items)
    deploy(ranker, 4)
    for _ in range(3):
        client.rank(user, items)
    assert ranker.metadata_requests == 2
    for version in (3, 4, 3, 4):  # two versions behind one address: both are known by now
        ranker.version = version
        client.rank(user, items)
    assert ranker.metadata_requests == 2


def test_a_version_of_other_types_is_noticed(ranker: Any, client: RankingClient, user: Given, items: Given) -> None:
    client.rank(user, items)
    deploy(ranker, 4, hour=(tf.string, [], False))
    with pytest.raises(FeatureError, match="'hour' is 21 .*the model takes strings"):
        client.rank(user, items)  # sent as int64, and answered from version 4
        client.rank(user, items)
    client.rank(user | {"hour": "21"}, items)
    assert ranker.arrays()["hour"].tolist() == [b"21"]


def test_a_model_with_one_feature_less_refuses_and_is_asked_again(
    ranker: Any, client: RankingClient, user: Given, items: Given
) -> None:
    client.rank(user, items)
    deploy(ranker, 4, hour=None)
    with pytest.raises(FeatureError, match="'hour' is no feature of the model"):
        client.rank(user, items)
    del user["hour"]
    client.rank(user, items)
    assert len(ranker.requests) == 3


def test_a_feature_of_a_newer_model_is_taken_at_once(
    ranker: Any, client: RankingClient, user: Given, items: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stem_client.calls._MISFIT_SECONDS", 0.0)
    client.rank(user, items)
    deploy(ranker, 4, country=(tf.string, [], False))
    client.rank(user | {"country": "FR"}, items)
    assert ranker.arrays()["country"].tolist() == [b"FR"] and len(ranker.requests) == 2


def test_a_wrong_caller_does_not_ask_the_server_every_time(
    ranker: Any, client: RankingClient, user: Given, items: Given
) -> None:
    for _ in range(50):
        with pytest.raises(FeatureError):
            client.rank(user | {"hours": 1}, items)
    assert ranker.metadata_requests < 10


def test_the_servers_own_error_comes_through_when_features_did_fit(
    ranker: Any, client: RankingClient, user: Given, items: Given
) -> None:
    ranker.faults.append((grpc.StatusCode.INVALID_ARGUMENT, "tensor parsing error: f0"))
    with pytest.raises(RankingError) as caught:
        client.rank(user, items)
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details == "tensor parsing error: f0" and len(ranker.requests) == 1


def test_a_version_of_ones_own_choice(ranker: Any, client: RankingClient, user: Given, items: Given) -> None:
    client.rank(user, items, version=3)
    assert ranker.requests[0].model_spec.version.value == 3
    with pytest.raises(RankingError) as caught:
        client.rank(user, items, version=99)
    assert caught.value.code == grpc.StatusCode.NOT_FOUND
    assert caught.value.details == "Servable not found for request: Specific(ranker, 99)"


def test_a_version_by_its_label(ranker: Any, target: str, make: Any, user: Given, items: Given) -> None:
    with make(target, label="stable", timeout=20, chunk_rows=1) as client:
        client.rank(user, items)  # in chunks, all of the version that answered the first
        specs = [request.model_spec for request in ranker.requests]
        assert specs[0].version_label == "stable" and {spec.version.value for spec in specs[1:]} == {3}
        client.rank(user, items, version=3)
        assert ranker.requests[-1].model_spec.WhichOneof("version_choice") == "version"
        deploy(ranker, 4)
        ranker.labels = {"stable": 4}
        client.rank(user, items)
        assert client.metadata().version == 4
    with make(target, label="nope", timeout=20) as client, pytest.raises(RankingError) as caught:
        client.rank(user, items)
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT and "label: nope" in str(caught.value)
    with pytest.raises(ValueError, match="label is ''"):
        RankingClient(target, label="")


def test_a_model_without_the_signature(client: RankingClient, user: Given, items: Given, ranker: Any) -> None:
    definition = copy.copy(ranker.signature)

    def without_rank(name: str) -> Any:
        found = definition("serving_default")
        if name == "rank":
            del found.inputs["hour"]
        return found

    ranker.signature = without_rank
    with pytest.raises(RankingError, match="model 'ranker' version 3 takes other features for 'rank'"):
        client.rank(user, items)


def test_other_models_metadata(target: str) -> None:
    with RankingClient(target, model="nope", timeout=20) as client, pytest.raises(RankingError) as caught:
        client.metadata()
    assert caught.value.code == grpc.StatusCode.NOT_FOUND
    expected = (
        f"metadata of model 'nope' at {target}, 2 attempts: NOT_FOUND: Servable not found for request: Latest(nope)"
    )
    assert str(caught.value) == expected


def test_one_channel_is_used_again(ranker: Any, client: RankingClient, user: Given, items: Given) -> None:
    for _ in range(5):
        client.rank(user, items)
    assert len(ranker.requests) == 5 and len(ranker.peers) == 1


def test_works_without_pandas(target: str) -> None:
    code = f"""
import sys
sys.modules["pandas"] = None
import numpy
from stem_client import RankingClient
with RankingClient({target!r}, timeout=20) as client:
    user = dict(user_id=None, interests=[], taste=numpy.zeros(3), hour=1)
    items = dict(video_id=[1], title=["a"], topics=[[1]], seconds=numpy.ones(1), image=numpy.ones((1, 2)))
    print(client.rank(user, items)["like"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[1.]", done.stderr
