"""The first pass over the log: decides how rows are split and counts them, reading only the columns that this needs.

A split by time depends on order statistics of all times, a leave-last split on the last rows of every group. Worker
processes gather both.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.convert.cleaner import Cleaner, Clock
from pipelines.convert.last_rows import LastRows
from pipelines.convert.options import FRACTIONS, Options
from pipelines.convert.split import (
    GivenSplit,
    HashSplit,
    LastSplit,
    RandomSplit,
    SplitPolicy,
    TimeSplit,
    last_directory,
)
from pipelines.convert.times import LAST_KEY, parse_time, time_kind
from pipelines.log import source
from pipelines.log.parts import Log, Unit
from stem_util import files
from stem_util.errors import UserError
from stem_util.progress import Progress
from stem_util.workers import Workers


class Scan:
    """Decides how the rows of a log are divided.

    Args:
      options: options of the conversion.
      log: its input.
      given: the split of each file, if splits are given.
      directory: where the output is built.
      scratch: directory of the scratch files.
    """

    def __init__(self, options: Options, log: Log, given: tuple[int, ...], directory: str, scratch: str) -> None:
        self._options, self._log, self._given = options, log, given
        self._directory, self._scratch = directory, scratch

    @functools.cached_property
    def clock(self) -> Clock | None:
        """Where a row's time is: in the schema's time column or, without one, in that of a split by time."""
        options = self._options
        if options.schema.time is not None:
            return Clock(options.schema.time, self._time_kind(options.schema.time, "the schema's time")[0])
        if options.split in ("time", "leave_last") or options.validation_by == "time":
            column = self._split_column()
            return Clock(column, self._time_kind(column)[0])
        return None

    def run(self, pool: Workers) -> tuple[SplitPolicy, list[int]]:
        """The split policy, and the number of rows in each unit."""
        options = self._options
        if self._given and not options.validation_share:
            policy: SplitPolicy = GivenSplit(self._given)
        elif self._given:
            share = options.validation_share or 0.0
            rest, unit_rows = self._divide(pool, options.validation_by or "random", (1 - share, share, 0.0))
            return GivenSplit(self._given, rest), unit_rows
        elif options.split == "leave_last":
            return self._scan_last(pool)
        elif options.validation_from is not None or options.test_from is not None:
            column = self._split_column()
            policy = _given_times(column, *self._time_kind(column), options.validation_from, options.test_from)
        else:
            return self._divide(pool, str(options.split), options.fractions or FRACTIONS)
        return policy, self._count(pool)

    def _divide(
        self, pool: Workers, by: str, fractions: tuple[float, float, float]
    ) -> tuple[HashSplit | RandomSplit | TimeSplit, list[int]]:
        """The policy that divides all rows (if splits are given: those of train files), and each unit's rows."""
        if by == "time":
            return self._scan_times(pool, self._split_column(), fractions)
        seed = self._options.seed
        policy = HashSplit(self._split_column(), fractions, seed) if by == "hash" else RandomSplit(fractions, seed)
        return policy, self._count(pool)

    def _scan_times(
        self, pool: Workers, column: str, fractions: tuple[float, float, float]
    ) -> tuple[TimeSplit, list[int]]:
        """Reads all times, and finds the limits that divide them by the fractions."""
        kind, _ = self._time_kind(column)
        # Times can be read before the limits are known.
        unit_rows = self._gather(pool, gather_times, TimeSplit(column, kind, 0, 0), set(self._train_units()))
        paths = [path for path in map(self._scan_path, self._train_units()) if os.path.getsize(path)]

        def pieces() -> Iterator[np.ndarray]:
            for path in paths:
                times = np.memmap(path, np.uint64, "r")
                for start in range(0, len(times), source.CHUNK_ROWS):
                    yield times[start : start + source.CHUNK_ROWS]

        total = sum(os.path.getsize(path) // 8 for path in paths)
        train, validation, _ = fractions
        ranks = [round(total * train), min(round(total * (train + validation)), total)]
        if not ranks[0]:
            dropped = (
                f" (others are dropped: '{column}' is missing or no {kind})" if self._options.drop_bad_rows else ""
            )
            raise UserError(f"the log has {total:,} rows with a time, too few for a split by shares of them{dropped}")
        limits = kth_smallest(pieces, ranks)
        for path in paths:
            os.unlink(path)
        return TimeSplit(column, kind, limits[0], limits[1], fractions), unit_rows

    def _scan_last(self, pool: Workers) -> tuple[LastSplit, list[int]]:
        """Finds the last rows of every group. Takes 72 bytes of memory per group, about 500 while sorting."""
        column = self._split_column()
        group = self._options.schema.group if self._options.split_group is None else self._split_column("split_group")
        if group is None:
            raise UserError(
                "--split=leave_last: the schema names no group; say whose last rows with --split_group=COLUMN"
            )
        directory = last_directory(self._directory)
        policy = LastSplit(column, self._time_kind(column)[0], group, directory)
        unit_rows = self._gather(pool, gather_last_rows, policy, set(range(len(self._log.units))))
        starts = np.cumsum([0, *self._log.file_rows(unit_rows)])
        last = LastRows()
        for unit in self._log.units:
            rows = np.load(self._scan_path(unit.index))
            rows["row"] += starts[unit.file]
            last.merge(rows)
            os.unlink(self._scan_path(unit.index))
        held_out = last.held_out()
        if not len(held_out[0]):
            raise UserError(f"--split=leave_last: no value of column '{group}' has 3 rows, so nothing can be held out")
        policy.save(*held_out)
        return policy, unit_rows

    def _split_column(self, flag: str = "split_column") -> str:
        column = getattr(self._options, flag)
        self._log.require(column, f"--{flag}={column}")
        return column

    def _time_kind(self, column: str, named: str = "--split_column") -> tuple[pa.DataType, Any]:
        """The type by which a time column is ordered, and one of its values; ``named`` says what names the column."""
        rows = 0
        for unit in self._log.units:
            for chunk in source.read(self._log, unit, [column], skip_malformed=self._options.drop_bad_rows):
                found = self._log.alike(chunk.columns)[column]
                values, rows = found.drop_null(), rows + len(found)
                if len(values):
                    return time_kind(values, column, named), values[0].as_py()
        raise UserError(f"{named}={column}: {'the column holds no value' if rows else 'the log has no rows'}")

    def _train_units(self) -> list[int]:
        """The units that decide a split by time: all of them, or those of given train files."""
        return [unit.index for unit in self._log.units if not self._given or self._given[unit.file] == 0]

    def _scan_path(self, unit: int) -> str:
        return os.path.join(self._scratch, f"scan-{unit}")

    def _count(self, pool: Workers) -> list[int]:
        """The number of rows in each unit."""
        if not self._log.text:
            return [unit.rows for unit in self._log.units]  # known from the footers of Parquet files
        drop = self._options.drop_bad_rows
        return self._run(pool, count_rows, lambda unit: (self._log, unit, drop))

    def _gather(
        self, pool: Workers, function: Callable[..., int], policy: SplitPolicy, settling: set[int]
    ) -> list[int]:
        """Runs ``function`` on each unit, and lets the units ``settling`` leave files that decide ``policy``.

        Returns:
          The number of rows in each unit.
        """
        cleaner = Cleaner(self._options.schema, policy, self._options.drop_bad_rows, self.clock)

        def arguments(unit: Unit) -> tuple[Any, ...]:
            path = self._scan_path(unit.index) if unit.index in settling else None
            return self._log, unit, cleaner, policy, path

        return self._run(pool, function, arguments)

    def _run(
        self, pool: Workers, function: Callable[..., int], arguments: Callable[[Unit], tuple[Any, ...]]
    ) -> list[int]:
        """Runs ``function``, which returns a number of rows, on each unit."""
        tasks = [(self._log.unit_name(unit), arguments(unit)) for unit in self._log.units]
        counts = []
        with Progress(None, unit="rows", desc="scan") as progress:
            for rows in pool.run(function, tasks):
                counts.append(rows)
                progress.update(rows)
        return counts


def count_rows(log: Log, unit: Unit, drop: bool) -> int:
    """The number of rows in a unit, malformed ones included; without ``drop`` they are an error. Runs in a worker."""
    return source.count_rows(log, unit, skip_malformed=drop)


def gather_times(log: Log, unit: Unit, cleaner: Cleaner, policy: TimeSplit, path: str | None) -> int:
    """Counts a unit's rows, and writes the times of those that have one to a file. Runs in a worker.

    Args:
      log: the input.
      unit: a piece of the log.
      cleaner: decides what happens to bad rows.
      policy: gives column and type of the times; its limits are not known yet.
      path: file to write, of uint64 keys in the order of the times; None to count rows only.
    """
    if path is None:
        return count_rows(log, unit, cleaner.drop)
    rows = 0
    with files.moved_into_place(path, os.path.dirname(path)) as beside, open(beside, "wb") as file:
        for chunk in source.read(log, unit, [policy.column], skip_malformed=cleaner.drop):
            rows += len(chunk.rows) + chunk.malformed
            file.write(cleaner.times(chunk, policy.column, policy.kind).tobytes())
    return rows


def gather_last_rows(log: Log, unit: Unit, cleaner: Cleaner, policy: LastSplit, path: str) -> int:
    """Counts a unit's rows, and writes the last rows of each group, by place in the log, to a file. Runs in a worker.

    Arguments are those of :func:`gather_times`; the file holds what :meth:`LastRows.kept` returns.
    """
    rows, last = 0, LastRows()
    # Only good rows count, and whether a row is good depends on all of its columns.
    columns = cleaner.columns if cleaner.drop else list(policy.columns)
    for chunk in source.read(log, unit, columns, skip_malformed=cleaner.drop):
        rows += len(chunk.rows) + chunk.malformed
        groups, times, places = cleaner.group_times(chunk, policy)
        if cleaner.drop:
            unsplit = replace(cleaner, split=RandomSplit((1.0, 0.0, 0.0), 0))
            kept = np.isin(places, unsplit.clean(chunk, chunk.rows, unit.file)[0].places)
            groups, times, places = groups[kept], times[kept], places[kept]
        last.add(groups, times, chunk.rows[places])
    with files.moved_into_place(path, os.path.dirname(path)) as beside, open(beside, "wb") as file:
        np.save(file, last.kept())
    return rows


def _given_times(
    column: str, kind: pa.DataType, example: Any, validation_from: str | None, test_from: str | None
) -> TimeSplit:
    """A split at given times. If one is not given, the split that begins with it has no rows."""

    def last_before(text: str, flag: str) -> int:
        return max(parse_time(text, kind, flag, example) - 1, 0)

    test = last_before(test_from, "test_from") if test_from is not None else LAST_KEY
    validation = last_before(validation_from, "validation_from") if validation_from is not None else test
    if validation > test:
        raise UserError(f"--validation_from={validation_from} should not be later than --test_from={test_from}")
    return TimeSplit(column, kind, validation, test)


def kth_smallest(pieces: Callable[[], Iterable[np.ndarray]], ranks: Sequence[int], bins: int = 1 << 16) -> list[int]:
    """Exact order statistics of more numbers than fit in memory, by histograms of ever smaller ranges.

    A sample (`pipelines.sampling`) would only estimate them, and a split by shares of rows is exact.

    Args:
      pieces: returns the numbers, as uint64 arrays; called once per pass.
      ranks: ranks from 1 to the count of the numbers.
      bins: bins of a histogram; each pass narrows the range of candidates by this factor.

    Returns:
      The number of each rank in ascending order.
    """
    low, high = 2**64 - 1, 0
    for piece in pieces():
        if len(piece):
            low, high = min(low, int(piece.min())), max(high, int(piece.max()))
    ranges = [(low, high)] * len(ranks)  # inclusive
    left = list(ranks)  # rank within the range
    while any(low < high for low, high in ranges):
        widths = [(high - low) // bins + 1 for low, high in ranges]
        counts = [np.zeros(bins, np.int64) for _ in ranges]
        for piece in pieces():
            for (low, high), width, count in zip(ranges, widths, counts, strict=True):
                inside = piece[(piece >= np.uint64(low)) & (piece <= np.uint64(high))]
                places = (inside - np.uint64(low)) // np.uint64(width)
                count += np.bincount(places.astype(np.int64), minlength=bins)
        for i, ((low, high), width) in enumerate(zip(ranges, widths, strict=True)):
            below = np.cumsum(counts[i])
            place = int(np.searchsorted(below, left[i], "left"))
            left[i] -= int(below[place - 1]) if place else 0
            ranges[i] = (low + place * width, min(high, low + (place + 1) * width - 1))
    return [low for low, _ in ranges]
