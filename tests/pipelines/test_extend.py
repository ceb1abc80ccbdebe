"""Conversions that go on from another one: ids, counts, what is forgotten, what is refused."""

import dataclasses
import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import manifest, schema_yaml, tfrecord, vocabulary
from pipelines.convert import growth
from pipelines.convert.conversion import convert
from pipelines.convert.growth import UNKNOWN, Known, Step
from pipelines.convert.options import Options
from pipelines.jobs import convert as job
from pipelines.log.parts import CsvOptions
from pipelines.manifest import Manifest
from stem_util.errors import UserError

_DAY = 86_400
_SCHEMA = """
name: days
group: user
time: when
features:
  user: {kind: categorical, side: user, dtype: int64, min_count: 3}
  tags: {kind: multivalent, side: item, dtype: string, separator: "|", max_length: 3, min_count: 4}
  device: {kind: categorical, side: user, dtype: string, hash: {buckets: 50}}
  length: {kind: numeric, side: item, bucketise: {quantiles: 4}}
  log_length: {kind: numeric, side: item, column: length, transform: [log1p, standardise]}
tasks:
  click: {label: {column: click}}
  seen: {type: regression, label: {column: seen, standardise: true, missing: outside}}
"""
_COUNTED = {"user": 3, "tags": 4}


def _log(day: int, rows: int = 300) -> pa.Table:
    """Users and tags drift from day to day."""
    rng = np.random.default_rng(day)
    tags = rng.zipf(1.4, (rows, 3)).clip(max=40) + 5 * day
    return pa.table(
        {
            "user": rng.integers(10 * day, 10 * day + 120, rows),
            "tags": ["|".join(f"t{tag}" for tag in row) for row in tags],
            "device": [f"d{number}" for number in rng.integers(0, 30, rows)],
            "length": rng.gamma(2, 20 + 10 * day, rows),
            "click": rng.integers(0, 2, rows),
            "seen": rng.integers(0, 9, rows) + day,
            "when": np.sort(1_700_000_000 + day * _DAY + rng.integers(0, _DAY, rows)),
        }
    )


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("logs")
    for day in range(4):
        pq.write_table(_log(day), directory / f"{day}.parquet", row_group_size=60)
    return directory


def _convert(logs: Path, days: str, output: Path, schema: str = _SCHEMA, **settings: Any) -> Manifest:
    """Converts the logs of days such as "01"; all rows are train rows."""
    paths = ",".join(f"{logs}/{day}.parquet" for day in days)
    options: dict[str, Any] = {"given": {"train": paths}, "validation_share": 0.0, "layouts": ()} | settings
    return convert(Options(schema=schema_yaml.loads(schema), output=str(output), **options))


def _ids(done: Manifest, feature: str) -> dict[Any, int]:
    """The ids by value."""
    values = vocabulary.load(done.vocabulary_path(feature))["value"].to_pylist()
    assert len(values) == done.vocabularies[feature].size
    return {value: number for number, value in enumerate(values, start=2) if value not in (b"", -(2**63))}


def _values(log: pa.Table, feature: str) -> list[list[Any]]:
    """The values of each row."""
    if feature == "user":
        return [[value] for value in log["user"].to_pylist()]
    return [[tag.encode() for tag in text.split("|")] for text in log["tags"].to_pylist()]


