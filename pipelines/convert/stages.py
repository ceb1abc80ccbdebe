"""What conversion does to one unit of the log, one feature or one shard: the functions that worker processes run.

1. `scan` counts the rows of CSV files and gathers what a split by time or by last rows is settled from.
2. `fit` reads and cleans rows, leaves them in scratch files with each feature's values as a dictionary, and counts
   vocabularies and fits numeric transforms on those of train; `build_vocabulary` merges a feature's counts.
3. `encode` turns the dictionaries, not the rows, into ids, and leaves encoded rows in scratch files: train rows sorted
   by a hash of seed and row_id. It reads the log again only for the raw rows of validation and test.
4. `write_shard` gathers the rows of one shard from the scratch files of all units and writes its records.

None imports TensorFlow. Everything is bounded by segments and shards, except vocabularies.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import hashing, records, vocabulary
from pipelines.convert.cleaning import Cleaner, Rows, kept_columns, kept_types
from pipelines.convert.numeric_fit import Moments, NumericFit
from pipelines.convert.split import LastRows, LastSplit, RandomSplit, TimeSplit
from pipelines.log import source
from pipelines.log.source import Chunk, Log, Unit
from pipelines.manifest import SPLITS, Shard, vocabulary_path
from pipelines.schema import Schema
from pipelines.tfrecord import Writer
from pipelines.vocabulary import Lookup, ValueCounts
from stem_util import files

_Writers = dict[str, pa.ipc.RecordBatchFileWriter | pq.ParquetWriter]

_HASH = "hash"
_SPLIT = "split"
_SEGMENT_ROWS = 1 << 19
_SEGMENT_BYTES = 1 << 30
MALFORMED = ("", "wrong number of columns")


@dataclass(frozen=True)
class Job:
    """One conversion, as its workers see it.

    Attributes:
      log: the input.
      cleaner: schema, split policy, policy for bad rows.
      file_starts: row_id of each file's first row.
      seed: of the shuffle.
      layouts: which of blocks and rows to write, if any.
      block_rows: rows of a block.
      directory: where the output is built.
      scratch: directory of intermediate files.
    """

    log: Log
    cleaner: Cleaner
    file_starts: tuple[int, ...]
    seed: int
    layouts: tuple[str, ...]
    block_rows: int
    directory: str
    scratch: str

    def chunks(self, unit: Unit, columns: list[str]) -> Iterator[tuple[Chunk, Rows, Counter[tuple[str, str]]]]:
        """Reads and cleans a unit: (chunk, its good rows, counts of its bad ones)."""
        for chunk in source.read(self.log, unit, columns, skip_malformed=self.cleaner.drop):
            rows, bad = self.cleaner.clean(chunk, self.file_starts[unit.file] + chunk.rows, unit.file)
            if chunk.malformed:
                bad[MALFORMED] += chunk.malformed
            yield chunk, rows, bad

    def counted_features(self) -> list[str]:
        """Names of the features that have a vocabulary."""
        return [f.name for f in self.cleaner.schema.features if f.kind in ("categorical", "multivalent")]

    def counts_path(self, feature: str, unit: int) -> str:
        return os.path.join(self.scratch, f"counts-{self.counted_features().index(feature)}-{unit}.arrow")

    def segment_path(self, unit: int, number: int) -> str:
        return os.path.join(self.scratch, f"clean-{unit}-{number}.arrow")

    def rows_path(self, split: str, unit: int) -> str:
        return os.path.join(self.scratch, f"{split}-{unit}.arrow")

    def raw_path(self, split: str, part: int | str) -> str:
        number = f"{part:05d}" if isinstance(part, int) else part
        return os.path.join(self.directory, "raw", split, f"part-{number}.parquet")


def scan(log: Log, unit: Unit, cleaner: Cleaner, gather: bool, path: str) -> int:
    """Counts a unit's rows, and leaves at ``path`` what a split by time or by last rows is settled from.

    Args:
      log: the input.
      unit: a piece of it.
      cleaner: its policy for bad rows is followed; the limits of its split are not known yet.
      gather: write the times of the rows that have one as keys that sort as they do, or (`LastSplit`) the last rows of
        each group, by their place in the file; only count otherwise.
      path: of the file.
    """
    if not gather:
        return source.count_rows(log, unit, skip_malformed=cleaner.drop)
    rows, policy, last = 0, cleaner.split, LastRows()
    of_last = isinstance(policy, LastSplit)
    # Whether a last row is a good one depends on all of its columns.
    columns = cleaner.columns if of_last and cleaner.drop else list(policy.columns)
    with open(path, "wb") as file:
        for chunk in source.read(log, unit, columns, skip_malformed=cleaner.drop):
            rows += len(chunk.rows) + chunk.malformed
            if isinstance(policy, TimeSplit):
                file.write(cleaner.times(chunk, policy.column, policy.kind).tobytes())
            elif isinstance(policy, LastSplit):
                groups, times, places = cleaner.group_times(chunk, policy)
                if cleaner.drop:
                    unsplit = replace(cleaner, split=RandomSplit((1.0, 0.0, 0.0), 0))
                    kept = np.isin(places, unsplit.clean(chunk, chunk.rows, unit.file)[0].places)
                    groups, times, places = groups[kept], times[kept], places[kept]
                last.add(groups, times, chunk.rows[places])
        if of_last:
            np.save(file, last.kept())
    return rows


@dataclass
class Fit:
    """What `fit` found in one unit. By split: int64 or float64 [3].

    Attributes:
      segments: how many scratch files hold the unit's rows, each some chunks together.
      rows: good rows by split.
      inside: by task, rows inside its sample space by split.
      weights: by task, the sum of their row weights by split, or their number where the task has none.
      label_sums: by task, the sum of their labels, times the weights, by split.
      scales: by task whose label is standardised, the moments of its labels in train, weighted alike.
      bad: bad rows by (column, reason).
      numerics: by numeric feature.
    """

    segments: int
    rows: np.ndarray
    inside: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    label_sums: dict[str, np.ndarray]
    scales: dict[str, Moments]
    bad: Counter[tuple[str, str]]
    numerics: dict[str, NumericFit]


def fit(job: Job, unit: Unit) -> Fit:
    """Pass 1 over a unit: checks every row, counts and fits on those of train, leaves rows and counts in scratch."""
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
    )
    counts = {name: ValueCounts(schema.feature(name).dtype) for name in job.counted_features()}
    segment: list[Rows] = []
    for _, rows, bad in job.chunks(unit, job.cleaner.columns):
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
        _write_table(job.counts_path(name, unit.index), counter.table())
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
    """Writes the rows of a segment to scratch, and counts the values of its train rows."""
    rows = Rows.join(segment)
    train = rows.split == 0

    def places(name: str, values: pa.Array) -> pa.Array:
        encoded = vocabulary.encode(values)
        lists = rows.lists.get(name)
        counts[name].add_encoded(encoded, train if lists is None else np.repeat(train, lists.lengths))
        return encoded

    columns = _columns(job.cleaner.schema, rows, places) | {_SPLIT: pa.array(rows.split)}
    _write_table(job.segment_path(unit.index, result.segments), pa.table(columns))
    result.segments += 1


def _columns(schema: Schema, rows: Rows, ids: Callable[[str, pa.Array], pa.Array]) -> dict[str, pa.Array]:
    """The columns of `records` for some rows; ``ids`` makes those of a feature's raw values."""
    columns: dict[str, pa.Array] = {}
    for feature in schema.features:
        name, key = feature.name, f"feature:{feature.name}"
        if feature.kind == "categorical":
            columns[key] = ids(name, rows.ids[name])
        elif feature.kind == "multivalent":
            lists = rows.lists[name]
            columns[key] = records.lists(lists.lengths, ids(name, lists.values), key)
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
    """The columns of `records` for some rows, by the vocabularies under ``data_dir``."""

    def ids(name: str, values: pa.Array) -> pa.Array:
        return pa.array(_lookup(vocabulary_path(data_dir, name)).plain(values))

    return pa.RecordBatch.from_pydict(_columns(schema, rows, ids))


