"""Values to arrays: everything the model takes, losslessly, and an error with the place for the rest."""

from __future__ import annotations

import array
import decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stem_client import FeatureError, features, values
from stem_client.metadata import Feature

EMPTY = -(2**63)
INT = Feature("f", "int64", "value", None, True)
STRING = Feature("f", "string", "value", None, True)
FLOAT = Feature("f", "float32", "value", None, True)
INTS = Feature("f", "int64", "list", None, True)
STRINGS = Feature("f", "string", "list", None, True)
VECTOR = Feature("f", "float32", "vector", 2, True)
ONE = Feature("f", "string", "list", 1, True)
FIXED = Feature("f", "int64", "list", 3, True)


def encode(feature: Feature, given: Any) -> np.ndarray:
    return values.encode(feature, given, "item feature 'f'", "item")


def masked(data: list[Any]) -> Any:
    return np.ma.masked_array(data, [False] * (len(data) - 1) + [True])


@pytest.mark.parametrize(
    "given, expected",
    [
        ([1, -2, 2**63 - 1], [1, -2, 2**63 - 1]),
        ((1, EMPTY), [1, EMPTY]),
        (range(3), [0, 1, 2]),
        (array.array("i", [4, 5]), [4, 5]),
        ([1, None, float("nan"), np.float32("nan"), pd.NA], [1, EMPTY, EMPTY, EMPTY, EMPTY]),
        ([2.0, np.float64(3), np.int8(4), np.uint64(5), np.array(6)], [2, 3, 4, 5, 6]),
        (np.array([1, 2], np.uint8), [1, 2]),
        (np.array([2**63 - 1], np.uint64), [2**63 - 1]),
        (np.array([1.0, np.nan, 1 - 2.0**53]), [1, EMPTY, 1 - 2**53]),
        (np.array([1, None, 2.0], object), [1, EMPTY, 2]),
        (masked([1, 2, 3]), [1, 2, EMPTY]),
        (pd.Series([1, 2], index=[7, 3]), [1, 2]),
        (pd.Series([1, None]), [1, EMPTY]),
        (pd.Series([1, None, 2**62], dtype="Int64"), [1, EMPTY, 2**62]),
        (pd.Series([3, 4], dtype="category"), [3, 4]),
        ([], []),
    ],
)
def test_int64(given: Any, expected: list[int]) -> None:
    encoded = encode(INT, given)
    assert encoded.dtype == np.int64 and encoded.tolist() == expected


@pytest.mark.parametrize(
    "given, expected",
    [
        (["é", b"\xff", "", "a\nb"], ["é".encode(), b"\xff", b"", b"a\nb"]),
        (["a", None, float("nan"), pd.NA, np.str_("b"), np.bytes_(b"c")], [b"a", b"", b"", b"", b"b", b"c"]),
        (np.array(["a", "bé"]), [b"a", "bé".encode()]),
        (np.array([b"a"]), [b"a"]),
        (np.array(["a", None], object), [b"a", b""]),
        (pd.Series(["a", None]), [b"a", b""]),
        (pd.Series(["a", None], dtype="string"), [b"a", b""]),
        (pd.Series(["a", "b"], dtype="category"), [b"a", b"b"]),
        ([], []),
    ],
)
def test_string(given: Any, expected: list[bytes]) -> None:
    encoded = encode(STRING, given)
    assert encoded.dtype == np.object_ and encoded.tolist() == expected


@pytest.mark.parametrize(
    "given, expected",
    [
        ([0.1, 2, -3.5], [0.1, 2, -3.5]),
        ([1, None, float("nan"), pd.NA], [1, np.nan, np.nan, np.nan]),
        ([decimal.Decimal("0.5"), np.float16(2), np.int32(3)], [0.5, 2, 3]),
        ([2**70], [2.0**70]),
        (np.array([1, 2], np.int16), [1, 2]),
        (np.array([0.1, np.nan]), [0.1, np.nan]),
        (pd.Series([1, None], dtype="Float64"), [1, np.nan]),
        ([], []),
    ],
)
def test_float32(given: Any, expected: list[float]) -> None:
    encoded = encode(FLOAT, given)
    assert encoded.dtype == np.float32
    np.testing.assert_array_equal(encoded, np.array(expected, np.float32))


