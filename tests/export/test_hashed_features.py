"""Features with hashes from the log to the exported graph: raw values that train never saw score as the trainer's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from export import check, exporter, hashed_ids
from pipelines import hashed_ids as conversion
from pipelines.batches.dataset import read_batches
from pipelines.manifest import INPUT_FORMATS, Hashed
from pipelines.schema import Hash
from pipelines.vocabulary import RARE_ID
from stem_tf.models.ranking_model import RankingModel

SCHEMA = """
name: hashed
group: user
task_tables: [user, tags]
features:
  user: {kind: categorical, side: user, dtype: string, hash: {buckets: 30, hashes: 2}}
  once: {kind: categorical, side: user, column: user, dtype: string, dim: 6, hash: {buckets: 10}}
  history: {kind: multivalent, side: user, dtype: int64, max_length: 3, hash: {buckets: 7}}
  hour: {kind: categorical, side: context, dtype: int64, hash: {buckets: 10, hashes: 2}}
  item: {kind: categorical, side: item, dtype: int64, hash: {buckets: 1000000, hashes: 2}}
  tags: {kind: multivalent, side: item, dtype: string, separator: "|", max_length: 2, hash: {buckets: 9, hashes: 2}}
  looked_up: {kind: categorical, side: item, column: item, dtype: int64}
  length: {kind: numeric, side: item, transform: [log1p, standardise]}
tasks:
  click: {label: {column: clicked}}
  watched: {type: regression, label: {column: seconds, standardise: true, missing: outside}}
