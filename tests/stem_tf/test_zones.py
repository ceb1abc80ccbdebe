"""Zones: buckets and lifts by hand, and what selecting rows by a model's own scores does to its AUC."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from stem_tf.compare.comparison import Comparison
from stem_tf.compare.document import Cell, Table
from stem_tf.compare.page import render
from stem_tf.compare.sections.zones import section
from stem_tf.compare.zones import EVERY_MRF, Lift, Zones, zones
from tests.stem_tf.made_up import comparison


def _noisy(random: np.random.Generator, *signals: NDArray, noise: float) -> dict[str, NDArray]:
    return {task: s + noise * random.normal(size=len(s)) for task, s in zip("ab", signals, strict=True)}


def test_zones_by_hand() -> None:
    """20 rows: a falls, b rises, so that MRF goes from 9 to -9; each bucket has two rows."""
    rows = np.arange(20)
    labels = {"a": rows % 2, "b": np.ones(20)}
    scores = {"a": 20.0 - rows, "b": rows * 1.0}
    made = comparison(labels, {"single": [scores], "same": [scores]})
    found = Zones(made)
    assert found.pairs == (("a", "b"),)
    np.testing.assert_array_equal(found.rows(("a", "b"), zones(made.settings)), [6, 4, 6, 4])
    np.testing.assert_array_equal(found.rows(("a", "b"), EVERY_MRF), [2, 0] * 9 + [2, 0])
    lifts = found.lifts(found.pairs, zones(made.settings))
    assert {(lift.task, lift.arm, lift.cell, lift.rows, lift.positives) for lift in lifts} == {
        (task, "same", cell, rows, rows // 2 if task == "a" else rows)
        for task in "ab"
        for cell, rows in enumerate((6, 4, 6))
    }
    assert {lift.too_few for lift in lifts if lift.task == "a"} == {"3 positives", "2 positives"}
    assert {lift.too_few for lift in lifts if lift.task == "b"} == {"0 negatives"}
    assert all(lift.difference is None and np.isnan(lift.p) for lift in lifts)


def test_lifts_are_scikit_learns_aucs_of_the_rows() -> None:
    """With weights, a sample space, a regression in the pair, an arm without it, and seeds."""
    random = np.random.default_rng(0)
    signal = random.normal(size=4000)
    labels = {"a": (random.random(4000) < 1 / (1 + np.exp(-signal))).astype(float), "b": signal}
    weights = random.integers(0, 3, 4000)
    labels["a"][weights == 0] = np.nan
    single = [_noisy(random, signal, random.normal(size=4000), noise=1.0) for _ in range(2)]
    arm = [{"a": scores["a"]} for scores in (_noisy(random, signal, signal, noise=0.5) for _ in range(2))]
    group = random.integers(300, size=4000)
    made = comparison(
        labels, {"single": single, "arm": arm}, regressions="b", weights={"a": weights}, group=group, resamples=50
    )
    found = Zones(made)
    lifts = found.lifts(found.pairs, zones(made.settings))
    assert [(lift.alike, lift.cell) for lift in lifts] == [
        (alike, cell) for alike in (True, False) for cell in range(3)
    ]
    ranks = {task: np.sum([scores[task] for scores in single], axis=0).argsort().argsort() for task in "ab"}
    mrf = ranks["a"] // 400 - ranks["b"] // 400
    for lift, rows in zip(lifts[3:], (mrf >= 5, abs(mrf) <= 2, mrf <= -5), strict=True):
        rows = rows & (weights > 0)
        expected = [
            np.mean([roc_auc_score(labels["a"][rows], s["a"][rows], sample_weight=weights[rows]) for s in of])
            for of in (single, arm)
        ]
        assert (lift.rows, lift.positives) == (rows.sum(), (labels["a"][rows] == 1).sum())
        assert lift.single == pytest.approx(expected[0], abs=1e-6)
        assert lift.auc == pytest.approx(expected[1], abs=1e-6)
        assert lift.difference is not None
        assert lift.difference.estimate == pytest.approx(expected[1] - expected[0], abs=1e-6)
        assert lift.difference.low < lift.difference.estimate < lift.difference.high
        assert lift.difference.p <= lift.p or np.isnan(lift.p)


def _equally_good(seed: int, rows: int) -> list[Lift]:
    """Lifts on a of a model that is as good as Single-Task, with errors of its own; the tasks are correlated."""
    random = np.random.default_rng(seed)
    a = random.normal(size=rows)
    b = 0.5 * a + np.sqrt(0.75) * random.normal(size=rows)
    labels = {"a": random.random(rows) < 1 / (1 + np.exp(2 - 1.2 * a)), "b": random.random(rows) < 0.3}
    made = comparison(labels, {name: [_noisy(random, a, b, noise=1.0)] for name in ("single", "arm")}, resamples=100)
    found = Zones(made)
    return [lift for lift in found.lifts(found.pairs, zones(made.settings)) if lift.task == "a"]


def test_single_tasks_own_zones_favour_an_equally_good_rival() -> None:
    """The picture of the paper's Figure 1, up in the overwhelming zones and down in between, without any transfer."""
    logs = [_equally_good(seed, 80_000) for seed in range(3)]
    assert [lift.alike for lift in logs[0]] == [True] * 3 + [False] * 3
    differences = [[lift.difference for lift in lifts if lift.difference is not None] for lifts in logs]
    estimates = np.array([[found.estimate for found in of_log] for of_log in differences])
    errors = np.array([[found.users.error for found in of_log] for of_log in differences])
    a, comparable, b = estimates.mean(axis=0)[3:]
    assert a > 0.01
    assert b > 0.01
    assert comparable < -0.004
    np.testing.assert_allclose((estimates / errors).sum(axis=0)[:3] / np.sqrt(len(logs)), 0, atol=2.5)


