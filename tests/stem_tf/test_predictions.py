"""Scores of a split: every row once, in order, whatever the steps an execution; and beside the raw rows in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines import manifest as manifests
from pipelines.batches.dataset import read_batches
from pipelines.manifest import Manifest
from stem_tf import configs, models
from stem_tf.evaluation import predictions, scoring
from stem_tf.models.predictor import Predictor
from stem_util.errors import UserError


@pytest.fixture(scope="module", params=[1, 2], ids=["step", "two_steps"])
def made(request: pytest.FixtureRequest, tiny_settings: dict[str, Any]) -> tuple[Predictor, Manifest, Any]:
    """150 rows are three batches of 64, the last one padded."""
    config = configs.checked(tiny_settings | {"train.steps_per_execution": request.param})
    manifest = manifests.load(config.data.dir)
    return models.build(config, manifest, training=False), manifest, config.data


def test_every_row_once_in_order(made: tuple[Predictor, Manifest, Any]) -> None:
    model, manifest, data = made
    got = scoring.predict(model, manifest, "test", data, desc="test")
    rows: dict[str, Any] = {"row_id": got.row_id, "group": got.group, "item": got.item}
    batches = list(read_batches(manifest, "test", batch_size=150, training=False).as_numpy_iterator())
    for name, values in rows.items():
        np.testing.assert_array_equal(values, batches[0][name])
    for task in ("click", "watched"):
        inside = batches[0]["weights"][task] == 1
        np.testing.assert_array_equal(~np.isnan(got.labels[task]), inside)
        np.testing.assert_array_equal(got.labels[task][inside], batches[0]["labels"][task][inside])
        expected = model.predict_step(batches[0])["scores"][task]
        np.testing.assert_allclose(got.scores[task], expected, atol=1e-6)
    again = scoring.predict(model, manifest, "test", data, desc="test", limit=70)
    np.testing.assert_array_equal(again.row_id, got.row_id[:70])
    np.testing.assert_array_equal(again.scores["click"], got.scores["click"][:70])


def test_a_file_of_several_row_groups_joins_the_raw_rows(
    made: tuple[Predictor, Manifest, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, manifest, data = made
    got = scoring.predict(model, manifest, "test", data, desc="test")
    predictions.write(tmp_path / "whole.parquet", manifest, "test", got)
    monkeypatch.setattr(predictions, "_ROW_GROUP", 40)
    predictions.write(tmp_path / "parts.parquet", manifest, "test", got)
    table = pq.read_table(tmp_path / "parts.parquet")
    assert table.equals(pq.read_table(tmp_path / "whole.parquet"))
    assert pq.ParquetFile(tmp_path / "parts.parquet").num_row_groups == 4
    raw = pq.read_table(Path(manifest.data_dir) / "raw" / "test")
    assert table["user"].equals(raw["user"])
    assert table["label_watched"].null_count == raw["share"].null_count
    got.row_id[-1] += 1
    with pytest.raises(UserError, match="lacks rows of the records"):
        predictions.write(tmp_path / "other.parquet", manifest, "test", got)
    assert not (tmp_path / "other.parquet").exists()
