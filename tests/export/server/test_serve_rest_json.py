"""TensorFlow Serving's JSON: what is read exactly, and what is refused with words."""

from __future__ import annotations

import json
from typing import Any

import grpc
import numpy as np
import pytest

from export.server import rest_json
from export.server.status import StatusError

INT, FLOAT, STRING = np.dtype(np.int64), np.dtype(np.float32), np.dtype(object)


def _read(text: str | bytes, **inputs: np.dtype[Any]) -> dict[str, np.ndarray]:
    return rest_json.arrays(rest_json.parse(text.encode() if isinstance(text, str) else text), inputs)


def test_rows_and_columns() -> None:
    rows = _read('{"instances": [{"user": 1, "item": [5, 6]}, {"item": [7, 8], "user": 2}]}', user=INT, item=INT)
    columns = _read('{"inputs": {"user": [1, 2], "item": [[5, 6], [7, 8]]}}', user=INT, item=INT)
    for arrays in (rows, columns):
        assert arrays["user"].tolist() == [1, 2] and arrays["item"].tolist() == [[5, 6], [7, 8]]
        assert arrays["user"].dtype == np.int64
    for single in ('{"instances": [1, 2]}', '{"inputs": [1, 2]}', '{"instances": [{"user": 1}, {"user": 2}]}'):
        assert _read(single, user=INT)["user"].tolist() == [1, 2]
    assert _read('{"inputs": 7}', user=INT)["user"].shape == ()
    assert _read('{"inputs": {"user": [[], []]}}', user=INT)["user"].shape == (2, 0)


def test_integers_are_exact_and_floats_what_they_say() -> None:
    edges = [2**63 - 1, -(2**63), 2**53 + 1]
    assert _read(json.dumps({"inputs": edges}), x=INT)["x"].tolist() == edges
    numbers = _read('{"inputs": [0.1, 1, 3e38, NaN, Infinity, -Infinity, 1e-300]}', x=FLOAT)["x"]
    assert numbers.dtype == np.float32 and np.isnan(numbers[3]) and numbers[4:].tolist() == [np.inf, -np.inf, 0.0]
    assert _read('{"inputs": [true, false]}', x=np.dtype(bool))["x"].tolist() == [True, False]
    assert _read('{"inputs": [255]}', x=np.dtype(np.uint8))["x"].dtype == np.uint8


