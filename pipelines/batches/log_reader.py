"""Reads a split straight from the Parquet log: the order of reading, and the process that reads.

Rows are read, cleaned, split and encoded as in the conversion, with its vocabularies. A plan cuts the log into parts
(row groups), and parts into windows of up to `WINDOW_ROWS` rows; each window is one record batch. For training, parts
are permuted and several are read side by side (`pipelines.batches.pools` then permutes rows). The order depends on the
plan alone, not on the number of processes that share its parts.

    python -m pipelines.batches.log_reader < (plan, stream, streams), pickled > an Arrow stream

writes the windows of every ``streams``-th part. It does not import TensorFlow, and ends when its output is closed.
"""

from __future__ import annotations

import functools
import os
import pickle
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO, NoReturn

import numpy as np
import pyarrow as pa

from pipelines import records
from pipelines.convert.cleaner import Cleaner, Clock
from pipelines.convert.encode import encoded_rows
from pipelines.convert.split import restore
from pipelines.convert.times import kind_of_name
from pipelines.integrity import Watch
from pipelines.log import source
from pipelines.log.find import is_parquet
from pipelines.log.parts import Chunk, Log, Unit
from pipelines.manifest import SPLITS, Manifest, Source, check_source
from pipelines.schema import Schema
from stem_util.errors import UserError, message

WINDOW_ROWS = 131_072
SIDE_BY_SIDE = 8
"""The number of parts that training reads side by side."""
WINDOW = "window"
"""The last column: the number of the window. If the value differs, the stream was cut off inside this window."""

_watch = Watch()

Columns = dict[str, np.ndarray]
"""Encoded rows by record key: [n], or [n, length]."""


@dataclass(frozen=True)
class Part:
    """What one process reads in one go.

    Attributes:
      units: one row group of any size, or several that make a single window together.
      windows: the number of windows.
    """

    units: tuple[Unit, ...]
    windows: int


@dataclass(frozen=True)
class Plan:
    """How a split is read once.

    Attributes:
      data_dir: the converted data, for its vocabularies.
      log: the log, without its units.
      sources: the log's files as they are now.
      cleaner: the conversion's cleaner.
      split: number of the split to read.
      parts: parts of the log, in the order of reading.
      order: number of the part that each window belongs to.
      every: (index, count): read the rows with ``row_id % count == index``.
      window_rows: number of rows in a window of one row group.
    """

    data_dir: str
    log: Log
    sources: tuple[Source, ...]
    cleaner: Cleaner
    split: int
    parts: tuple[Part, ...]
    order: tuple[int, ...]
    every: tuple[int, int]
    window_rows: int

    def write(self, output: BinaryIO, stream: int, streams: int) -> None:
        """Writes the windows of every ``streams``-th part from ``stream`` on, in the plan's order, as an Arrow stream.

        Raises:
          UserError: a file of the log is missing, has changed, or has a bad row that it did not have at conversion.
          BrokenPipeError: the output was closed.
        """
        schema = self.cleaner.schema
        reading: dict[int, Generator[Columns, None, None]] = {}
        written: Counter[int] = Counter()
        stream_schema = arrow_schema(schema)
        writer = pa.ipc.new_stream(pa.PythonFile(output, mode="w"), stream_schema)
        for number, part in enumerate(self.order):
            if part % streams != stream:
                continue
            if part not in reading:
                reading[part] = self._windows(self.parts[part])
            columns = next(reading[part])
            written[part] += 1
            if written[part] == self.parts[part].windows:
                reading.pop(part).close()  # closes the file, too
            if not columns:
                columns = {
                    key: np.zeros((1, width) if width else 1, kind) for key, (kind, width) in records.shapes(schema)
                }
                columns["key:row_id"][:] = -1
            columns[WINDOW] = np.full(len(columns["key:row_id"]), number, np.int32)
            arrays = [_array(values, key) for key, values in columns.items()]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=stream_schema))
        writer.close()

    def _windows(self, part: Part) -> Generator[Columns, None, None]:
        """Yields the columns of each window, {} if it has no rows."""
        columns: list[Columns] = []
        read = windows = 0
        for unit in part.units:
            check_source(self.sources[unit.file], _watch)
            if not self._has_rows(unit):
                continue
            for chunk in source.read(
                self.log, unit, self.cleaner.columns, skip_malformed=False, chunk_rows=self.window_rows
            ):
                columns += self._encoded(chunk, unit)
                read += len(chunk.rows)
                if read >= (windows + 1) * self.window_rows:
                    yield _joined(columns)
                    columns, windows = [], windows + 1
        while windows < part.windows:
            yield _joined(columns)
            columns, windows = [], windows + 1

    def _has_rows(self, unit: Unit) -> bool:
        """Whether the unit may have rows of the split, judged by the column of the split alone."""
        columns = self.cleaner.split.columns
        if self.split == 0 or len(columns) != 1:
            return True
        chunks = source.read(self.log, unit, columns, skip_malformed=False)
        return any((self.cleaner.splits(chunk, chunk.rows, unit.file) == self.split).any() for chunk in chunks)

    def _encoded(self, chunk: Chunk, unit: Unit) -> list[Columns]:
        """The rows of a chunk that belong to the split and the reader, encoded; [] if there are none."""
        row_ids = chunk.rows + sum(file.rows for file in self.sources[: unit.file])
        index, count = self.every
        wanted = (self.cleaner.splits(chunk, row_ids, unit.file) == self.split) & (row_ids % count == index)
        if not wanted.all():
            chunk, row_ids = chunk.take(np.flatnonzero(wanted)), row_ids[wanted]
        rows, _ = self.cleaner.clean(chunk, row_ids, unit.file)
        if not len(rows.row_ids):
            return []
        batch = encoded_rows(self.data_dir, self.cleaner.schema, rows)
        return [{key: _matrix(batch.column(key), width) for key, (_, width) in records.shapes(self.cleaner.schema)}]