"""


@pytest.fixture(scope="module")
def run(nasty_data: Path, convert: Callable[..., Path], train: Callable[..., Any]) -> Any:
    data = convert(SCHEMA, pq.read_table(nasty_data.parent / "log.parquet"), "--layouts=blocks,rows")
    return train(data, **{"optimizer.tables": "deferred", "model.task_features": "schema"})


@pytest.mark.parametrize("by", [Hash(2), Hash(1000, 2), Hash(2**31 - 3, 2)])
def test_the_graph_computes_the_ids_of_conversion(by: Hash, nasty_values: list[str]) -> None:
    random = np.random.default_rng(0)
    integers = [*random.integers(-(2**63) + 1, 2**63 - 1, 200).tolist(), 0, 1, -1, 2**63 - 1, None]
    texts = [*nasty_values, *("é" * length for length in range(1, 80)), None]
    for values, kind, empty in ((integers, pa.int64(), -(2**63)), (texts, pa.string(), "")):
        expected = conversion.ids(conversion.codes(pa.array(values, kind)), by)
        graph = hashed_ids.ids(tf.constant([empty if value is None else value for value in values]), by)
        np.testing.assert_array_equal(np.reshape(graph, -1), expected)


def test_every_input_format_has_the_same_ids(run: Any) -> None:
    found = []
    for layout in INPUT_FORMATS:
        batches = list(read_batches(run.manifest, "validation", batch_size=64, input_format=layout, training=False))
        names = batches[0]["features"]
        found.append({name: np.concatenate([batch["features"][name] for batch in batches]) for name in names})
        for name, values in found[0].items():
            np.testing.assert_array_equal(found[-1][name], values)
    assert {name: values.shape[1:] for name, values in found[0].items()} == {
        "user": (2,),
        "once": (),
        "history": (3,),
        "hour": (2,),
        "item": (2,),
        "tags": (4,),
        "looked_up": (),
        "length": (),
    }
    hours = found[0]["hour"][: run.manifest.rows("validation")]  # the last batch is padded
    missing = hours[:, 0] == RARE_ID
    assert missing.any() and not hours[missing, 1].any() and hours[~missing].min() >= 2


def test_the_manifest_has_buckets_hash_and_an_estimate(run: Any, nasty_values: list[str]) -> None:
    manifest = run.manifest
    assert manifest.hashed["user"] == Hashed(30, 2, "farmhash64", len(nasty_values))
    assert manifest.hashed["history"] == Hashed(7, 1, "splitmix64", 3)
    assert [*manifest.vocabularies] == ["looked_up"] and not Path(manifest.vocabulary_path("user")).exists()
    assert (manifest.num_ids("user"), manifest.num_ids("item")) == (32, 1_000_002)
    assert manifest.splits["train"].rare_share["user"] == 0 < manifest.splits["train"].rare_share["hour"] < 0.2


def _trainers(model: RankingModel, raw: dict[str, Any], numbers: dict[str, Any]) -> dict[str, np.ndarray]:
    """Scores of the trained model on ids that conversion computes from raw values, lists already cut."""
    features = {}
    for feature in model.inputs.features:
        values = raw[feature.name]
        if feature.hash is None:
            features[feature.name] = tf.constant(numbers[feature.name])
            continue
        flat = pa.array(np.concatenate(values) if feature.kind == "multivalent" else values, from_pandas=True)
        ids = conversion.ids(conversion.codes(flat), feature.hash)
        if feature.kind == "categorical":
            features[feature.name] = tf.constant(ids.reshape(-1, 2) if feature.hash.hashes == 2 else ids)
        else:
            lengths = [feature.hash.hashes * len(row) for row in values]
            width = feature.hash.hashes * feature.max_length
            features[feature.name] = tf.RaggedTensor.from_row_lengths(ids, lengths).to_tensor(shape=[None, width])
    return {task: scores.numpy() for task, scores in model.scores(model(features)).items()}


def test_raw_values_that_train_never_saw(run: Any, tmp_path: Path) -> None:
    version, tree = run.export(tmp_path / "models")
    assert max(tree["check"]["worst"].values()) < 1e-5
    assert [*tree["vocabularies"]] == ["looked_up"]
    assert tree["schema"]["features"][0]["hash"] == {"buckets": 30, "hashes": 2}
    names = {f["name"] for f in exporter.features(run.manifest.schema)}
    card = (version / "card.md").read_text()
    assert "hashed into 1,000,000 rows" in card and "An unseen value of user, once, history, hour, item, tags" in card
    raw: dict[str, list[Any]] = {
        "user": ["new-1", "ünseen 🦊", "x" * 200, "plain"],
        "history": [[10**18, -5, 7], [123_456_789], [8, 9], [0, 1, 2]],
        "hour": [24, None, -(10**12), 3],
        "item": [2**62 + 1, 77, 78, None],
        "tags": [["a new tag"], ["other", "x\ny"], ["third", "fourth"], ["plain", "unseen"]],
        "looked_up": [2**62 + 1, 77, 78, None],
        "length": [1.0, 10.0, 100.0, 1000.0],
    }
    raw["once"] = raw["user"]
    assert raw.keys() == names
    numbers = {"looked_up": np.full(4, RARE_ID, np.int32), "length": np.array(raw["length"], np.float32)}
    expected = _trainers(run.model(), raw, numbers)
    tensors = {
        "user": np.array(raw["user"]),
        "once": np.array(raw["user"]),
        "history": np.array([[*row, *[-(2**63)] * (3 - len(row))] for row in raw["history"]]),
        "hour": np.array([-(2**63) if hour is None else hour for hour in raw["hour"]]),
        "item": np.array([-(2**63) if item is None else item for item in raw["item"]]),
        "looked_up": np.array([-(2**63) if item is None else item for item in raw["item"]]),
        "tags": np.array([[*row, *[""] * (2 - len(row))] for row in raw["tags"]]),
        "length": numbers["length"],
    }
    calls = check.load(str(version))
    served = calls["serving_default"](tensors)
    for row in range(4):
        once = {"user", "once", "history", "hour"}
        request = {n: values[row : row + 1] if n in once else values[np.newaxis] for n, values in tensors.items()}
        ranked = calls["rank"](request)
        for task, scores in expected.items():
            np.testing.assert_allclose(ranked[task][0, row], scores[row], rtol=1e-5)
    for task, scores in expected.items():
        assert np.std(scores) > 1e-4
        np.testing.assert_allclose(served[task], scores, rtol=1e-5)
