"""Deviations of models: calibration and AUC by slice, against numbers by hand and simulated test sets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from pipelines import manifest as manifests
from stem_tf.compare.comparison import Comparison
from stem_tf.compare.deviations import deviations
from stem_tf.compare.page import render
from stem_tf.compare.sections.calibration import section
from stem_tf.evaluation.slices import Slice
from tests.stem_tf.made_up import comparison


def _halves(rows: int) -> list[Slice]:
    first = np.arange(rows) < rows // 2
    return [Slice("half=1", "half", "", first), Slice("half=2", "half", "", ~first)]


def test_numbers_of_slices() -> None:
    random = np.random.default_rng(0)
    labels = {"a": (random.random(400) < 0.4).astype(float), "b": random.normal(size=400)}
    weights = random.integers(0, 3, 400)
    labels["a"][weights == 0] = np.nan
    runs = [{"a": random.random(400), "b": random.normal(size=400)} for _ in range(3)]
    made = comparison(labels, {"x": runs}, regressions="b", weights={"a": weights}, single=None, resamples=50)
    arms = list(made.arms.values())
    found = deviations(made, "calibration", arms, _halves(400))
    expected = {(task, name) for name in (None, "half=1", "half=2") for task in "ab"}
    assert {(one.task, one.slice and one.slice.name) for one in found} == expected
    one = next(one for one in found if one.task == "a" and one.slice and one.slice.name == "half=2")
    rows = (np.arange(400) >= 200) & (weights > 0)
    assert one.rows == rows.sum()
    assert one.value == pytest.approx(np.mean([np.average(run["a"][rows], weights=weights[rows]) for run in runs]))
    assert one.reference == pytest.approx(np.average(labels["a"][rows], weights=weights[rows]))
    assert one.difference.estimate == pytest.approx(one.value - one.reference)
    aucs = deviations(made, "auc", arms, _halves(400))
    assert [(one.task, one.slice and one.slice.name) for one in aucs] == [("a", "half=1"), ("a", "half=2")]
    by_seed = [roc_auc_score(labels["a"][rows], run["a"][rows], sample_weight=weights[rows]) for run in runs]
    assert aucs[1].value == pytest.approx(np.mean(by_seed), abs=1e-6)


def test_calibrated_scores_seldom_stand_out() -> None:
    """15 slices of about 20 expected positives each: by Holm, one log in 20 may have any that stands out."""
    random = np.random.default_rng(1)
    scores = random.beta(1, 19, 6_000).astype(np.float32)
    parts = [Slice(f"s={n}", "s", "", np.arange(6_000) % 15 == n) for n in range(15)]
    hits = 0
    for seed in range(12):
        labels = {"a": random.random(6_000) < scores}
        made = comparison(labels, {"x": [{"a": scores}]}, single=None, resamples=50, seed=seed)
        hits += any(one.p < 0.05 for one in deviations(made, "calibration", list(made.arms.values()), parts))
    assert hits <= 3


def test_an_uncalibrated_slice_stands_out() -> None:
    random = np.random.default_rng(2)
    truth = random.uniform(0.05, 0.6, 4000)
    labels = {"a": random.random(4000) < truth}
    scores = np.where(np.arange(4000) < 2000, truth, np.minimum(truth * 1.5, 1))
    made = comparison(labels, {"x": [{"a": scores}]}, single=None, resamples=200)
    found = deviations(made, "calibration", list(made.arms.values()), _halves(4000))
    assert [one.p < 0.05 for one in found if one.slice] == [False, True]
    assert found[-1].value / found[-1].reference == pytest.approx(1.5, abs=0.15)
    assert found[-1].certain == pytest.approx(found[-1].difference.low)


def _on_tiny(tiny_data: Path, **settings: Any) -> Comparison:
    """Scores made up for the real test rows of the tiny log; one arm's are wrong for one item."""
    manifest = manifests.load(str(tiny_data))
    raw = pq.read_table(tiny_data / "raw" / "test").to_pandas()
    random = np.random.default_rng(0)
    labels = {"click": raw["clicked"].to_numpy(), "watched": raw["share"].to_numpy()}
    users = raw["user"].str.removeprefix("user-").astype(int).to_numpy()
    scores = {"click": users / 40 + 0.01, "watched": random.random(len(raw))}
    arms = {
        "single": [scores, scores],
        "<b>&`": [{"click": scores["click"] ** 3, "watched": scores["watched"] + 5} for _ in range(2)],
    }
    made = comparison(labels, arms, regressions=["watched"], resamples=100, row_id=raw["row_id"].to_numpy(), **settings)
    return dataclasses.replace(made, manifest=manifest)


def test_section_of_real_raw_rows(tiny_data: Path) -> None:
    found = section(_on_tiny(tiny_data))
    page = render("x", "", [found])
    assert "<b>&`" not in page
    assert len(page) < 300_000
    assert "further from what was observed than chance allows" in found.lead
    assert {one["arm"] for one in found.data["slices"]} >= {"<b>&`"}
    assert {one["task"] for one in found.data["slices"]} >= {"watched"}
    assert len(found.data["errors"]) == 4
    assert all(len(one["observed"]) == len(one["predicted"]) for one in found.data["buckets"])


def test_without_raw_rows_there_are_no_slices(tiny_data: Path, tmp_path: Path) -> None:
    made = _on_tiny(tiny_data)
    moved = dataclasses.replace(made, manifest=dataclasses.replace(made.manifest, data_dir=str(tmp_path)))
    vars(moved.manifest)["schema"] = made.manifest.schema
    found = section(moved)
    assert any(isinstance(block, str) and block.startswith("There are no slices: ") for block in found.blocks)


@pytest.mark.parametrize(
    ("slope", "shift", "says"),
    [
        (
            1,
            0,
            "by more than chance allows, nor is that of low, middle or high scores. ",
        ),
        (
            5,
            0,
            "single scores are: for 1 of 1 pairs of arm and task, high scores are too high and low ones too low",
        ),
        (0, 0, "but single scores are: for 1 of 1 pairs of arm and task, scores are too high or too low in some"),
        (
            1,
            3,
            ". By buckets of rows with similar scores: for 1 of 1 pairs of arm and task, scores are too high or too",
        ),
    ],
)
def test_the_lead_tells_means_from_single_scores(tiny_data: Path, slope: int, shift: int, says: str) -> None:
    real = _on_tiny(tiny_data)
    row_id = real.arms["single"].runs[0].predictions("test").row_id
    logits = np.where(np.arange(len(row_id)) % 2, 0.7, -0.7)
    labels = np.arange(len(row_id)) // 2 % 3 < np.where(logits > 0, 2, 1)  # rates of 2/3 and 1/3
    scores = 1 / (1 + np.exp(-slope * logits - shift))
    if slope == 0:
        scores = np.where(logits > 0, 0.52, 0.48)
    made = comparison({"click": labels}, {"single": [{"click": scores}] * 2}, resamples=100, row_id=row_id)
    manifest = dataclasses.replace(real.manifest)
    vars(manifest)["schema"] = dataclasses.replace(
        real.manifest.schema, tasks=tuple(task for task in real.manifest.schema.tasks if task.name == "click")
    )
    assert says in section(dataclasses.replace(made, manifest=manifest)).lead
