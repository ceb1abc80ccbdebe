"""How often the gate's rules about score drift refuse, where scores have not moved and where they have.

    python -m benchmarks.score_drift

Days are drawn from a population of scores in which the candidate's lie where the served version's do, or are shifted by
a known number of standard deviations; one user's rows are alike, and the two scores of a row have a correlation of .8.
Each day is judged by the estimate alone and, as `export.gate.checks` does it, by an interval. Where nothing has moved,
the bound is a usual one; otherwise it is what has moved in the population, or half of that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from export.gate import measures
from stem_tf import report
from stem_tf.evaluation.intervals import Resamples
from stem_util import cli

flags = cli.Flags()

_DAYS = flags.DEFINE_integer("days", 200, "How many days are drawn for each line.")
_SHIFTS = flags.DEFINE_list("shifts", ["0", ".7"], "How far the candidate's scores are shifted.")
_ROWS = flags.DEFINE_list("rows", ["60", "350", "2000"], "Rows of a day.")
_ROWS_PER_USER = 5
_POPULATION = 400_000
_LEVEL = 0.05
_USUAL = {"psi": 0.25, "mean": 0.25, "quantiles": 0.5}


def main(argv: Sequence[str]) -> None:
    del argv
    random = np.random.default_rng(0)
    lines = []
    for shift in map(float, _SHIFTS.value):
        truth = {key: found.estimate for key, found in _drift(*_drawn(random, _POPULATION, shift), 1).items()}
        for rows in map(int, _ROWS.value):
            days = [_drift(*_drawn(random, rows, shift), 200) for _ in range(_DAYS.value)]
            for key, true in truth.items():
                estimates, lows = (np.array([getattr(day[key], end) for day in days]) for end in ("estimate", "low"))
                for bound in (true, true / 2) if shift else (_USUAL[key],):
                    cells = [f"{np.mean(estimates):.3f}", f"{bound:.3f}"]
                    refused = [f"{100 * np.mean(values > bound):.1f} %" for values in (estimates, lows)]
                    lines.append([key, f"{rows:,}", f"{true:.3f}", *cells, *refused])
    head = ["drift", "rows", "in the population", "mean estimate", "bound", "refused by estimate", "by interval"]
    print(report.table(head, lines))


def _drawn(random: np.random.Generator, rows: int, shift: float) -> tuple[NDArray, NDArray, NDArray]:
    """Scores of the candidate and of the served version, and the user of each row."""
    users = np.arange(rows) // _ROWS_PER_USER
    common, own, other = (
        random.normal(size=users[-1] + 1)[users] * 0.7 + random.normal(size=rows) * 0.7 for _ in range(3)
    )
    served, candidate = (np.sqrt(0.8) * common + np.sqrt(0.2) * apart for apart in (own, other))
    return 1 / (1 + np.exp(1 - candidate - shift)), 1 / (1 + np.exp(1 - served)), users


def _drift(candidate: NDArray, served: NDArray, users: NDArray, resamples: int) -> dict[str, measures.Estimate]:
    return measures.drift(candidate, served, Resamples(users, resamples, 0), _LEVEL)


if __name__ == "__main__":
    cli.run(main, flags)
