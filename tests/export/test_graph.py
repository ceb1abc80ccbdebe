"""The serving graph, called eagerly: what every kind of value becomes, and that a ranking is its rows' scores."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from export import check, graph, raw, vocabulary_asset
from pipelines import schema_yaml, vocabulary
from stem_client import features as client_features
from stem_client.metadata import Feature

INT_EMPTY = -(2**63)
ITEMS = ("item", "never_twice", "never_again", "tags", "length", "image")


@pytest.fixture(scope="module")
def serving(
    nasty_run: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[graph.ServingModule, Any]:
    """The serving module of the float32 run, and its model."""
    run = nasty_run("float32")
    model, manifest = run.model(), run.manifest
    directory, paths = tmp_path_factory.mktemp("assets"), {}
    for name in manifest.vocabularies:
        paths[name] = directory / name
        vocabulary_asset.write(vocabulary.load(manifest.vocabulary_path(name))["value"], paths[name])
    return graph.ServingModule(manifest.schema, model, paths), model


def row(**changes: Any) -> dict[str, np.ndarray]:
    """One row of `serving_default`; what is not given is empty."""
    values: dict[str, Any] = {
        "user": [b""],
        "age": np.array([np.nan], np.float32),
        "history": np.full([1, 3], INT_EMPTY),
        "hour": np.array([INT_EMPTY]),
        "weekend": np.array([INT_EMPTY]),
        "temperature": np.array([np.nan], np.float32),
        "item": np.array([INT_EMPTY]),
        "never_twice": [b""],
        "never_again": np.array([INT_EMPTY]),
        "tags": np.array([[b"", b""]], object),
        "length": np.array([np.nan], np.float32),
        "image": np.array([[np.nan] * 3], np.float32),
    }
    return values | changes


def score(module: graph.ServingModule, raw: dict[str, Any]) -> np.ndarray:
    """[B, T]."""
    return np.stack(list(module.score({name: tf.constant(x) for name, x in raw.items()}).values()), axis=1)


def test_what_is_missing_scores_as_rare_ids_and_train_means(serving: tuple[graph.ServingModule, Any]) -> None:
    module, model = serving
    rare = {name: tf.constant([1]) for name in ("user", "hour", "weekend", "item", "never_twice", "never_again")}
    floats = {"age": [np.nan], "temperature": [np.nan], "length": [np.nan], "image": [[0.0, 0.0, 0.0]]}
    bags = {"history": tf.zeros([1, 3], tf.int32), "tags": tf.zeros([1, 2], tf.int32)}
    outputs = model(rare | bags | {name: tf.constant(x, tf.float32) for name, x in floats.items()})
    scale = model.scales["watched"]  # of its standardised label
    click, watched = tf.sigmoid(outputs["click"])[0], outputs["watched"][0] * scale.std + scale.mean
    expected = [[click, watched, click**2 * np.log1p(10) + 0.001 * 20 * watched]]  # the formula's defaults
    np.testing.assert_allclose(score(module, row()), expected, rtol=1e-6)
    empty = module.score_examples({"examples": tf.constant([tf.train.Example().SerializeToString()])})
    np.testing.assert_array_equal(np.stack(list(empty.values()), axis=1), score(module, row()))


@pytest.mark.parametrize(
    "change",
    [
        {"user": [b"never seen"]},
        {"user": [b"\xff"]},
        {"item": np.array([77])},
        {"hour": np.array([-(2**63) + 5])},
        {"weekend": np.array([2])},
        {"never_again": np.array([3])},
        {"temperature": np.array([np.inf], np.float32)},
        {"length": np.array([-1.0], np.float32)},
        {"length": np.array([-np.inf], np.float32)},
        {"age": np.array([np.inf], np.float32)},
        {"image": np.array([[0.0, np.inf, np.nan]], np.float32)},
    ],
    ids=str,
)
def test_what_training_never_saw_counts_as_missing(serving: tuple[graph.ServingModule, Any], change: Any) -> None:
    module, _ = serving
    np.testing.assert_array_equal(score(module, row(**change)), score(module, row()))


@pytest.mark.parametrize(
    "change", [{"user": [b"two\nlines"]}, {"item": np.array([2**40])}, {"length": np.array([9.0], np.float32)}], ids=str
)
def test_what_training_saw_does_not(serving: tuple[graph.ServingModule, Any], change: Any) -> None:
    module, _ = serving
    assert np.abs(score(module, row(**change)) - score(module, row())).max() > 1e-4


def by_example(module: graph.ServingModule, **changes: Any) -> np.ndarray:
    """[1, T], of a tf.Example, whose lists have any length."""
    example = tf.train.Example()
    for name, values in changes.items():
        kind = "bytes_list" if isinstance(values[0], bytes) else "int64_list"
        getattr(example.features.feature[name], kind).value.extend(values)
    scores = module.score_examples({"examples": tf.constant([example.SerializeToString()])})
    return np.stack(list(scores.values()), axis=1)


def test_bags_drop_empty_values_then_keep_the_first(serving: tuple[graph.ServingModule, Any]) -> None:
    module, _ = serving
    e = INT_EMPTY
    expected = score(module, row(history=np.array([[1, 2, 77]])))
    for history in ([e, 1, 2, e, 77], [1, 2, 77, 3, 4], [e, e, 1, 2, 77, e, 3]):
        np.testing.assert_array_equal(by_example(module, history=history), expected)
    assert np.abs(score(module, row(history=np.array([[1, 2, e]]))) - expected).max() > 1e-5  # 77 is in the bag
    np.testing.assert_array_equal(
        score(module, row(history=np.array([[e, 1, 2]]))), score(module, row(history=np.array([[1, 2, e]])))
    )
    tags = [[b"", b"plain", b"", b"it's", b"plain"], [b"plain", b"it's", b"", b"", b""]]
    scores = [by_example(module, tags=t) for t in tags]
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_array_equal(scores[0], score(module, row(tags=np.array([[b"plain", b"it's"]], object))))


def ranked(requests: int, candidates: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Random tensors of `rank`, and of `serving_default` for the same rows."""
    random = np.random.default_rng(1)
    users = {
        "user": random.choice([b"plain", b"two\nlines", b"new"], requests).astype(object),
        "age": random.uniform(10, 70, requests).astype(np.float32),
        "history": random.integers(0, 5, [requests, 3]),
        "hour": random.integers(0, 24, requests),
        "weekend": random.integers(0, 2, requests),
        "temperature": random.normal(20, 5, requests).astype(np.float32),
    }
    shape = (requests, candidates)
    items = {
        "item": random.integers(-1, 2, shape),
        "never_twice": np.full(shape, b"x", object),
        "never_again": random.integers(0, 9, shape),
        "tags": random.choice([b"plain", b"it's", b""], (*shape, 2)).astype(object),
        "length": random.uniform(0, 1e5, shape).astype(np.float32),
        "image": random.normal(size=(*shape, 3)).astype(np.float32),
    }
    rows = {name: np.repeat(x, candidates, axis=0) for name, x in users.items()}
    rows |= {name: x.reshape(-1, *x.shape[2:]) for name, x in items.items()}
    return users | items, rows


