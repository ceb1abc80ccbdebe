"""The best of scored items."""

from __future__ import annotations

import difflib
import numbers
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

RANKING_SCORE = "ranking_score"
"""The output that a model with a ranking has beside its tasks."""

By = str | Mapping[str, float] | Callable[[Mapping[str, np.ndarray]], Any]
"""What ranks: a task or other output; weights by task; a function of scores by task ``[N]`` to a number per item."""


class Top(NamedTuple):
    """The best items, the best one first.

    Attributes:
      indices: int64 [k], positions among the given items.
      scores: float64 [k], the ranking scores.
    """

    indices: np.ndarray
    scores: np.ndarray


def check(k: Any, by: Any) -> int:
    """Checks ``k`` and ``by``; returns ``k`` as an int.

    Raises:
      TypeError: ``k`` is not an integer, or ``by`` is of no known kind.
      ValueError: ``k`` is less than 1, or a weight is not finite.
    """
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"k is {k!r} ({type(k).__name__}); a number of items is expected")
    if operator.index(k) < 1:
        raise ValueError(f"k is {k}; it should be 1 or more")
    if isinstance(by, Mapping):
        for task, weight in by.items():
            if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not np.isfinite(float(weight)):
                raise ValueError(f"by: the weight of '{task}' is {weight!r}; a finite number is expected")
        if not by:
            raise ValueError("by: there are no weights")
    elif not isinstance(by, str) and not callable(by):
        raise TypeError(f"by is {by!r} ({type(by).__name__}); a task, weights by task or a function is expected")
    return operator.index(k)


def best(scores: Mapping[str, np.ndarray], by: By, k: int) -> Top:
    """Returns the ``k`` best items; among equal ones the first wins.

    Args:
      scores: [N] by task.
      by: see `By`.
      k: how many; all if there are fewer.

    Raises:
      ValueError: ``by`` names no task of the model, or a function does not return one number per item.
    """
    values = _values(scores, by)
    # A stable argsort keeps equal values in order, but sorts ascending: so the values are negated.
    indices = np.argsort(-values, kind="stable")[:k]
    return Top(indices, values[indices])


def _values(scores: Mapping[str, np.ndarray], by: By) -> np.ndarray:
    if isinstance(by, str):
        by = {by: 1.0}
    if isinstance(by, Mapping):
        for task in by:
            if task not in scores:
                close = difflib.get_close_matches(str(task), list(scores), n=1)
                hint = f" (did you mean '{close[0]}'?)" if close else ""
                raise ValueError(f"by: '{task}' is no task of the model{hint}; its tasks are {', '.join(scores)}")
        return np.sum([float(weight) * scores[task].astype(np.float64) for task, weight in by.items()], axis=0)
    count = len(next(iter(scores.values())))
    given = by(scores)
    try:
        values = np.asarray(given, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"by: the function's values are no numbers ({error})") from error
    if values.shape != (count,) or np.isnan(values).any():
        what = "NaN" if values.shape == (count,) else f"shape {values.shape}"
        raise ValueError(f"by: the function gives {what}; one number for each of {count} items is expected")
    return values
