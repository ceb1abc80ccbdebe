"""Ids by hash: the hash against published values, ids by hand, and the counts and chances that are reported."""

import math

import numpy as np
import pyarrow as pa
import pytest

from pipelines import hashed_ids
from pipelines.farmhash import fingerprint64
from pipelines.hashed_ids import CODES, MISSING, Distinct
from pipelines.schema import Hash


def test_published_fingerprints() -> None:
    # The example of FARM_FINGERPRINT in BigQuery's reference.
    published = {
        "1footrue": -1541654101129638711,
        "2applefalse": 2794438866806483259,
        "3true": -4880158226897771312,
    }
    assert fingerprint64(pa.array(published)).view(np.int64).tolist() == [*published.values()]


def test_fingerprints_of_every_length_are_tensorflows() -> None:
    import tensorflow as tf

    random = np.random.default_rng(0)
    lengths = [*range(330), 0, 1000, 4096, 65_537]
    values = [random.integers(256, size=length, dtype=np.uint8).tobytes() for length in lengths]
    bits = tf.raw_ops.Fingerprint(data=tf.constant(values), method="farmhash64")
    expected = tf.bitcast(bits, tf.uint64).numpy()
    np.testing.assert_array_equal(fingerprint64(pa.array(values, pa.binary())), expected)
    # A piece of a larger array, in another order, and more values than are hashed in one go.
    order = random.permutation(np.tile(np.arange(len(values)), 60))
    piece = pa.array([b"before", *(values[i] for i in order if len(values[i]) < 65), b"after"]).slice(1)[:-1]
    short = [i for i in order if len(values[i]) < 65]
    np.testing.assert_array_equal(fingerprint64(piece), expected[short])


def _mixed(value: int) -> int:
    """splitmix64's finaliser in Python's integers."""
    z = value % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_codes() -> None:
    integers = [0, 1, -1, 2**63 - 1, -(2**63) + 1, None]
    found = hashed_ids.codes(pa.array(integers, pa.int64()))
    assert found.tolist() == [*(_mixed(i) >> 1 for i in integers if i is not None), MISSING]
    words = hashed_ids.codes(pa.array(["3true", None, "1footrue"]))
    assert words.tolist() == [(-4880158226897771312 % 2**64) % CODES, MISSING, (-1541654101129638711 % 2**64) % CODES]


@pytest.mark.parametrize(("hashes", "expected"), [(1, [5, 9, 1, 2]), (2, [5, 4, 9, 9, 1, 0, 2, 2])])
def test_ids_by_hand(hashes: int, expected: list[int]) -> None:
    # Remainder and quotient by 10, after padding and the missing value; 10^2 times the code 1 has the code 0's rows.
    found = hashed_ids.ids(np.array([123, 77, MISSING, 100 * 10]), Hash(10, hashes))  # type: ignore[arg-type]
    assert found.tolist() == expected and found.dtype == np.int32


def test_ids_of_the_most_buckets_fit() -> None:
    found = hashed_ids.ids(np.array([CODES - 1, 0]), Hash(2**31 - 3, 2))
    assert found.min() >= 2 and found.max() <= 2**31 - 1


def test_distinct_values_are_counted_exactly_then_to_two_percent() -> None:
    first, second = Distinct(), Distinct()
    codes = hashed_ids.codes(pa.array(range(3000)))
    first.add(np.append(codes, MISSING))
    first.add(codes[:10])
    second.add(codes[1000:])
    first.merge(second)
    assert first.count == 3000
    for start in range(0, 400_000, 50_000):
        second.add(hashed_ids.codes(pa.array(range(start, start + 100_000))))
    first.merge(second)
    assert first.count == pytest.approx(450_000, rel=0.05)
    assert first.count == second.count


def test_shares_of_values_that_are_alike() -> None:
    assert hashed_ids.alike(1, Hash(2)) == hashed_ids.alike(0, Hash(2, 2)) == 0
    # Of two values in 3 buckets: one row alike with 1/3; both rows with the sum of squares over unordered pairs.
    assert hashed_ids.alike(2, Hash(3)) == pytest.approx(1 / 3)
    assert hashed_ids.alike(2, Hash(3, 2)) == pytest.approx((3 * 1 + 3 * 4) / 81)
    # Measured on 20,000 values.
    codes = hashed_ids.codes(pa.array([f"user-{i}" for i in range(20_000)]))
    for by in (Hash(30_000), Hash(300, 2)):
        rows = np.sort(hashed_ids.ids(codes, by).reshape(-1, by.hashes), axis=1)
        _, place, count = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
        shared = np.mean(count[place.reshape(-1)] > 1)
        assert shared == pytest.approx(hashed_ids.alike(20_000, by), abs=0.015)
    assert math.isclose(hashed_ids.alike(2_000_000_000, Hash(100_000_000, 2)), 2e9 * 2 / 1e16, rel_tol=1e-3)
