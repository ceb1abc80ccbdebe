"""Vocabulary assets: every byte of a value survives, and a table of the graph finds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from export import vocabulary_asset, vocabulary_table
from export.server.known_values import KnownValues


def lookup(tmp_path: Path, values: pa.ChunkedArray, dtype: str, wanted: list) -> list[int]:
    vocabulary_asset.write(values, tmp_path / "asset")
    assert vocabulary_asset.read(tmp_path / "asset", dtype).to_pylist() == values.to_pylist()
    table = vocabulary_table.lookup_table(tmp_path / "asset", dtype)
    return list(table.lookup(tf.constant(wanted, tf.as_dtype(dtype))).numpy())


def test_strings_of_any_bytes(tmp_path: Path, nasty_values: list[str]) -> None:
    texts = [text.encode() for text in nasty_values]
    values = pa.chunked_array([texts[:5], [], texts[5:]], pa.binary())
    assert lookup(tmp_path, values, "string", texts) == list(range(2, len(texts) + 2))
    assert lookup(tmp_path, values.slice(3), "string", texts) == [1, 1, 1, *range(2, len(texts) - 1)]


def test_strings_that_are_not_there_are_rare(tmp_path: Path) -> None:
    values = pa.chunked_array([[b"a", b"b"]], pa.binary())
    assert lookup(tmp_path, values, "string", [b"b", b"", b"c", b"A", b"\xff", b"a\x00"]) == [3, 1, 1, 1, 1, 1]


def test_integers(tmp_path: Path) -> None:
    values = pa.chunked_array([[7, -1], [0, 2**63 - 1, -(2**63) + 1]], pa.int64())
    wanted = [-(2**63) + 1, 2**63 - 1, 0, -1, 7, 8, -(2**63)]
    assert lookup(tmp_path, values, "int64", wanted) == [6, 5, 4, 3, 2, 1, 1]


@pytest.mark.parametrize(("dtype", "kind"), [("string", pa.binary()), ("int64", pa.int64())])
def test_an_empty_vocabulary_knows_nothing(tmp_path: Path, dtype: str, kind: pa.DataType) -> None:
    wanted: list = [b"", b"a"] if dtype == "string" else [0, -(2**63)]
    assert lookup(tmp_path, pa.chunked_array([], kind), dtype, wanted) == [1, 1]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([30, -(2**63), -5, -(2**63)], "int64"), ([b"a", b"", b"b\nc", b""], "string")],
)
def test_free_ids_belong_to_nobody(tmp_path: Path, values: list, dtype: str) -> None:
    assert lookup(tmp_path, pa.chunked_array([values]), dtype, values) == [2, 1, 4, 1]
    known = KnownValues(tmp_path / "asset", dtype)
    assert len(known) == 2
    assert known.unknown(np.array([values[0], values[2]])) == 0
    assert known.unknown(np.array([values[0], 77 if dtype == "int64" else b"zz"])) == 1


def test_layout(tmp_path: Path) -> None:
    vocabulary_asset.write(pa.chunked_array([[b"ab", b"\n"]], pa.binary()), tmp_path / "asset")
    expected = np.array([3], "<i8").tobytes() + np.array([0, 2, 1], "<i4").tobytes() + b"ab\n"
    assert (tmp_path / "asset").read_bytes() == expected