def tensors(raw: dict[str, np.ndarray]) -> dict[str, tf.Tensor]:
    return {name: tf.constant(x, tf.string if x.dtype == object else None) for name, x in raw.items()}


def test_a_signature_looks_up_once_a_vocabulary_and_gathers_once_a_table(
    serving: tuple[graph.ServingModule, Any], tmp_path: Path
) -> None:
    module, model = serving
    module.save(tmp_path / "saved")
    saved = saved_model_pb2.SavedModel.FromString((tmp_path / "saved" / "saved_model.pb").read_bytes())
    functions = {
        function.signature.name.removeprefix("__inference_").rpartition("_")[0]: collections.Counter(
            node.op for node in function.node_def
        )
        for function in saved.meta_graphs[0].graph_def.library.function
    }
    packed = sum(group.rows > 0 for group in model.embeddings.groups)
    for name, sides in (("score", 1), ("score_examples", 1), ("rank", 2)):
        ops = functions[name]
        assert ops["LookupTableFindV2"] == len(module.tables) == 8
        # User and context features have no bag of the item's width, and so on: not every side reads every table.
        assert packed <= ops["ResourceGather"] <= sides * packed
        # Nothing of training: no search for distinct rows, no dropout, no moments of batch norm.
        assert not [op for op in ops if "Unique" in op or "Random" in op or "Assign" in op or "Moments" in op]


