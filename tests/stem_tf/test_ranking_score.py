"""One score to rank by: measured by hand, and searched on validation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import sklearn.metrics

from pipelines import schema_yaml
from stem_tf.evaluation import evaluator, ranking_score, ranking_search
from stem_tf.evaluation.evaluator import evaluate_run
from stem_tf.evaluation.intervals import Resamples
from stem_tf.evaluation.predictions import Predictions
from stem_tf.evaluation.ranking import Lists
from stem_tf.evaluation.ranking_search import Search, pareto
from stem_tf.workdir import Workdir
from stem_util.errors import UserError

SCHEMA = """
name: made
group: user
features:
  user: {kind: categorical, side: user, dtype: int64}
  length: {kind: numeric, side: item}
tasks:
  click: {label: {column: clicked}}
  buy: {label: {column: bought}, space: {task: click}}
ranking:
  score: click^a * buy
  gain: click + 3 * buy
  parameters: {a: {value: 1, low: 0, high: 4}}
"""
NAN = float("nan")


def predictions(**scores: list[float]) -> Predictions:
    """Two users of three rows each, and one of one row."""
    labels = {"click": [1, 0, 1, 0, 1, 0, 1], "buy": [1, NAN, 0, NAN, 0, NAN, 1]}
    return Predictions(
        row_id=np.arange(7),
        labels={task: np.array(values, np.float32) for task, values in labels.items()},
        scores={task: np.array(values, np.float32) for task, values in scores.items()},
        weights={},
        group=np.array([5, 5, 5, 9, 9, 9, 2]),
        item=None,
    )


def test_by_hand() -> None:
    predicted = predictions(click=[0.5, 0.5, 1, 0.5, 0.25, 0.125, 1], buy=[0.5, 1, 0.125, 1, 1, 0.5, 1])
    manifest = cast(Any, SimpleNamespace(schema=schema_yaml.loads(SCHEMA), data_dir=""))
    rows = ranking_score.rows(predicted, manifest, "test")
    assert rows.gain.tolist() == [4, 0, 1, 0, 1, 0, 4]  # outside of its space a label counts 0
    assert ranking_score.score(rows, manifest.schema).tolist() == [0.25, 0.5, 0.125, 0.5, 0.25, 0.0625, 1]
    found = ranking_score.measured(rows, manifest.schema, 2, Resamples(predicted.group, 50, 0), 0.05)
    # User 5 sees gains 0, 4, 1 in this order, user 9 sees 0, 1, 0; the list of user 2 has one order only.
    second = 1 / np.log2(3)
    by_score = found["orders"]["ranking_score"]
    assert by_score["ndcg"] == pytest.approx((4 * second / (4 + second) + second) / 2)
    assert by_score["map"] == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1 / 2) / 2)
    assert by_score["grouped_auc"] == pytest.approx((0 + 1 / 2) / 2) and found["groups"] == 2
    assert by_score["tasks"] == {"click": pytest.approx(0.25), "buy": pytest.approx(1.0)}
    assert found["orders"]["click"]["tasks"]["click"] == pytest.approx(((0.5 + 1) / 2 + 0.5) / 2)
    assert list(found["orders"]) == ["ranking_score", "click", "buy"] and found["out_of_range"] == 0
    assert np.isnan(by_score["intervals"]["ndcg"]).all()  # of two users


def test_lists_against_scikit_learn() -> None:
    random = np.random.default_rng(3)
    groups, scores = random.integers(40, size=600), np.round(random.random(600), 1)
    gains = random.choice([0, 0, 1, 2.5, 7], 600)
    lists = Lists(scores, groups)
    ndcg, auc = lists.ndcg(gains, 5), lists.auc(gains > 0)
    assert (groups[lists.first] == np.unique(groups)).all() and lists.rows.sum() == 600
    for place, group in enumerate(np.unique(groups)):
        at = groups == group
        assert ndcg[place] == pytest.approx(sklearn.metrics.ndcg_score(gains[None, at], scores[None, at], k=5))
        if not (gains[at] > 0).all():
            assert auc[place] == pytest.approx(sklearn.metrics.roc_auc_score(gains[at] > 0, scores[at]))


def test_a_gain_that_is_no_gain() -> None:
    for gain, words in (("click - 2 * buy", "'click - 2 * buy' is -1 in the row with row_id 0 of test"),
                        ("1 / click", "'1 / click' is inf in the row with row_id 1")):  # fmt: skip
        schema = schema_yaml.loads(SCHEMA.replace("click + 3 * buy", gain))
        with pytest.raises(UserError, match=words.replace("*", r"\*")):
            scores = predictions(click=[0.5] * 7, buy=[0.5] * 7)
            ranking_score.rows(scores, cast(Any, SimpleNamespace(schema=schema, data_dir="")), "test")


def test_the_front_is_what_nothing_is_better_than() -> None:
    assert pareto(np.array([[1, 1], [2, 0], [0, 2], [1, 0], [1, 1], [NAN, 3]])) == [0, 1, 2, 5]


BLOCK = """
ranking:
  score: click^a * (0.1 + watched)^b * log1p(default(length, 0))
  gain: 2 * click + max(watched, 0)
  parameters: {a: 1, b: {value: 1, low: 0.123456, high: 4, log: true}}
