"""Splits: exact order statistics, keys that sort as times do, stable hashes."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.convert import scan, times
from pipelines.convert.last_rows import LastRows
from pipelines.convert.split import (
    GivenSplit,
    HashSplit,
    LastSplit,
    RandomSplit,
    SplitPolicy,
    TimeSplit,
    last_directory,
    restore,
)
from stem_util.errors import UserError


@pytest.mark.parametrize("bins", [2, 7, 1 << 16])
@pytest.mark.parametrize("high", [5, 1000, 2**64 - 1])
def test_kth_smallest_is_exact(bins: int, high: int) -> None:
    values = np.random.default_rng(0).integers(0, high, 3000, dtype=np.uint64, endpoint=True)
    ranks = [1, 2, 1500, 2999, 3000]
    found = scan.kth_smallest(lambda: np.array_split(values, 7), ranks, bins)
    assert found == np.sort(values)[np.array(ranks) - 1].tolist()


def test_order_keys_sort_as_values() -> None:
    floats = np.array([-np.inf, -1e300, -1.5, -0.0, 1e-300, 2.0, np.inf])
    keys = times.order_keys(pa.array(floats))
    assert (np.diff(keys.astype(object)) > 0).all()
    assert times.order_keys(pa.array([0.0]))[0] == keys[3]
    assert [times.key_value(int(k), pa.float64()) for k in keys] == floats.tolist()
    integers = np.array([-(2**63) + 1, -1, 0, 1, 2**63 - 1])
    keys = times.order_keys(pa.array(integers))
    assert (np.diff(keys.astype(object)) > 0).all()
    assert [times.key_value(int(k), pa.int64()) for k in keys] == integers.tolist()


def test_time_split_keeps_equal_times_on_the_older_side() -> None:
    keys = times.order_keys(pa.array([1, 2, 2, 3, 4]))
    policy = TimeSplit("t", pa.int64(), int(keys[1]), int(keys[3]))
    assert policy.assign(keys).tolist() == [0, 0, 0, 1, 2]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([b"5", b" 12"], pa.int64()),
        ([b"5", b"1.5"], pa.float64()),
        ([b"2022-04-08 10:00:00", b"2022-04-08"], pa.timestamp("us")),
        ([b"2022-04-08T10:00:00Z"], pa.timestamp("us", "UTC")),
    ],
)
def test_time_kind_of_text(values: list[bytes], kind: pa.DataType) -> None:
    assert times.time_kind(pa.array(values, pa.binary()), "t") == kind


def test_times_that_are_none() -> None:
    with pytest.raises(UserError, match="--split_column=t: a time should be"):
        times.time_kind(pa.array([b"soon"], pa.binary()), "t")
    with pytest.raises(UserError, match=r"--test_from=x: the .* holds numbers \(int64\); .* such as 1700000000"):
        times.parse_time("x", pa.int64(), "test_from", 1700000000)
    assert times.parse_time("12", pa.int64(), "test_from", 3) == times.order_keys(pa.array([12]))[0]
    with pytest.raises(UserError, match=r"2024-01-02: the split column holds numbers \(double\); .* such as 1.5"):
        times.parse_time("2024-01-02", pa.float64(), "test_from", b"1.5")


UTC, BERLIN, NAIVE = pa.timestamp("us", "UTC"), pa.timestamp("ms", "Europe/Berlin"), pa.timestamp("us")


@pytest.mark.parametrize(
    ("text", "kind", "moment"),
    [
        ("2024-01-02", NAIVE, "2024-01-02 00:00:00"),
        (" 2024-01-02 10 ", NAIVE, "2024-01-02 10:00:00"),
        ("2024-01-02T10:00", pa.timestamp("ns"), "2024-01-02 10:00:00"),
        ("2024-01-02 10:00:00.123456789", NAIVE, "2024-01-02 10:00:00.123457"),
        ("2024-01-02 10:00:00.5", pa.timestamp("s"), "2024-01-02 10:00:01"),
        ("1969-12-31T23:59:59.25", NAIVE, "1969-12-31 23:59:59.250000"),
        ("2024-01-02", UTC, "2024-01-02 00:00:00+00:00"),
        ("2024-01-02T10:00Z", UTC, "2024-01-02 10:00:00+00:00"),
        ("2024-01-02 10:00 +0130", UTC, "2024-01-02 08:30:00+00:00"),
        # Without an offset a time is one of the column's zone.
        ("2024-01-02", BERLIN, "2024-01-02 00:00:00+01:00"),
        ("2024-07-02 10:00", BERLIN, "2024-07-02 10:00:00+02:00"),
        ("2024-07-02 10:00-05", BERLIN, "2024-07-02 17:00:00+02:00"),
        ("2024-01-02 10:00", pa.timestamp("us", "+03:00"), "2024-01-02 10:00:00+03:00"),
    ],
)
def test_times_of_flags(text: str, kind: pa.TimestampType, moment: str) -> None:
    assert times.key_value(times.parse_time(text, kind, "test_from", None), kind) == moment


@pytest.mark.parametrize(
    ("text", "kind", "why"),
    [
        (
            "soon",
            UTC,
            r"holds timestamp\[us, tz=UTC\]; write a time as 2024-01-31, .* \(as in UTC\), or with an offset:",
        ),
        ("1700000000", NAIVE, r"holds timestamp\[us\]; write a time as 2024-01-31, 2024-01-31T10:00 or 2024-\S*$"),
        ("2024-01-02T10:00+01:00", NAIVE, "times without a zone; write it without the offset"),
        ("2024-13-01", NAIVE, "there is no such time; write one as 2024-01-31"),
        ("2024-01-02T25:00Z", UTC, "there is no such time"),
        ("2024-03-31T02:30", BERLIN, "clocks change in Europe/Berlin, so this time does not exist or occurs twice; "),
        ("2024-10-27T02:30", BERLIN, "clocks change in Europe/Berlin"),
        ("2300-01-01", pa.timestamp("ns"), "which cannot hold that time"),
    ],
)
def test_times_of_flags_that_are_none(text: str, kind: pa.TimestampType, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        times.parse_time(text, kind, "test_from", None)
    assert str(caught.value).startswith(f"--test_from={text}: ")


@pytest.mark.parametrize("pieces", [1, 7])
def test_last_rows_of_every_group(pieces: int) -> None:
    random = np.random.default_rng(0)
    groups, times = random.integers(-40, 40, 300), random.integers(0, 5, 300).astype(np.uint64)
    groups[:3] = 100, 101, 101  # groups of one row, and of two
    rows = random.permutation(300)
    last = LastRows()
    for part in np.array_split(np.arange(300), pieces):
        other = LastRows()
        other.add(groups[part], times[part], rows[part])
        last.merge(other.kept())
    by_group: dict[int, list[tuple[int, int]]] = {}
    for group, time, row in zip(groups.tolist(), times.tolist(), rows.tolist(), strict=True):
        by_group.setdefault(group, []).append((time, row))
    large = [sorted(found) for found in by_group.values() if len(found) > 2]
    validation, test = last.held_out()
    assert sorted(test.tolist()) == sorted(found[-1][1] for found in large)
    assert sorted(validation.tolist()) == sorted(found[-2][1] for found in large)
    assert len(last.kept()) <= 3 * len(by_group)
    assert [len(part) for part in LastRows().held_out()] == [0, 0]


def test_last_split_assigns_any_ascending_rows(tmp_path: Path) -> None:
    policy = LastSplit("t", pa.int64(), "u", str(tmp_path / "split"))
    policy.save(np.array([9, 4]), np.array([], np.int64))
    assert policy.assign(np.array([2, 4, 5, 9, 11])).tolist() == [0, 1, 0, 1, 0]
    assert policy.assign(np.array([5, 8])).tolist() == [0, 0]
    assert policy.assign(np.array([], np.int64)).tolist() == []


def test_random_and_hash_splits_have_their_fractions_and_differ_by_seed() -> None:
    rows = np.arange(100_000)
    for policy in (RandomSplit((0.7, 0.2, 0.1), 0), HashSplit("u", (0.7, 0.2, 0.1), 0)):
        parts = policy.assign(rows)
        np.testing.assert_allclose(np.bincount(parts) / len(rows), [0.7, 0.2, 0.1], atol=0.006)
    assert (RandomSplit((0.7, 0.2, 0.1), 1).assign(rows) != RandomSplit((0.7, 0.2, 0.1), 0).assign(rows)).any()
    assert set(RandomSplit((0.9, 0.1, 0.0), 0).assign(rows).tolist()) == {0, 1}


_SHARES = (0.7, 0.2, 0.1)


@pytest.mark.parametrize(
    "policy",
    [
        RandomSplit(_SHARES, 3),
        HashSplit("u", _SHARES, 3),
        TimeSplit("t", pa.timestamp("us", "UTC"), 2**63 + 5, 2**63 + 9, _SHARES),
        TimeSplit("t", pa.int64(), 2**63 + 5, times.LAST_KEY),
        LastSplit("t", pa.float64(), "u", last_directory("/data")),
        GivenSplit((0, 0, 2)),
        GivenSplit((0, 0, 2), HashSplit("u", (0.9, 0.1, 0.0), 3)),
    ],
)
def test_a_policy_is_restored_from_what_the_manifest_keeps(policy: SplitPolicy) -> None:
    files = ["/log/a.parquet", "/log/b.parquet", "/log/c.parquet"]
    kept = json.loads(json.dumps(policy.describe(files)))
    assert restore(kept, "/data", files, 3) == policy


def test_files_that_may_hold_rows_of_a_split() -> None:
    given = GivenSplit((0, 2))
    assert [given.may_hold(file, split) for file in (0, 1) for split in (0, 1, 2)] == [1, 0, 0, 0, 0, 1]
    divided = GivenSplit((0, 2), RandomSplit((0.9, 0.1, 0.0), 0))
    assert [divided.may_hold(file, split) for file in (0, 1) for split in (0, 1, 2)] == [1, 1, 0, 0, 0, 1]
    assert RandomSplit(_SHARES, 0).may_hold(0, 2)