def arrow_schema(schema: Schema) -> pa.Schema:
    """The Arrow schema of the streams. Multivalent lists are padded with 0, as tensorflow-io needs equal lengths."""
    fields = []
    for key, (kind, width) in records.shapes(schema):
        value = pa.from_numpy_dtype(kind)
        fields.append((key, pa.list_(value) if width else value))
    return pa.schema([*fields, (WINDOW, pa.int32())])


def _matrix(array: pa.Array, width: int) -> np.ndarray:
    """A column of encoded rows as [n], or as [n, width] with short lists padded with 0."""
    if not width:
        return array.to_numpy()
    values = array.flatten().to_numpy()
    if pa.types.is_fixed_size_list(array.type):
        return values.reshape(-1, width)
    return records.padded(values, np.diff(array.offsets.to_numpy()), width)


def _array(values: np.ndarray, key: str) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return records.lists(np.full(len(values), values.shape[1]), pa.array(values.reshape(-1)), key)


def _joined(columns: list[Columns]) -> Columns:
    if len(columns) < 2:
        return columns[0] if columns else {}
    return {key: np.concatenate([part[key] for part in columns]) for key in columns[0]}


def plan(manifest: Manifest, name: str, *, shuffle: tuple[int, int] | None, reader: tuple[int, int]) -> Plan:
    """Plans how to read a split of the log.

    Args:
      manifest: manifest of the conversion of the log.
      name: name of the split.
      shuffle: seed that permutes row groups, or None to keep the order of the log.
      reader: (index, count): read part ``index`` of ``count``: whole row groups, dealt out in the order of reading, if
        there are at least ``count`` of them, else every ``count``-th row.

    Raises:
      UserError: the log is CSV, or a file of it is missing or has changed.
    """
    files = [file.path for file in manifest.sources]
    sources = tuple(check_source(file, manifest.watch) for file in manifest.sources)
    if not files or not is_parquet(files[0]):
        raise UserError(
            f"{manifest.data_dir} was converted from CSV, which --input_format=parquet does not read: read its records "
            "(blocks or rows)"
        )
    log = _open_log(sources)
    policy = restore(manifest.split, manifest.data_dir, files, manifest.seed)
    number = SPLITS.index(name)
    units = [unit for unit in log.units if unit.rows and policy.may_hold(unit.file, number)]
    if shuffle is not None:
        units = [units[i] for i in np.random.default_rng(shuffle).permutation(len(units))]
    index, count = reader
    by_unit = len(units) >= count
    if by_unit:
        units = units[index::count]
    # A window has fewer than twice as many rows, because chunks of the log do not end where windows do.
    widest = max(width for _, (_, width) in records.shapes(manifest.record_schema))
    window_rows = max(1, min(WINDOW_ROWS, records.MOST_VALUES // (2 * max(1, widest))))
    parts = _parts(units, window_rows)
    return Plan(
        data_dir=manifest.data_dir,
        log=replace(log, units=()),
        sources=sources,
        cleaner=Cleaner(manifest.record_schema, policy, drop=bool(manifest.dropped), clock=_clock(manifest)),
        split=number,
        parts=parts,
        order=tuple(_order(parts, SIDE_BY_SIDE if shuffle else 1)),
        every=(0, 1) if by_unit else reader,
        window_rows=window_rows,
    )


def _clock(manifest: Manifest) -> Clock | None:
    """The time column, if rows without a time were dropped because of it."""
    if manifest.times is None or not manifest.dropped:
        return None
    return Clock(manifest.times.column, kind_of_name(manifest.times.type))


@functools.lru_cache(maxsize=4)
def _open_log(files: tuple[Source, ...]) -> Log:
    """The log with one unit per row group. The cache avoids opening files again that have not changed."""
    log = source.open_log([file.path for file in files], unit_rows=0)
    rows = [0] * len(files)
    for unit in log.units:
        rows[unit.file] += unit.rows
    for file, count in zip(files, rows, strict=True):
        if count != file.rows:
            raise UserError(
                f"{file.path} has changed since it was converted ({count:,} rows, {file.rows:,} then): restore it, or "
                "convert the log again"
            )
    return log


def _parts(units: Sequence[Unit], window_rows: int) -> tuple[Part, ...]:
    """Joins consecutive small row groups, as long as they fit in a window."""
    parts: list[Part] = []
    for unit in units:
        before = sum(u.rows for u in parts[-1].units) if parts else window_rows
        if before + unit.rows <= window_rows:
            parts[-1] = Part((*parts[-1].units, unit), 1)
        else:
            parts.append(Part((unit,), -(-unit.rows // window_rows)))
    return tuple(parts)


def _order(parts: Sequence[Part], side_by_side: int) -> Iterator[int]:
    """Yields the part of each window: ``side_by_side`` parts take turns, one window each."""
    for start in range(0, len(parts), side_by_side):
        together = range(start, min(start + side_by_side, len(parts)))
        for window in range(max(parts[i].windows for i in together)):
            yield from (i for i in together if window < parts[i].windows)


def main() -> NoReturn:
    """Writes a stream. Exit codes: 0 if all is written or the output was closed, 2 on a UserError, 1 on other errors.

    On an error, the first line of stderr is its message; the traceback follows.
    """
    # The job that reads the stream decides when this process ends: it has work to finish after Ctrl-C or SIGTERM.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    pa.set_cpu_count(1)  # one thread each: there are several processes
    code, why = 0, ""
    try:
        reading, stream, streams = pickle.load(sys.stdin.buffer)
        reading.write(sys.stdout.buffer, stream, streams)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        pass
    except Exception as error:
        code = 2 if isinstance(error, UserError) else 1
        why = f"{message(error)}\n{traceback.format_exc()}"
    print(why, file=sys.stderr, flush=True)
    os._exit(code)  # skips finalisers: that of the writer would end the stream as if it were whole


if __name__ == "__main__":
    main()
