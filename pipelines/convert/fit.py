"""Pass 1 over the log: checks all rows, and on train rows counts vocabularies and fits numeric transforms.

:func:`fit` reads and cleans the rows of a unit, and leaves them in scratch files. There each feature's values are
dictionary-encoded, or ids already if the feature has a hash. :func:`build_vocabulary` merges a feature's counts with
those of the data that are extended. Worker processes run both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import hashed_ids, hashing, vocabulary
from pipelines.convert import growth, times
from pipelines.convert.encode import record_columns
from pipelines.convert.growth import Known, Step
from pipelines.convert.job import SPLIT, Job
from pipelines.convert.numeric_fit import Moments, NumericFit
from pipelines.convert.rows import Rows
from pipelines.hashed_ids import Distinct
from pipelines.log import source
from pipelines.log.parts import Unit
from pipelines.manifest import Growth, Vocabulary, history_path, vocabulary_path
from pipelines.schema import Feature, Schema
from pipelines.vocabulary import ValueCounts
from stem_util import files

_SEGMENT_ROWS = 1 << 19
_SEGMENT_BYTES = 1 << 30


@dataclass
class Fit:
    """What `fit` found in one unit. Counts by split are int64 or float64 [3]: train, validation, test.

    Attributes:
      segments: number of scratch files (segments) that hold the unit's rows, each with the rows of several chunks.
      rows: number of good rows, by split.
      first: the time (`Rows.times`) of the first good row, if there is one.
      last: the time of the last one, and its row id.
      inside: by task, the number of rows inside its sample space, by split.
      weights: by task, the sum of these rows' weights, by split; without row weights, their number.
      label_sums: by task, the sum of these rows' labels times their weights, by split.
      scales: by task with a standardised label, the moments of its labels in train, with the same weights.
      bad: number of bad rows by (column, reason).
      numerics: what was gathered for each numeric feature.
      distinct: the distinct values of train, by feature with a hash.
    """

    segments: int
    rows: np.ndarray
    first: int | None
    last: tuple[int, int] | None
    inside: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    label_sums: dict[str, np.ndarray]
    scales: dict[str, Moments]
    bad: Counter[tuple[str, str]]
    numerics: dict[str, NumericFit]
    distinct: dict[str, Distinct]


def fit(job: Job, unit: Unit) -> Fit:
    """Checks the rows of a unit, counts and fits on its train rows, and leaves rows and counts in scratch files."""
    schema = job.cleaner.schema
    result = Fit(
        segments=0,
        rows=np.zeros(3, np.int64),
        first=None,
        last=None,
        inside={name: np.zeros(3, np.int64) for name in schema.task_names},
        weights={name: np.zeros(3) for name in schema.task_names},
        label_sums={name: np.zeros(3) for name in schema.task_names},
        scales={task.name: Moments() for task in schema.tasks if task.label.standardise},
        bad=Counter(),
        numerics={f.name: NumericFit.empty(f) for f in schema.features if f.kind == "numeric"},
        distinct={f.name: Distinct() for f in schema.features if f.hash is not None},
    )
    counts = {name: ValueCounts(schema.feature(name).dtype) for name in job.counted_features()}
    segment: list[Rows] = []
    for chunk in source.read(job.log, unit, job.cleaner.columns, skip_malformed=job.cleaner.drop):
        rows, bad = job.cleaner.clean(chunk, job.file_starts[unit.file] + chunk.rows, unit.file)
        result.bad.update(bad)
        _count_labels(result, schema, rows)
        if len(rows.times):
            place = int(rows.times.argmax())
            first, last = int(rows.times.min()), (int(rows.times[place]), int(rows.row_ids[place]))
            result.first = first if result.first is None else min(result.first, first)
            result.last = last if result.last is None else max(result.last, last)
        train = rows.split == 0
        if result.numerics and train.any():
            hashes = hashing.seeded64(rows.row_ids[train], job.seed, "sample")
            for name, numeric in result.numerics.items():
                numeric.add(rows.numerics[name][train], hashes)
        segment.append(rows)
        if (
            sum(len(part.row_ids) for part in segment) >= _SEGMENT_ROWS
            or sum(part.nbytes for part in segment) >= _SEGMENT_BYTES
        ):
            _leave(job, unit, result, counts, segment)
            segment = []
    if any(len(part.row_ids) for part in segment):
        _leave(job, unit, result, counts, segment)
    for name, counter in counts.items():
        _write_table(job, job.counts_path(name, unit.index), counter.table())
    pa.default_memory_pool().release_unused()
    return result


def _count_labels(result: Fit, schema: Schema, rows: Rows) -> None:
    result.rows += np.bincount(rows.split, minlength=3)
    for number in range(3):
        of_split = rows.split == number
        if not of_split.any():
            continue
        for task in schema.tasks:
            inside = of_split & ~np.isnan(rows.labels[task.name])
            labels, count = rows.labels[task.name][inside].astype(np.float64), int(np.count_nonzero(inside))
            weights = None if task.row_weight is None else rows.weights[task.row_weight][inside].astype(np.float64)
            result.inside[task.name][number] += count
            result.weights[task.name][number] += count if weights is None else weights.sum()
            result.label_sums[task.name][number] += (labels if weights is None else labels * weights).sum()
            if number == 0 and task.label.standardise:
                result.scales[task.name] += Moments.of(labels, weights)


def _leave(job: Job, unit: Unit, result: Fit, counts: dict[str, ValueCounts], segment: list[Rows]) -> None:
    """Writes the rows of a segment to a scratch file, and counts the values of its train rows."""
    rows = Rows.join(segment)
    train = rows.split == 0

    def places(feature: Feature, values: pa.Array) -> pa.Array:
        lists = rows.lists.get(feature.name)
        counted = train if lists is None else np.repeat(train, lists.lengths)
        if feature.hash is not None:
            codes = hashed_ids.codes(values)
            result.distinct[feature.name].add(codes[counted])
            return pa.array(hashed_ids.ids(codes, feature.hash))
        encoded = vocabulary.encode(values)
        times = rows.times if lists is None else np.repeat(rows.times, lists.lengths)
        counts[feature.name].add_encoded(encoded, counted, times)
        return encoded

    columns = record_columns(job.cleaner.schema, rows, places) | {SPLIT: pa.array(rows.split)}
    _write_table(job, job.segment_path(unit.index, result.segments), pa.table(columns))
    result.segments += 1


def _write_table(job: Job, path: str, table: pa.Table) -> None:
    with job.written(path) as beside, pa.OSFile(beside, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def build_vocabulary(job: Job, name: str, step: Step) -> tuple[Vocabulary, Growth]:
    """Merges a feature's counts, and writes its vocabulary and what the next conversion needs; returns their sizes."""
    feature = job.cleaner.schema.feature(name)
    counts = ValueCounts(feature.dtype)
    for unit in job.log.units:
        with pa.OSFile(job.counts_path(name, unit.index)) as file:
            counts.add_counts(pa.ipc.open_file(file).read_all())
    merged = counts.table()
    last = np.full(len(merged), growth.UNKNOWN)
    if step.units is not None:
        last = times.microseconds(merged["time"].to_numpy(), step.units)
    seen = np.full(len(merged), step.generation, np.int32)
    counted = Known(merged["value"], merged["count"].to_numpy(), seen, last)
    known, rare = (
        [Known.nothing(merged["value"].type)] * 2 if step.ancestor is None else Known.load(step.ancestor, name)
    )
    grown = growth.grow(known, rare, counted, feature.min_count, step)
    _save(job, vocabulary_path(job.directory, name), {"value": grown.known.values, "count": grown.known.counts})
    columns = {"conversion": grown.known.seen, "time": grown.known.times}
    _save(job, history_path(job.directory, "seen", name), columns)
    columns = {"value": grown.rare.values, "count": grown.rare.counts}
    columns |= {"conversion": grown.rare.seen, "time": grown.rare.times}
    _save(job, history_path(job.directory, "rare", name), columns)
    if step.ancestor is not None:
        _save(job, history_path(job.directory, "changed", name), grown.changed)
    pa.default_memory_pool().release_unused()
    return (
        Vocabulary(len(grown.known), grown.distinct, grown.free),
        Growth(grown.new, grown.evicted, grown.reassigned, len(grown.rare)),
    )


def _save(job: Job, path: str, columns: Mapping[str, Any] | pa.Table) -> None:
    with job.written(path) as beside:
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), beside)
        files.sync(beside)