def test_strings_are_utf8_and_bytes_base64() -> None:
    text = '{"instances": ["é🎬", {"b64": "/wA="}, "", "nul\\u0000"]}'
    assert _read(text, x=STRING)["x"].tolist() == ["é🎬".encode(), b"\xff\x00", b"", b"nul\x00"]
    assert _read('{"inputs": {"b64": "AA=="}}', x=STRING)["x"].tolist() == b"\x00"
    assert _read('{"instances": [{"x": {"b64": "AA=="}}]}', x=STRING)["x"].tolist() == [b"\x00"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The document is empty"),
        ("  ", "The document is empty"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        ("{", "JSON Parse error: .* at offset: 1"),
        ('{"inputs": [1,]}', "JSON Parse error"),
        ("[" * 100_000, "nested too deep"),
        ('{"inputs":' * 50_000, "nested too deep"),
        ('{"inputs": ' + "[" * 300 + "]" * 300 + "}", "nested too deep for a tensor"),
        ("[1]", "Is not object"),
        ("{}", "Missing 'inputs' or 'instances' key"),
        ('{"instances": [1], "inputs": [1]}', "expecting only one of"),
        ('{"instances": 1}', "to be an list/array"),
        ('{"instances": []}', "No values in 'instances' array"),
        ('{"signature_name": 1, "inputs": [1]}', "'signature_name' key must be a string value"),
        ('{"signature_name": "\\ud800", "inputs": [1]}', "'signature_name' key must be a string value"),
        ('{"inputs": {"x": 1, "x": 2}}', 'the key "x" occurs twice'),
        ('{"inputs": {"y": 1}}', "Missing named input: x in 'inputs' object."),
        ('{"inputs": {"x": 1, "y": 1}}', 'does not have named input: "y"'),
        ('{"instances": [{"y": 1}]}', "keys must be equal to: x"),
        ('{"instances": [{"x": 1}, 2]}', "Expecting object but got list at item 1"),
        ('{"instances": [2, {"x": 1}]}', "is not of expected type: int64"),
        ('{"inputs": [[1, 2], [3]]}', "list at unexpected size: 1 at level: 1 expected size: 2"),
        ('{"inputs": [[1], 3]}', "3 found at incorrect level: 1"),
        ('{"inputs": [3, [1]]}', "list at unexpected level: 1"),
        ('{"inputs": [1.0]}', "1.0 is not of expected type: int64"),
        ('{"inputs": [true]}', "true is not of expected type: int64"),
        ('{"inputs": ["1"]}', '"1" is not of expected type: int64'),
        ('{"inputs": [null]}', "null is not of expected type: int64"),
        ('{"inputs": [9223372036854775808]}', "9223372036854775808 is not of expected type: int64"),
        ('{"inputs": [' + "9" * 4000 + "]}", r"999\.\.\. is not of expected type: int64"),
        ('{"inputs": [' + "9" * 5000 + "]}", "a number has too many digits"),
    ],
)
def test_what_is_no_request_is_refused_with_words(text: str | bytes, message: str) -> None:
    with pytest.raises(StatusError, match=message) as caught:
        _read(text, x=INT)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("text", "dtype", "message"),
    [
        ('{"inputs": [16777217]}', FLOAT, "Cannot convert JSON value: 16777217 to float32 without loss"),
        ('{"inputs": [' + "9" * 400 + "]}", FLOAT, "without loss"),
        ('{"inputs": [1e39]}', FLOAT, "to float32: it is too large"),
        ('{"inputs": [1e999]}', np.dtype(np.float64), "to float64: it is too large"),
        ('{"inputs": ["NaN"]}', FLOAT, "is not of expected type: float"),
        ('{"inputs": [256]}', np.dtype(np.uint8), "256 is not of expected type: uint8"),
        ('{"inputs": [-1]}', np.dtype(np.uint64), "-1 is not of expected type: uint64"),
        ('{"inputs": [1]}', np.dtype(bool), "1 is not of expected type: bool"),
        ('{"inputs": [1]}', STRING, "1 is not of expected type: string"),
        ('{"inputs": ["\\ud800"]}', STRING, "half a surrogate pair"),
        ('{"inputs": [{"b64": "?"}]}', STRING, "Unable to base64 decode"),
        ('{"inputs": [{"b64": "é"}]}', STRING, "Unable to base64 decode"),
        ('{"inputs": [{"x64": "AA=="}]}', STRING, "not formatted correctly for base64 data"),
    ],
)
def test_values_that_a_type_does_not_hold(text: str, dtype: np.dtype[Any], message: str) -> None:
    with pytest.raises(StatusError, match=message):
        _read(text, x=dtype)


def test_answers_by_row_and_by_column() -> None:
    click, like = np.array([[0.2, 1.0], [0.1, np.nan]], np.float32), np.array([[3, 4], [5, 6]])
    both, one = {"click": click, "like": like}, {"click": click}
    assert rest_json.answer(both, True) == (
        b'{"predictions": [{"click": [0.2, 1.0], "like": [3, 4]}, {"click": [0.1, NaN], "like": [5, 6]}]}'
    )
    assert rest_json.answer(one, True) == b'{"predictions": [[0.2, 1.0], [0.1, NaN]]}'
    assert rest_json.answer(one, False) == b'{"outputs": [[0.2, 1.0], [0.1, NaN]]}'
    assert json.loads(rest_json.answer(both, False))["outputs"]["like"] == [[3, 4], [5, 6]]
    texts = {"name": np.array(["é".encode(), b"\xff"], object), "raw_bytes": np.array([b"a", b"b"], object)}
    assert json.loads(rest_json.answer(texts, False))["outputs"] == {
        "name": ["é", {"b64": "/w=="}],
        "raw_bytes": [{"b64": "YQ=="}, {"b64": "Yg=="}],
    }
    for ragged in ({"a": np.zeros(2), "b": np.zeros(3)}, {"a": np.float32(1).reshape(())}):
        with pytest.raises(StatusError, match="no common number of rows"):
            rest_json.answer(ragged, True)
