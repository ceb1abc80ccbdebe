"""Pass 2 over the log: turns values into ids, and separates rows by split.

:func:`encode` looks up the dictionaries that pass 1 left rather than the values of each row, and leaves encoded rows in
scratch files, those of train sorted by a hash of seed and row_id. It reads the log again only for the raw rows of
validation and test. Worker processes run it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import hashed_ids, hashing, records, vocabulary
from pipelines.convert.job import HASH, SPLIT, Job
from pipelines.convert.raw_columns import kept_columns, kept_types
from pipelines.convert.rows import Rows
from pipelines.log import source
from pipelines.log.parts import Unit
from pipelines.manifest import SPLITS, vocabulary_path
from pipelines.schema import Feature, Schema
from pipelines.vocabulary import Lookup
from stem_util import files


class _Outputs:
    """The files that a unit's rows go to: each is whole once the context ends without an error."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._open = contextlib.ExitStack()
        self._writers: dict[str, pa.ipc.RecordBatchFileWriter | pq.ParquetWriter] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, traceback)

    def write(self, path: str, batch: pa.RecordBatch) -> None:
        if path not in self._writers:
            beside = self._open.enter_context(self._job.written(path))
            parquet = path.endswith(".parquet")
            writer = (pq.ParquetWriter if parquet else pa.ipc.new_file)(beside, batch.schema)
            if parquet:  # belongs to the output; the others are scratch files
                self._open.callback(files.sync, beside)
            self._writers[path] = self._open.enter_context(writer)
        self._writers[path].write_batch(batch)


@dataclass
class Encoded:
    """Counts in one unit's encoded rows, by split, int64 [3] each.

    Attributes:
      values: number of values, by feature that has ids.
      rare: number of values with the rare id, by feature that has ids.
    """

    values: dict[str, np.ndarray]
    rare: dict[str, np.ndarray]


def encode(job: Job, unit: Unit, segments: int, keep_raw: bool) -> Encoded:
    """Encodes a unit.

    Args:
      job: the conversion.
      unit: a piece of the log.
      segments: number of segments that `fit` left.
      keep_raw: whether the unit has rows of validation or test, whose raw columns are kept.
    """
    features = [feature for feature in job.cleaner.schema.features if feature.has_ids]
    counts = Encoded(*({feature.name: np.zeros(3, np.int64) for feature in features} for _ in range(2)))
    with _Outputs(job) as outputs:
        encoded = (_encode(job, unit, number, counts, outputs) for number in range(segments))
        if keep_raw:
            _keep_raw(job, unit, encoded, outputs)
        for _ in encoded:
            pass
    pa.default_memory_pool().release_unused()
    return counts


def _encode(job: Job, unit: Unit, number: int, counts: Encoded, outputs: _Outputs) -> tuple[np.ndarray, np.ndarray]:
    """Writes the encoded rows of a segment, by split; returns row_id, int64 [n], and split, uint8 [n], of each row."""
    with pa.memory_map(job.segment_path(unit.index, number)) as file:
        batch = _with_ids(job, pa.ipc.open_file(file).get_batch(0))
    row_ids, splits = (batch.column(name).to_numpy() for name in ("key:row_id", SPLIT))
    batch = batch.drop_columns([SPLIT])
    for i, split in enumerate(SPLITS):
        places = np.flatnonzero(splits == i)
        if not len(places):
            continue
        if split == "train":
            hashes = hashing.seeded64(row_ids[places], job.seed, "shuffle")
            order = np.argsort(hashes)
            rows = batch.take(pa.array(places[order])).append_column(HASH, pa.array(hashes[order]))
        else:
            rows = batch.take(pa.array(places))
        _count_ids(counts, i, rows, job.cleaner.schema)
        if job.layouts:
            outputs.write(job.rows_path(split, unit.index), rows)
    return row_ids, splits


