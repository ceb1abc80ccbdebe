"""The first look at the log: settles the split and counts rows, reading only what that needs.

A split by time is settled by order statistics of all times, one by last rows by the last rows of every group; worker
processes gather both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.convert.cleaner import Cleaner
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
from stem_util.errors import UserError
from stem_util.progress import Progress
from stem_util.workers import Pool


class Scan:
    """Settles how the rows of a log are divided.

    Args:
      options: of the conversion.
      log: its input.
      given: the split of each of its files, when splits are given.
      directory: where the output is built.
      scratch: directory of intermediate files.
    """

    def __init__(self, options: Options, log: Log, given: tuple[int, ...], directory: str, scratch: str) -> None:
        self._options, self._log, self._given = options, log, given
        self._directory, self._scratch = directory, scratch

    def run(self, pool: Pool) -> tuple[SplitPolicy, list[int]]:
        """The policy, and the rows of each unit."""
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
        self, pool: Pool, by: str, fractions: tuple[float, float, float]
    ) -> tuple[HashSplit | RandomSplit | TimeSplit, list[int]]:
        """The policy that divides rows, of train files where splits are given, and each unit's rows."""
        if by == "time":
            return self._scan_times(pool, self._split_column(), fractions)
        seed = self._options.seed
        policy = HashSplit(self._split_column(), fractions, seed) if by == "hash" else RandomSplit(fractions, seed)
        return policy, self._count(pool)

    def _scan_times(
        self, pool: Pool, column: str, fractions: tuple[float, float, float]
    ) -> tuple[TimeSplit, list[int]]:
        """Reads all times, and finds those that divide them by the fractions."""
        kind, _ = self._time_kind(column)
        # The limits are not known yet, and not needed to read times.
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

    def _scan_last(self, pool: Pool) -> tuple[LastSplit, list[int]]:
        """Finds the last rows of every group: holds 72 bytes per group, about 500 while they are sorted."""
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

    def _time_kind(self, column: str) -> tuple[pa.DataType, Any]:
        """The type in which a column's values are ordered, and one of them."""
        for unit in self._log.units:
            for chunk in source.read(self._log, unit, [column], skip_malformed=self._options.drop_bad_rows):
                values = self._log.alike(chunk.columns)[column].drop_null()
                if len(values):
                    return time_kind(values, column), values[0].as_py()
        raise UserError(f"--split_column={column}: the column holds no value")

    def _train_units(self) -> list[int]:
        """Units that a split by time is settled from: all, or those of given train files."""
        return [unit.index for unit in self._log.units if not self._given or self._given[unit.file] == 0]

    def _scan_path(self, unit: int) -> str:
        return os.path.join(self._scratch, f"scan-{unit}")

    def _count(self, pool: Pool) -> list[int]:
        """Rows of each unit."""
        if not self._log.text:
            return [unit.rows for unit in self._log.units]  # Parquet files know
        drop = self._options.drop_bad_rows
        return self._run(pool, count_rows, lambda unit: (self._log, unit, drop))

    def _gather(self, pool: Pool, function: Callable[..., int], policy: SplitPolicy, settling: set[int]) -> list[int]:
        """Rows of each unit, after ``function`` has left what ``policy`` is settled from by the units ``settling``."""
        cleaner = Cleaner(self._options.schema, policy, self._options.drop_bad_rows)

        def arguments(unit: Unit) -> tuple[Any, ...]:
            path = self._scan_path(unit.index) if unit.index in settling else None
            return self._log, unit, cleaner, policy, path

        return self._run(pool, function, arguments)

    def _run(self, pool: Pool, function: Callable[..., int], arguments: Callable[[Unit], tuple[Any, ...]]) -> list[int]:
        """What ``function`` returns for each unit: its rows."""
        tasks = [(self._log.unit_name(unit), arguments(unit)) for unit in self._log.units]
        counts = []
        with Progress(None, unit="rows", desc="scan") as progress:
            for rows in pool.run(function, tasks):
                counts.append(rows)
                progress.update(rows)
        return counts


def count_rows(log: Log, unit: Unit, drop: bool) -> int:
    """Rows of a unit, malformed ones included, which are an error unless they are to be dropped. Runs in a worker."""
    return source.count_rows(log, unit, skip_malformed=drop)


def gather_times(log: Log, unit: Unit, cleaner: Cleaner, policy: TimeSplit, path: str | None) -> int:
    """Counts a unit's rows, and leaves the times of those that have one. Runs in a worker.

    Args:
      log: the input.
      unit: a piece of it.
      cleaner: says what happens to bad rows.
      policy: its column and kind; its limits are not known yet.
      path: of the file of uint64 keys that sort as the times do; None to count only.
    """
    if path is None:
        return count_rows(log, unit, cleaner.drop)
    rows = 0
    with open(path, "wb") as file:
        for chunk in source.read(log, unit, [policy.column], skip_malformed=cleaner.drop):
            rows += len(chunk.rows) + chunk.malformed
            file.write(cleaner.times(chunk, policy.column, policy.kind).tobytes())
    return rows


def gather_last_rows(log: Log, unit: Unit, cleaner: Cleaner, policy: LastSplit, path: str) -> int:
    """Counts a unit's rows, and leaves the last rows of each group, by place in the file. Runs in a worker.

    Arguments as of :func:`gather_times`; the file holds what :meth:`LastRows.kept` returns.
    """
    rows, last = 0, LastRows()
    # Whether a last row is a good one depends on all of its columns.
    columns = cleaner.columns if cleaner.drop else list(policy.columns)
    for chunk in source.read(log, unit, columns, skip_malformed=cleaner.drop):
        rows += len(chunk.rows) + chunk.malformed
        groups, times, places = cleaner.group_times(chunk, policy)
        if cleaner.drop:
            unsplit = replace(cleaner, split=RandomSplit((1.0, 0.0, 0.0), 0))
            kept = np.isin(places, unsplit.clean(chunk, chunk.rows, unit.file)[0].places)
            groups, times, places = groups[kept], times[kept], places[kept]
        last.add(groups, times, chunk.rows[places])
    with open(path, "wb") as file:
        np.save(file, last.kept())
    return rows


def _given_times(
    column: str, kind: pa.DataType, example: Any, validation_from: str | None, test_from: str | None
) -> TimeSplit:
    """The split at given times; without one of them the split that it would begin has no rows."""

    def last_before(text: str, flag: str) -> int:
        return max(parse_time(text, kind, flag, example) - 1, 0)

    test = last_before(test_from, "test_from") if test_from is not None else LAST_KEY
    validation = last_before(validation_from, "validation_from") if validation_from is not None else test
    if validation > test:
        raise UserError(f"--validation_from={validation_from} should not be later than --test_from={test_from}")
    return TimeSplit(column, kind, validation, test)


def kth_smallest(pieces: Callable[[], Iterable[np.ndarray]], ranks: Sequence[int], bins: int = 1 << 16) -> list[int]:
    """Exact order statistics of more numbers than fit in memory, by histograms that close in on them.

    A sample (`pipelines.sampling`) would give estimates: a split by shares of rows is exact.

    Args:
      pieces: gives the numbers, uint64 arrays, anew at every call.
      ranks: 1-based; each from 1 to the count of the numbers.
      bins: of a histogram; a pass narrows the range of candidates by this factor.

    Returns:
      For each rank the number that stands there in ascending order.
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
