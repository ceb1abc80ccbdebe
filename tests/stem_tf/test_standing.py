"""How a model stands against trivial answers: differences with intervals over users, and the remarks of the table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from numpy.typing import NDArray

from pipelines import schema_yaml
from stem_tf.evaluation import metrics, standing, table
from stem_tf.evaluation.predictions import Predictions
from stem_tf.evaluation.standing import answers_of

SCHEMA = """
name: standing
group: user
item: item
features:
  user: {kind: categorical, side: user, dtype: int64}
tasks:
  click: {label: {column: click}}
  buy: {label: {column: buy}}
  stars: {type: regression, label: {column: stars}}
"""
ROWS = 2000


def log(users: int = 100) -> tuple[Predictions, dict[str, NDArray]]:
    rng = np.random.default_rng(0)
    taste = rng.normal(size=ROWS)
    stars = (taste + rng.normal(size=ROWS)).astype(np.float32)
    stars[::3] = np.nan  # outside the task's space
    labels = {
        "click": (taste > 0).astype(np.float32),
        "buy": (rng.random(ROWS) < 0.1).astype(np.float32),
        "stars": stars,
    }
    noise = {task: rng.normal(size=ROWS) for task in labels}
    scores = {task: (taste + noise[task]).astype(np.float32) for task in labels}
    scores |= {task: 1 / (1 + np.exp(-scores[task])) for task in ("click", "buy")}
    return Predictions(
        row_id=np.arange(ROWS),
        labels=labels,
        scores=scores,
        weights={},
        group=rng.integers(users, size=ROWS),
        item=rng.integers(50, size=ROWS),
    ), {task: taste + 2 * noise[task] for task in labels}


def stand(predicted: Predictions, answers: dict[str, dict[str, NDArray]]) -> tuple[dict[str, Any], dict[str, Any]]:
    tasks = schema_yaml.loads(SCHEMA).tasks
    results = metrics.evaluate(
        {task.name: task.type for task in tasks},
        predicted.labels,
        predicted.scores,
        {task.name: predicted.weights_of(task.name) for task in tasks},
    )
    scores = {name: iter(of_tasks.items()) for name, of_tasks in answers.items()}
    return standing.standing(tasks, predicted, results, scores, ["click", "buy"], standing.drawn_again(predicted))


def test_differences_and_their_intervals_are_those_of_redrawn_users() -> None:
    predicted, other = log()
    found, mean = stand(predicted, {"user": other})
    assert predicted.group is not None
    rows = [np.flatnonzero(predicted.group == user) for user in range(100)]
    rng = np.random.default_rng(1)
    drawn: dict[str, list[float]] = {"click": [], "buy": [], "mean": [], "stars": []}
    for _ in range(400):
        at = np.concatenate([rows[user] for user in rng.integers(100, size=100)])
        for task in ("click", "buy"):
            own, against = (
                sklearn.metrics.roc_auc_score(predicted.labels[task][at], scores[task][at])
                for scores in (predicted.scores, other)
            )
            drawn[task].append(own - against)
        drawn["mean"].append((drawn["click"][-1] + drawn["buy"][-1]) / 2)
        at = at[~np.isnan(predicted.labels["stars"][at])]
        errors = [(predicted.labels["stars"] - scores["stars"])[at] ** 2 for scores in (other, predicted.scores)]
        drawn["stars"].append(float(np.mean(errors[0] - errors[1])))
    for task, differences in drawn.items():
        lead = (mean if task == "mean" else found[task])["over_trivial"]["user"]
        width = float(np.std(differences))
        assert lead["low"] == pytest.approx(np.quantile(differences, 0.025), abs=0.4 * width)
        assert lead["high"] == pytest.approx(np.quantile(differences, 0.975), abs=0.4 * width)
        assert lead["low"] < lead["difference"] < lead["high"]
    auc = sklearn.metrics.roc_auc_score(predicted.labels["click"], other["click"])
    assert found["click"]["trivial"]["user"] == pytest.approx(auc, abs=1e-12)
    assert found["click"]["interval"][0] < metrics.auc(predicted.labels["click"], predicted.scores["click"])


def test_few_users_and_missing_answers_have_no_interval() -> None:
    predicted, other = log(users=5)
    found, mean = stand(predicted, {"user": {"click": other["click"]}})
    assert np.isnan(found["click"]["interval"]).all() and np.isnan(mean["interval"]).all()
    assert np.isnan(found["buy"]["trivial"]["user"]) and np.isnan(found["buy"]["over_trivial"]["user"]["difference"])
    assert found["click"]["over_trivial"]["user"]["difference"] > 0
    tasks = schema_yaml.loads(SCHEMA).tasks
    results = {task.name: {metrics.MAIN[task.type]: float("nan")} for task in tasks}
    draws = standing.drawn_again(predicted)
    nothing = standing.standing(tasks, predicted, results, {"user": iter([])}, [], draws)[1]
    assert np.isnan(nothing["trivial"]["user"]) and np.isnan(nothing["interval"]).all()


def test_intervals_of_a_slice_are_those_of_its_users() -> None:
    predicted, _ = log()
    assert predicted.group is not None
    rows = predicted.group < 60
    draws, rng = standing.drawn_again(predicted), np.random.default_rng(2)
    of_user = [np.flatnonzero(predicted.group == user) for user in range(60)]
    click, _, stars = schema_yaml.loads(SCHEMA).tasks
    y, s = predicted.labels["click"], predicted.scores["click"]
    aucs, ratios = [], []
    for _ in range(400):
        # All users are drawn, and those of the slice are looked at.
        at = np.concatenate([of_user[user] for user in rng.integers(100, size=100) if user < 60])
        aucs.append(sklearn.metrics.roc_auc_score(y[at], s[at]))
        ratios.append(s[at].mean() / y[at].mean())
    found = standing.slice_intervals(click, predicted, rows, draws)
    for name, values in (("interval", aucs), ("predicted_over_observed_interval", ratios)):
        assert found[name] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.4 * float(np.std(values)))
    few = standing.slice_intervals(stars, predicted, predicted.group < 5, draws)
    assert np.isnan(few["interval"]).all()
    nobody = standing.slice_intervals(click, predicted, np.zeros(ROWS, bool), draws)
    assert np.isnan([*nobody["interval"], *nobody["predicted_over_observed_interval"]]).all()


def tree(**leads: tuple[float | None, float | None]) -> dict[str, Any]:
    """What the table of one task, ``click``, is made of; ``leads`` are intervals over user, item, both."""
    answers = list(answers_of(schema_yaml.loads(SCHEMA)).values())
    over = {
        answer: {"difference": 0.1, "low": low, "high": high}
        for answer, (low, high) in zip(answers, leads.values(), strict=True)
    }
    task = {
        "rows": 9,
        "rate": 0.5,
        "auc": 0.7,
        "mse": 0.2,
        "logloss": 0.6,
        "grouped_auc": None,
        "ndcg@5": 0.4,
        "map": 0.3,
        "predicted_over_observed": 1.1,
        "calibration_error": 0.01,
        "calibration_error_by_chance": 0.02,
        "interval": [0.65, 0.75],
        "trivial": dict.fromkeys(answers, 0.6),
        "over_trivial": over,
    }
    return {
        "k": 5,
        "level": 0.05,
        "untrained": {"buy": "its weight is 0"},
        "slices": [],
        "ranking": None,
        "tasks": {"click": task, "buy": task, "stars": task},
        "mean": task,
    }


@pytest.mark.parametrize(
    ("leads", "remark"),
    [
        (((0.1, 0.2), (0.1, 0.2), (0.1, 0.2)), ""),
        (((0.1, 0.2), (0.1, 0.2), (0.0, 0.2)), "no clear gain over biases"),
        (((-0.1, 0.2), (0.1, 0.2), (-0.2, -0.1)), "worse than biases; no clear gain over per user"),
        (((-0.1, 0.2), (-0.1, 0.2), (-0.2, 0.1)), "no clear gain over any"),
        (((-0.1, 0.2), (-0.1, 0.2), (0.1, 0.2)), "no clear gain over per user and per item"),
        (((None, None), (None, None), (None, None)), "too few rows to judge"),
    ],
)
def test_remarks(leads: tuple[tuple[float | None, float | None], ...], remark: str) -> None:
    text = table.tables(tree(**dict(zip("abc", leads, strict=True))), schema_yaml.loads(SCHEMA))
    lines = {line.split()[0]: line for line in reversed(text.splitlines()) if line}
    assert lines["click"].endswith(remark or ".6000")
    assert lines["buy"].endswith("not trained")