def test_features_of_one_vocabulary_share_its_lookup(serving: tuple[graph.ServingModule, Any], tmp_path: Path) -> None:
    schema, paths = serving[0]._schema(), {name: tmp_path / name for name in ("hour", "item", "tags")}
    for name, values in (("hour", [5, 7]), ("item", [5, 7]), ("tags", [b"5", b"7"])):
        vocabulary_asset.write(pa.chunked_array([values]), paths[name])
    module = graph.ServingModule(schema, serving[1], paths)
    assert len(module.tables) == 2
    raw = {
        "hour": tf.constant([7, 5, 9], tf.int64),
        "item": tf.constant([[5], [7]], tf.int64),
        "tags": tf.constant([b"7"]),
    }
    found = {name: ids.numpy().tolist() for name, ids in module._ids(raw).items()}
    assert found == {"hour": [3, 2, 1], "item": [[2], [3]], "tags": [3]}


def test_a_ranking_is_the_scores_of_its_rows(serving: tuple[graph.ServingModule, Any]) -> None:
    module, _ = serving
    request, rows = ranked(3, 4)
    scores, alone = module.rank(tensors(request)), module.score(tensors(rows))
    for task, values in scores.items():
        assert values.shape == (3, 4) and values.dtype == tf.float32
        assert np.std(values) > 1e-3
        np.testing.assert_allclose(tf.reshape(values, [-1]), alone[task], rtol=2e-6)


@pytest.mark.parametrize(("requests", "candidates"), [(0, 0), (0, 3), (2, 0), (1, 1)])
def test_rankings_of_nothing(serving: tuple[graph.ServingModule, Any], requests: int, candidates: int) -> None:
    module, _ = serving
    request, rows = ranked(requests, candidates)
    assert {tuple(s.shape) for s in module.rank(tensors(request)).values()} == {(requests, candidates)}
    assert {tuple(s.shape) for s in module.score(tensors(rows)).values()} == {(requests * candidates,)}
    examples = tf.constant(raw.examples(rows), tf.string)
    assert {tuple(s.shape) for s in module.score_examples({"examples": examples}).values()} == {(len(examples),)}


def test_features_that_differ_in_size_are_named(serving: tuple[graph.ServingModule, Any]) -> None:
    module, _ = serving
    request, rows = tensors(ranked(2, 4)[0]), tensors(ranked(2, 4)[1])
    with pytest.raises(tf.errors.InvalidArgumentError, match="differ in their number of requests.*hour"):
        module.rank(request | {"hour": request["hour"][:1]})
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"differ in their number of candidates \(item"):
        module.rank(request | {"length": request["length"][:, :3]})
    # As many rows in all, yet not 2 requests of 4.
    with pytest.raises(tf.errors.InvalidArgumentError, match="differ in their number of requests"):
        module.rank(request | {name: tf.stack([*request[name][0], *request[name][1]])[None] for name in ITEMS})
    with pytest.raises(tf.errors.InvalidArgumentError, match="differ in their number of rows"):
        module.score(rows | {"hour": rows["hour"][:1]})