class _Line:
    """A line of conversions of one feature, one value at a time."""

    def __init__(self, feature: str) -> None:
        self.feature, self.generation = feature, 0
        self.counts: Counter[Any] = Counter()
        self.seen: dict[Any, int] = {}
        self.times: dict[Any, int] = {}
        self.ids: dict[Any, int] = {}

    def add(self, log: pa.Table, days: int = 0, conversions: int = 0) -> dict[int, tuple[Any, Any]]:
        """Adds a log; returns the ids that changed, with the values before and after."""
        self.generation += 1
        before = {number: value for value, number in self.ids.items()}
        size = max(before, default=1)
        whens = log["when"].to_pylist()
        for when, values in zip(whens, _values(log, self.feature), strict=True):
            for value in values:
                self.counts[value] += 1
                self.seen[value], self.times[value] = self.generation, when
        for value in [*self.counts]:
            old = days and self.times[value] < max(whens) - days * _DAY
            if old or (conversions and self.generation - self.seen[value] >= conversions):
                del self.counts[value], self.seen[value], self.times[value]
                self.ids.pop(value, None)
        frequent = {value for value, count in self.counts.items() if count >= _COUNTED[self.feature]}
        taken = set(self.ids.values())
        numbers = (number for number in itertools.count(2) if number not in taken)
        for value in sorted(frequent - set(self.ids), key=lambda value: (-self.counts[value], value)):
            self.ids[value] = next(numbers)
        after = {number: value for value, number in self.ids.items()}
        pairs = {number: (before.get(number), after.get(number)) for number in range(2, size + 1)}
        return {number: pair for number, pair in pairs.items() if pair[0] != pair[1]}


@pytest.mark.parametrize("forget", [{}, {"days": 1}, {"conversions": 1}, {"conversions": 2}])
def test_four_days_give_the_ids_of_a_plain_count(logs: Path, tmp_path: Path, forget: dict[str, int]) -> None:
    text = f"{forget['days']}d" if "days" in forget else str(forget["conversions"]) if forget else None
    lines = {feature: _Line(feature) for feature in _COUNTED}
    done = _convert(logs, "0", tmp_path / "0")
    for line in lines.values():
        line.add(_log(0))
    evicted = reassigned = 0
    for day in range(1, 4):
        done = _convert(logs, str(day), tmp_path / str(day), extend=done.data_dir, forget=text)
        for feature, line in lines.items():
            size = max(line.ids.values()) - 1
            differ = line.add(_log(day), **forget)
            assert _ids(done, feature) == line.ids
            table = vocabulary.load(done.vocabulary_path(feature))
            by_id = dict(zip(range(2, 2 + len(table)), table["count"].to_pylist(), strict=True))
            assert {value: by_id[number] for value, number in line.ids.items()} == {v: line.counts[v] for v in line.ids}
            rare = pq.read_table(manifest.history_path(done.data_dir, "rare", feature))
            known = {value: line.counts[value] for value in line.counts if value not in line.ids}
            assert dict(zip(rare["value"].to_pylist(), rare["count"].to_pylist(), strict=True)) == known
            changed = pq.read_table(manifest.history_path(done.data_dir, "changed", feature)).to_pylist()
            empty = {b"": None, -(2**63): None}
            named = {row["id"]: tuple(empty.get(row[key], row[key]) for key in ("before", "after")) for row in changed}
            assert named == differ
            grown = done.history[feature]
            assert grown.evicted == sum(before is not None for before, _ in differ.values())
            assert grown.reassigned == sum(after is not None for _, after in differ.values())
            assert grown.rare == len(known)
            assert done.vocabularies[feature].distinct == len(line.counts)
            assert done.vocabularies[feature].free == done.vocabularies[feature].size - len(line.ids)
            assert done.vocabularies[feature].size >= size
            evicted, reassigned = evicted + grown.evicted, reassigned + grown.reassigned
    assert bool(evicted) == bool(reassigned) == bool(forget)
    assert done.generation == 4


