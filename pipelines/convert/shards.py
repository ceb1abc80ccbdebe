"""Plans which rows each shard holds, gathers them from the scratch files of all units and writes them as records."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines import records
from pipelines.convert.job import HASH, Job
from pipelines.manifest import Shard
from pipelines.tfrecord import Writer


@dataclass(frozen=True)
class ShardPlan:
    """Which rows a shard holds.

    Attributes:
      split: the shard's split.
      index: its number.
      shards: the number of shards of the split.
      pieces: (unit, first row, end): ranges of rows in the units' scratch files of the split. For train, these are
        whole units, of which the shard takes rows by hash.
    """

    split: str
    index: int
    shards: int
    pieces: tuple[tuple[int, int, int], ...]


def plan_shards(split: str, unit_rows: list[int], shard_rows: int) -> list[ShardPlan]:
    """Divides the rows of a split, ``unit_rows`` in each unit, into shards of about ``shard_rows`` rows."""
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
        with job.written(os.path.join(job.directory, path)) as beside, Writer(beside) as writer:
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
    """A shard's rows in their final order: train by hash (different for all rows), other splits by row_id."""
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
                    low, high = _hash_range(batch.column(HASH).to_numpy(), plan.index, plan.shards)
                if low < high:
                    parts.append(batch.slice(low, high - low))
    for field in schema:
        if pa.types.is_list(field.type):
            values = sum(len(part.column(field.name).flatten()) for part in parts)
            records.check_values(values, field.name, f"a shard of {plan.split}; convert with a smaller --shard_rows")
    table = pa.Table.from_batches(parts, schema)
    if plan.split == "train":
        order = np.argsort(table[HASH].to_numpy(), kind="stable")  # timsort merges the parts, which are sorted
        table = table.drop_columns([HASH]).take(pa.array(order))
    return pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], names=table.column_names)


def _hash_range(hashes: np.ndarray, index: int, shards: int) -> tuple[int, int]:
    """The range of sorted ``hashes`` for shard ``index``: the space of 64-bit hashes is cut into equal parts."""
    first, end = (np.uint64(min((place << 64) // shards, 2**64 - 1)) for place in (index, index + 1))
    low, high = np.searchsorted(hashes, [first, end])
    return int(low), int(high) if index + 1 < shards else len(hashes)
