"""Whole conversions: what ends up where, the same bytes again, and logs with something wrong."""

import dataclasses
import filecmp
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipelines import hashing, records, schema_yaml, tfrecord
from pipelines.batches import log_reader
from pipelines.convert import constant_labels, fit
from pipelines.convert.conversion import convert
from pipelines.convert.options import Options
from pipelines.log import source
from pipelines.log.parts import CsvOptions
from pipelines.manifest import Constants, Manifest, Vocabulary
from stem_util.errors import UserError

_SCHEMA = """
name: tiny
group: user
item: note
features:
  user: {kind: categorical, side: user, dtype: int64}
  video: {kind: categorical, side: item, dtype: string, min_count: 2}
  tags: {kind: multivalent, side: item, dtype: string, separator: "|", max_length: 2}
  length: {kind: numeric, side: item, transform: [log1p, standardise], allow_label_column: true}
tasks:
  click: {label: {column: click}}
  done: {type: regression, label: {column: seen, divide_by: length, clip: [0, 1], missing: outside}}
"""


def _log(rows: int = 60) -> pa.Table:
    """Sorted by time; the schema's own columns, and one more."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 5, rows).astype(float)
    return pa.table(
        {
            "user": rng.integers(1, 9, rows),
            "video": [["a\nb", 'c"', "日本", ""][i] for i in rng.integers(0, 4, rows)],
            "tags": [["x|y|z", "y", "", "x||z"][i] for i in rng.integers(0, 4, rows)],
            "length": pa.array(lengths, mask=lengths == 4),
            "click": rng.integers(0, 2, rows),
            "seen": rng.integers(0, 4, rows),
            "time": np.arange(rows) * 10,
            "note": [f"row {i}" for i in range(rows)],
        }
    )


def _convert(log: Path | str, output: Path, **settings: Any) -> Manifest:
    defaults: dict[str, Any] = {"schema": schema_yaml.loads(_SCHEMA), "split": "time", "split_column": "time"}
    settings = defaults | settings
    return convert(Options(log=str(log), output=str(output), **settings))


def _write(path: Path, table: pa.Table, row_group_size: int | None = None) -> Path:
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def _rows(done: Manifest, split: str) -> list[dict[str, Any]]:
    """The records of the rows layout, as lists."""
    result = []
    for shard in done.shards(split, "rows"):
        for _, payload in tfrecord.scan(shard.path):
            features = tfrecord.Example.FromString(payload).features.feature
            result.append({key: list(getattr(f, f.WhichOneof("kind")).value) for key, f in features.items()})
    return result


def _block_column(done: Manifest, split: str, key: str, kind: str) -> np.ndarray:
    parts = [np.zeros(0, kind)]
    for shard in done.shards(split, "blocks"):
        for _, payload in tfrecord.scan(shard.path):
            features = tfrecord.Example.FromString(payload).features.feature
            parts.append(np.frombuffer(features[key].bytes_list.value[0], kind))
    return np.concatenate(parts)


def _files(directory: Path) -> list[str]:
    return sorted(os.path.relpath(os.path.join(d, f), directory) for d, _, files in os.walk(directory) for f in files)


def _assert_same_bytes(one: Path, other: Path) -> None:
    assert _files(one) == _files(other)
    assert filecmp.cmpfiles(one, other, _files(one), shallow=False) == (_files(one), [], [])


def test_records_hold_the_log(tmp_path: Path) -> None:
    table = _log()
    done = _convert(_write(tmp_path / "log.parquet", table), tmp_path / "out")
    vocabularies = {n: pq.read_table(done.vocabulary_path(n))["value"].to_pylist() for n in ("user", "video", "tags")}
    raw = table.to_pylist()
    assert [done.rows(split) for split in ("train", "validation", "test")] == [48, 6, 6]
    seen = []
    for split in ("train", "validation", "test"):
        for record in _rows(done, split):
            (row_id,) = record["key:row_id"]
            row = raw[row_id]
            seen.append(row_id)
            assert vocabularies["user"].index(row["user"]) + 2 == record["feature:user"][0]
            video = row["video"].encode()
            expected = vocabularies["video"].index(video) + 2 if video in vocabularies["video"] else 1
            assert record["feature:video"] == [expected]
            assert (expected == 1) == (video == b"" or video not in vocabularies["video"])
            tags = [tag.encode() for tag in row["tags"].split("|") if tag][:2]
            assert record["feature:tags"] == [vocabularies["tags"].index(tag) + 2 for tag in tags]
            length = np.float32(np.nan if row["length"] is None else row["length"])
            np.testing.assert_array_equal(record["feature:length"], [length])
            assert record["label:click"] == [row["click"]]
            inside = row["length"] not in (None, 0)
            ratio = np.float32(min(row["seen"] / row["length"], 1)) if inside else np.float32(np.nan)
            np.testing.assert_array_equal(np.float32(record["label:done"]), [ratio])
            assert record["key:group"] == hashing.key64(pa.array([row["user"]])).tolist()
    assert sorted(seen) == list(range(60))
    assert seen[48:] == list(range(48, 60))  # input order
    assert seen[:48] != sorted(seen[:48])


def test_blocks_and_rows_agree(tmp_path: Path) -> None:
    done = _convert(_write(tmp_path / "log.parquet", _log()), tmp_path / "out", block_rows=7)
    for split in ("train", "validation", "test"):
        rows = _rows(done, split)
        for key, kind in [("key:row_id", "<i8"), ("key:item", "<i8"), ("feature:user", "<i4"), ("feature:tags", "<i4")]:
            assert _block_column(done, split, key, kind).tolist() == [value for row in rows for value in row[key]]
        lengths = _block_column(done, split, "length:tags", "<i4")
        assert lengths.tolist() == [len(row["feature:tags"]) for row in rows]
    assert [s.records for s in done.shards("train", "blocks")] == [7]  # 48 rows


def test_manifest_counts(tmp_path: Path) -> None:
    table = _log()
    done = _convert(_write(tmp_path / "log.parquet", table), tmp_path / "out")
    train = table.slice(0, 48).to_pandas()
    assert done.task_rate("train", "click") == train["click"].mean()
    assert done.task_rows("train", "done") == int((train["length"] > 0).sum())
    logs = np.log1p(train["length"].dropna().to_numpy(np.float32).astype(float))
    constants = done.constants("length")
    np.testing.assert_allclose([constants.mean, constants.std, constants.mean_after], [logs.mean(), logs.std(), 0])
    assert done.vocabularies["video"] == Vocabulary(3, 3)
    assert done.splits["train"].rare_share["video"] == (train["video"] == "").mean()
    assert done.splits["train"].rare_share["tags"] == 0
    assert done.sources[0].rows == 60
    assert done.split == {
        "by": "time",
        "column": "time",
        "fractions": [0.8, 0.1, 0.1],
        "train_until": 470,
        "validation_until": 530,
        "type": "int64",
        "keys": [470 + 2**63, 530 + 2**63],
    }
    for layout in ("blocks", "rows"):
        for shard in done.shards("train", layout):
            assert os.path.getsize(shard.path) == shard.bytes
    assert done.schema == schema_yaml.loads(_SCHEMA)


def test_row_weights_reach_records_and_rates(tmp_path: Path) -> None:
    table = _log().append_column("worth", pa.array(np.arange(60) % 4 / 2))
    weighted = _SCHEMA.replace("click: {label: {column: click}}", "click: {label: {column: click}, weight: worth}")
    log = _write(tmp_path / "log.parquet", table)
    done = _convert(log, tmp_path / "out", schema=schema_yaml.loads(weighted))
    train = table.slice(0, 48).to_pandas()
    counts = done.splits["train"].tasks
    assert (counts["click"].rows, counts["click"].weight) == ((train["worth"] > 0).sum(), train["worth"].sum())
    assert counts["click"].rate == pytest.approx(np.average(train["click"], weights=train["worth"]), rel=1e-12)
    assert counts["done"].weight is None
    worth = {row["key:row_id"][0]: row["weight:worth"] for row in _rows(done, "train")}
    assert worth == {i: [i % 4 / 2] for i in range(48)}
    np.testing.assert_array_equal(
        _block_column(done, "train", "weight:worth", "<f4"),
        [w for row in _rows(done, "train") for w in row["weight:worth"]],
    )
    # For all tasks, and one with a column of its own.
    everywhere = schema_yaml.loads(
        "weight: worth\n" + weighted.replace("weight: worth", "row_weight: seen, weight: 0.5")
    )
    assert [(task.row_weight, task.weight) for task in everywhere.tasks] == [("seen", 0.5), ("worth", 1.0)]
    assert schema_yaml.loads(schema_yaml.dumps(everywhere)) == everywhere
    counts = _convert(log, tmp_path / "all", schema=everywhere).splits["train"].tasks
    assert counts["click"].weight == train["seen"].sum() and counts["done"].weight is not None


def test_standardised_labels_have_their_constants_of_train(tmp_path: Path) -> None:
    table = _log().append_column("worth", pa.array(np.arange(60) % 4 / 2))
    text = _SCHEMA.replace("clip: [0, 1], missing", "clip: [0, 2], standardise: true, missing")
    text += "  seen: {type: regression, label: {column: seen, standardise: true}, row_weight: worth}\n"
    text += "  same: {type: regression, label: {column: one, standardise: true}}\n"
    table = table.append_column("one", pa.array([0.1] * 60))
    done = _convert(_write(tmp_path / "log.parquet", table, 7), tmp_path / "out", schema=schema_yaml.loads(text))
    train = table.slice(0, 48).to_pandas()
    ratio = (
        np.clip(train["seen"] / train["length"], 0, 2).to_numpy()[train["length"] > 0].astype(np.float32).astype(float)
    )
    mean = np.average(train["seen"], weights=train["worth"])
    variance = np.average((train["seen"] - mean) ** 2, weights=train["worth"])
    found = {task: dataclasses.astuple(scale) for task, scale in done.label_scales.items()}
    assert found == {
        "done": pytest.approx((ratio.mean(), ratio.std())),
        "seen": pytest.approx((mean, variance**0.5)),
        "same": pytest.approx((0.1, 1.0)),
    }
    # Records hold the label as it is.
    assert {row["label:seen"][0] for row in _rows(done, "train") if row["weight:worth"][0]} <= {0.0, 1.0, 2.0, 3.0}


def test_raw_rows_join_by_row_id(tmp_path: Path) -> None:
    table = _log()
    done = _convert(_write(tmp_path / "log.parquet", table), tmp_path / "out")
    raw = pq.read_table(os.path.join(done.data_dir, "raw/test"))
    assert raw.drop_columns(["row_id"]).equals(table.slice(54).combine_chunks())
    assert raw["row_id"].to_pylist() == list(range(54, 60))


def test_csv_gives_the_same_records_as_parquet(tmp_path: Path) -> None:
    table = _log()
    pyarrow.csv.write_csv(table, tmp_path / "log.csv")
    one = _convert(_write(tmp_path / "log.parquet", table), tmp_path / "a")
    two = _convert(tmp_path / "log.csv", tmp_path / "b")
    for split in ("train", "validation", "test"):
        assert str(_rows(one, split)) == str(_rows(two, split))  # as text, for NaN
    raw = pq.read_table(os.path.join(two.data_dir, "raw/validation")).to_pylist()
    assert (raw[0]["user"], raw[0]["note"], raw[0]["row_id"]) == (table["user"][48].as_py(), "row 48", 48)
    assert raw[0]["click"] == str(table["click"][48].as_py())  # text, as it was read


@pytest.mark.parametrize("split", ["time", "random", "hash", "leave_last"])
def test_same_bytes_whatever_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    # Workers are new processes, which a patch does not reach: several units come from several files.
    table = _log(900)
    for i in range(3):
        pyarrow.csv.write_csv(table.slice(i * 300, 300), tmp_path / f"log-{i}.csv")
    column = {"time": "time", "random": None, "hash": "user", "leave_last": "seen"}[split]
    settings: dict[str, Any] = {"split": split, "split_column": column, "shard_rows": 100, "seed": 3}
    one = _convert(f"{tmp_path}/log-*.csv", tmp_path / "one", processes=1, **settings)
    _convert(f"{tmp_path}/log-*.csv", tmp_path / "two", processes=2, **settings)
    _assert_same_bytes(tmp_path / "one", tmp_path / "two")
    assert len(one.shards("train", "rows")) == -(-one.rows("train") // 100)
    assert sum(one.rows(s) for s in one.splits) == 900
    assert one.rows("validation") and one.rows("test")
    other = _convert(f"{tmp_path}/log-*.csv", tmp_path / "other", **(settings | {"seed": 4}))
    assert not filecmp.cmp(one.shards("train", "rows")[0].path, other.shards("train", "rows")[0].path, shallow=False)
    if split == "hash":
        users = [{row["key:group"][0] for row in _rows(one, s)} for s in ("train", "validation", "test")]
        assert not users[0] & users[1] and not users[0] & users[2] and not users[1] & users[2]


@pytest.mark.parametrize("drop", [False, True])
def test_same_bytes_whatever_the_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drop: bool) -> None:
    table = _log(300)
    if drop:  # chunks, and the last segment, without a good row
        bad = np.isin(np.arange(300) // 20, [3, 4, 14])
        table = table.set_column(4, "click", pa.array(np.where(bad, 7, table["click"].to_numpy())))
    log = _write(tmp_path / "log.parquet", table)
    monkeypatch.setattr(source, "CHUNK_ROWS", 20)
    for split, column in (("random", None), ("time", "time")):
        settings: dict[str, Any] = {"split": split, "split_column": column, "shard_rows": 50, "drop_bad_rows": drop}
        _convert(log, tmp_path / split / "whole", **settings)
        for limit, value in (("_SEGMENT_ROWS", 1), ("_SEGMENT_ROWS", 50), ("_SEGMENT_BYTES", 500)):
            with monkeypatch.context() as patch:
                patch.setattr(fit, limit, value)
                _convert(log, tmp_path / split / f"{limit} {value}", **settings)
            _assert_same_bytes(tmp_path / split / "whole", tmp_path / split / f"{limit} {value}")


def test_more_values_than_a_list_column_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with 2^31 of them: where each list begins is an int32."""
    table = _log(300)
    table = table.set_column(table.schema.get_field_index("tags"), "tags", pa.array(["a|b"] * 300))
    log = _write(tmp_path / "log.parquet", table)
    monkeypatch.setattr(source, "CHUNK_ROWS", 20)
    monkeypatch.setattr(records, "MOST_VALUES", 40)
    with pytest.raises(
        UserError, match="feature:tags has 600 values, more than 40, in 300 rows .* lower its max_length"
    ):
        _convert(log, tmp_path / "out", shard_rows=50)
    monkeypatch.setattr(fit, "_SEGMENT_BYTES", 1)
    with pytest.raises(
        UserError, match="feature:tags has [0-9]+ values, .* in a shard of train; .*smaller --shard_rows"
    ):
        _convert(log, tmp_path / "out", shard_rows=50)
    _convert(log, tmp_path / "out", shard_rows=10)