def _keep_raw(job: Job, unit: Unit, encoded: Iterator[tuple[np.ndarray, np.ndarray]], outputs: _Outputs) -> None:
    """Writes the raw rows of validation and test; ``encoded`` yields row_id and split of the good rows in order."""
    row_ids, splits = np.zeros(0, np.int64), np.zeros(0, np.uint8)
    kinds = kept_types(job.log, job.cleaner.schema)
    names = [name for name in kinds if name != "row_id"]  # the conversion writes its own
    for chunk in source.read(job.log, unit, names, skip_malformed=job.cleaner.drop):
        if not len(chunk.rows):
            continue
        ids = job.file_starts[unit.file] + chunk.rows
        while not len(row_ids) or row_ids[-1] < ids[-1]:
            more = next(encoded, None)
            if more is None:
                break
            row_ids, splits = np.append(row_ids, more[0]), np.append(splits, more[1])
        end = np.searchsorted(row_ids, ids[-1], "right")
        for i, split in enumerate(SPLITS[1:], start=1):
            kept = row_ids[:end][splits[:end] == i]
            if len(kept):
                columns = kept_columns(chunk.take(np.searchsorted(ids, kept)).columns, kinds)
                batch = pa.RecordBatch.from_pydict(columns | {"row_id": pa.array(kept)})
                outputs.write(job.raw_path(split, f"unit-{unit.index}"), batch)
        row_ids, splits = row_ids[end:], splits[end:]


def _with_ids(job: Job, batch: pa.RecordBatch) -> pa.RecordBatch:
    """A segment with its values replaced by ids."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for name in job.counted_features():
        key, lookup = f"feature:{name}", lookup_of(vocabulary_path(job.directory, name))
        array = columns[key]
        if pa.types.is_list(array.type):
            columns[key] = pa.ListArray.from_arrays(array.offsets, pa.array(lookup(array.values)))
        else:
            columns[key] = pa.array(lookup(array))
    return pa.RecordBatch.from_pydict(columns)


def _count_ids(counts: Encoded, split: int, batch: pa.RecordBatch, schema: Schema) -> None:
    for name in counts.values:
        ids = batch.column(f"feature:{name}")
        ids = (ids if pa.types.is_integer(ids.type) else ids.flatten()).to_numpy()
        counts.values[name][split] += len(ids) // schema.feature(name).ids_per_value
        counts.rare[name][split] += np.count_nonzero(ids == vocabulary.RARE_ID)


def record_columns(schema: Schema, rows: Rows, ids: Callable[[Feature, pa.Array], pa.Array]) -> dict[str, pa.Array]:
    """Columns of `pipelines.records` for some rows.

    ``ids(feature, raw values [n])`` makes those of ids, `Feature.ids_per_value` of each value side by side.
    """
    columns: dict[str, pa.Array] = {}
    for feature in schema.features:
        name, key, several = feature.name, f"feature:{feature.name}", feature.ids_per_value
        if feature.kind == "categorical":
            found = ids(feature, rows.ids[name])
            columns[key] = found if several == 1 else pa.FixedSizeListArray.from_arrays(found, several)
        elif feature.kind == "multivalent":
            lists = rows.lists[name]
            columns[key] = records.lists(lists.lengths * several, ids(feature, lists.values), key)
        elif feature.kind == "numeric":
            columns[key] = pa.array(rows.numerics[name])
        else:
            flat = pa.array(rows.vectors[name].reshape(-1))
            columns[key] = pa.FixedSizeListArray.from_arrays(flat, feature.length)
    columns |= {f"label:{name}": pa.array(labels) for name, labels in rows.labels.items()}
    columns |= {f"weight:{name}": pa.array(weights) for name, weights in rows.weights.items()}
    columns |= {f"key:{role}": pa.array(hashing.key64(values)) for role, values in rows.keys.items()}
    return columns | {"key:row_id": pa.array(rows.row_ids)}


def encoded_rows(data_dir: str, schema: Schema, rows: Rows) -> pa.RecordBatch:
    """Columns of `pipelines.records` for some rows, with the vocabularies under ``data_dir``."""

    def ids(feature: Feature, values: pa.Array) -> pa.Array:
        if feature.hash is not None:
            return pa.array(hashed_ids.ids(hashed_ids.codes(values), feature.hash))
        return pa.array(lookup_of(vocabulary_path(data_dir, feature.name)).plain(values))

    return pa.RecordBatch.from_pydict(record_columns(schema, rows, ids))


@functools.cache
def lookup_of(path: str) -> Lookup:
    """The lookup of a vocabulary file; cached, so that a process reads each file once."""
    return Lookup(vocabulary.load(path)["value"])


def forget_vocabularies() -> None:
    """Frees the lookups that `encode` caches; the next conversion in this process may reuse the same paths."""
    lookup_of.cache_clear()
