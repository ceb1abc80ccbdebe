"""The log itself as the source of batches: the rows of the records, in an order of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from pipelines import records, schema_yaml
from pipelines.batches import log_reader
from pipelines.batches.damage import naming_corrupt_records
from pipelines.batches.dataset import count_batches, read_batches
from pipelines.convert.conversion import convert as convert_log
from pipelines.convert.options import Options
from pipelines.manifest import SPLITS, Manifest
from stem_util.errors import JobError, UserError

SCHEMA = """
name: raw
group: user
item: video
features:
  user: {kind: categorical, side: user, dtype: string, min_count: 2}
  video: {kind: categorical, side: item, dtype: int64}
  small: {kind: categorical, side: context, dtype: int64}
  tags: {kind: multivalent, side: item, dtype: string, max_length: 3}
  age: {kind: numeric, side: user, bucketise: {quantiles: 4}}
  image: {kind: dense, side: item, length: 2}
tasks:
  click: {label: {column: click}, row_weight: worth}
  liked: {label: {column: done, at_least: 0.5, missing: outside}, row_weight: worth}
  done: {type: regression, label: {column: done, missing: outside}}
"""
ROWS = 1100
Convert = Callable[..., Manifest]


def log() -> pa.Table:
    """Nulls in every column that may have some, a large_string, int8 columns, lists, a dictionary and times."""
    random = np.random.default_rng(0)

    def nulls(share: float) -> np.ndarray:
        return random.random(ROWS) < share

    tags = [[["x", "y", None, "日本"][j] for j in random.integers(4, size=i % 5)] for i in range(ROWS)]
    seconds = np.sort(random.random(ROWS) * 1e6)
    return pa.table(
        {
            "user": pa.array([f"u{i}" for i in random.integers(60, size=ROWS)], pa.large_string()),
            "video": pa.array(random.integers(1, 90, ROWS)),
            "small": pa.array(random.integers(-3, 4, ROWS), pa.int8(), mask=nulls(0.2)),
            "tags": pa.array([None if i % 11 == 0 else row for i, row in enumerate(tags)]),
            "age": pa.array(random.integers(16, 70, ROWS), pa.int8(), mask=nulls(0.3)),
            "image": pa.array(list(random.random((ROWS, 2), np.float32)), pa.list_(pa.float32(), 2)),
            "click": pa.array(random.integers(0, 2, ROWS), pa.int8()),
            "done": pa.array(random.random(ROWS), mask=nulls(0.5)),
            "seconds": pa.array(seconds),
            "worth": pa.array(seconds % 5, pa.float32()),
            "moment": pa.array((seconds * 1e3).astype(np.int64), pa.timestamp("ms", "UTC")),
            "country": pa.array(
                [["de", "fr", "pl", "at"][i] for i in random.integers(4, size=ROWS)]
            ).dictionary_encode(),
        }
    )


@pytest.fixture(autouse=True)
def _many_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_reader, "WINDOW_ROWS", 64)


def converter(directory: Path) -> Convert:
    """``converter(directory)(split="time", ...)``: the log in two files of row groups of 100 rows, converted."""
    files = [directory / "log" / name for name in ("a.parquet", "b.parquet")]
    files[0].parent.mkdir()
    for path, table in zip(files, (log().slice(0, 700), log().slice(700)), strict=True):
        pq.write_table(table, path, row_group_size=100)

    def run(**options: Any) -> Manifest:
        settings: dict[str, Any] = {
            "schema": schema_yaml.loads(SCHEMA),
            "output": str(directory / "data"),
            "overwrite": True,
            "block_rows": 32,
            "layouts": ("blocks",),
        }
        if "given" not in options:
            settings |= {"log": str(files[0].parent)}
        return convert_log(Options(**settings | options))

    return run


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    return converter(tmp_path)


@pytest.fixture(scope="module")
def by_time(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Not to be damaged."""
    return converter(tmp_path_factory.mktemp("pristine"))(split="time", split_column="seconds")


def read(manifest: Manifest, split: str = "train", **options: Any) -> list[dict[str, Any]]:
    defaults: dict[str, Any] = {"batch_size": 64, "training": split == "train", "input_format": "parquet"}
    options = defaults | options
    with naming_corrupt_records(manifest, split, options["input_format"]):
        return list(read_batches(manifest, split, **options).as_numpy_iterator())


def windows(manifest: Manifest, split: str = "train", processes: int = 1, **options: Any) -> list[dict[str, Any]]:
    """What the processes send, read here."""
    defaults: dict[str, Any] = {"shuffle": (0, 0) if split == "train" else None, "reader": (0, 1)}
    plan = log_reader.plan(manifest, split, **defaults | options)
    found: dict[int, dict[str, Any]] = {}
    for stream in range(processes):
        output = io.BytesIO()
        plan.write(output, stream, processes)
        for batch in pa.ipc.open_stream(output.getvalue()):
            columns = {name: batch.column(name) for name in batch.schema.names}
            found[columns.pop(log_reader.WINDOW)[0].as_py()] = {
                key: np.array(values.to_pylist()) for key, values in columns.items() if values[0].as_py() != -1
            }
    assert sorted(found) == list(range(len(plan.order)))
    return [found[number] for number in sorted(found) if "key:row_id" in found[number]]


