"""Pass 1 over the log: checks all rows, and on train rows counts vocabularies and fits numeric transforms.

:func:`fit` reads and cleans the rows of a unit, and leaves them in scratch files. There each feature's values are
dictionary-encoded, or ids already if the feature has a hash. :func:`build_vocabulary` merges a feature's counts. Worker
processes run both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines import hashed_ids, hashing, vocabulary
from pipelines.convert.encode import record_columns
from pipelines.convert.job import SPLIT, Job
from pipelines.convert.numeric_fit import Moments, NumericFit
from pipelines.convert.rows import Rows
from pipelines.hashed_ids import Distinct
from pipelines.log import source
from pipelines.log.parts import Unit
from pipelines.manifest import vocabulary_path
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
        counts[feature.name].add_encoded(encoded, counted)
        return encoded

    columns = record_columns(job.cleaner.schema, rows, places) | {SPLIT: pa.array(rows.split)}
    _write_table(job, job.segment_path(unit.index, result.segments), pa.table(columns))
    result.segments += 1


def _write_table(job: Job, path: str, table: pa.Table) -> None:
    with job.written(path) as beside, pa.OSFile(beside, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def build_vocabulary(job: Job, name: str) -> tuple[int, int]:
    """Merges a feature's counts and writes its vocabulary; returns its size and the number of distinct values."""
    feature = job.cleaner.schema.feature(name)

    def pieces() -> Iterator[pa.Table]:
        for unit in job.log.units:
            with pa.OSFile(job.counts_path(name, unit.index)) as file:
                yield pa.ipc.open_file(file).read_all()

    table, distinct = vocabulary.build(pieces(), feature.dtype, feature.min_count)
    with job.written(vocabulary_path(job.directory, name)) as beside:
        vocabulary.save(table, beside)
        files.sync(beside)
    return len(table), distinct
