"""Rows that count with weights: predictions, metrics and trivial answers of converted data, against scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics

from pipelines import schema_yaml
from pipelines.convert.conversion import convert
from pipelines.convert.options import Options
from stem_tf import configs, models, report
from stem_tf.evaluation import evaluator, predictions, scoring, standing, table, trivial

SCHEMA = """
name: weighted
group: user
item: item
features:
  user: {kind: categorical, side: user, dtype: int64}
tasks:
  click: {label: {column: rating, at_least: 4}, weight: worth}
  plain: {label: {column: rating, at_least: 4}}
  rating: {type: regression, label: {column: rating, standardise: true}, row_weight: worth}
"""


@pytest.mark.parametrize("input_format", ["blocks", "rows", "parquet"])
def test_evaluation_is_that_of_scikit_learn(tmp_path: Path, tiny_settings: dict[str, Any], input_format: str) -> None:
    random, rows = np.random.default_rng(0), 600
    log = pa.table(
        {
            "user": random.integers(8, size=rows),
            "item": random.integers(9, size=rows),
            "rating": random.integers(1, 6, rows),
            "worth": random.choice([0, 0.5, 2, 3], rows),
        }
    )
    pq.write_table(log, tmp_path / "log.parquet")
    manifest = convert(
        Options(schema_yaml.loads(SCHEMA), str(tmp_path / "data"), str(tmp_path / "log.parquet"), split="random")
    )
    config = configs.checked(
        tiny_settings | {"data.dir": manifest.data_dir, "model.init_std": 1.0, "data.input_format": input_format}
    )
    got = scoring.predict(models.build(config, manifest, training=False), manifest, "test", config.data, desc="x")
    results = predictions.evaluate(got, manifest)
    answers = trivial.TrivialAnswers(trivial.fit(manifest, config.data), manifest.schema.tasks)
    by_item = trivial.compare(manifest.schema.tasks, got, answers.scores("item", got))
    predictions.write(tmp_path / "test.parquet", manifest, "test", got)
    frame, written = log.take(pa.array(got.row_id)).to_pandas(), pq.read_table(tmp_path / "test.parquet")
    assert written.column_names == ["row_id", "user"] + [
        *("label_click", "weight_click", "score_click"),
        *("label_plain", "score_plain"),
        *("label_rating", "weight_rating", "score_rating"),
    ]
    np.testing.assert_array_equal(written["weight_click"], frame["worth"])
    assert written["label_click"].null_count == (frame["worth"] == 0).sum() and not written["label_plain"].null_count
    y = frame["rating"] >= 4
    for task, weights in (("click", frame["worth"]), ("plain", np.ones(len(y)))):
        expected = sklearn.metrics.roc_auc_score(y, got.scores[task], sample_weight=weights)
        assert results[task]["auc"] == pytest.approx(expected, abs=1e-12)
        assert results[task]["rate"] == pytest.approx(np.average(y, weights=weights), abs=1e-12)
        assert manifest.task_rate("test", task) == pytest.approx(results[task]["rate"], abs=1e-12)
    wide = got.scores["rating"].astype(np.float64)
    expected = sklearn.metrics.mean_squared_error(frame["rating"], wide, sample_weight=frame["worth"])
    assert results["rating"]["mse"] == pytest.approx(expected, rel=1e-9)
    train = log.to_pandas().drop(index=_held_out(manifest.data_dir))
    mean = np.average(train["rating"], weights=train["worth"])
    weight = train["worth"][train["worth"] > 0].mean() * trivial.PRIOR_ROWS
    sums = train.assign(product=train["rating"] * train["worth"]).groupby("item")[["product", "worth"]].sum()
    means = (sums["product"] + weight * mean) / (sums["worth"] + weight)
    expected = sklearn.metrics.mean_squared_error(
        frame["rating"], means[frame["item"]].to_numpy(), sample_weight=frame["worth"]
    )
    assert by_item["rating"] == pytest.approx(expected, rel=1e-6)
    scores = {name: answers.scores(answer, got) for answer, name in standing.answers_of(manifest.schema).items()}
    results, tree = evaluator.measured(got, manifest, scores, {}, 10, standing.drawn_again(got))
    assert tree["tasks"]["rating"]["trivial"]["item"] == by_item["rating"]
    weights = got.weights_of("click")
    inside = weights > 0
    predicted, observed = (np.average(values[inside], weights=weights[inside]) for values in (got.scores["click"], y))
    assert tree["tasks"]["click"]["predicted_over_observed"] == pytest.approx(predicted / observed, rel=1e-6)
    assert tree["tasks"]["click"]["row_weight"] == "worth"
    text = table.tables(report.finite(tree | {"slices": [], "ranking": None}), manifest.schema)
    assert text.endswith("rows count with weights: click by worth, rating by worth")


def _held_out(data_dir: str) -> list[int]:
    """row_ids of validation and test."""
    parts = [pq.read_table(Path(data_dir) / "raw" / split, columns=["row_id"]) for split in ("validation", "test")]
    return pa.concat_tables(parts)["row_id"].to_pylist()
