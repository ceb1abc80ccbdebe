"""How good one score to rank by is: lists that are ordered by it, against a gain made of labels.

The score and the gain are the formulas of the schema's ranking (:mod:`pipelines.ranking`), computed for the rows of a
split. Beside it stand the lists that the score of each single task would give.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines import expression, outputs
from pipelines import ranking as rankings
from pipelines.log import casts
from pipelines.manifest import Manifest
from pipelines.outputs import Output
from pipelines.schema import Schema
from stem_tf import report
from stem_tf.evaluation import metrics
from stem_tf.evaluation.intervals import Resamples, interval
from stem_tf.evaluation.predictions import Predictions, raw_values
from stem_tf.evaluation.ranking import Lists
from stem_util.errors import UserError

METRICS = ("ndcg", "map", "grouped_auc")


@dataclass(frozen=True)
class Rows:
    """The rows of a split, as a ranking sees them.

    Attributes:
      predicted: scores by task and labels of N rows.
      groups: int64 [N], the keys of their groups.
      features: raw values float64 [N] of the numeric features in the formulas, NaN where missing.
      gain: float64 [N], 0 or more.
    """

    predicted: Predictions
    groups: NDArray[np.int64]
    features: dict[str, NDArray[np.float64]]
    gain: NDArray[np.float64]


def why_not(schema: Schema, split: str) -> str:
    """Why the ranking cannot be measured on a split; "" if it can."""
    if schema.group is None:
        return "the schema names no group, so that there are no lists to order"
    if split == "train" and (features := _features(schema)):
        return f"the data keep no raw rows of train, which have the values of {', '.join(features)}"
    return ""


def rows(predicted: Predictions, manifest: Manifest, split: str) -> Rows:
    """The rows of a split; `why_not` is "".

    Raises:
      UserError: a gain is below 0 or no number, or the raw rows cannot be read.
    """
    schema = manifest.schema
    assert schema.ranking is not None and predicted.group is not None
    raw = Path(manifest.data_dir) / "raw" / split
    features = {name: _values(raw, schema.feature(name).column, predicted.row_id) for name in _features(schema)}
    formula = rankings.gain(schema.ranking, schema.features, schema.tasks)
    labels = {task: np.nan_to_num(values, nan=0.0) for task, values in predicted.labels.items()}
    with np.errstate(over="ignore"):
        gain = np.broadcast_to(expression.values(formula, {**features, **labels}), len(predicted.row_id))
    bad = ~((gain >= 0) & np.isfinite(gain))
    if bad.any():
        row = int(bad.argmax())
        raise UserError(
            f"the ranking's gain '{formula.text}' is {gain[row]:g} in the row with row_id {predicted.row_id[row]} of "
            f"{split}, and should be a number of 0 or more in all rows: max(..., 0) is"
        )
    return Rows(predicted, predicted.group, features, gain)


def score(given: Rows, schema: Schema) -> NDArray[np.float32]:
    """The score to rank by, as an exported model gives it, [N]."""
    return np.broadcast_to(_output(schema).values(given.predicted.scores, given.features), len(given.gain))


def _output(schema: Schema) -> Output:
    return next(output for output in outputs.of(schema) if output.name == outputs.RANKING_SCORE)


def measured(given: Rows, schema: Schema, k: int, resamples: Resamples, level: float) -> dict[str, Any]:
    """What an evaluation says of the ranking.

    Args:
      given: the rows of a split.
      schema: schema of the data, with the ranking.
      k: of NDCG@k.
      resamples: draws of the split's users.
      level: .05 for intervals of 95 %.

    Returns:
      ``block``, ``score`` and ``gain`` in words, how many ``groups`` the metrics rest on, the share of rows whose score
      is ``out_of_range``, and in ``orders`` by what lists are ordered by (``ranking_score``, then each task): the
      metrics of :data:`METRICS`, their ``intervals``, and in ``tasks`` the grouped AUC of each binary task.
    """
    assert schema.ranking is not None
    own = score(given, schema)
    orders = {outputs.RANKING_SCORE: own, **given.predicted.scores}
    found = {name: _order(given, schema, values, k, resamples, level) for name, values in orders.items()}
    return {
        "block": rankings.fields(schema.ranking),
        "score": _output(schema).text,
        "gain": rankings.gain(schema.ranking, schema.features, schema.tasks).text,
        "groups": int(np.count_nonzero(~np.isnan(Lists(own, given.groups).ndcg(given.gain, k)))),
        "out_of_range": float(np.mean((own == 0) | (np.abs(own) == np.float32(expression.LARGEST)))),
        "orders": found,
    }


def _order(given: Rows, schema: Schema, values: NDArray, k: int, resamples: Resamples, level: float) -> dict[str, Any]:
    by_user = in_lists(given, values, k)
    found: dict[str, Any] = {metric: _mean(*by_user[metric]) for metric in METRICS}
    found["intervals"] = {metric: list(interval(resamples.means(*by_user[metric]), level)) for metric in METRICS}
    return found | {"tasks": of_tasks(given, schema, values)}


def in_lists(given: Rows, values: NDArray, k: int) -> dict[str, tuple[NDArray, NDArray]]:
    """The metrics of each group's list, as values and weights of rows, both [N], for `Resamples.means`.

    A group's value is at one of its rows; all other rows have the weight 0. NDCG@k is of the gain. A row is relevant to
    average precision and AUC if its gain is above 0. Groups count alike but in grouped AUC, where they count with
    their rows.
    """
    lists = Lists(values, given.groups)
    relevant = given.gain > 0
    found = {
        "ndcg": (lists.ndcg(given.gain, k), np.ones(len(lists.rows))),
        "map": (lists.precision(relevant), np.ones(len(lists.rows))),
        "grouped_auc": (lists.auc(relevant), lists.rows),
    }
    by_row = {}
    for metric, (of_group, weights) in found.items():
        known = ~np.isnan(of_group)
        at_rows, weights_of_rows = np.zeros(len(values)), np.zeros(len(values))
        at_rows[lists.first[known]], weights_of_rows[lists.first[known]] = of_group[known], weights[known]
        by_row[metric] = (at_rows, weights_of_rows)
    return by_row


def ndcg(given: Rows, values: NDArray, k: int) -> float:
    """NDCG@k of the gain in lists by ``values``; NaN where no group has rows of unequal gain."""
    of_group = Lists(values, given.groups).ndcg(given.gain, k)
    known = ~np.isnan(of_group)
    return float(np.mean(of_group[known])) if known.any() else float("nan")


def of_tasks(given: Rows, schema: Schema, values: NDArray) -> dict[str, float]:
    """The grouped AUC of each binary task in lists by ``values``."""
    labels, weights_of = given.predicted.labels, given.predicted.weights_of
    return {
        task.name: metrics.grouped_auc(labels[task.name], values, given.groups, weights_of(task.name))
        for task in schema.tasks
        if task.type == "binary"
    }


def lead(given: Rows, values: NDArray, before: NDArray, k: int, resamples: Resamples, level: float) -> dict[str, float]:
    """How far NDCG@k of lists by ``values`` is above that of lists by ``before``, with a paired interval."""
    after, earlier = (in_lists(given, x, k)["ndcg"] for x in (values, before))
    low, high = interval(resamples.means(*after) - resamples.means(*earlier), level)
    return {"lead": _mean(*after) - _mean(*earlier), "low": low, "high": high}


def tables(tree: Mapping[str, Any], k: int, level: float) -> str:
    """What `measured` found, as text for people."""
    percent = f"{100 - 100 * level:g} %"
    names = {"ndcg": f"NDCG@{k}", "map": "MAP", "grouped_auc": "grouped AUC"}
    head = ["lists by", *itertools.chain.from_iterable((name, percent) for name in names.values()), ""]
    lines = [
        [name, *itertools.chain.from_iterable((report.number(o[m]), _ends(o["intervals"][m])) for m in names), ""]
        for name, o in tree["orders"].items()
    ]
    tasks = list(next(iter(tree["orders"].values()))["tasks"])
    of_task = [
        [name, *(report.number(order["tasks"][task]) for task in tasks), ""] for name, order in tree["orders"].items()
    ]
    texts = [report.table(head, lines)]
    if tasks:
        texts.append(report.table(["grouped AUC in lists by", *tasks, ""], of_task))
    notes = [
        f"{outputs.RANKING_SCORE}: {tree['score']}",
        f"NDCG@{k} is of the gain {tree['gain']}; in MAP and grouped AUC a row is relevant if its gain is above 0",
    ]
    if tree["out_of_range"] > 0:
        notes.append(
            f"{report.percent(tree['out_of_range'])} of the scores are 0, no number or beyond float32, and so not "
            "told from one another"
        )
    return "\n\n".join([*texts, "\n".join(notes)])


def _ends(ends: Sequence[float | None]) -> str:
    return "-" if ends[0] is None else f"{report.number(ends[0])} to {report.number(ends[1])}"


def _mean(values: NDArray, weights: NDArray) -> float:
    return float(np.average(values, weights=weights)) if weights.any() else float("nan")


def _features(schema: Schema) -> list[str]:
    """The features in the formulas of score and gain."""
    if schema.ranking is None:
        return []
    made = (function(schema.ranking, schema.features, schema.tasks) for function in (rankings.score, rankings.gain))
    named = {name for formula in made for name in formula.names}
    return [feature.name for feature in schema.features if feature.name in named]


def _values(raw: Path, column: str, row_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """The values of a numeric feature, as float32 like in a request; NaN where missing or not finite."""
    array = casts.to_float64(raw_values(raw, column, row_ids).combine_chunks())[0]
    values = array.to_numpy(zero_copy_only=False).astype(np.float64)
    with np.errstate(over="ignore"):
        values = values.astype(np.float32).astype(np.float64)
    return np.where(np.isfinite(values), values, np.nan)