"""


@pytest.fixture(scope="module")
def run(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, train: Callable[..., Any]) -> Path:
    directory = tmp_path_factory.mktemp("ranked") / "run"
    train(directory, tiny_settings | {"train.epochs": 1})
    return directory


def test_a_search_chooses_on_validation_and_is_measured_on_test(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "block.yaml").write_text(BLOCK)
    given = str(tmp_path / "block.yaml")
    found = evaluate_run(Workdir(run), "test", ranking=given, search=Search(12, 3), output=tmp_path / "out", k=3)
    trials = json.loads((tmp_path / "out" / ranking_search.TRIALS).read_text())
    assert len(trials["trials"]) == 12 and trials["trials"][0]["values"] == {"b": 1}
    best = trials["trials"][trials["best"]]
    assert best["ndcg"] == max(trial["ndcg"] for trial in trials["trials"])
    assert any(trial["pareto"] for trial in trials["trials"]) and 0.123456 <= best["values"]["b"] <= 4

    # The block that was written says the same of test, and the numbers are those of the raw log.
    again = evaluate_run(Workdir(run), "test", ranking=str(tmp_path / "out/ranking.yaml"), output=tmp_path / "x", k=3)
    ranking = dict(found.metrics["ranking"])
    lead = ranking.pop("search")
    assert again.metrics["ranking"] == ranking
    rows = pq.read_table(tmp_path / "out/test.parquet").to_pandas()
    rows["length"] = pq.read_table(tiny_data.parent / "log.parquet")["length"].to_pandas()[1350:].to_numpy()

    def ndcg(b: float) -> float:
        score = rows["score_click"].astype(float) * (0.1 + rows["score_watched"].astype(float)) ** b
        score = (score * np.log1p(rows["length"])).to_numpy(np.float32)
        gain = (2 * rows["label_click"] + np.maximum(rows["label_watched"].fillna(0), 0)).to_numpy()
        by_user = [np.flatnonzero(rows["user"] == user) for user in rows["user"].unique()]
        apart = [at for at in by_user if np.ptp(gain[at])]
        return float(np.mean([sklearn.metrics.ndcg_score(gain[None, at], score[None, at], k=3) for at in apart]))

    assert ranking["orders"]["ranking_score"]["ndcg"] == pytest.approx(ndcg(best["values"]["b"]), abs=1e-6)
    assert lead["ndcg_before"] == pytest.approx(ndcg(1), abs=1e-6) and lead["low"] <= lead["lead"] <= lead["high"]
    low, high = ranking["orders"]["ranking_score"]["intervals"]["ndcg"]
    assert low < ranking["orders"]["ranking_score"]["ndcg"] < high
    assert "ranking_score: click^a * (0.1 + watched)^b" in found.table and found.chosen is not None
    shown = ranking_search.tables(found.chosen, found.metrics, "test")
    assert "best for click" in shown and "chosen on validation; on test NDCG@3 moved by" in shown
    same = evaluate_run(Workdir(run), "test", ranking=given, search=Search(12, 3), output=tmp_path / "out", k=3)
    assert same.chosen is not None and same.chosen.trials == found.chosen.trials  # the seed's


def test_mistakes_are_noticed_at_once(
    run: Path, tmp_path: Path, job_in_process: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "start_tensorflow", lambda: pytest.fail("TensorFlow was started"))
    (tmp_path / "block.yaml").write_text(BLOCK)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/ranking.yaml").write_text("a: 1\n")
    block = f"--ranking={tmp_path / 'block.yaml'}"
    for flags, words in (
        (["--ranking=click*wached"], "--ranking: position 7: nothing is named 'wached'; did you mean 'watched'?"),
        ([block, "--split=train"], "cannot be measured on train: the data keep no raw rows of train"),
        (["--search_ranking"], "--search_ranking needs a ranking with a parameter that has a range"),
        (["--ranking=click", "--search_ranking"], "--search_ranking needs a ranking with a parameter"),
        ([block, "--search_ranking", "--split=validation"], "--search_ranking chooses on validation, where"),
        ([block, "--trials=3"], "--trials belongs to --search_ranking"),
        ([block, "--search_ranking", "--trials=0"], "a search has 1 trial or more"),
        ([block, "--search_ranking", f"--output={tmp_path / 'taken'}"], "ranking.yaml exists and holds no ranking"),
    ):
        job = job_in_process("stem_tf.jobs.evaluate", f"--workdir={run}", *flags)
        assert job.returncode == 2 and words in job.stderr and job.stderr.count("\n") == 1, job.stderr