def _write_table(path: str, table: pa.Table) -> None:
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def build_vocabulary(job: Job, name: str) -> tuple[int, int]:
    """Merges a feature's counts and writes its vocabulary; returns its size and the number of distinct values."""
    feature = job.cleaner.schema.feature(name)

    def pieces() -> Iterator[pa.Table]:
        for unit in job.log.units:
            path = job.counts_path(name, unit.index)
            with pa.OSFile(path) as file:
                yield pa.ipc.open_file(file).read_all()
            os.unlink(path)

    table, distinct = vocabulary.build(pieces(), feature.dtype, feature.min_count)
    path = vocabulary_path(job.directory, name)
    vocabulary.save(table, path)
    files.sync(path)
    return len(table), distinct


@functools.cache
def _lookup(path: str) -> Lookup:
    """A process reads each vocabulary once."""
    return Lookup(vocabulary.load(path)["value"])


def forget_vocabularies() -> None:
    """Frees what `encode` keeps between units; the next conversion in this process may use the same paths again."""
    _lookup.cache_clear()


@dataclass
class Encoded:
    """Counts of one unit's encoded rows, by split: int64 [3].

    Attributes:
      values: by feature with a vocabulary, its values.
      rare: likewise, its values that have the rare id.
    """

    values: dict[str, np.ndarray]
    rare: dict[str, np.ndarray]


