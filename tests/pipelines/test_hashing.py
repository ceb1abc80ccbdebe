"""Hashes that converted data depends on: their values must never change."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from pipelines import hashing


def test_mix64_is_the_finaliser_of_splitmix64() -> None:
    # The first outputs of splitmix64 with seed 0 (Vigna's reference): the finaliser of multiples of its step.
    state = np.array([0x9E3779B97F4A7C15, 0x3C6EF372FE94F82A], np.uint64)
    assert [hex(x) for x in hashing.mix64(state)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


def test_integer_keys_do_not_depend_on_width() -> None:
    wide = hashing.key64(pa.array([0, 1, 7], pa.int64()))
    for kind in (pa.int8(), pa.uint32(), pa.int16()):
        np.testing.assert_array_equal(hashing.key64(pa.array([0, 1, 7], kind)), wide)
    np.testing.assert_array_equal(hashing.key64(pa.array([False, True])), wide[:2])
    np.testing.assert_array_equal(hashing.key64(pa.array([7, 0, 7]).dictionary_encode()), wide[[2, 0, 2]])


def test_string_keys_are_blake2b_of_utf8() -> None:
    texts = ["", "a", "naïve\n", "a"]
    expected = [
        int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8).digest(), "little", signed=True) for t in texts
    ]
    for kind in (pa.string(), pa.large_string(), pa.binary()):
        assert hashing.key64(pa.array(texts, pa.string()).cast(kind)).tolist() == expected


def test_keys_refuse_nulls_and_floats() -> None:
    with pytest.raises(ValueError, match="null"):
        hashing.key64(pa.array([1, None]))
    with pytest.raises(TypeError, match="double"):
        hashing.key64(pa.array([1.5]))


def test_seeded64_differs_by_seed_and_purpose_and_has_no_collisions() -> None:
    rows = np.arange(100_000)
    hashes = hashing.seeded64(rows, 0, "shuffle")
    assert len(np.unique(hashes)) == len(rows)
    assert not np.isin(hashing.seeded64(rows, 1, "shuffle"), hashes).any()
    assert not np.isin(hashing.seeded64(rows, 0, "split"), hashes).any()
    assert hashes[:2].tolist() == hashing.seeded64(np.array([0, 1]), 0, "shuffle").tolist()
