"""Decides which records training reads together: runs of records, dealt out to pools differently in every epoch.

A run is one block, or some records of the ``rows`` layout. All runs of a split are permuted by seed and epoch, and in
that order cut into a part for each reader, equal in rows, and each part into pools. A run across the border of two
parts is read by both readers, each of which keeps its own rows: there are fewer such runs than readers. The rows of a
pool are held in memory and permuted
(:mod:`pipelines.batches.pools`), so a split that fits in one pool is shuffled as a whole. In a larger split, the rows
of a run share a pool, and in every epoch another one. Inside a pool, records are read in the order of the files.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipelines.manifest import Shard
from pipelines.tfrecord import CorruptRecord, Example, offsets, scan

_ROWS_PER_RUN = 128
"""Records per run of the ``rows`` layout."""
_LEAST_RUNS = 64
"""Runs that each reader gets at least, if there are enough records."""


class Runs(NamedTuple):
    """Runs of records, each int64 [n]. The records of a run lie one after another.

    Attributes:
      shard: number of the shard.
      offset: where the first record starts, in bytes.
      records: number of records.
      rows: number of rows that are read of them: all rows, except in runs at the border of a reader's part.
      skip: number of rows before those; -1 in runs of which all rows are read.
    """

    shard: np.ndarray
    offset: np.ndarray
    records: np.ndarray
    rows: np.ndarray
    skip: np.ndarray

    def part(self, numbers: np.ndarray) -> Runs:
        """The runs ``numbers``, of which all rows are read, in their order in the files; adjacent ones are joined."""
        numbers = np.sort(numbers)
        follows = (np.diff(numbers) == 1) & (np.diff(self.shard[numbers]) == 0)
        starts = np.flatnonzero(np.append(True, ~follows)[: len(numbers)])
        first = numbers[starts]
        joined = (np.add.reduceat(values[numbers], starts) for values in (self.records, self.rows))
        records, rows = joined
        return Runs(self.shard[first], self.offset[first], records, rows, self.skip[first])

    def followed_by(self, others: Runs) -> Runs:
        """These runs and then the ``others``."""
        return Runs(*(np.concatenate(columns) for columns in zip(self, others, strict=True)))


def pools(
    shards: Sequence[Shard],
    layout: str,
    *,
    pool_rows: int,
    run_bytes: int,
    seed: tuple[int, int],
    reader: tuple[int, int],
) -> list[Runs]:
    """The runs that a reader reads in an epoch, pool by pool.

    Args:
      shards: shards that hold rows.
      layout: layout of the shards.
      pool_rows: number of rows that a pool may hold, roughly.
      run_bytes: smallest size of a run if the split does not fit in a pool.
      seed: seed of the permutation; another one in every epoch.
      reader: (index, count): the reader's part. The sizes of parts differ by at most one row.

    Raises:
      CorruptRecord: a record has a damaged header.
    """
    index, count = reader
    records, size = (sum(getattr(shard, name) for shard in shards) for name in ("records", "bytes"))
    if count == 1 and sum(shard.rows for shard in shards) <= pool_rows:
        every = [(number, 0, shard.records, shard.rows, -1) for number, shard in enumerate(shards)]
        return [Runs(*np.array(every, np.int64).T)]
    least = _ROWS_PER_RUN if layout == "rows" else 1
    unit = min(max(least, run_bytes * records // size), max(1, records // (_LEAST_RUNS * count)))
    found = [_runs(shard, os.stat(shard.path).st_mtime_ns, layout, unit) for shard in shards]
    numbers = np.repeat(np.arange(len(shards)), [len(runs[0]) for runs in found])
    offset, in_records, in_rows = (np.concatenate(columns) for columns in zip(*found, strict=True))
    runs = Runs(numbers, offset, in_records, in_rows, np.full(len(numbers), -1))
    permuted = np.random.default_rng(seed).permutation(len(numbers))
    ends = np.cumsum(runs.rows[permuted])
    first, last = (int(ends[-1]) * border // count for border in (index, index + 1))  # rows, in this order
    begin, end = np.searchsorted(ends, (first, last - 1), "right")
    mine = slice(begin, end + 1 if first < last else begin)
    permuted, ends = permuted[mine], ends[mine]
    skip = np.maximum(first - (ends - runs.rows[permuted]), 0)
    rows = np.minimum(ends, last) - (ends - runs.rows[permuted]) - skip
    whole = rows == runs.rows[permuted]
    parts = max(1, min(-(-(last - first) // pool_rows), len(permuted)))
    found_pools = []
    for places in np.array_split(np.arange(len(permuted)), parts):
        pool = runs.part(permuted[places[whole[places]]])
        for place in places[~whole[places]]:
            pool = pool.followed_by(_cut(runs, permuted[place], shards, layout, int(skip[place]), int(rows[place])))
        found_pools.append(pool)
    return found_pools


def _cut(runs: Runs, number: int, shards: Sequence[Shard], layout: str, skip: int, rows: int) -> Runs:
    """The ``rows`` rows of a run after its first ``skip`` rows."""
    shard, offset, records = (int(values[number]) for values in runs[:3])
    if layout == "rows":  # a record is a row
        offset, _ = next(itertools.islice(scan(shards[shard].path, offset), skip, None))
        records, skip = rows, -1
    return Runs(*np.array([[shard], [offset], [records], [rows], [skip]], np.int64))


@functools.cache
def _runs(shard: Shard, mtime_ns: int, layout: str, unit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset, records and rows of every ``unit`` records of a shard.

    ``mtime_ns`` is part of the cache key, so that only a file that has changed is read again.
    """
    del mtime_ns
    places = np.array(offsets(shard.path, unit), np.int64)
    starts = np.arange(0, shard.records, unit)
    if len(places) != len(starts):
        raise CorruptRecord(shard.path, shard.bytes, f"the manifest says that {shard.records:,} records end here")
    records = np.minimum(shard.records - starts, unit)
    if layout == "rows":
        return places, records, records
    return places, records, np.add.reduceat(_block_rows(shard), starts)


def _block_rows(shard: Shard) -> np.ndarray:
    """Rows of each block, int64 [records]: all but the last have as many as the first, unless records were lost."""

    def rows(payload: bytes) -> int:
        return len(Example.FromString(payload).features.feature["key:row_id"].bytes_list.value[0]) // 8

    full = rows(next(scan(shard.path))[1])
    last = shard.rows - full * (shard.records - 1)
    if 0 < last <= full:
        return np.append(np.full(shard.records - 1, full), last)
    return np.array([rows(payload) for _, payload in scan(shard.path)])