def test_layout_of_the_log_does_not_change_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = _log(300)
    whole = _convert(_write(tmp_path / "log.parquet", table), tmp_path / "one", shard_rows=50)
    monkeypatch.setattr(source, "_UNIT_ROWS", 64)
    monkeypatch.setattr(source, "CHUNK_ROWS", 20)
    (tmp_path / "parts").mkdir()
    for i in range(3):
        _write(tmp_path / f"parts/log-{i}.parquet", table.slice(i * 100, 100), row_group_size=30)
    parts = _convert(tmp_path / "parts", tmp_path / "two", shard_rows=50)
    for layout in ("blocks", "rows"):
        digests = [[shard.sha256 for shard in done.shards("train", layout)] for done in (whole, parts)]
        assert digests[0] == digests[1]
    # Sums are taken in another order.
    np.testing.assert_allclose(whole.constants("length").mean, parts.constants("length").mean, rtol=1e-12)
    raw = pq.read_table(os.path.join(parts.data_dir, "raw/test"))
    assert raw["row_id"].to_pylist() == list(range(270, 300))


def test_train_order_is_unrelated_to_input_order(tmp_path: Path) -> None:
    rows = 200_000
    table = pa.table({"user": np.zeros(rows, np.int64), "click": np.zeros(rows, np.int8)})
    features = "{user: {kind: categorical, side: user, dtype: int64}}"
    text = f"{{name: s, features: {features}, tasks: {{c: {{label: {{column: click}}}}}}}}"
    done = _convert(
        _write(tmp_path / "log.parquet", table),
        tmp_path / "out",
        schema=schema_yaml.loads(text),
        split="random",
        split_column=None,
        fractions=(1.0, 0.0, 0.0),
        layouts=("blocks",),
        shard_rows=20_000,
    )
    places = _block_column(done, "train", "key:row_id", "<i8")
    assert sorted(places.tolist()) == list(range(rows))
    # Of independent orders it is normal with deviation 1 / sqrt(rows) = .0022; a block's neighbours too.
    assert abs(np.corrcoef(places, np.arange(rows))[0, 1]) < 0.01
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.01
    sizes = [shard.rows for shard in done.shards("train", "blocks")]
    assert len(sizes) == 10 and max(sizes) < 21_000