@pytest.mark.parametrize(
    "feature, given, expected",
    [
        (INTS, [[1, 2], [], [3]], [[1, 2], [EMPTY, EMPTY], [3, EMPTY]]),
        (INTS, [None, (1, None), np.array([5]), pd.Series([7])], [[EMPTY] * 2, [1, EMPTY], [5, EMPTY], [7, EMPTY]]),
        (INTS, np.array([[1, 2], [3, 4]], np.int32), [[1, 2], [3, 4]]),
        (INTS, pd.Series([[1], np.array([2, 3]), None]), [[1, EMPTY], [2, 3], [EMPTY, EMPTY]]),
        (INTS, [[], []], [[EMPTY], [EMPTY]]),
        (INTS, [], np.empty((0, 1))),
        (FIXED, [[1], [2, 3, 4]], [[1, EMPTY, EMPTY], [2, 3, 4]]),
        # As conversion does it: what is empty is dropped, then the first ones kept.
        (FIXED, [[None, 1, EMPTY, 2, 3, 4], [], None, [None]], [[1, 2, 3], *[[EMPTY] * 3] * 3]),
        (FIXED, np.arange(10).reshape(2, 5), [[0, 1, 2], [5, 6, 7]]),
        (FIXED, np.array([[np.nan, 1], [2, np.nan]]), [[1, EMPTY, EMPTY], [2, EMPTY, EMPTY]]),
        (FIXED, [], np.empty((0, 3))),
        (ONE, [["", "a", "b"], [None], []], [[b"a"], [b""], [b""]]),
        (STRINGS, [["a", "é"], [None]], [[b"a", "é".encode()], [b"", b""]]),
        (STRINGS, np.array([["a", "b"]]), [[b"a", b"b"]]),
        (VECTOR, [[1, 2.5], None, [None, 4]], [[1, 2.5], [np.nan, np.nan], [np.nan, 4]]),
        (VECTOR, np.ones((2, 2)), [[1, 1], [1, 1]]),
        (VECTOR, [np.array([1, 2], np.float64)], [[1, 2]]),
    ],
)
def test_lists_and_vectors(feature: Feature, given: Any, expected: Any) -> None:
    np.testing.assert_array_equal(encode(feature, given), np.array(expected))


