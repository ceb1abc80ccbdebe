"""Vocabularies: counting, order, file, lookup."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines import vocabulary
from pipelines.vocabulary import Lookup, ValueCounts

_AWKWARD = ["new\nline", "tab\t", '"quote"', "comma,", "naïve 日本 🎉", " ", "\0", "a\r\nb"]


def _counts(values: list, dtype: str) -> pa.Table:
    counts = ValueCounts(dtype)
    kind, other = (pa.int64(), 77) if dtype == "int64" else (pa.string(), "uncounted")
    array = pa.array([*values, other], kind)
    counts.add_encoded(vocabulary.encode(array), np.arange(len(array)) < len(values))
    return counts.table()


def test_order_is_count_then_value() -> None:
    pieces = [_counts([5, 3, 3, None, -7], "int64"), _counts([5, 9, 3], "int64")]
    table, distinct = vocabulary.build(pieces, "int64", min_count=1)
    assert table.to_pydict() == {"value": [3, 5, -7, 9], "count": [3, 2, 1, 1]}
    assert distinct == 4
    table, distinct = vocabulary.build(pieces, "int64", min_count=2)
    assert (table["value"].to_pylist(), distinct) == ([3, 5], 4)


def test_merging_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 50, 1000)
    whole, _ = vocabulary.build([_counts(values.tolist(), "int64")], "int64", 1)
    monkeypatch.setattr(vocabulary, "_MERGE_ROWS", 10)
    parts, _ = vocabulary.build([_counts(p.tolist(), "int64") for p in np.array_split(values, 30)], "int64", 1)
    assert parts.equals(whole)


def test_awkward_strings_survive_the_file(tmp_path: Path) -> None:
    table, _ = vocabulary.build([_counts(_AWKWARD, "string")], "string", 1)
    vocabulary.save(table, str(tmp_path / "v.parquet"))
    loaded = vocabulary.load(str(tmp_path / "v.parquet"))
    assert loaded["value"].type == pa.binary()
    assert loaded["value"].to_pylist() == sorted(text.encode() for text in _AWKWARD)
    ids = Lookup(loaded["value"])(vocabulary.encode(pa.array([*_AWKWARD, "unseen", None])))
    assert sorted(ids[:-2]) == list(range(2, 2 + len(_AWKWARD)))
    assert ids[-2:].tolist() == [1, 1]
    assert ids.dtype == np.int32


def test_integer_lookup() -> None:
    lookup = Lookup(pa.chunked_array([pa.array([30, -5, 2**62])]))
    assert lookup(vocabulary.encode(pa.array([2**62, 30, None, 31, -5, -6, 30]))).tolist() == [4, 2, 1, 1, 3, 1, 2]
    assert lookup(vocabulary.encode(pa.array([], pa.int64()))).tolist() == []
    assert Lookup(pa.chunked_array([], pa.int64()))(vocabulary.encode(pa.array([1, None]))).tolist() == [1, 1]


def test_integers_close_together_are_found_in_a_table() -> None:
    random = np.random.default_rng(0)
    lookup = Lookup(pa.chunked_array([pa.array(random.permutation(np.arange(-500, 500, 2)))]))
    extremes = [-(2**63) + 1, 2**63 - 1, -501, -500, 498, 499, 500, None, 2**62, -(2**62)]
    values = pa.array([*random.integers(-600, 600, 2000).tolist(), *extremes])
    assert lookup._table is not None
    np.testing.assert_array_equal(lookup.plain(values), lookup(vocabulary.encode(values)))
    assert lookup.plain(values).dtype == np.int32
    far = Lookup(pa.chunked_array([pa.array([30, -5, 2**62])]))
    assert far._table is None
    assert far.plain(pa.array([-5, 7, None])).tolist() == [3, 1, 1]
