"""What a model's embedding tables have learned: whether one has collapsed, and what it knows of contradictory pairs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from pipelines.schema import Feature, Schema
from pipelines.vocabulary import FIRST_ID, PADDING_ID
from stem_tf.evaluation import metrics
from stem_tf.evaluation.intervals import Resamples
from stem_tf.layers.embedding import SHARED, PackedTable, rows_between, task_table
from stem_tf.models.ranking_model import RankingModel

Sets = Sequence[tuple[RankingModel, tuple[str, ...]]]
"""Sets of weights, each with the tasks that it scores: :func:`stem_tf.inspection.members`."""

BINS = 40
"""Of the histograms of distances, which lie between 0 and 2."""
_ROWS_AT_A_TIME = 1 << 18


def abundance(sets: Sets) -> list[dict[str, Any]]:
    """Information abundance of each table of each feature that has ids (Guo et al., ICML 2024, Definition 1)::

        abundance = (s_1 + ... + s_K) / s_1, s the singular values of the table [V, D], K = min(V, D)

    It is K where all directions of the space are used alike, and 1 where all embeddings lie on one line: the table has
    collapsed. The rows are those of the V values in the vocabulary (or of the buckets), each once, all of which occur
    in train; padding and the id that rare values share are left out. A feature with a hash has all its B buckets here,
    also those that no value of train falls into.

    Returns:
      One entry per table and feature: ``table``, ``feature``, ``rows`` V, ``most`` K, ``abundance``, NaN for a table
      of zeros or without rows.
    """
    found = []
    for label, member, table in _tables(sets):
        for group in member.embeddings.groups:
            if table not in group.tables:
                continue
            for field in (*group.single, *group.bags):
                values = singular_values(group, field.name, table)
                found.append(
                    {
                        "table": label,
                        "feature": field.name,
                        "rows": max(field.rows - FIRST_ID, 0),
                        "most": len(values),
                        "abundance": float(values.sum() / values.max()) if values.any() else math.nan,
                    }
                )
    return found


def singular_values(group: PackedTable, field: str, table: str) -> NDArray[np.float64]:
    """Singular values [min(V, D)] of one table of a feature, without padding and the rare id, descending.

    They are square roots of the eigenvalues of E' E [D, D], which needs one pass over the rows: exact to 1e-8 of the
    largest.
    """
    first = group.offsets[field] + FIRST_ID
    end = group.offsets[field] + next(f.rows for f in (*group.single, *group.bags) if f.name == field)
    columns = _columns(group, table)
    products = np.zeros((group.dim, group.dim))
    for start in range(first, end, _ROWS_AT_A_TIME):
        part = rows_between(group.table, start, min(start + _ROWS_AT_A_TIME, end))
        rows = part[:, columns].numpy().astype(np.float64)
        products += rows.T @ rows
    eigenvalues = np.linalg.eigvalsh(products)[::-1][: max(end - first, 0)]
    return np.sqrt(np.maximum(eigenvalues, 0.0))


def distances(
    sets: Sets, schema: Schema, rows: Mapping[str, Any], groups: NDArray | None, resamples: int, seed: int
) -> dict[str, Any]:
    """Distances of user and item in each table, of contradictory pairs and of all (STEM poster, Fig. 4).

    The distance of a row's user u and item i in a table is ``|| u / ||u|| - i / ||i|| ||``, between 0 and 2. A pair
    contradicts tasks a and b where the label is 1 for a and 0 for b: a table that serves both cannot place it near for
    a and far for b. Rows whose user or item is missing or not in the vocabulary are left out.

    Args:
      sets: the model.
      schema: schema of its data.
      rows: a batch of N rows in numpy arrays.
      groups: [N] users of the rows, for the bootstrap; or None, then rows are drawn.
      resamples, seed: of the bootstrap.

    Returns:
      ``reason``, why there is nothing, alone; or ``user`` and ``item``, the features; ``rows``; ``edges`` of the
      histograms; ``tables``, by table ``mean`` and ``counts`` of all pairs; ``pairs``, for each ordered pair of binary
      tasks with at least one contradictory row ``positive``, ``negative``, ``rows`` and, in ``tables``, by table
      ``mean``, ``counts`` and ``auc``: the probability that a contradictory pair is further apart than another one, .5
      where the table does not tell them from the rest; with ``sd``, its standard error over users, or NaN.
    """
    user, item = _ids_of(schema, "user"), _ids_of(schema, "item")
    if user is None or item is None:
        missing = " and no ".join(side for side, feature in (("user", user), ("item", item)) if feature is None)
        return {"reason": f"the schema has no {missing} feature with one id per row"}
    features = rows["features"]
    by_row = {feature.name: features[feature.name].reshape(len(rows["row_id"]), -1) for feature in (user, item)}
    known = (by_row[user.name][:, 0] >= FIRST_ID) & (by_row[item.name][:, 0] >= FIRST_ID)
    if not known.any():
        return {"reason": f"no row has a user and an item, both of which occur in train: {user.name}, {item.name}"}
    by_table: dict[str, NDArray[np.float64]] = {}
    for label, member, table in _tables(sets):
        u, i = (_read(member, table, feature.name, by_row[feature.name]) for feature in (user, item))
        if u is None and i is None:  # the shared table again
            continue
        u, i = (
            _read(member, SHARED, feature.name, by_row[feature.name]) if read is None else read
            for feature, read in ((user, u), (item, i))
        )
        assert u is not None and i is not None
        if u.shape != i.shape:
            return {"reason": f"the embeddings of {user.name} and {item.name} differ in width"}
        by_table[label] = unit_distances(u, i)
    drawn = Resamples(groups, resamples, seed, rows=len(known))
    edges = np.linspace(0.0, 2.0, BINS + 1)
    binary = [task.name for task in schema.tasks if task.type == "binary"]
    pairs = []
    for a, b in itertools.permutations(binary, 2):
        inside = known & (rows["weights"][a] > 0) & (rows["weights"][b] > 0)
        contradictory = inside & (rows["labels"][a] > 0.5) & (rows["labels"][b] < 0.5)
        if not contradictory.any():
            continue
        of_table = {}
        for label, distance in by_table.items():
            defined = ~np.isnan(distance)
            resampled = drawn.aucs(contradictory, np.nan_to_num(distance), inside & defined)
            of_table[label] = {
                **_histogram(distance[contradictory], edges),
                "auc": metrics.auc(contradictory, np.nan_to_num(distance), inside & defined),
                "sd": float(np.std(resampled, ddof=1)),
            }
        pairs.append({"positive": a, "negative": b, "rows": int(contradictory.sum()), "tables": of_table})
    return {
        "user": user.name,
        "item": item.name,
        "rows": int(known.sum()),
        "edges": edges.tolist(),
        "tables": {label: _histogram(distance[known], edges) for label, distance in by_table.items()},
        "pairs": pairs,
    }


def unit_distances(u: NDArray, i: NDArray) -> NDArray[np.float64]:
    """Euclidean distances [N] of the rows of two arrays [N, D], each of length 1; NaN where one is all zeros."""
    with np.errstate(invalid="ignore", divide="ignore"):
        units = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (u.astype(np.float64), i.astype(np.float64))]
    distance: NDArray[np.float64] = np.linalg.norm(units[0] - units[1], axis=1)
    return distance


def _histogram(distance: NDArray, edges: NDArray) -> dict[str, Any]:
    defined = np.clip(distance[~np.isnan(distance)], 0.0, 2.0)  # rounding can exceed 2
    return {
        "mean": float(defined.mean()) if len(defined) else math.nan,
        "counts": np.histogram(defined, edges)[0].tolist(),
    }


def _tables(sets: Sets) -> Iterator[tuple[str, RankingModel, str]]:
    """Label, model and name of each table: a task's of the set of weights that scores the task, others of every set."""
    for member, tasks in sets:
        others = {task_table(task.name) for task in member.tasks} - {task_table(task) for task in tasks}
        for table in member.embeddings.tables:
            if table in others:
                continue
            own = len(sets) == 1 or table in map(task_table, tasks)
            yield (table if own else f"{table}, for {' and '.join(tasks)}"), member, table


def _columns(group: PackedTable, table: str) -> slice:
    first = group.tables.index(table) * group.dim
    return slice(first, first + group.dim)


def _read(model: RankingModel, table: str, feature: str, ids: NDArray) -> NDArray | None:
    """Embeddings [N, D] in a table of a feature's values, the sum of the rows of their ids [N, K]; padding has none.

    None where the feature has no such table.
    """
    group = next(group for group in model.embeddings.groups if feature in group.offsets)
    if table not in group.tables:
        return None
    rows = tf.gather(group.table, ids + group.offsets[feature]).numpy()[..., _columns(group, table)]
    summed: NDArray = np.sum(rows, axis=1, where=(ids != PADDING_ID)[..., np.newaxis])
    return summed


def _ids_of(schema: Schema, side: str) -> Feature | None:
    """The feature that holds the id of the user or of the item.

    It reads the schema's ``group`` or ``item`` column; where none does, it is the first categorical one of its side.
    """
    column = schema.group if side == "user" else schema.item
    single = [feature for feature in schema.features if feature.kind == "categorical"]
    of_column = [feature for feature in single if feature.column == column]
    return next(iter(of_column or [feature for feature in single if feature.side == side]), None)
