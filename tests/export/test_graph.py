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

from export import check, graph, vocabulary_asset
from pipelines import schema as schemas
from pipelines import vocabulary

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
        "history": np.zeros([1, 0], np.int64),
        "hour": np.array([INT_EMPTY]),
        "weekend": np.array([INT_EMPTY]),
        "temperature": np.array([np.nan], np.float32),
        "item": np.array([INT_EMPTY]),
        "never_twice": [b""],
        "never_again": np.array([INT_EMPTY]),
        "tags": np.array([[b""]], object),
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
    expected = [[tf.sigmoid(outputs["click"])[0], outputs["watched"][0] * scale.std + scale.mean]]
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
        {"history": np.full([1, 5], INT_EMPTY)},
        {"tags": np.zeros([1, 0], object)},
    ],
    ids=str,
)
def test_what_training_never_saw_counts_as_missing(serving: tuple[graph.ServingModule, Any], change: Any) -> None:
    module, _ = serving
    if "tags" in change:
        change = {"tags": tf.zeros([1, 0], tf.string)}
    np.testing.assert_array_equal(score(module, row(**change)), score(module, row()))


@pytest.mark.parametrize(
    "change", [{"user": [b"two\nlines"]}, {"item": np.array([2**40])}, {"length": np.array([9.0], np.float32)}], ids=str
)
def test_what_training_saw_does_not(serving: tuple[graph.ServingModule, Any], change: Any) -> None:
    module, _ = serving
    assert np.abs(score(module, row(**change)) - score(module, row())).max() > 1e-4


def test_bags_drop_empty_values_then_keep_the_first(serving: tuple[graph.ServingModule, Any]) -> None:
    module, _ = serving
    e = INT_EMPTY
    expected = score(module, row(history=np.array([[1, 2, 77]])))
    for history in ([e, 1, 2, e, 77], [1, 2, 77, 3, 4], [e, e, 1, 2, 77, e, 3]):
        np.testing.assert_array_equal(score(module, row(history=np.array([history]))), expected)
    assert np.abs(score(module, row(history=np.array([[1, 2]]))) - expected).max() > 1e-5  # the unseen 77 is in the bag
    tags = [[b"", b"plain", b"", b"it's", b"plain"], [b"plain", b"it's", b"", b"", b""]]
    scores = [score(module, row(tags=np.array([t], object))) for t in tags]
    np.testing.assert_array_equal(scores[0], scores[1])


def ranked(requests: int, candidates: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Random tensors of `rank`, and of `serving_default` for the same rows."""
    random = np.random.default_rng(1)
    users = {
        "user": random.choice([b"plain", b"two\nlines", b"new"], requests).astype(object),
        "age": random.uniform(10, 70, requests).astype(np.float32),
        "history": random.integers(0, 5, [requests, 4]),
        "hour": random.integers(0, 24, requests),
        "weekend": random.integers(0, 2, requests),
        "temperature": random.normal(20, 5, requests).astype(np.float32),
    }
    shape = (requests, candidates)
    items = {
        "item": random.integers(-1, 2, shape),
        "never_twice": np.full(shape, b"x", object),
        "never_again": random.integers(0, 9, shape),
        "tags": random.choice([b"plain", b"it's", b""], (*shape, 3)).astype(object),
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
    examples = tf.constant(check.examples(rows), tf.string)
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


@pytest.mark.parametrize(("sides", "why"), [("iii", "no user or context"), ("ucu", "no item features"), ("uci", "")])
def test_models_without_a_ranking(sides: str, why: str) -> None:
    names = {"i": "item", "u": "user", "c": "context"}
    features = "".join(f"  f{n}: {{kind: numeric, side: {names[side]}}}\n" for n, side in enumerate(sides))
    schema = schemas.loads(f"name: x\nfeatures:\n{features}tasks:\n  t: {{label: {{column: y}}}}\n")
    found = graph.why_no_rank(schema)
    assert why in found and bool(why) == bool(found)