def test_old_ids_stay_and_the_values_are_those_of_both_logs_at_once(logs: Path, tmp_path: Path) -> None:
    first = _convert(logs, "0", tmp_path / "a")
    both = _convert(logs, "01", tmp_path / "both")
    second = _convert(logs, "1", tmp_path / "b", extend=first.data_dir, layouts=("rows",))
    for feature in _COUNTED:
        old, new = _ids(first, feature), _ids(second, feature)
        assert {value: new[value] for value in old} == old
        assert set(new) == set(_ids(both, feature)) != set(old)
        assert second.vocabularies[feature].distinct == both.vocabularies[feature].distinct
    assert second.rows("train") == 300
    assert second.numerics == first.numerics != both.numerics
    assert second.label_scales == first.label_scales
    assert second.ancestor is not None
    assert (second.ancestor.directory, second.ancestor.sha256) == (first.data_dir, manifest.checksum(first.data_dir))
    assert (first.generation, second.generation) == (1, 2)
    # The records have these ids, and the rows of the new log.
    ids = _ids(second, "user")
    users = _log(1)["user"].to_pylist()
    for shard in second.shards("train", "rows"):
        for _, payload in tfrecord.scan(shard.path):
            row = tfrecord.Example.FromString(payload).features.feature
            user = users[row["key:row_id"].int64_list.value[0]]
            assert row["feature:user"].int64_list.value[0] == ids.get(user, 1)
    refitted = _convert(logs, "1", tmp_path / "refitted", extend=first.data_dir, refit=True)
    alone = _convert(logs, "1", tmp_path / "alone")
    assert (refitted.numerics, refitted.label_scales) == (alone.numerics, alone.label_scales)
    # Any number of processes makes the same bytes.
    _convert(logs, "1", tmp_path / "two", extend=first.data_dir, layouts=("rows",), processes=2)
    for path in ("manifest.json", "vocabulary/tags.parquet", "history/rare/tags.parquet", "history/seen/user.parquet"):
        assert (tmp_path / "b" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def _as(known: Mapping[int, tuple[int, int, int]]) -> Known:
    count, seen, time = (np.array([of[i] for of in known.values()], np.int64) for i in range(3))
    return Known(pa.chunked_array([pa.array([*known], pa.int64())]), count, seen.astype(np.int32), time)


def test_a_value_of_unknown_time_counts_as_seen_before_the_log() -> None:
    known = _as({7: (5, 1, UNKNOWN), 8: (5, 1, UNKNOWN)})
    counted = _as({8: (1, 2, 95), 9: (1, 2, 90)})
    grown = growth.grow(known, _as({}), counted, 1, Step("a", 2, first=90, units=0, seen_since=90))
    assert dict(zip(grown.known.values.to_pylist(), grown.known.times.tolist(), strict=True)) == {7: 90, 8: 95, 9: 90}
    untimed = growth.grow(grown.known, _as({}), _as({9: (1, 3, UNKNOWN)}), 1, Step("a", 3))
    assert untimed.known.times.tolist() == [90, 95, UNKNOWN]


def test_values_of_a_long_log_that_were_last_seen_before_the_limit_are_forgotten_new_or_not() -> None:
    known, rare = _as({1: (5, 1, 10), 2: (5, 1, 10)}), _as({3: (1, 1, 10), 4: (1, 1, 10)})
    counted = _as({1: (1, 2, 89), 2: (1, 2, 90), 3: (1, 2, 89), 4: (1, 2, 90), 5: (9, 2, 89), 6: (9, 2, 90)})
    grown = growth.grow(known, rare, counted, 3, Step("a", 2, first=20, units=0, seen_since=90))
    assert grown.known.values.to_pylist() == [6, 2] and grown.rare.values.to_pylist() == [4]
    assert (grown.evicted, grown.reassigned, grown.distinct) == (1, 1, 3)


def test_so_many_rare_values_are_kept_those_seen_last_and_most() -> None:
    rare = _as({1: (9, 1, 0), 2: (2, 2, 0), 3: (1, 2, 0)})
    counted = _as({4: (1, 3, 0), 5: (3, 3, 0)})
    grown = growth.grow(_as({}), rare, counted, 10, Step("a", 3, units=0), rare_kept=3)
    assert (grown.rare.values.to_pylist(), grown.distinct) == ([2, 4, 5], 5)


def test_what_may_differ_in_a_schema(logs: Path, tmp_path: Path) -> None:
    first = _convert(logs, "0", tmp_path / "a")
    text = _SCHEMA.replace("min_count: 3", "min_count: 1, missing: error").replace("name: days", "name: other")
    done = _convert(logs, "1", tmp_path / "b", text, extend=first.data_dir, given={}, log=f"{logs}/1.parquet",
                    validation_share=None, split="time", split_column="when")  # fmt: skip
    assert done.rows("test") == 30
    # Values that were rare under the old minimum count are admitted though the new log may lack them.
    assert set(_ids(done, "user")) >= {user for (user,) in _values(_log(0), "user")}
    for old, new, why in [
        ("min_count: 3}", "min_count: 3, dim: 4}", "features.user.dim is 4 and was not set"),
        ("buckets: 50", "buckets: 60", "features.device.hash is {buckets: 60, hashes: 1} and was {buckets: 50"),
        ("max_length: 3", "max_length: 2", "features.tags.max_length is 2 and was 3"),
        ("column: click}", "column: click, equals: 1}", "tasks.click.label is {column: click, equals: 1, "),
        ("  click: {label: {column: click}}\n", "", "tasks.click is missing"),
        ("quantiles: 4", "quantiles: 5", "features.length.quantiles is 5 and was 4"),
    ]:  # fmt: skip
        with pytest.raises(UserError) as caught:
            _convert(logs, "1", tmp_path / "c", _SCHEMA.replace(old, new), extend=first.data_dir)
        assert f"the schema does not extend that of {first.data_dir}: {why}" in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_logs_are_added_once_and_in_the_order_of_time(logs: Path, tmp_path: Path) -> None:
    data = [_convert(logs, "1", tmp_path / "1")]
    data.append(_convert(logs, "2", tmp_path / "2", extend=data[0].data_dir))
    copy = tmp_path / "copy.parquet"
    copy.write_bytes((logs / "1.parquet").read_bytes())
    refused: list[tuple[dict[str, Any], str | None]] = [
        ({"given": {"train": str(copy)}}, f"{copy} is in {data[1].data_dir} already, as train rows: each log can be"),
        ({"days": "0"}, "the log ends at 2023-11-15 22:12:02 ('when'), and "),
        ({"forget": "30"}, None),
        ({"forget": "x"}, "--forget=x: should be a time as in 30d or 12h, or a number of conversions as in 7"),
        ({"output": data[1].data_dir, "overwrite": True}, "--extend and --output are both "),
        ({"output": f"{data[1].data_dir}/next"}, "lies in "),
        ({"extend": str(tmp_path / "gone")}, "gone holds no converted data (no manifest.json)"),
    ]
    for number, (settings, why) in enumerate(refused):
        arguments: dict[str, Any] = {"output": tmp_path / f"out{number}", "days": "3", "extend": data[1].data_dir}
        arguments |= settings
        if why is None:
            _convert(logs, **arguments)
            continue
        with pytest.raises(UserError) as caught:
            _convert(logs, **arguments)
        assert why in str(caught.value)
        assert not (tmp_path / f"out{number}").exists()
    # A log that came late may be older. The next one is compared with it, so that one odd time does no lasting harm.
    late = _convert(logs, "0", tmp_path / "late", extend=data[1].data_dir, late=True, forget="1d")
    assert late.times is not None and data[1].times is not None and late.times.last < data[1].times.last
    assert not any(grown.evicted for grown in late.history.values())
    assert _convert(logs, "3", tmp_path / "4", extend=late.data_dir).generation == 4
    # A copy for validation was learned from, but is not learned again.
    _convert(logs, "", tmp_path / "v", extend=data[1].data_dir, validation_share=None,
             given={"train": f"{logs}/3.parquet", "validation": str(copy)})  # fmt: skip


def test_a_time_in_the_future_is_named(logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = _convert(logs, "0", tmp_path / "a")
    table = _log(2)
    whens = table["when"].to_pylist()
    whens[7] = 4_000_000_000
    pq.write_table(table.set_column(6, "when", pa.array(whens)), tmp_path / "odd.parquet", row_group_size=5)
    odd: dict[str, Any] = {"given": {"train": f"{logs}/1.parquet,{tmp_path}/odd.parquet"}}
    with pytest.raises(UserError) as caught:
        _convert(logs, "", tmp_path / "b", extend=first.data_dir, **odd)
    assert str(caught.value).startswith(
        f"{tmp_path}/odd.parquet, row 7: its time ('when'), 2096-10-02 07:06:40, lies in the future: "
    )
    # What is not extended may have such rows, for instance when they are made up.
    done = _convert(logs, "", tmp_path / "b", **odd)
    job.report(done, "b", 1.0, CsvOptions())
    assert "the newest row is of 2096-10-02 07:06:40 ('when'), in the future" in capsys.readouterr().err
    with pytest.raises(UserError, match="has rows until 2096-10-02 07:06:40: .*; --late adds one that came late"):
        _convert(logs, "3", tmp_path / "c", extend=done.data_dir)


def test_logs_without_times_and_times_that_are_no_dates(logs: Path, tmp_path: Path) -> None:
    schema = _SCHEMA.replace("time: when\n", "")
    first = _convert(logs, "0", tmp_path / "a", schema)
    assert first.times is None
    with pytest.raises(UserError, match=r"--forget: .* needs the time of rows: name their column in the schema"):
        _convert(logs, "1", tmp_path / "b", schema, extend=first.data_dir, forget="30d")
    steps = tmp_path / "steps.parquet"
    pq.write_table(_log(1).set_column(6, "when", pa.array(np.arange(300))), steps)
    with pytest.raises(UserError, match=r"the numbers in column 'when' \(up to 299\) are no seconds"):
        _convert(logs, "", tmp_path / "b", extend=first.data_dir, forget="30d", given={"train": str(steps)})
    numbered = _convert(logs, "", tmp_path / "b", extend=first.data_dir, forget="1", given={"train": str(steps)})
    assert numbered.times == manifest.Times("when", "int64", False, 0, 299)
    with pytest.raises(UserError, match=r"column 'when' holds numbers that are no dates \(up to 299\), and column"):
        _convert(logs, "2", tmp_path / "c", extend=numbered.data_dir)


def test_damaged_data_are_not_extended(logs: Path, tmp_path: Path) -> None:
    first = _convert(logs, "0", tmp_path / "a")
    for path in ("vocabulary/user.parquet", "history/rare/tags.parquet"):
        whole = (tmp_path / "a" / path).read_bytes()
        (tmp_path / "a" / path).write_bytes(whole[:-1] + b"X")
        with pytest.raises(UserError, match=f"{path} has changed since the conversion"):
            _convert(logs, "1", tmp_path / "b", extend=first.data_dir)
        os.unlink(tmp_path / "a" / path)
        with pytest.raises(UserError, match=f"{path} is missing"):
            _convert(logs, "1", tmp_path / "b", extend=first.data_dir)
        (tmp_path / "a" / path).write_bytes(whole)
    with manifest.replacing(first.data_dir, overwrite=True):
        with pytest.raises(UserError, match="is being replaced by a conversion"):
            _convert(logs, "1", tmp_path / "b", extend=first.data_dir)
    tree = json.loads((tmp_path / "a/manifest.json").read_text())
    assert tree["history"]["user"]["new"] == first.vocabularies["user"].size
    manifest.save(dataclasses.replace(manifest.load(first.data_dir), history={}))
    with pytest.raises(UserError, match="an earlier version, which kept no counts of rare values"):
        _convert(logs, "1", tmp_path / "b", extend=first.data_dir)
    assert not (tmp_path / "b").exists()


def test_a_day_of_unknown_values_only(logs: Path, tmp_path: Path) -> None:
    first = _convert(logs, "0", tmp_path / "a")
    table = _log(1, 3).set_column(0, "user", pa.array([900, 901, 902]))
    table = table.set_column(1, "tags", pa.array(["u", "", "v"])).set_column(5, "seen", pa.nulls(3, pa.int64()))
    pq.write_table(table, tmp_path / "log.parquet")
    done = _convert(logs, "", tmp_path / "b", extend=first.data_dir, given={"train": f"{tmp_path}/log.parquet"})
    assert _ids(done, "user") == _ids(first, "user")
    assert done.splits["train"].rare_share["user"] == 1
    assert done.task_rows("train", "seen") == 0
    assert done.label_scales == first.label_scales
    pq.write_table(table.slice(0, 0), tmp_path / "log.parquet")
    with pytest.raises(UserError, match="the log has no rows"):
        _convert(logs, "", tmp_path / "c", extend=first.data_dir, given={"train": f"{tmp_path}/log.parquet"})