def encode(job: Job, unit: Unit, segments: int, keep_raw: bool) -> Encoded:
    """Pass 2 over a unit.

    Args:
      job: of the conversion.
      unit: a piece of the log.
      segments: how many `fit` left.
      keep_raw: the unit has rows of validation or test, whose raw columns are kept.
    """
    features = job.counted_features()
    counts = Encoded(*({name: np.zeros(3, np.int64) for name in features} for _ in range(2)))
    writers: _Writers = {}
    encoded = (_encode(job, unit, number, counts, writers) for number in range(segments))
    try:
        if keep_raw:
            _keep_raw(job, unit, encoded, writers)
        for _ in encoded:
            pass
    finally:
        for writer in writers.values():
            writer.close()
    for path in writers:
        if path.endswith(".parquet"):
            files.sync(path)
    pa.default_memory_pool().release_unused()
    return counts


def _encode(job: Job, unit: Unit, number: int, counts: Encoded, writers: _Writers) -> tuple[np.ndarray, np.ndarray]:
    """Writes the rows of a segment, encoded, by split; returns row_id, int64 [n], and split, uint8 [n], of all."""
    path = job.segment_path(unit.index, number)
    with pa.memory_map(path) as file:
        batch = _with_ids(job, pa.ipc.open_file(file).get_batch(0))
    os.unlink(path)
    row_ids, splits = (batch.column(name).to_numpy() for name in ("key:row_id", _SPLIT))
    batch = batch.drop_columns([_SPLIT])
    for i, split in enumerate(SPLITS):
        places = np.flatnonzero(splits == i)
        if not len(places):
            continue
        if split == "train":
            hashes = hashing.seeded64(row_ids[places], job.seed, "shuffle")
            order = np.argsort(hashes)
            rows = batch.take(pa.array(places[order])).append_column(_HASH, pa.array(hashes[order]))
        else:
            rows = batch.take(pa.array(places))
        _count_ids(counts, i, rows)
        if job.layouts:
            _write(writers, job.rows_path(split, unit.index), rows)
    return row_ids, splits


def _keep_raw(job: Job, unit: Unit, encoded: Iterator[tuple[np.ndarray, np.ndarray]], writers: _Writers) -> None:
    """Writes the raw rows of validation and test; ``encoded`` gives row_id and split of a unit's good rows in turn."""
    row_ids, splits = np.zeros(0, np.int64), np.zeros(0, np.uint8)
    kinds = kept_types(job.log, job.cleaner.schema)
    names = [name for name in kinds if name != "row_id"]  # ours takes its place
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
                _write(writers, job.raw_path(split, f"unit-{unit.index}"), batch)
        row_ids, splits = row_ids[end:], splits[end:]


def _write(writers: _Writers, path: str, batch: pa.RecordBatch) -> None:
    if path not in writers:
        parquet = path.endswith(".parquet")
        writers[path] = (pq.ParquetWriter if parquet else pa.ipc.new_file)(path, batch.schema)
    writers[path].write_batch(batch)