def test_a_second_conversion_in_the_same_place_has_its_own_vocabulary(tmp_path: Path) -> None:
    table = _log()
    _convert(_write(tmp_path / "log.parquet", table), tmp_path / "out")
    users = pa.array(table["user"].to_numpy() + 1000)
    changed = table.set_column(0, "user", users)
    done = _convert(_write(tmp_path / "log.parquet", changed), tmp_path / "out", overwrite=True)
    assert done.splits["train"].rare_share["user"] == 0


def test_given_files(tmp_path: Path) -> None:
    table = _log(30)
    paths = {s: _write(tmp_path / f"{s}.parquet", table.slice(i * 10, 10)) for i, s in enumerate(["train", "test"])}
    given = {split: str(path) for split, path in paths.items()}
    done = _convert("", tmp_path / "out", given=given, validation_share=0, split=None, split_column=None)
    assert [done.rows(split) for split in ("train", "validation", "test")] == [10, 0, 10]
    assert [row["key:row_id"] for row in _rows(done, "test")] == [[i] for i in range(10, 20)]
    assert done.split == {"by": "given files", "train": [given["train"]], "validation": [], "test": [given["test"]]}
    with pytest.raises(UserError, match="train.parquet: given for both --train and --test"):
        _convert(
            "",
            tmp_path / "x",
            given={"train": given["train"], "test": given["train"]},
            validation_share=0,
            split=None,
            split_column=None,
        )


