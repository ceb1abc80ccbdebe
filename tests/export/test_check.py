"""The check on its own: raw columns to requests, grouping, comparison, and that it needs nothing of this project."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from export import check

INT_EMPTY = -(2**63)


def one(kind: str, dtype: str, column: pa.Array, **more: Any) -> np.ndarray:
    """The tensor of one feature, all values of its lists."""
    feature = {"name": "x", "kind": kind, "column": "c", "dtype": dtype, "separator": None, "length": 0} | more
    return check.whole([feature], pa.record_batch({"c": column}))["x"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([3, None, 1], pa.uint8()),
        pa.array([3, None, 1], pa.int64()),
        pa.array([" 3", "", "1 "]),
        pa.array([3, None, 1], pa.int32()).dictionary_encode(),
    ],
)
def test_integers(column: pa.Array) -> None:
    values = one("categorical", "int64", column)
    assert values.dtype == np.int64 and values.tolist() == [3, INT_EMPTY, 1]


def test_bools_are_integers() -> None:
    column = pa.array([True, None, False])
    assert one("categorical", "int64", column).tolist() == [1, INT_EMPTY, 0]
    np.testing.assert_array_equal(one("numeric", "float32", column), [1, np.nan, 0])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_strings(kind: pa.DataType) -> None:
    values = one("categorical", "string", pa.array(["a\nb", None, "", "é"]).cast(kind))
    assert values.dtype == object and values.tolist() == [b"a\nb", b"", b"", "é".encode()]


@pytest.mark.parametrize(
    "column", [pa.array([1.5, None, -2.0]), pa.array(["1.5", None, " -2"]), pa.array([1.5, np.nan, -2])]
)
def test_numbers(column: pa.Array) -> None:
    values = one("numeric", "float32", column)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, np.array([1.5, np.nan, -2], np.float32))


def test_bags_keep_empty_values_in_their_places() -> None:
    lists = pa.array([[1, None, 2], None, [], [3]], pa.list_(pa.int32()))
    e = INT_EMPTY
    assert one("multivalent", "int64", lists).tolist() == [[1, e, 2], [e, e, e], [e, e, e], [3, e, e]]
    text = pa.array(["a||b", None, "", "c"])
    expected = [[b"a", b"", b"b"], [b""] * 3, [b""] * 3, [b"c", b"", b""]]
    assert one("multivalent", "string", text, separator="|").tolist() == expected
    assert one("multivalent", "int64", pa.array(["1| 2", "3"]), separator="|").tolist() == [[1, 2], [3, e]]
    assert one("multivalent", "int64", pa.array([None, []], pa.list_(pa.int64()))).shape == (2, 0)


def test_requests_hold_the_first_values_that_are_not_empty() -> None:
    rows = pa.record_batch({"c": pa.array([[None, 1, 2, 3], None, [], [3, None]], pa.list_(pa.int32()))})
    feature = {"name": "x", "kind": "multivalent", "column": "c", "dtype": "int64", "separator": None, "max_length": 2}
    e = INT_EMPTY
    assert check.request([feature], rows)["x"].tolist() == [[1, 2], [e, e], [e, e], [3, e]]
    rows = pa.record_batch({"c": ["a||b|c", "", "d"]})
    found = check.request([feature | {"dtype": "string", "separator": "|", "max_length": 3}], rows)["x"]
    assert found.tolist() == [[b"a", b"b", b"c"], [b""] * 3, [b"d", b"", b""]]


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.list_(pa.float32(), 2), pa.large_list(pa.float32())])
def test_vectors(kind: pa.DataType) -> None:
    column = pa.array([[1, 2], None, [None, 4]], kind)
    expected = np.array([[1, 2], [np.nan, np.nan], [np.nan, 4]], np.float32)
    np.testing.assert_array_equal(one("dense", "float32", column, length=2), expected)


def test_examples_leave_out_what_is_empty() -> None:
    import tensorflow as tf

    arrays = {
        "id": np.array([5, INT_EMPTY]),
        "text": np.array([b"t", b""], object),
        "bag": np.array([[b"a", b""], [b"", b""]], object),
        "number": np.array([1.5, np.nan], np.float32),
        "vector": np.array([[1, np.nan], [np.nan, np.nan]], np.float32),
    }
    first, second = (tf.train.Example.FromString(message).features.feature for message in check.examples(arrays))
    assert sorted(first) == sorted(arrays) and not second
    assert list(first["id"].int64_list.value) == [5] and list(first["bag"].bytes_list.value) == [b"a"]
    assert np.isnan(first["vector"].float_list.value[1])


def test_rows_of_a_request_share_what_comes_once() -> None:
    arrays = {
        "user": np.array([b"a", b"b", b"a", b"c", b"a", b"b"], object),
        "bag": np.array([[1, 2]] * 4 + [[2, 1]] + [[1, 2]]),
        "image": np.array([[0, np.nan]] * 6, np.float32),
        "item": np.arange(6),
    }
    requests = sorted(check._requests(arrays, ["user", "bag", "image"]), key=lambda places: places.shape[1])
    assert [places.tolist() for places in requests] == [[[3], [4]], [[0, 2], [1, 5]]]


def compare(served: list[float], trained: list[float]) -> dict[str, dict[str, float]]:
    comparison = check.Comparison({"click": 1e-5})
    arrays = {"user": np.array([b"a\nb", b"c"], object), "length": np.array([1, 2], np.float32)}
    scores, expected = {"click": np.array(served, np.float32)}, {"click": np.array(trained, np.float32)}
    comparison("rank", arrays, np.array([70, 71]), scores, expected)
    return comparison.worst


def test_differences_are_relative_for_large_values() -> None:
    assert compare([0.5, 0.25], [0.5, 0.250001])["rank"]["click"] == pytest.approx(1e-6, rel=0.1)
    compare([1000.0, -1000.0], [1000.005, -1000.005])


@pytest.mark.parametrize("wrong", [0.75, float("nan")])
def test_a_mismatch_names_everything(wrong: float) -> None:
    with pytest.raises(check.Mismatch) as caught:
        compare([0.5, wrong], [0.5, 0.25])
    for words in (
        "signature rank",
        "row_id 71",
        "task 'click'",
        "trained 0.25",
        f"served {wrong:g}",
        "user=b'c', length=2.0",
    ):
        assert words in str(caught.value)


def test_it_needs_nothing_of_this_project(tmp_path: Path) -> None:
    path = Path(check.__file__).resolve()
    code = (
        f"import runpy, sys; runpy.run_path({str(path)!r}, run_name='check'); "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'export', 'stem_tf', 'pipelines', 'absl'}))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_nothing_of_this_project_imports_it() -> None:
    root = Path(check.__file__).resolve().parents[1]
    modules = [
        path for package in ("stem_util", "pipelines", "stem_tf", "export") for path in (root / package).rglob("*.py")
    ]
    importing = re.compile(r"^\s*(from export import .*\bcheck\b|(from|import) export\.check\b)", re.MULTILINE)
    assert modules and not [path for path in modules if importing.search(path.read_text(encoding="utf-8"))]
