"""Vocabularies: counting, order, file, lookup."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import vocabulary
from pipelines.convert import growth
from pipelines.convert.growth import Grown, Known, Step
from pipelines.vocabulary import Lookup, ValueCounts

_AWKWARD = ["new\nline", "tab\t", '"quote"', "comma,", "naïve 日本 🎉", " ", "\0", "a\r\nb"]


def _counts(values: list, dtype: str) -> pa.Table:
    counts = ValueCounts(dtype)
    kind, other = (pa.int64(), 77) if dtype == "int64" else (pa.string(), "uncounted")
    array = pa.array([*values, other], kind)
    places = np.arange(len(array))
    counts.add_encoded(vocabulary.encode(array), places < len(values), places)
    return counts.table()


def _built(pieces: list[pa.Table], dtype: str, min_count: int) -> Grown:
    """The vocabulary of a first conversion."""
    counts = ValueCounts(dtype)
    for piece in pieces:
        counts.add_counts(piece)
    value, count, time = counts.table().columns
    counted = Known(value, count.to_numpy(), np.ones(len(count), np.int32), time.to_numpy())
    nothing = Known.nothing(value.type)
    return growth.grow(nothing, nothing, counted, min_count, Step(None, 1, first=0, units=0))


def test_order_is_count_then_value() -> None:
    pieces = [_counts([5, 3, 3, None, -7], "int64"), _counts([5, 9, 3], "int64")]
    built = _built(pieces, "int64", min_count=1)
    assert built.known.values.to_pylist() == [3, 5, -7, 9]
    assert built.known.counts.tolist() == [3, 2, 1, 1]
    assert built.known.times.tolist() == [2, 0, 4, 1]
    assert built.distinct == 4
    built = _built(pieces, "int64", min_count=2)
    assert (built.known.values.to_pylist(), built.rare.values.to_pylist(), built.distinct) == ([3, 5], [-7, 9], 4)


def test_merging_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 50, 1000)
    for dtype in ("int64", "string"):
        given = [str(value) for value in values] if dtype == "string" else values.tolist()
        pieces = [_counts(given[start : start + 33], dtype) for start in range(0, 1000, 33)]
        whole = _built(pieces, dtype, 1).known
        with monkeypatch.context() as context:
            context.setattr(vocabulary, "_MERGE_ROWS", 10)
            parts = _built(pieces, dtype, 1).known
        assert parts.values.equals(whole.values)
        np.testing.assert_array_equal(parts.counts, whole.counts)
        np.testing.assert_array_equal(parts.times, whole.times)


def test_awkward_strings_survive_the_file(tmp_path: Path) -> None:
    built = _built([_counts(_AWKWARD, "string")], "string", 1)
    pq.write_table(pa.table({"value": built.known.values}), tmp_path / "v.parquet")
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


def test_free_ids_belong_to_nobody() -> None:
    integers = Lookup(pa.chunked_array([pa.array([30, -(2**63), -5, -(2**63)])]))
    assert integers._table is not None
    assert integers.plain(pa.array([-5, 30, None, 29])).tolist() == [4, 2, 1, 1]
    texts = Lookup(pa.chunked_array([pa.array([b"a", b"", b"b"])]))
    assert texts(vocabulary.encode(pa.array(["b", "a", None, ""]))).tolist() == [4, 2, 1, 1]


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