@pytest.mark.parametrize(("by", "column"), [("random", None), ("hash", "user"), ("time", "time")])
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_validation_as_a_share_of_given_train_files(tmp_path: Path, by: str, column: str | None, suffix: str) -> None:
    write = pq.write_table if suffix == "parquet" else pyarrow.csv.write_csv
    # What the shares are of is train alone: the test file is older.
    given = {"train": str(tmp_path / f"a.{suffix}"), "test": str(tmp_path / f"b.{suffix}")}
    table = _log(300).drop_columns(["tags", "length", "seen"])
    write(table.slice(100), given["train"])
    write(table.slice(0, 100), given["test"])
    small = schema_yaml.loads(
        """
        {name: small, group: user, features: {user: {kind: categorical, side: user, dtype: int64}},
         tasks: {click: {label: {column: click}}}}
        """
    )
    share: dict[str, Any] = {"validation_share": 0.25, "validation_by": by, "split_column": column}
    done = _convert("", tmp_path / "out", schema=small, given=given, split=None, **share)
    rows = {name: [row["key:row_id"][0] for row in _rows(done, name)] for name in done.splits}
    assert sorted(rows["test"]) == list(range(200, 300)) and sorted(rows["train"] + rows["validation"]) == list(
        range(200)
    )
    if by == "time":
        assert sorted(rows["validation"]) == list(range(150, 200))
    else:
        assert 0 < len(rows["validation"]) < 150
    if by == "hash":
        users = [{row["key:group"][0] for row in _rows(done, name)} for name in ("train", "validation")]
        assert not users[0] & users[1]
    assert done.split["rest"]["by"] == by


