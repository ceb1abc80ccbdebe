"""Measures versions on the held-back rows of a run: the same raw rows for all, through their exported signatures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export import publish, raw
from export.gate.checks import Scored
from export.gate.measures import Rows
from export.published import Call, Published
from export.server.known_values import KnownValues
from pipelines import manifest as manifests
from pipelines.log import source
from pipelines.log.casts import EMPTY
from pipelines.manifest import Manifest
from pipelines.schema import Task
from stem_tf.evaluation import standing
from stem_tf.evaluation.predictions import Predictions
from stem_util.errors import JobError, UserError
from stem_util.progress import Progress

_BATCH_ROWS = 8192
_CANDIDATES = 200
_WARM_UP, _CALLS = 5, 40

Arrays = dict[str, NDArray]


def rows_of(predicted: Predictions, tasks: Sequence[Task], resamples: int) -> dict[str, Rows]:
    """The held-back rows of each task to judge, with the same draws of users for all."""
    drawn = standing.drawn_again(predicted, resamples)
    return {
        task.name: Rows(task, predicted.labels[task.name], predicted.weights_of(task.name).astype(np.float64), drawn)
        for task in tasks
    }


def measure(versions: Sequence[Published], manifest: Manifest, split: str, row_ids: NDArray) -> list[Scored]:
    """Scores the raw rows of a split with each version, and times calls of all in turn.

    Args:
      versions: the candidate, and the one that is served; with the features of the run's data.
      manifest: of the run's data.
      split: its name.
      row_ids: int64 [N], ascending: the rows that the scores are for.

    Raises:
      UserError: raw rows are missing.
      JobError: a version cannot be loaded, or fails.
    """
    calls = [version.signature("serving_default") for version in versions]
    known = [_vocabularies(version.directory) for version in versions]
    scores: list[dict[str, list[NDArray]]] = [{task: [] for task in version.tasks} for version in versions]
    unknown = [np.zeros((2, len(of_version)), np.int64) for of_version in known]
    found: list[NDArray] = []
    first: Arrays | None = None
    with Progress(len(row_ids), unit="rows", desc="gate") as progress:
        for ids, arrays in _raw_rows(manifest, split):
            found.append(ids)
            first = first or {name: values[:_CANDIDATES] for name, values in arrays.items()}
            answers = [call(arrays) for call in calls]
            for answer, vocabularies, own, counts in zip(answers, known, scores, unknown, strict=True):
                for task, parts in own.items():
                    parts.append(answer[task])
                counts += _counts(vocabularies, arrays)
            progress.update(len(ids))
    places = _places(np.concatenate(found) if found else np.zeros(0, np.int64), row_ids, manifest, split)
    assert first is not None  # `_places` found every row
    seconds = _seconds([_caller(version, first) for version in versions])
    return [
        Scored(
            {task: np.concatenate(parts)[places] for task, parts in own.items()},
            {name: float(n[1] / n[0]) if n[0] else float("nan") for name, n in zip(names, counts.T, strict=True)},
            publish.size(version.directory) / 1e6,
            1000 * took,
        )
        for version, names, own, counts, took in zip(versions, known, scores, unknown, seconds, strict=True)
    ]


def check_finite(scored: Scored, what: str) -> None:
    """Refuses scores that are not numbers.

    Raises:
      JobError: naming the task.
    """
    for task, scores in scored.scores.items():
        if bad := int(np.count_nonzero(~np.isfinite(scores))):
            raise JobError(f"{what}: {bad:,} of {len(scores):,} scores of task '{task}' are not finite")


def _raw_rows(manifest: Manifest, split: str) -> Iterator[tuple[NDArray, Arrays]]:
    """The rows of a split, a batch at a time: their ids, and tensors of ``serving_default``."""
    schema = raw.without_outcomes(manifest.schema)
    log = source.open_log(sorted(map(str, (Path(manifest.data_dir) / "raw" / split).glob("*.parquet"))))
    for rows, columns, _ in raw.read(log, schema, ["row_id"]):
        ids, arrays = columns["row_id"].to_numpy(), raw.tensors(schema, rows)
        for start in range(0, len(ids), _BATCH_ROWS):
            part = slice(start, start + _BATCH_ROWS)
            yield ids[part], {name: values[part] for name, values in arrays.items()}


def _places(found: NDArray, wanted: NDArray, manifest: Manifest, split: str) -> NDArray:
    """Where the wanted rows are among those found."""
    order = np.argsort(found, kind="stable")
    places = np.minimum(np.searchsorted(found, wanted, sorter=order), max(0, len(found) - 1))
    if not len(found) or not np.array_equal(found[order][places], wanted):
        raise UserError(f"{manifest.data_dir}/raw/{split} lacks rows of the records; convert the log again")
    return order[places]


def _vocabularies(version: Path) -> dict[str, KnownValues]:
    """The values that a version knows, by feature with a vocabulary."""
    tree = json.loads((version / manifests.FILENAME).read_bytes())
    dtypes = {feature["name"]: feature["dtype"] for feature in tree["schema"]["features"]}
    return {
        feature: KnownValues(version / name, dtypes[feature]) for feature, name in publish.vocabularies(tree).items()
    }


def _counts(vocabularies: Mapping[str, KnownValues], arrays: Arrays) -> NDArray[np.int64]:
    """How many values each feature has, and how many of these are unknown, [2, features]."""
    counts = np.zeros((2, len(vocabularies)), np.int64)
    for place, (feature, known) in enumerate(vocabularies.items()):
        values = arrays[feature]
        given = values[values != EMPTY["string" if values.dtype == object else "int64"]]
        counts[:, place] = len(given), known.unknown(given)
    return counts


def _caller(version: Published, rows: Arrays) -> tuple[Call, Arrays]:
    """A call of `_CANDIDATES` candidates, or rows where the model does not rank, and its tensors."""
    chosen = {name: values[np.arange(_CANDIDATES) % len(values)] for name, values in rows.items()}
    if not version.ranks:
        return version.signature("serving_default"), chosen
    items = {feature.name for feature in version.schema.features if feature.side == "item"}
    return version.signature("rank"), {n: v[np.newaxis] if n in items else v[:1] for n, v in chosen.items()}


def _seconds(callers: Sequence[tuple[Call, Arrays]]) -> list[float]:
    """The median of a call of each, in turn, so that whatever else the machine does slows them alike."""
    took = np.zeros((_WARM_UP + _CALLS, len(callers)))
    for times in took:
        for place, (call, arrays) in enumerate(callers):
            started = time.perf_counter()
            call(arrays)
            times[place] = time.perf_counter() - started
    return [float(seconds) for seconds in np.median(took[_WARM_UP:], axis=0)]