def places(windows: list[dict[str, Any]]) -> list[int]:
    """row_ids of windows."""
    return [int(i) for columns in windows for i in columns["key:row_id"]]


def row_ids(batches: list[dict[str, Any]]) -> list[int]:
    return [int(i) for batch in batches for i in batch["row_id"] if i >= 0]


def assert_equal(got: Any, expected: Any) -> None:
    tf.nest.map_structure(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"split": "time", "split_column": "seconds", "validation_from": "700000"},
        {"split": "time", "split_column": "moment", "validation_from": "1970-01-08T00:00:00Z"},
        {"split": "hash", "split_column": "country", "fractions": (0.4, 0.3, 0.3), "seed": 4},
        {"split": "random", "seed": 3},
        {"given": {"train": "log/a.parquet", "test": "log/b.parquet"}, "validation_share": 0},
        {
            "given": {"train": "log/a.parquet", "test": "log/b.parquet"},
            "validation_share": 0.2,
            "validation_by": "time",
            "split_column": "moment",
        },
        {"split": "leave_last", "split_column": "moment", "split_group": "user"},
    ],
    ids=["float times", "timestamps", "hash", "random", "given", "share of given", "leave last"],
)
def test_every_split_has_the_rows_of_its_records(
    convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = convert(**options)
    monkeypatch.chdir("/")
    assert manifest.split.get("validation_until") is None  # none of these has a test split that begins at a time
    assert sum(manifest.rows(split) for split in SPLITS) == ROWS
    for split in filter(manifest.rows, SPLITS):
        raw = windows(manifest, split, shuffle=None)
        records = read(manifest, split, training=False, input_format="blocks")
        assert places(raw) == sorted(row_ids(records))
        users = np.concatenate([columns["feature:user"] for columns in raw])
        order = np.argsort([i for batch in records for i in batch["row_id"] if i >= 0])
        expected = np.concatenate([batch["features"]["user"][batch["row_id"] >= 0] for batch in records])
        np.testing.assert_array_equal(users, expected[order])


def test_batches_are_those_of_the_records(by_time: Manifest) -> None:
    # Padding and all.
    assert_equal(read(by_time, "validation"), read(by_time, "validation", input_format="blocks"))
    raw, records = (read(by_time, training=False, input_format=f) for f in ("parquet", "blocks"))
    assert row_ids(raw) == list(range(880))
    assert_equal(by_row(raw), by_row(records))


def by_row(batches: list[dict[str, Any]]) -> Any:
    """All real rows of some batches, by row_id."""
    joined = tf.nest.map_structure(lambda *parts: np.concatenate(parts), *batches)
    order = np.argsort(joined["row_id"])
    order = order[joined["row_id"][order] >= 0]
    return tf.nest.map_structure(lambda values: values[order], joined)


def test_bad_rows_are_dropped_again(convert: Convert, tmp_path: Path) -> None:
    path = tmp_path / "log" / "a.parquet"
    table = pq.read_table(path)
    clicks = table["click"].to_numpy().copy()
    clicks[[3, 400]] = 7
    times = pa.array(table["seconds"].to_numpy(), mask=np.arange(700) == 5)
    table = table.set_column(table.schema.get_field_index("click"), "click", pa.array(clicks))
    pq.write_table(table.set_column(table.schema.get_field_index("seconds"), "seconds", times), path)
    manifest = convert(split="time", split_column="seconds", drop_bad_rows=True)
    rows = places(windows(manifest, shuffle=None))
    assert rows == sorted(row_ids(read(manifest, training=False, input_format="blocks")))
    assert {3, 5, 400}.isdisjoint(rows)


def test_training_batches_follow_from_seed_and_epoch_alone(by_time: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = read_batches(by_time, "train", batch_size=64, training=True, input_format="parquet", seed=5, epoch=2)
    assert dataset.element_spec == read_batches(by_time, "train", batch_size=64, training=True).element_spec
    first = list(dataset.as_numpy_iterator())
    assert len(first) == count_batches(by_time, "train", 64, training=True, input_format="parquet") == 880 // 64
    ids = row_ids(first)
    assert len(set(ids)) == len(ids)
    assert len({i // 100 for i in ids[:64]}) == 9  # of all row groups
    for seed, epoch in ((6, 2), (5, 3)):
        assert row_ids(read(by_time, seed=seed, epoch=epoch)) != ids
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert_equal(read(by_time, seed=5, epoch=2, start_step=7), first[7:])


def test_row_groups_are_permuted_and_read_side_by_side(by_time: Manifest) -> None:
    every = places(windows(by_time, shuffle=(5, 2)))
    assert sorted(every) == list(range(880))
    assert len({i // 100 for i in every[:64]}) == 1
    assert len({i // 100 for i in every[: 64 * 8]}) > 5
    assert places(windows(by_time, shuffle=(5, 2), processes=3)) == every
    for seed in ((6, 2), (5, 3)):
        assert places(windows(by_time, shuffle=seed)) != every


def test_small_row_groups_share_a_window(by_time: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_reader, "WINDOW_ROWS", 500)
    found = windows(by_time)
    assert len(found) == 3
    assert len({i // 100 for i in found[0]["key:row_id"]}) > 3
    assert places(windows(by_time, "test")) == list(range(990, 1100))


def test_windows_are_shorter_where_rows_are_wide(by_time: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with rows so wide that 64 of them have 2^31 values: where each list begins is an int32."""
    monkeypatch.setattr(records, "MOST_VALUES", 3 * 2 * 16)
    plan = log_reader.plan(by_time, "train", shuffle=None, reader=(0, 1))
    assert plan.window_rows == 16
    assert places(windows(by_time, shuffle=None)) == list(range(880))
    monkeypatch.setattr(records, "MOST_VALUES", 3)
    with pytest.raises(UserError, match="feature:tags has .* values, more than 3, in "):
        dataclasses.replace(plan, order=plan.order[:1]).write(io.BytesIO(), 0, 1)


@pytest.mark.parametrize("count", [3, 13])  # by row group, and, there being 11, by row
@pytest.mark.parametrize("shuffle", [(0, 0), None])
def test_readers_share_the_rows(by_time: Manifest, count: int, shuffle: tuple[int, int] | None) -> None:
    parts = [places(windows(by_time, shuffle=shuffle, reader=(index, count))) for index in range(count)]
    assert sorted(i for part in parts for i in part) == list(range(880))
    assert min(map(len, parts)) > 880 / count / 2
    assert shuffle or all(part == sorted(part) for part in parts)


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_another_log_is_refused(convert: Convert, tmp_path: Path) -> None:
    converted = convert(split="random")
    path = tmp_path / "log" / "b.parquet"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError, match=r"log/b.parquet is missing: restore it, or convert the log"):
        windows(converted)
    path.write_bytes(whole[:-1])
    with pytest.raises(
        UserError, match=r"b.parquet has changed since .* bytes, [0-9,]+ then\): restore it, or convert"
    ):
        windows(converted)
    path.write_bytes(whole)
    first, second = converted.sources
    other = dataclasses.replace(converted, sources=(first, dataclasses.replace(second, rows=399)))
    with pytest.raises(UserError, match=r"b.parquet has changed since it was converted \(400 rows, 399 then\)"):
        windows(other)


def test_text_is_refused(convert: Convert, tmp_path: Path) -> None:
    pa.csv.write_csv(pq.read_table(tmp_path / "log", columns=["click"]), tmp_path / "log.csv")
    small = schema_yaml.loads(
        "name: s\nfeatures: {a: {kind: categorical, side: user, dtype: int64, column: click, "
        "allow_label_column: true}}\ntasks: {click: {label: {column: click}}}"
    )
    options = {"log": str(tmp_path / "log.csv"), "schema": small, "split": "random"}
    with pytest.raises(UserError, match="converted from CSV, which --input_format=parquet does not read"):
        read(convert(**options))
    with pytest.raises(UserError, match="log.csv: training cannot read CSV; .* needs a Parquet log"):
        convert(**options, layouts=())


def test_conversion_without_records(by_time: Manifest, tmp_path: Path) -> None:
    options = Options(
        schema=by_time.schema,
        log=str(Path(by_time.sources[0].path).parent),
        output=str(tmp_path / "bare"),
        split="time",
        split_column="seconds",
        layouts=(),
    )
    bare = convert_log(options)
    assert not any(split.shards for split in bare.splits.values())
    kept = [".stem-tf", "history", "manifest.json", "raw", "schema.yaml", "vocabulary"]
    assert sorted(os.listdir(bare.data_dir)) == kept
    same = dataclasses.replace(bare, data_dir=by_time.data_dir, splits=by_time.splits)
    assert same == by_time
    for name in SPLITS:
        assert dataclasses.replace(bare.splits[name], shards=by_time.splits[name].shards) == by_time.splits[name]
    assert_equal(windows(bare), windows(by_time))
    with pytest.raises(
        UserError, match="without records .--layouts=none.: read the log itself with --input_format=par"
    ):
        read(bare, input_format="blocks")


def test_an_earlier_manifest_without_exact_limits(by_time: Manifest) -> None:
    split = {key: value for key, value in by_time.split.items() if key != "keys"}
    with pytest.raises(UserError, match="an earlier version converted the log .* convert it again"):
        windows(dataclasses.replace(by_time, split=split))


def test_a_file_that_goes_while_it_is_read(convert: Convert, tmp_path: Path) -> None:
    converted = convert(split="random")
    batches = read_batches(converted, "train", batch_size=64, training=True, input_format="parquet")
    (tmp_path / "log" / "a.parquet").unlink()
    with pytest.raises(UserError, match="a.parquet is missing: restore it"):  # noqa: SIM117
        with naming_corrupt_records(converted, "train", "parquet"):
            list(batches)


def test_a_vocabulary_that_has_gone(convert: Convert) -> None:
    converted = convert(split="random")
    os.unlink(converted.vocabulary_path("video"))
    with pytest.raises(UserError, match="video.parquet is missing: restore it, or convert"):
        read(converted)


def readers(parent: int) -> list[int]:
    """Processes that read a log for another one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, ppid = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z" and int(ppid) == parent and b"log_reader" in (path.parent / "cmdline").read_bytes():
                found.append(int(path.parent.name))
    return found


def until(done: Callable[[], Any], seconds: float = 30) -> Any:
    """Waits for a true value."""
    end = time.monotonic() + seconds
    while not (value := done()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return value


@pytest.fixture
def large(convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """A log whose windows are larger than what a socket holds; a pool of 1 MB holds one."""
    monkeypatch.setattr(log_reader, "WINDOW_ROWS", 60_000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    rows = np.arange(600_000)
    pq.write_table(pa.table({"item": rows % 1000, "click": rows % 7 == 0}), tmp_path / "large.parquet")
    small = schema_yaml.loads(
        "name: large\nfeatures: {item: {kind: categorical, side: item, dtype: int64}}\n"
        "tasks: {click: {label: {column: click}}}"
    )
    given = {"train": str(tmp_path / "large.parquet")}
    return convert(given=given, validation_share=0, schema=small, layouts=())


def test_a_killed_reader_ends_the_job_and_spoils_no_batch(large: Manifest) -> None:
    batches = read_batches(
        large, "train", batch_size=10_000, training=True, input_format="parquet", shuffle_megabytes=1
    )
    seen: set[int] = set()
    gc.collect()  # of tests before
    with (
        pytest.raises(JobError, match="that reads the log was ended by SIGKILL: killed from outside, or out of memory"),
        naming_corrupt_records(large, "train", "parquet"),
    ):
        for batch in batches.as_numpy_iterator():
            if not seen:
                time.sleep(1)  # it waits for somebody to read on, inside a window
                [process] = readers(os.getpid())
                os.kill(process, signal.SIGKILL)
            np.testing.assert_array_equal(batch["labels"]["click"], batch["row_id"] % 7 == 0)
            seen.update(batch["row_id"].tolist())
    assert 0 < len(seen) < 600_000
    assert len(seen) % 10_000 == 0


def test_readers_end_with_their_iterator(large: Manifest) -> None:
    gc.collect()
    until(lambda: not readers(os.getpid()))
    threads = threading.active_count()
    batches = read_batches(large, "train", batch_size=64, training=True, input_format="parquet", shuffle_megabytes=1)
    first, second = iter(batches), iter(batches)
    assert_equal(next(first)["row_id"].numpy(), next(second)["row_id"].numpy())
    assert len(readers(os.getpid())) == 2
    del first
    until(lambda: len(readers(os.getpid())) == 1)
    next(second)
    del batches  # the iterator keeps it
    assert next(second)["row_id"].shape == 64
    del second
    until(lambda: not readers(os.getpid()))
    gc.collect()
    until(lambda: threading.active_count() <= threads)


def test_readers_end_with_their_job_and_import_no_tensorflow(large: Manifest) -> None:
    job = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import socket, sys, time\n"
            "from pipelines import manifest\nfrom pipelines.batches import log_reader, log_streams\n"
            f"data = manifest.load({large.data_dir!r})\n"
            "plan = log_reader.plan(data, 'train', shuffle=(0, 0), reader=(0, 1))\n"
            "streams = log_streams.Streams(plan, 1)\n"
            "client = socket.socket(socket.AF_UNIX)\n"
            "client.connect(streams.endpoints[0].removeprefix('unix://'))\n"
            "client.recv(1)\n"
            "time.sleep(60)",
        ]
    )
    try:
        [process] = until(lambda: readers(job.pid))
        until(lambda: b"pyarrow" in Path(f"/proc/{process}/maps").read_bytes())
        time.sleep(0.3)
        assert b"tensorflow" not in Path(f"/proc/{process}/maps").read_bytes()
    finally:
        job.kill()
        job.wait()
    until(lambda: not Path(f"/proc/{process}").exists())