def _with_ids(job: Job, batch: pa.RecordBatch) -> pa.RecordBatch:
    """A segment with ids in the place of dictionaries."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for name in job.counted_features():
        key, lookup = f"feature:{name}", _lookup(vocabulary_path(job.directory, name))
        array = columns[key]
        if pa.types.is_list(array.type):
            columns[key] = pa.ListArray.from_arrays(array.offsets, pa.array(lookup(array.values)))
        else:
            columns[key] = pa.array(lookup(array))
    return pa.RecordBatch.from_pydict(columns)


def _count_ids(counts: Encoded, split: int, batch: pa.RecordBatch) -> None:
    for name in counts.values:
        ids = batch.column(f"feature:{name}")
        ids = (ids.flatten() if pa.types.is_list(ids.type) else ids).to_numpy()
        counts.values[name][split] += len(ids)
        counts.rare[name][split] += np.count_nonzero(ids == vocabulary.RARE_ID)


@dataclass(frozen=True)
class ShardPlan:
    """Which rows a shard holds.

    Attributes:
      split: its split.
      index: its number.
      shards: of how many.
      pieces: (unit, first row, end) among the rows of the split in the units' scratch files. Rows of train are taken by
        hash from whole units.
    """

    split: str
    index: int
    shards: int
    pieces: tuple[tuple[int, int, int], ...]


def plan_shards(split: str, unit_rows: list[int], shard_rows: int) -> list[ShardPlan]:
    """Divides the rows of a split, ``unit_rows`` in each unit, into shards of about ``shard_rows``."""
    ends = np.cumsum(unit_rows).tolist()
    total = ends[-1] if ends else 0
    shards = -(-total // shard_rows)
    plans = []
    for index in range(shards):
        low, high = (0, total) if split == "train" else (index * shard_rows, (index + 1) * shard_rows)
        pieces = [
            (unit, max(low - (end - rows), 0), min(high - (end - rows), rows))
            for unit, (rows, end) in enumerate(zip(unit_rows, ends, strict=True))
            if rows and low < end and high > end - rows
        ]
        plans.append(ShardPlan(split, index, shards, tuple(pieces)))
    return plans


def write_shard(job: Job, plan: ShardPlan) -> dict[str, Shard]:
    """Writes one shard in every layout."""
    rows = _gather(job, plan)
    shards = {}
    for layout in job.layouts:
        path = os.path.join(layout, f"{plan.split}-{plan.index:05d}-of-{plan.shards:05d}.tfrecord")
        with Writer(os.path.join(job.directory, path)) as writer:
            if layout == "blocks":
                for _, payload in records.blocks(rows, job.block_rows):
                    writer.write(payload)
            else:
                for payload in records.rows(rows):
                    writer.write(payload)
        shards[layout] = Shard(path, rows.num_rows, writer.records, writer.bytes, writer.sha256)
    del rows
    pa.default_memory_pool().release_unused()
    return shards


def _gather(job: Job, plan: ShardPlan) -> pa.RecordBatch:
    """A shard's rows in their order: train by hash (hashes of different rows differ), others by row_id."""
    parts = []
    for unit, first, end in plan.pieces:
        with pa.memory_map(job.rows_path(plan.split, unit)) as file:
            reader = pa.ipc.open_file(file)
            schema, start = reader.schema, 0
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                low, high = max(first - start, 0), min(end - start, batch.num_rows)
                start += batch.num_rows
                if plan.split == "train":
                    low, high = _hash_range(batch.column(_HASH).to_numpy(), plan.index, plan.shards)
                if low < high:
                    parts.append(batch.slice(low, high - low))
    for field in schema:
        if pa.types.is_list(field.type):
            values = sum(len(part.column(field.name).flatten()) for part in parts)
            records.check_values(values, field.name, f"a shard of {plan.split}; convert with a smaller --shard_rows")
    table = pa.Table.from_batches(parts, schema)
    if plan.split == "train":
        order = np.argsort(table[_HASH].to_numpy(), kind="stable")  # merges the parts, which are sorted
        table = table.drop_columns([_HASH]).take(pa.array(order))
    return pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], names=table.column_names)


def _hash_range(hashes: np.ndarray, index: int, shards: int) -> tuple[int, int]:
    """Where in sorted hashes those of shard ``index`` lie: all 64-bit hashes cut into ``shards`` equal parts."""
    first, end = (np.uint64(min((place << 64) // shards, 2**64 - 1)) for place in (index, index + 1))
    low, high = np.searchsorted(hashes, [first, end])
    return int(low), int(high) if index + 1 < shards else len(hashes)