def test_leave_the_last_rows_of_every_user(tmp_path: Path) -> None:
    users, times = [7, 7, 7, 7, 8, 8, 9, 5, 5, 5], [4, 9, 9, 1, 1, 2, 1, 3, 2, 1]
    table = _log(10).set_column(0, "user", pa.array(users)).set_column(6, "time", pa.array(times))
    log = _write(tmp_path / "log.parquet", table, row_group_size=3)

    def places(done: Manifest) -> dict[str, list[int]]:
        return {name: sorted(row["key:row_id"][0] for row in _rows(done, name)) for name in done.splits}

    done = _convert(log, tmp_path / "a", split="leave_last")
    assert places(done) == {"train": [0, 3, 4, 5, 6, 9], "validation": [1, 8], "test": [2, 7]}
    assert done.split == {"by": "leave last", "column": "time", "group": "user", "type": "int64"}
    # A row that is dropped is nobody's last one.
    bad = table.set_column(4, "click", pa.array([0, 1, 7, 0, 1, 0, 1, 0, 1, 0]))
    dropped = _convert(_write(tmp_path / "bad.parquet", bad), tmp_path / "b", split="leave_last", drop_bad_rows=True)
    assert places(dropped) == {"train": [3, 4, 5, 6, 9], "validation": [0, 8], "test": [1, 7]}
    without = schema_yaml.loads(_SCHEMA.replace("group: user\n", ""))
    with pytest.raises(UserError, match="--split=leave_last: the schema names no group; say whose last rows"):
        _convert(log, tmp_path / "c", schema=without, split="leave_last")
    named = _convert(log, tmp_path / "c", schema=without, split="leave_last", split_group="user")
    assert places(named) == places(done)


@pytest.mark.parametrize("kind", [pa.timestamp("us", "Europe/Berlin"), pa.date32(), pa.string()])
def test_split_at_times_without_an_offset(tmp_path: Path, kind: pa.DataType) -> None:
    days = [f"2024-01-0{1 + i // 12} 0{i % 8}:00:00" for i in range(60)]
    times = pa.compute.assume_timezone(pa.array(days).cast(pa.timestamp("us")), "Europe/Berlin")
    column = {
        pa.date32(): times.cast(pa.timestamp("us", "Europe/Berlin")).cast(kind) if kind == pa.date32() else None
    }.get(kind)
    if kind == pa.string():
        column = pa.array([day.replace(" ", "T") + "Z" for day in days])
    table = _log().drop_columns(["time"]).append_column("time", times if column is None else column)
    done = _convert(
        _write(tmp_path / "log.parquet", table), tmp_path / "out", validation_from="2024-01-04", test_from="2024-01-05"
    )
    assert [done.rows(split) for split in ("train", "validation", "test")] == [36, 12, 12]


def test_split_at_given_times(tmp_path: Path) -> None:
    log = _write(tmp_path / "log.parquet", _log())
    done = _convert(log, tmp_path / "a", validation_from="400", test_from="550")
    assert [done.rows(split) for split in ("train", "validation", "test")] == [40, 15, 5]
    done = _convert(log, tmp_path / "b", test_from="550")
    assert [done.rows(split) for split in ("train", "validation", "test")] == [55, 0, 5]
    with pytest.raises(UserError, match="--validation_from=9 should not be later than --test_from=5"):
        _convert(log, tmp_path / "c", validation_from="9", test_from="5")
    with pytest.raises(UserError, match="the train split has no rows"):
        _convert(log, tmp_path / "c", validation_from="0")
    assert not (tmp_path / "c").exists()


def test_equal_times_stay_together(tmp_path: Path) -> None:
    table = _log(10).drop_columns(["time"]).append_column("time", pa.array([1.5] * 7 + [2.5] * 3))
    done = _convert(_write(tmp_path / "log.parquet", table), tmp_path / "out", fractions=(0.5, 0.3, 0.2))
    assert [done.rows(split) for split in ("train", "validation", "test")] == [7, 3, 0]


def test_dense_and_quantiles(tmp_path: Path) -> None:
    rows = 40
    vectors = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    table = pa.table(
        {
            "image": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 3),
            "tags": [[1, None, 2] if i % 2 else None for i in range(rows)],
            "age": np.arange(rows, dtype=np.int16),
            "click": [True, False] * (rows // 2),
        }
    )
    text = """
name: s
features:
  image: {kind: dense, side: item, length: 3}
  tags: {kind: multivalent, side: item, dtype: int64, max_length: 4}
  age: {kind: numeric, side: user, bucketise: {quantiles: 4}}
tasks:
  click: {label: {column: click}}
"""
    settings: dict[str, Any] = {"schema": schema_yaml.loads(text), "split": "random", "split_column": None}
    done = _convert(_write(tmp_path / "log.parquet", table), tmp_path / "out", fractions=(1.0, 0.0, 0.0), **settings)
    order = _block_column(done, "train", "key:row_id", "<i8")
    np.testing.assert_array_equal(_block_column(done, "train", "feature:image", "<f4").reshape(rows, 3), vectors[order])
    np.testing.assert_array_equal(_block_column(done, "train", "feature:age", "<f4"), order)
    assert _block_column(done, "train", "length:tags", "<i4").tolist() == [2 if i % 2 else 0 for i in order]
    assert done.constants("age") == Constants(19.5, np.std(np.arange(40)), 19.5, (10.0, 20.0, 30.0))
    assert done.num_ids("age") == 6