def _better_and_worse(rows: int) -> Comparison:
    """Arms of two seeds: one far better than Single-Task on a, one far worse."""
    random = np.random.default_rng(5)
    a, b = random.normal(size=(2, rows))
    labels = {"a <b>": random.random(rows) < 1 / (1 + np.exp(-a)), "b": random.random(rows) < 0.5}
    noise = {"single": 1.0, "better": 0.2, "worse": 9.0}
    arms = {
        name: [{"a <b>": s["a"], "b": s["b"]} for s in (_noisy(random, a, b, noise=n) for _ in range(4))]
        for name, n in noise.items()
    }
    return comparison(labels, arms, group=np.arange(rows) % 200, resamples=40)


def test_section_says_which_arms_differ_and_where() -> None:
    found = section(_better_and_worse(2000))
    assert "`better` is better in" in found.lead
    assert "`worse` is worse in" in found.lead
    page = render("x", "", [found])
    assert "a &lt;b&gt; overwhelms" in page
    assert "<b> overwhelms" not in page
    assert len(page) < 300_000
    assert len(found.data["pairs"]) == 1
    assert all(sum(pair["rows"].values()) == 2000 for pair in found.data["pairs"])
    assert {lift["mrf"] for lift in found.data["by_mrf"]} == set(range(-9, 10))
    cells = [cell for block in found.blocks if isinstance(block, Table) for row in block.rows for cell in row[1:]]
    assert {cell.tone for cell in cells if isinstance(cell, Cell)} >= {"good", "bad"}


def test_few_rows_are_said_to_be_few() -> None:
    found = section(_better_and_worse(60))
    assert found.lead.startswith("In no zone") or found.lead.startswith("Nothing can be said")
    assert "only " in render("x", "", [found])
    assert all(lift["lift"] is None for lift in found.data["by_mrf"])


def test_comparisons_without_zones_say_so() -> None:
    scores = {"a": np.arange(40.0), "b": np.arange(40.0)}
    labels = {"a": np.arange(40) % 2, "b": np.arange(40) % 3 == 0}
    without = [
        comparison(labels, {"x": [scores], "y": [scores]}, single=None),
        comparison(labels, {"single": [scores]}),
        comparison(labels, {"single": [{"a": scores["a"]}], "x": [scores]}),
        comparison(labels, {"single": [scores], "x": [scores]}, regressions=("a", "b")),
    ]
    assert [section(made).blocks for made in without] == [()] * 4
    one_seed = section(comparison(labels, {"single": [scores], "x": [scores]}, resamples=20))
    assert one_seed.lead.startswith("Nothing can be said")
    assert "too few users or seeds" in render("x", "", [one_seed])