@pytest.fixture(scope="module")
def sessions(serving: tuple[graph.ServingModule, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The signatures as servers run them: calls of a TF1 session that hold no request to a placeholder's shape."""
    directory = tmp_path_factory.mktemp("served") / "1"
    serving[0].save(directory)
    calls: dict[str, Any] = dict(check.load(str(directory)))
    saved = saved_model_pb2.SavedModel.FromString((directory / "saved_model.pb").read_bytes())
    return calls | {"definitions": saved.meta_graphs[0].signature_def}


def test_the_shapes_that_are_published(sessions: dict[str, Any]) -> None:
    def shapes(infos: Any) -> dict[str, list[int]]:
        return {name: [dim.size for dim in info.tensor_shape.dim] for name, info in infos.items()}

    rank, default = (sessions["definitions"][key] for key in ("rank", "serving_default"))
    found = shapes(default.inputs)
    assert found == {name: [-1] for name in found} | {"history": [-1, 3], "tags": [-1, 2], "image": [-1, 3]}
    items = {name: [-1, -1] for name in ITEMS} | {"tags": [-1, -1, 2], "image": [-1, -1, 3]}
    assert shapes(rank.inputs) == found | items
    names = ("click", "watched", "ranking_score")
    assert shapes(rank.outputs) == dict.fromkeys(names, [-1, -1])
    assert shapes(default.outputs) == dict.fromkeys(names, [-1])
    assert shapes(sessions["definitions"]["examples"].inputs) == {"examples": [-1]}


@pytest.mark.parametrize("key", ["serving_default", "rank"])
@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("history", 2, r"history should have shape \[B, 3\]: a list is padded with the empty value \(-9223372036"),
        ("history", 0, r"feature history should have shape \[B, 3\]"),
        ("tags", 3, r"tags should have shape \[B, (N, )?2\]: a list is .* the empty value \(an empty string\) to 2"),
        ("image", 4, r"feature image should have shape \[B, (N, )?3\]: a vector has 3 elements"),
        ("hour", None, r"feature hour should have shape \[B\].*axes sent:\] \[[23]"),
        ("tags", None, r"feature tags should have shape \[B, (N, )?2\]"),
    ],
)
def test_other_shapes_are_refused_by_name(
    sessions: dict[str, Any], key: str, name: str, size: int | None, words: str
) -> None:
    raw = ranked(2, 4)[0 if key == "rank" else 1]
    sessions[key](raw)
    x = raw[name]
    # Another inner size, or (None) one axis too many.
    wrong = np.resize(x, (*x.shape[:-1], size)) if size is not None else x[..., np.newaxis]
    with pytest.raises(tf.errors.InvalidArgumentError, match=words) as caught:
        sessions[key](raw | {name: wrong})
    assert "weekend" not in caught.value.message
    sessions[key](raw)


def joined(requests: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One request of several, as TensorFlow Serving joins them under ``pad_variable_length_inputs``.

    Shorter axes are filled up with the first value of their tensor, along every axis but the first.
    """
    result = {}
    for name in requests[0]:
        parts = [request[name] for request in requests]
        sizes = np.max([part.shape[1:] for part in parts], axis=0, initial=0)
        pads = [[(0, 0), *((0, most - size) for most, size in zip(sizes, p.shape[1:], strict=True))] for p in parts]
        parts = [np.pad(part, pad, constant_values=part.flat[0]) for part, pad in zip(parts, pads, strict=True)]
        result[name] = np.concatenate(parts)
    return result


def test_requests_that_a_server_joins_keep_their_scores(sessions: dict[str, Any]) -> None:
    features = (
        Feature("history", "int64", "list", 3, False),
        Feature("tags", "string", "list", 2, True),
        *(Feature(n, "string" if n == "never_twice" else "int64", "value", None, True) for n in ITEMS[:3]),
    )
    requests = []
    for candidates, history, tags in ((3, [1, 2], [b"plain"]), (7, [3], [b"it's", b"plain", b"plain"]), (1, [], [])):
        values, _ = ranked(1, candidates)
        user: dict[str, Any] = {"history": history}
        items: dict[str, Any] = {name: values[name][0] for name in ITEMS[:3]} | {"tags": [tags] * candidates}
        requests.append(values | client_features.rank(features, user, items)[1])
    whole = sessions["rank"](joined(requests))
    for place, request in enumerate(requests):
        count = request["item"].shape[1]
        for task, scores in sessions["rank"](request).items():
            assert whole[task].shape == (3, 7) and scores.shape == (1, count)
            np.testing.assert_allclose(whole[task][place, :count], scores[0], rtol=2e-6)
    # It would be other scores, were lists filled up by the server.
    shorter = requests[0] | {"history": requests[0]["history"][:, :2]}
    assert joined([shorter, requests[1]])["history"].tolist()[0] == [1, 2, 1]


@pytest.mark.parametrize(("sides", "why"), [("iii", "no user or context"), ("ucu", "no item features"), ("uci", "")])
def test_models_without_a_ranking(sides: str, why: str) -> None:
    names = {"i": "item", "u": "user", "c": "context"}
    features = "".join(f"  f{n}: {{kind: numeric, side: {names[side]}}}\n" for n, side in enumerate(sides))
    schema = schema_yaml.loads(f"name: x\nfeatures:\n{features}tasks:\n  t: {{label: {{column: y}}}}\n")
    found = graph.why_no_rank(schema)
    assert why in found and bool(why) == bool(found)