def test_bad_rows_fail_or_are_dropped_and_counted(tmp_path: Path) -> None:
    table = _log()
    clicks = table["click"].to_pylist()
    clicks[7], clicks[50] = 9, 9
    bad = table.set_column(table.schema.get_field_index("click"), "click", pa.array(clicks))
    (tmp_path / "log").mkdir()
    _write(tmp_path / "log/a.parquet", table.slice(0, 5))
    log = _write(tmp_path / "log/b.parquet", bad.slice(5))
    with pytest.raises(UserError, match=f"^{log}, row 2: label 'click' is 9; a binary label is 0 or 1"):
        _convert(tmp_path / "log", tmp_path / "out")
    assert os.listdir(tmp_path) == ["log"]
    done = _convert(tmp_path / "log", tmp_path / "out", drop_bad_rows=True)
    assert [dataclasses.astuple(dropped) for dropped in done.dropped] == [("click", "binary label not 0 or 1", 2)]
    assert [done.rows(split) for split in ("train", "validation", "test")] == [47, 5, 6]
    ids = [row["key:row_id"][0] for s in done.splits for row in _rows(done, s)]
    assert sorted(ids) == [i for i in range(60) if i not in (7, 50)]  # dropped rows keep their number


def test_malformed_csv_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    pyarrow.csv.write_csv(_log(20), tmp_path / "log.csv")
    text = (tmp_path / "log.csv").read_bytes().replace(b'"row 12"', b"row 12,more").replace(b'"row 3"', b"r\xff")
    (tmp_path / "log.csv").write_bytes(text)
    settings: dict[str, Any] = {
        "schema": schema_yaml.loads(_SCHEMA.replace("item: note\n", "")),
        "validation_from": "20",
        "test_from": "1000",
    }
    with pytest.raises(UserError, match="log.csv, row 12: 9 values, but the file has 8 columns"):
        _convert(tmp_path / "log.csv", tmp_path / "out", **settings)
    done = _convert(tmp_path / "log.csv", tmp_path / "out", drop_bad_rows=True, **settings)
    assert [dataclasses.astuple(dropped) for dropped in done.dropped] == [("", "wrong number of columns", 1)]
    assert [row["key:row_id"][0] for row in _rows(done, "validation")] == [i for i in range(2, 20) if i != 12]
    assert done.sources[0].rows == 20
    # A column that the schema does not use may hold anything.
    raw = pq.read_table(os.path.join(done.data_dir, "raw/validation"))
    assert raw["note"].to_pylist()[:2] == ["row 2", "r\ufffd"]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"split_column": "tme"}, "--split_column=tme: not in the log; did you mean 'time'"),
        ({"split_column": "note"}, "--split_column=note: a time should be a number, a date or a timestamp"),
        (
            {"test_from": "noon"},
            "--test_from=noon: the split column holds numbers .int64.; write a number .* such as 0$",
        ),
        ({"split": "leave_last", "split_group": "usr"}, "--split_group=usr: not in the log; did you mean 'user'"),
        (
            {"split": "leave_last", "split_group": "note"},
            "no value of column 'note' has 3 rows, so nothing can be held",
        ),
        ({"split": "hash", "split_column": "x"}, "--split_column=x: not in the log"),
    ],
)
def test_split_mistakes(tmp_path: Path, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        _convert(_write(tmp_path / "log.parquet", _log()), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_logs_that_cannot_be_converted(tmp_path: Path) -> None:
    table = _log()
    with pytest.raises(UserError, match="'click' is not in .*log.parquet"):
        _convert(_write(tmp_path / "log.parquet", table.drop_columns(["click"])), tmp_path / "out")
    with pytest.raises(UserError, match="the column name 'row_id' is reserved"):
        _convert(
            _write(tmp_path / "log.parquet", table.append_column("row_id", table["time"])),
            tmp_path / "out",
            split_column="row_id",
        )
    with pytest.raises(UserError, match="--split_column=time: the log has no rows"):
        _convert(_write(tmp_path / "log.parquet", table.slice(0, 0)), tmp_path / "out")
    (tmp_path / "out").mkdir()
    log = _write(tmp_path / "out/log.parquet", table)
    with pytest.raises(UserError, match="a file of the log lies in the output directory"):
        _convert(log, tmp_path / "out")


def test_a_log_may_have_a_row_id_that_nothing_uses(tmp_path: Path) -> None:
    table = _log().append_column("row_id", pa.array(range(900, 960)))
    done = _convert(_write(tmp_path / "log.parquet", table), tmp_path / "out")
    assert pq.read_table(os.path.join(done.data_dir, "raw/test"))["row_id"].to_pylist() == list(range(54, 60))


def _parts(directory: Path) -> str:
    """The log in three files: of wider and narrower types, with an index, with nulls that pandas gives no type."""
    table = _log().set_column(1, "video", pa.array(["a", "a", "b"] * 20))
    late = table.slice(55)
    parts = [
        table.slice(0, 40),
        table.slice(40, 15)
        .set_column(0, "user", table["user"].slice(40, 15).cast(pa.uint8()))
        .set_column(1, "video", table["video"].slice(40, 15).cast(pa.large_string()))
        .set_column(4, "click", table["click"].slice(40, 15).cast(pa.bool_()))
        .append_column("shape", pa.array([{"a": 1}] * 15)),
        late.set_column(1, "video", late["video"].dictionary_encode())
        .set_column(3, "length", pa.nulls(5))
        .set_column(5, "seen", pa.nulls(5))
        .set_column(6, "time", late["time"].cast(pa.float32()))
        .append_column("shape", pa.array([{"b": "x"}] * 5)),
    ]
    (directory / "log").mkdir()
    for number, part in enumerate(parts):
        _write(directory / "log" / f"{number}.parquet", part)
    return str(directory / "log")


def test_parts_of_other_types_are_one_log(tmp_path: Path) -> None:
    """And so are the parts of the raw rows that are kept of it."""
    done = _convert(_parts(tmp_path), tmp_path / "out")
    assert done.rows("train") == 48
    assert done.rows("test") == 6
    raw = pq.read_table(os.path.join(done.data_dir, "raw/test"))
    assert raw.column_names == [*_log().column_names, "row_id"]  # the files do not agree on shape, which nothing uses
    kinds = (raw.schema.field(name).type for name in ("user", "video", "click", "length", "time"))
    assert list(kinds) == [pa.int64(), pa.large_string(), pa.int64(), pa.float64(), pa.float64()]
    assert raw["user"].to_pylist() == _log()["user"].to_pylist()[54:]
    assert [row["label:click"] for row in _rows(done, "test")] == [[float(x)] for x in _log()["click"].to_pylist()[54:]]
    schema_yaml.loads(_SCHEMA).validate_columns(dict(zip(raw.schema.names, raw.schema.types, strict=True)))


def test_directories_split_and_are_features(tmp_path: Path) -> None:
    table = _log().append_column("half", pa.array(["0", "1"] * 30))
    for day in range(5):
        path = tmp_path / "log" / f"day=2024-01-0{day + 1}" / f"slot=0{day % 2}" / "part.parquet"
        path.parent.mkdir(parents=True)
        _write(path, table.slice(day * 12, 12))
    text = _SCHEMA.replace("features:", "features:\n  slot: {kind: categorical, side: context, dtype: int64}")
    log = str(tmp_path / "log")
    done = _convert(log, tmp_path / "out", schema=schema_yaml.loads(text), split_column="day")
    assert [done.rows(name) for name in ("train", "validation", "test")] == [48, 12, 0]
    assert (done.split["train_until"], done.vocabularies["slot"]) == ("2024-01-04 00:00:00", Vocabulary(2, 2))
    raw = pq.read_table(os.path.join(done.data_dir, "raw/validation"), partitioning=None)
    assert set(raw["day"].to_pylist()) == {"2024-01-05"}
    assert set(raw["slot"].to_pylist()) == {0}
    plan = log_reader.plan(done, "validation", shuffle=None, reader=(0, 1))
    output = io.BytesIO()
    plan.write(output, 0, 1)
    (read,) = pa.ipc.open_stream(output.getvalue())
    assert read.column("feature:slot").to_pylist() == [2] * 12  # the vocabulary's first


def _csv(path: Path, header: str, *rows: str) -> Path:
    path.write_text("\n".join([header, *rows, ""]))
    return path


_INCOME = """
name: income
features: {age: {kind: numeric, side: user}}
tasks:
  rich: {label: {column: pay, equals: ">50k"}}
  old: {label: {column: age, at_least: 200}}
  alive: {label: {column: age, at_least: 0}}
  seen: {label: {column: seen}}
  some: {label: {column: some}}
"""


def test_labels_that_are_all_the_same_are_warned_about(tmp_path: Path) -> None:
    pays = ("<=50K", ">50K.", ">50K", "?")
    rows = [f"{i}, {pays[i % 4]}, {i % 2}, 1" for i in range(40)]
    log = _csv(tmp_path / "log.csv", "age, pay, seen, some", *rows[:36], *(row[:-1] + "0" for row in rows[36:]))
    text = _INCOME.replace("kind: numeric, side: user", "kind: numeric, side: user, allow_label_column: true")
    settings = {"schema": schema_yaml.loads(text), "split_column": "age"}
    done = _convert(log, tmp_path / "out", **settings)
    assert constant_labels.warnings(done, CsvOptions()) == [
        "task 'rich': every label is 0: column 'pay' is never '>50k'; nearest of its values: '>50K', '>50K.', '<=50K', "
        "...",
        "task 'old': every label is 0: at_least: 200 never holds; column 'age' is from 0 to 39",
        "task 'alive': every label is 1: at_least: 0 always holds; column 'age' is from 0 to 39",
        "task 'some': every label of test is 0",
        "task 'some': every label of train and validation is 1",
    ]


def test_csv_labels_of_pandas(tmp_path: Path) -> None:
    """True and False, ids as floats beside a missing one; what has other words for it is told what to write."""
    text = (
        "name: a\nfeatures: {user: {kind: categorical, side: user, dtype: int64}}\ntasks: {click: {label: {column: c}}}"
    )
    settings: dict[str, Any] = {"schema": schema_yaml.loads(text), "split": "random", "split_column": None}
    rows = [f"{i % 5}.0,{bool(i % 2)}" for i in range(40)]
    done = _convert(_csv(tmp_path / "log.csv", "user,c", *rows, ",True"), tmp_path / "out", **settings)
    assert sum(done.task_rows(split, "click") for split in ("train", "validation", "test")) == 41
    assert done.vocabularies["user"] == Vocabulary(5, 5)
    raw = pq.read_table(os.path.join(done.data_dir, "raw/test"))
    assert raw["user"].type == pa.int64()
    for row, why in [
        ("1,yes", "label 'c' is 'yes', which is not a number; say which value means 1, as in equals: \"yes\" .--on"),
        ("1,5", "label 'c' is '5'; a binary label is 0 or 1; say which values mean 1, as in equals: 5 or at_least: 4"),
        ("u1,0", "feature 'user' is 'u1', which is not an int64; dtype: string takes any text"),
        (
            "1,NULL",
            "label 'c' is 'NULL', which is not a number; if it means a missing value, --csv_nulls=,NULL says so",
        ),
    ]:
        with pytest.raises(UserError, match=f"log.csv, row 40: {why.replace('?', '.')}"):
            _convert(_csv(tmp_path / "log.csv", "user,c", *rows, row), tmp_path / "bad", **settings)
    with pytest.raises(UserError, match="no rows .the log has 2; dropped 2 rows: column 'user': not an int64"):
        _convert(_csv(tmp_path / "log.csv", "user,c", "a,0", "b,1"), tmp_path / "bad", drop_bad_rows=True, **settings)


def test_csv_headers_that_say_why_a_column_is_missing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"split": "random", "split_column": None}
    for lines, why in [
        (["user;video;click", "1;a;0", "2;b;1"], "seem to be separated by ';', not by ',': --csv_delimiter=';'"),
        (["user\tvideo\tclick", "1\ta\t0", "2\tb\t1"], "--csv_delimiter=tab"),
        (["1,a,0", "2,b,1", "2,a,1"], "the first line looks like data, not like names"),
    ]:
        with pytest.raises(UserError, match=why):
            _convert(_csv(tmp_path / "log.csv", *lines), tmp_path / "out", **settings)


_SPACES = """
name: spaces
features:
  user: {kind: categorical, side: user, dtype: int64}
tasks:
  pay: {type: regression, output: sigmoid, label: {column: pay}, space: {task: buy}}
  click: {label: {column: click}, space: {column: shown}}
  buy: {label: {column: buy}, space: {task: click}}
  like: {label: {column: like, missing: outside}, space: {column: shown}}
"""
# row    user   shown  click  buy    pay    like
_SPACED = [
    (1, True, 1, 1, 0.5, 1),
    (1, True, 1, 0, None, None),
    (2, True, 0, 1, 9.0, 0),  # bought without a click: outside buy, so outside pay
    (2, False, 1, 1, 0.5, 1),
    (3, None, None, None, None, None),
    (3, True, 1, 1, 0.25, 0),
    (1, True, 1, 1, 1.0, None),  # validation
    (2, False, None, None, None, None),
    (1, True, 0, None, None, 1),  # test
    (2, None, -1, -1, -1.0, -1),
]
_INSIDE: dict[str, list] = {
    "pay": [0.5, None, None, None, None, 0.25, 1.0, None, None, None],
    "click": [1, 1, 0, None, None, 1, 1, None, 0, None],
    "buy": [1, 0, None, None, None, 1, 1, None, None, None],
    "like": [1, None, 0, None, None, 0, None, None, 1, None],
}


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_labels_are_nan_outside_their_spaces(tmp_path: Path, kind: str) -> None:
    names = ["user", "shown", "click", "buy", "pay", "like"]
    table = pa.table(dict(zip(names, map(list, zip(*_SPACED, strict=True)), strict=True)))
    table = table.append_column("time", pa.array(range(10)))
    log = tmp_path / f"log.{kind}"
    (pq.write_table if kind == "parquet" else pyarrow.csv.write_csv)(table, log)
    done = _convert(log, tmp_path / "out", schema=schema_yaml.loads(_SPACES), validation_from="6", test_from="8")
    for split, first, end in [("train", 0, 6), ("validation", 6, 8), ("test", 8, 10)]:
        rows = sorted(_rows(done, split), key=lambda row: row["key:row_id"])
        order = np.argsort(_block_column(done, split, "key:row_id", "<i8"))
        for task, labels in _INSIDE.items():
            expected = np.array(labels[first:end], np.float32)
            np.testing.assert_array_equal(np.array([row[f"label:{task}"][0] for row in rows], np.float32), expected)
            np.testing.assert_array_equal(_block_column(done, split, f"label:{task}", "<f4")[order], expected)
    counts = {s: {n: (c.rows, c.rate) for n, c in split.tasks.items()} for s, split in done.splits.items()}
    assert counts == {
        "train": {"pay": (2, 0.375), "click": (4, 0.75), "buy": (3, 2 / 3), "like": (3, 1 / 3)},
        "validation": {"pay": (1, 1.0), "click": (1, 1.0), "buy": (1, 1.0), "like": (0, None)},
        "test": {"pay": (0, None), "click": (1, 0.0), "buy": (0, None), "like": (1, 1.0)},
    }
    assert done.schema == schema_yaml.loads(_SPACES)


def test_sigmoid_labels_beyond_1_stop_the_conversion(tmp_path: Path) -> None:
    log = _write(tmp_path / "log.parquet", _log())
    settings: dict[str, Any] = {
        "schema": schema_yaml.loads(
            _SCHEMA.replace("clip: [0, 1], missing: outside}", "missing: outside}, output: sigmoid")
        )
    }
    why = "label 'seen' / 'length' is [0-9.]+; task 'done' has output: sigmoid, .* write clip: .0, 1. in its label, or"
    with pytest.raises(UserError, match=why):
        _convert(log, tmp_path / "out", **settings)
    done = _convert(log, tmp_path / "out", drop_bad_rows=True, **settings)
    assert [(dropped.column, dropped.reason) for dropped in done.dropped] == [("seen", "label outside [0, 1]")]
    assert all(not row["label:done"][0] > 1 for row in _rows(done, "train"))
