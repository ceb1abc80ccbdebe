"""Every section that judges scores, on labels and scores with nothing to tell: a page is made, without warnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.recipes import truth
from stem_tf.compare import page
from stem_tf.compare.sections import calibration, gain, seesaw, verdict, zones
from stem_tf.evaluation import slices
from stem_util.errors import UserError
from tests.stem_tf import made_up

ROWS = 400
RANDOM = np.random.default_rng(0)
RARE = (RANDOM.random(ROWS) < 0.1).astype(float)
OFTEN = (RANDOM.random(ROWS) < 0.3).astype(float)
NONE = np.full(ROWS, np.nan)
FIRST = np.arange(ROWS) < ROWS / 2


class NoRows:
    def __init__(self, *args: object) -> None:
        raise UserError("no raw rows")


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    ("a", "b", "score", "options"),
    [
        (np.ones(ROWS), RARE, None, {}),
        (NONE, RARE, None, {}),
        (OFTEN, RARE, 0.3, {}),
        (OFTEN, RARE, 0.0, {"group": np.zeros(ROWS, int)}),
        (OFTEN, RARE, 1.0, {"weights": {"a": np.zeros(ROWS)}}),
        (OFTEN[:3], RARE[:3], None, {"group": np.zeros(3, int)}),
        (RANDOM.normal(size=ROWS), np.full(ROWS, 5.0), None, {"regressions": ["a", "b"]}),
        (np.where(FIRST, OFTEN, np.nan), np.where(FIRST, np.nan, RARE), None, {"single": None}),
    ],
    ids=[
        "one_class",
        "no_label",
        "same_score",
        "one_user_all_0",
        "no_weight",
        "three_rows",
        "constant",
        "no_row_shared",
    ],
)
def test_nothing_to_tell(
    a: NDArray,
    b: NDArray,
    score: float | None,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(truth, "load", lambda *args: None)
    monkeypatch.setattr(slices, "Slicer", NoRows)
    monkeypatch.setattr(calibration, "Slicer", NoRows)

    def scores() -> dict[str, NDArray]:
        return {task: RANDOM.random(len(a)) if score is None else np.full(len(a), score) for task in "ab"}

    arms = {arm: [scores() for _ in range(2)] for arm in ("single", "other")}
    comparison = made_up.comparison({"a": a, "b": b}, arms, resamples=100, **options)
    evaluated = {task: {"auc": None, "mse": None, "trivial": {"mean": None}, "over_trivial": {}} for task in "ab"}
    for arm in comparison.arms.values():
        for run in arm.runs:
            run.metrics = lambda split: {"mean_auc": None, "tasks": evaluated}  # type: ignore[method-assign]
    sections = [module.section(comparison) for module in (verdict, gain, seesaw, zones, calibration)]
    assert page.write("made up", sections, tmp_path, subject="", settings={}).stat().st_size < 1_000_000
