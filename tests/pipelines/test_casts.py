"""Types that agree, and what becomes of their values."""

import pyarrow as pa
import pytest

from pipelines.log import casts

INTS, TEXT = pa.int64(), pa.string()


@pytest.mark.parametrize(
    ("left", "right", "common"),
    [
        (pa.int32(), pa.int64(), INTS),
        (pa.bool_(), pa.uint64(), pa.uint64()),
        (pa.bool_(), pa.uint8(), INTS),
        (pa.int8(), pa.uint64(), INTS),
        (pa.int64(), pa.float32(), pa.float64()),
        (pa.bool_(), pa.float32(), pa.float64()),
        (pa.null(), pa.list_(TEXT), pa.list_(TEXT)),
        (TEXT, pa.dictionary(pa.int8(), TEXT), TEXT),
        (TEXT, pa.large_string(), pa.large_string()),
        (TEXT, pa.binary(), pa.binary()),
        (pa.binary_view(), pa.string_view(), pa.binary()),
        (TEXT, INTS, None),
        (pa.list_(INTS), INTS, None),
        (pa.list_(pa.null()), pa.list_(pa.float32(), 2), pa.list_(pa.float32())),
        (pa.list_(pa.int8()), pa.large_list(pa.bool_()), pa.large_list(INTS)),
        (pa.list_(TEXT), pa.list_(INTS), None),
        (pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("us")),
        (pa.timestamp("ms"), pa.date32(), pa.timestamp("ms")),
        (pa.timestamp("ms", "UTC"), pa.date32(), None),
        (pa.timestamp("ms", "UTC"), pa.timestamp("us", "Europe/Berlin"), pa.timestamp("us", "UTC")),
        (pa.timestamp("ms", "UTC"), pa.timestamp("ms"), None),
        (pa.decimal128(5, 2), pa.decimal128(9, 4), pa.decimal128(9, 4)),
        (pa.struct([("a", INTS)]), pa.struct([("a", TEXT)]), None),
    ],
)
def test_common_types(left: pa.DataType, right: pa.DataType, common: pa.DataType | None) -> None:
    assert casts.common_type(left, right) == common
    assert casts.common_type(right, left) == common


def test_values_of_a_common_type() -> None:
    assert casts.to_type(pa.array([True, None]), pa.float64()).to_pylist() == [1.0, None]
    assert casts.to_type(pa.array([2**53 + 1]), pa.float64()).to_pylist() == [2.0**53]
    assert casts.to_type(pa.array([1, 2**63], pa.uint64()), INTS).to_pylist() == [1, None]
    assert casts.to_type(pa.array(["a", None]).dictionary_encode(), TEXT).to_pylist() == ["a", None]
    values, bad = casts.to_int64(pa.array([1, 2**63], pa.uint64()))
    assert values.to_pylist() == [1, None]
    assert bad.tolist() == [False, True]


def test_columns_of_nothing_but_nulls() -> None:
    nothing = pa.nulls(2)
    for cast in (casts.to_int64, casts.to_float64, casts.to_text, casts.to_bools):
        values, bad = cast(nothing)
        assert values.to_pylist() == [None, None]
        assert not bad.any()
    for dtype in ("int64", "string", "float32"):
        lists, bad = casts.to_lists(nothing, dtype, None)
        assert lists.lengths.tolist() == [0, 0]
        assert lists.missing.tolist() == [True, True]
        assert not bad.any()


def test_whole_numbers_written_as_floats_are_integers() -> None:
    text = pa.array(
        [b"18.0", b" 7.", b"-3.000", b"1.5", b"9007199254740992.0", b"9007199254740994.0", b"", b"-9223372036854775808"]
    )
    values, bad = casts.to_int64(text)
    assert values.to_pylist() == [18, 7, -3, None, 2**53, None, None, None]
    assert bad.tolist() == [False, False, False, True, False, True, False, False]
    assert casts.to_int64(pa.array([b"9007199254740993"]))[0].to_pylist() == [2**53 + 1]


def test_words_for_bools_are_numbers_where_asked_for() -> None:
    text = pa.array(["True", "FALSE", " true", "0.5", "yes", None])
    values, bad = casts.to_float64(text, bools=True)
    assert values.to_pylist() == [1.0, 0.0, 1.0, 0.5, None, None]
    assert bad.tolist() == [False, False, False, False, True, False]
    assert casts.to_float64(text)[1].sum() == 4


def test_separators_with_spaces_at_the_ends_of_values() -> None:
    lists, _ = casts.to_lists(pa.array(["a, b", "a, b,", "a,b, c", ""]), "string", ", ")
    assert lists.values.to_pylist() == ["a", "b", "a", "b", "a,b", "c"]
    lists, _ = casts.to_lists(pa.array(["| a | b", "a | b |"]), "string", " | ")
    assert lists.values.to_pylist() == ["a", "b"] * 2
