"""What was measured in an arm's runs, and its mean over them. No TensorFlow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stem_tf import report
from stem_tf.compare.comparison import Arm

VERSION = 2
"""Of the tree that `stem_tf.compare.measures.measure` returns. What another version measured counts as not measured."""


def of_runs(arm: Arm) -> list[Mapping[str, Any]]:
    """The measures of an arm's runs and their ``seed``, without those of runs that were not measured."""
    return [{**run.measures, "seed": run.seed} for run in arm.runs if run.measures.get("version") == VERSION]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
      mean: the mean.
      half: half the width of its interval; NaN where it cannot be said.
    """

    mean: float
    half: float

    def __str__(self) -> str:
        half = "" if math.isnan(self.half) else f" ±{report.number(self.half)}"
        return f"{report.number(self.mean)}{half}"

    def differs_from(self, value: float) -> bool:
        """Whether the interval leaves ``value`` out."""
        return abs(self.mean - value) > self.half


def span(values: Sequence[float | None], digits: int = 2) -> str:
    """The mean of one number per seed with the lowest and the highest, as ``.75 (.64 to .87)``."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, low, high = (report.number(value, digits) for value in (float(np.mean(known)), min(known), max(known)))
    return mean if low == high else f"{mean} ({low} to {high})"


def estimate(values: Sequence[float | None], errors: Sequence[float | None] | None, level: float) -> Estimate:
    """The mean of one number per seed, and an interval that leaves out ``level`` by chance.

    The standard error over the test's users is the same for all seeds, which share the rows; that over seeds falls with
    their number. Both parts of the interval add as squares, the second by Student's t for few seeds. With one seed the
    interval is that of the users alone.

    Args:
      values: [S]; None is left out.
      errors: [S] standard errors over users, or None for a number that has none, of the whole table for example.
      level: .05 for an interval of 95 %.
    """
    from scipy import stats

    known = np.array([value for value in values if value is not None], np.float64)
    if not len(known):
        return Estimate(math.nan, math.nan)
    seeds = stats.t.ppf(1 - level / 2, len(known) - 1) * stats.sem(known) if len(known) > 1 else math.nan
    if errors is None:
        return Estimate(float(known.mean()), float(seeds))
    of_users = [error for error in errors if error is not None]
    users = stats.norm.ppf(1 - level / 2) * np.mean(of_users) if of_users else math.nan
    return Estimate(float(known.mean()), float(np.hypot(users, 0.0 if len(known) == 1 else seeds)))
