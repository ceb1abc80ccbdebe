"""Splits: exact order statistics, keys that sort as times do, stable hashes."""

import numpy as np
import pyarrow as pa
import pytest

from pipelines import split
from pipelines.errors import UserError
from pipelines.split import HashSplit, RandomSplit, TimeSplit


@pytest.mark.parametrize("bins", [2, 7, 1 << 16])
@pytest.mark.parametrize("high", [5, 1000, 2**64 - 1])
def test_kth_smallest_is_exact(bins: int, high: int) -> None:
    values = np.random.default_rng(0).integers(0, high, 3000, dtype=np.uint64, endpoint=True)
    ranks = [1, 2, 1500, 2999, 3000]
    found = split.kth_smallest(lambda: np.array_split(values, 7), ranks, bins)
    assert found == np.sort(values)[np.array(ranks) - 1].tolist()


def test_order_keys_sort_as_values() -> None:
    floats = np.array([-np.inf, -1e300, -1.5, -0.0, 1e-300, 2.0, np.inf])
    keys = split.order_keys(pa.array(floats))
    assert (np.diff(keys.astype(object)) > 0).all()
    assert split.order_keys(pa.array([0.0]))[0] == keys[3]
    assert [split.key_value(int(k), pa.float64()) for k in keys] == floats.tolist()
    integers = np.array([-(2**63) + 1, -1, 0, 1, 2**63 - 1])
    keys = split.order_keys(pa.array(integers))
    assert (np.diff(keys.astype(object)) > 0).all()
    assert [split.key_value(int(k), pa.int64()) for k in keys] == integers.tolist()


def test_time_split_keeps_equal_times_on_the_older_side() -> None:
    keys = split.order_keys(pa.array([1, 2, 2, 3, 4]))
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
    assert split.time_kind(pa.array(values, pa.binary()), "t") == kind


def test_times_that_are_none() -> None:
    with pytest.raises(UserError, match="--split_column=t: a time should be"):
        split.time_kind(pa.array([b"soon"], pa.binary()), "t")
    with pytest.raises(UserError, match="--test_from=x: not a value of the split column's type, int64"):
        split.parse_time("x", pa.int64(), "test_from")
    assert split.parse_time("12", pa.int64(), "test_from") == split.order_keys(pa.array([12]))[0]


def test_random_and_hash_splits_have_their_fractions_and_differ_by_seed() -> None:
    rows = np.arange(100_000)
    for policy in (RandomSplit((0.7, 0.2, 0.1), 0), HashSplit("u", (0.7, 0.2, 0.1), 0)):
        parts = policy.assign(rows)
        np.testing.assert_allclose(np.bincount(parts) / len(rows), [0.7, 0.2, 0.1], atol=0.006)
    assert (RandomSplit((0.7, 0.2, 0.1), 1).assign(rows) != RandomSplit((0.7, 0.2, 0.1), 0).assign(rows)).any()
    assert set(RandomSplit((0.9, 0.1, 0.0), 0).assign(rows).tolist()) == {0, 1}