@pytest.mark.parametrize(
    "feature, given, message",
    [
        (INT, [1, 2, 3.5], "item 2 is 3.5 (float), which is not a whole number; the model takes int64"),
        (INT, np.array([1.0, 0.25]), "item 1 is 0.25 (float), which is not a whole number"),
        (INT, [1, True], "item 1 is True (bool); the model takes int64, so write 1 if that is meant"),
        (INT, np.array([False]), "item 0 is False (bool)"),
        (INT, [np.bool_(True)], "item 0 is True (bool)"),
        (INT, ["7"], "item 0 is '7' (str); the model takes int64"),
        (INT, np.array(["7"]), "item 0 is '7' (str); the model takes int64"),
        (INT, [1, 2**63], "item 1 is 9223372036854775808 (int), which int64 does not hold"),
        (INT, np.array([1, 2**63], np.uint64), "item 1 is 9223372036854775808 (int), which int64 does not hold"),
        (INT, [float(2**53)], "floats from 2^53 on skip integers"),
        (
            INT,
            np.array([1, 2**24], np.float32),
            "item 1 is 16777216.0 (float); float32 values from 2^24 on skip integers",
        ),
        (INT, [np.float32(2**24)], "float32 values from 2^24 on skip integers"),
        (INT, pd.Series([None, -(2.0**24)], dtype="float32"), "float32 values from 2^24 on skip integers"),
        (INT, pd.array([None, 2.0**24], "Float32"), "item 1 is 16777216.0 (float); float32 values from 2^24"),
        (INT, np.array([2**11], np.float16), "float16 values from 2^11 on skip integers"),
        (INTS, [[1], np.array([2**24], np.float32)], "item 1, element 0 is 16777216.0 (float); float32 values from"),
        (INT, pd.array([1.5]), "item 0 is 1.5 (float)"),
        (INT, [float("inf")], "item 0 is inf (float), which is not a whole number"),
        (INT, [1, [2]], "item 1 is [2] (list); the model takes int64"),
        (INT, [np.array([2])], "item 0 is array([2]) (ndarray); the model takes int64"),
        (INT, [[1, 2]], "item 0 is [1, 2] (list)"),
        (INT, np.array([[1, 2]]), "has shape (1, 2); one value for each item is expected"),
        (INT, 7, "is 7 (int); a list or an array is expected"),
        (INT, np.int64(7), "a list or an array is expected"),
        (INT, {1, 2}, "is {1, 2} (set); a list or an array is expected"),
        (INT, np.array(["2020-01-01"], "M8[ns]"), "has dtype datetime64[ns]; integers, floats or strings are expected"),
        (INT, [np.datetime64("2020-01-01", "ns")], "the model takes int64"),
        (STRING, "abc", "is 'abc' (str); a list or an array is expected"),
        (STRING, ["a", 1], "item 1 is 1 (int); the model takes strings"),
        (STRING, np.array([1.5]), "item 0 is 1.5 (float); the model takes strings"),
        (STRING, ["\ud800"], "which has no UTF-8 form"),
        (FLOAT, [1, "2"], "item 1 is '2' (str); the model takes float32"),
        (FLOAT, [0.5, True], "item 1 is True (bool); the model takes float32"),
        (FLOAT, np.array([True]), "item 0 is True (bool); the model takes float32"),
        (FLOAT, [1, 1e39], "item 1 is 1e+39 (float), which is not finite in float32"),
        (FLOAT, [None, -1e39], "item 1 is -1e+39 (float), which is not finite in float32"),
        (FLOAT, np.array([np.inf]), "which is not finite in float32"),
        (FLOAT, [10**400], "which is not finite in float32"),
        (FLOAT, [1j], "the model takes float32"),
        (FLOAT, [[1.0]], "item 0 is [1.0] (list); the model takes float32"),
        (FLOAT, [np.datetime64("2020-01-01", "ns")], "the model takes float32"),
        (INTS, [[1], [], [2, "x"]], "item 2, element 1 is 'x' (str); the model takes int64"),
        (INTS, np.array([[1, 2], [3, 4.5]]), "item 1, element 1 is 4.5 (float)"),
        (INTS, [[1], 2], "item 1 is 2 (int); a list or an array is expected"),
        (INTS, [1, 2], "item 0 is 1 (int); a list or an array is expected"),
        (INTS, np.array([1, 2]), "has shape (2,)"),
        (INTS, [np.ones((1, 2))], "item 0 has shape (1, 2); one dimension is expected"),
        (INTS, [[[1]]], "item 0, element 0 is [1] (list); the model takes int64"),
        (STRINGS, ["a|b"], "item 0 is 'a|b' (str); a list or an array is expected"),
        (FIXED, [[1], [1, 2, 3, "x"]], "item 1, element 3 is 'x' (str); the model takes int64"),
        (VECTOR, [[1, 2], [3]], "item 1 has 1 elements; the model takes 2"),
        (VECTOR, np.ones((3, 4)), "item 0 has 4 elements; the model takes 2"),
        (VECTOR, [[1, 2], [3, float("inf")]], "item 1, element 1 is inf (float), which is not finite"),
    ],
)
def test_what_the_model_does_not_take(feature: Feature, given: Any, message: str) -> None:
    with pytest.raises(FeatureError) as caught:
        encode(feature, given)
    assert str(caught.value).startswith("item feature 'f'") and message in str(caught.value)


def test_the_single_row_of_a_user_has_no_number() -> None:
    with pytest.raises(FeatureError, match=r"^user feature 'f', element 1 is 'x' \(str\); the model takes int64$"):
        values.encode(INTS, [[1, "x"]], "user feature 'f'", None)


def test_the_errors_that_the_documentation_shows() -> None:
    model = [
        Feature("user_id", "int64", "value", None, False),
        Feature("hour", "int64", "value", None, False),
        Feature("video_id", "int64", "value", None, True),
        Feature("duration_ms", "float32", "value", None, True),
    ]
    user: dict[str, Any] = {"user_id": 1042, "hour": 21}
    items: dict[str, Any] = {"video_id": [7, 8, 9], "duration_ms": [9000, 31000, None]}
    count, arrays = features.rank(model, user, items)
    assert count == 3 and {name: array.shape for name, array in arrays.items()} == {
        "user_id": (1,), "hour": (1,), "video_id": (1, 3), "duration_ms": (1, 3)
    }  # fmt: skip
    errors = []
    for wrong_user, wrong_items in (
        (user, items | {"video_id": [7, 8, 3.5]}),
        (user, items | {"duration": [1, 2, 3]}),
        (user | {"hour": "21"}, items),
        (user, items | {"video_id": [7, 8]}),
    ):
        with pytest.raises(FeatureError) as caught:
            features.rank(model, wrong_user, wrong_items)
        errors.append(str(caught.value))
    page = (Path(__file__).resolve().parents[2] / "docs/client.md").read_text(encoding="utf-8")
    assert all(f"\n    {error}\n" in page for error in errors), errors
