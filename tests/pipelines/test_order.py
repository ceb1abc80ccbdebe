"""The order of training: as good as a full shuffle, whatever it is read from."""

from __future__ import annotations

import collections
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from pipelines import schema_yaml
from pipelines.batches import dataset, order
from pipelines.batches.dataset import SHUFFLE_MEGABYTES, read_batches
from pipelines.convert.conversion import convert
from pipelines.convert.options import Options
from pipelines.manifest import INPUT_FORMATS, Manifest
from pipelines.tfrecord import CorruptRecord, Example, offsets, scan

ROWS, SHARD_ROWS, BLOCK_ROWS, GROUP_ROWS = 40_000, 3_000, 64, 2_500
SCHEMA = """
name: order
features:
  item: {kind: categorical, side: item, dtype: int64}
  tags: {kind: multivalent, side: item, dtype: string, max_length: 3}
tasks: {click: {label: {column: click}}}
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    directory = tmp_path_factory.mktemp("order")
    rows = np.arange(ROWS)
    tags = pa.array([[str(i % 5)] * (i % 4) for i in rows])
    log = pa.table({"item": rows % 1000, "tags": tags, "click": rows % 7 == 0})
    pq.write_table(log, directory / "log.parquet", row_group_size=GROUP_ROWS)
    return convert(
        Options(
            schema=schema_yaml.loads(SCHEMA),
            given={"train": str(directory / "log.parquet")},
            validation_share=0,
            output=str(directory / "data"),
            layouts=("blocks", "rows"),
            block_rows=BLOCK_ROWS,
            shard_rows=SHARD_ROWS,
            processes=1,
        )
    )


@pytest.fixture
def small_pools(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many pools the rows need."""
    monkeypatch.setattr(dataset, "row_bytes", lambda _: (SHUFFLE_MEGABYTES << 20) // (ROWS // 8))
    return 8


def read(manifest: Manifest, source: str, batch_size: int = 100, **options: Any) -> np.ndarray:
    """row_ids of the batches: [steps, B]."""
    batches = read_batches(manifest, "train", batch_size=batch_size, input_format=source, training=True, **options)
    return np.array([batch["row_id"] for batch in batches.as_numpy_iterator()]).reshape(-1, batch_size)


def together(manifest: Manifest, source: str) -> tuple[np.ndarray, np.ndarray]:
    """By row_id: the shard (part of the log) of each row, and the block (run of records, row group)."""
    rows = np.arange(ROWS)
    if source == "parquet":
        return rows // GROUP_ROWS // 4, rows // GROUP_ROWS
    shard, block, number = np.zeros(ROWS, int), np.zeros(ROWS, int), 0
    for i, file in enumerate(manifest.shards("train", source)):
        for j, (_, payload) in enumerate(scan(file.path)):
            values = Example.FromString(payload).features.feature["key:row_id"]
            row_ids = values.int64_list.value or np.frombuffer(values.bytes_list.value[0], "<i8")
            number += source == "blocks" or j % 128 == 0
            shard[row_ids], block[row_ids] = i, number
    return shard, block


def correlation(first: np.ndarray, second: np.ndarray, within: np.ndarray) -> float:
    """Of the places of the rows that two epochs share, relative to the mean place of their shard; in units of .02, or
    of four standard deviations where there are few."""
    places = [np.full(ROWS, np.nan) for _ in range(2)]
    for place, epoch in zip(places, (first, second), strict=True):
        place[epoch.ravel()] = np.arange(epoch.size)
    shared = ~np.isnan(places[0] + places[1])
    within = within[shared]
    counts = np.maximum(np.bincount(within), 1)
    centred = [p[shared] - (np.bincount(within, p[shared]) / counts)[within] for p in places]
    return abs(float(np.corrcoef(*centred)[0, 1])) / max(0.02, 4 / shared.sum() ** 0.5)


def meetings(batches: np.ndarray, blocks: np.ndarray) -> tuple[float, float]:
    """Pairs of rows of one block in one batch, relative to what a random order of the same rows has on average; and
    four standard deviations of that."""
    pairs = sum(n * (n - 1) / 2 for batch in batches for n in collections.Counter(blocks[batch].tolist()).values())
    counts = np.bincount(blocks[batches.ravel()])
    expected = (counts * (counts - 1)).sum() / 2 * (batches.shape[1] - 1) / (batches.size - 1)
    return float(pairs / expected), float(4 / expected**0.5)


@pytest.mark.parametrize("source", INPUT_FORMATS)
@pytest.mark.parametrize("reader", [(0, 1), (1, 2)])
def test_every_epoch_is_shuffled_as_a_whole(converted: Manifest, source: str, reader: tuple[int, int]) -> None:
    shards, blocks = together(converted, source)
    first, second = (read(converted, source, epoch=epoch, reader=reader) for epoch in (0, 1))
    rows = np.unique(first)
    assert len(rows) == first.size > ROWS / reader[1] * 0.9
    for within in (np.zeros(ROWS, int), shards):
        assert correlation(first, second, within) < 1
        assert correlation(first, rows, within) < 1  # with the order of the log
    for batches in (first, second, first[:, :20]):
        ratio, tolerance = meetings(batches, blocks)
        assert ratio == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("source", INPUT_FORMATS)
def test_a_split_of_many_pools(converted: Manifest, small_pools: int, source: str) -> None:
    """Pools are dealt out anew; two rows of a block meet as if their pool were the split."""
    shards, blocks = together(converted, source)
    first, second = (read(converted, source, epoch=epoch) for epoch in (0, 1))
    assert len(np.unique(first)) == first.size == ROWS
    ratio, tolerance = meetings(first, blocks)
    assert ratio < small_pools * (1 + tolerance)
    for start in (77, 400):  # 50 batches a pool
        np.testing.assert_array_equal(read(converted, source, epoch=1, start_step=start), second[start:])
    if source == "parquet":  # 16 row groups, one window each: too few to say more
        return
    for within in (np.zeros(ROWS, int), shards):
        assert correlation(first, second, within) < 1
    pool = set(first[:50].ravel())
    assert max(len(pool & set(second[i : i + 50].ravel())) for i in range(0, 400, 50)) < ROWS / small_pools / 2


@pytest.mark.parametrize("layout", ["blocks", "rows"])
def test_readers_share_the_records_anew_every_epoch(converted: Manifest, layout: str) -> None:
    shards = converted.shards("train", layout)
    starts = []
    for epoch in (0, 1):
        found: list[set[tuple[int, int]]] = []
        rows = []
        for index in range(3):
            pools = order.pools(shards, layout, pool_rows=ROWS // 8, run_bytes=0, seed=(0, epoch), reader=(index, 3))
            found.append({run for pool in pools for run in zip(*(v.tolist() for v in pool[:2]), strict=True)})
            rows.append(sum(int(pool.rows.sum()) for pool in pools))
        assert sum(rows) == ROWS
        assert max(rows) - min(rows) <= 1
        assert len(set.union(*found)) >= sum(map(len, found)) - 2  # runs at the two borders between three parts
        starts.append(found)
    assert len(starts[0][0] & starts[1][0]) < len(starts[0][0]) / 2


@pytest.mark.parametrize(("layout", "parts", "counts"), [("blocks", 6, (2, 3)), ("rows", 2, (2,))])
def test_processes_make_the_global_batches_of_one(
    converted: Manifest, small_pools: int, layout: str, parts: int, counts: tuple[int, ...]
) -> None:
    """Each row once and by one process, however many share the parts; also where an epoch is continued."""
    single = read(converted, layout, 600, parts=parts)
    assert len(np.unique(single)) == single.size == ROWS // 600 * 600
    assert len(single) == dataset.count_batches(converted, "train", 600, training=True, input_format=layout)
    for n in counts:
        each = [read(converted, layout, 600 // n, reader=(i, n), parts=parts, start_step=9) for i in range(n)]
        np.testing.assert_array_equal(np.concatenate(each, axis=1), single[9:])


@pytest.mark.parametrize("layout", ["blocks", "rows"])
def test_runs_are_as_long_as_asked(converted: Manifest, layout: str) -> None:
    shards = converted.shards("train", layout)
    settings: dict[str, Any] = {"pool_rows": ROWS // 8, "reader": (0, 1), "seed": (0, 0)}
    short, long = (order.pools(shards, layout, run_bytes=size, **settings) for size in (0, 20_000))
    assert [len(pool.shard) for pool in long] < [len(pool.shard) for pool in short]
    for pools in (short, long):
        assert sum(int(pool.rows.sum()) for pool in pools) == ROWS
        assert max(int(pool.rows.sum()) for pool in pools) < ROWS / 8 * 1.3
        for pool in pools:
            places = list(zip(pool.shard.tolist(), pool.offset.tolist(), strict=True))
            assert places == sorted(places)  # in the order of the files
    mean = sum(shard.bytes for shard in shards) / sum(shard.records for shard in shards)
    assert np.mean(np.concatenate([pool.records for pool in long])) * mean > 15_000


def test_rows_of_blocks_that_are_not_alike(tmp_path: Path, converted: Manifest) -> None:
    """As they are in a repaired shard."""
    shard = converted.shards("train", "blocks")[0]
    payloads = [payload for _, payload in scan(shard.path)]
    path = str(tmp_path / "shard.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for payload in [payloads[-1], *payloads[:3]]:
            writer.write(payload)
    rows = 3 * BLOCK_ROWS + shard.rows % BLOCK_ROWS
    other = dataclasses.replace(shard, path=path, records=4, rows=rows, bytes=os.path.getsize(path))
    settings: dict[str, Any] = {"pool_rows": 1000, "run_bytes": 0, "seed": (0, 0)}
    for count in (2, 3, 7):
        parts = [order.pools([other], "blocks", **settings, reader=(index, count)) for index in range(count)]
        assert [len(pools) for pools in parts] == [1] * count
        assert [int(pool.rows.sum()) for (pool,) in parts] == np.diff(rows * np.arange(count + 1) // count).tolist()
    (empty,) = order.pools([other], "blocks", **settings, reader=(0, rows + 1))
    assert len(empty.rows) == 0


def test_offsets_are_those_of_the_records(converted: Manifest, tmp_path: Path) -> None:
    path = converted.shards("train", "blocks")[0].path
    expected = [offset for offset, _ in scan(path)]
    assert offsets(path, 1) == expected
    assert offsets(path, 7) == expected[::7]
    data = bytearray(Path(path).read_bytes())
    other = tmp_path / "damaged"
    for damaged, why in ((data[:-1], "the file ends inside a record of"), (data[: expected[5] + 3], "header")):
        other.write_bytes(damaged)
        with pytest.raises(CorruptRecord, match=why):
            offsets(str(other), 1)
    data[expected[5] + 1] ^= 1
    other.write_bytes(data)
    with pytest.raises(CorruptRecord, match=f"offset {expected[5]:,}: the record's length fails its checksum"):
        offsets(str(other), 1)
    other.write_bytes(b"")
    assert offsets(str(other), 1) == []
