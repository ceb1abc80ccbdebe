"""Which records training reads together: runs of them, dealt out to pools anew every epoch.

A run is one block, or some records of the ``rows`` layout. All runs of a split are permuted by seed and epoch and
dealt out to the readers, each reader's to pools, whose rows are held in memory and permuted as a whole
(:mod:`pipelines.batches.pools`). A split that fits in one pool is thereby shuffled as a whole; the rows of a run of a
larger one share a pool, another one every epoch. Inside a pool, records are read in the order of the files.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipelines.manifest import Shard
from pipelines.tfrecord import CorruptRecord, Example, offsets, scan

_ROWS_A_RUN = 128
"""Records of a run of the ``rows`` layout."""
_LEAST_RUNS = 64
"""Of a reader, where there are that many records."""


class Runs(NamedTuple):
    """Records that lie one after another: int64 [n] each.

    Attributes:
      shard: number of the shard.
      offset: of the first record, in bytes.
      records: how many.
      rows: in them.
    """

    shard: np.ndarray
    offset: np.ndarray
    records: np.ndarray
    rows: np.ndarray

    def part(self, numbers: np.ndarray) -> Runs:
        """Some of them in their order, those that follow each other joined."""
        numbers = np.sort(numbers)
        follows = (np.diff(numbers) == 1) & (np.diff(self.shard[numbers]) == 0)
        starts = np.flatnonzero(np.append(True, ~follows)[: len(numbers)])
        first = numbers[starts]
        joined = (np.add.reduceat(values[numbers], starts) for values in (self.records, self.rows))
        return Runs(self.shard[first], self.offset[first], *joined)


def pools(
    shards: Sequence[Shard],
    layout: str,
    *,
    pool_rows: int,
    run_bytes: int,
    seed: tuple[int, int],
    reader: tuple[int, int],
) -> list[Runs]:
    """What a reader reads in an epoch, pool by pool.

    Args:
      shards: with rows.
      layout: of them.
      pool_rows: about how many rows a pool may hold.
      run_bytes: read at least so many in one go, where a split does not fit in a pool.
      seed: of the permutation, another one every epoch.
      reader: (index, count): its part. The parts differ by a run.

    Raises:
      CorruptRecord: a damaged header.
    """
    index, count = reader
    records, size = (sum(getattr(shard, name) for shard in shards) for name in ("records", "bytes"))
    if count == 1 and sum(shard.rows for shard in shards) <= pool_rows:
        every = [(number, 0, shard.records, shard.rows) for number, shard in enumerate(shards)]
        return [Runs(*np.array(every, np.int64).T)]
    least = _ROWS_A_RUN if layout == "rows" else 1
    unit = min(max(least, run_bytes * records // size), max(1, records // (_LEAST_RUNS * count)))
    found = [_runs(shard, os.stat(shard.path).st_mtime_ns, layout, unit) for shard in shards]
    numbers = np.repeat(np.arange(len(shards)), [len(runs[0]) for runs in found])
    runs = Runs(numbers, *(np.concatenate(columns) for columns in zip(*found, strict=True)))
    mine = np.random.default_rng(seed).permutation(len(numbers))[index::count]
    parts = -(-int(runs.rows[mine].sum()) // pool_rows)
    return [runs.part(numbers) for numbers in np.array_split(mine, max(1, min(parts, len(mine))))]


@functools.cache
def _runs(shard: Shard, mtime_ns: int, layout: str, unit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset, records and rows of each ``unit`` records of a shard.

    The cache saves a second look at a file that has not changed.
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
    """Rows of each block: int64 [records]. All but the last have as many as the first, unless some were lost."""

    def rows(payload: bytes) -> int:
        return len(Example.FromString(payload).features.feature["key:row_id"].bytes_list.value[0]) // 8

    full = rows(next(scan(shard.path))[1])
    last = shard.rows - full * (shard.records - 1)
    if 0 < last <= full:
        return np.append(np.full(shard.records - 1, full), last)
    return np.array([rows(payload) for _, payload in scan(shard.path)])
