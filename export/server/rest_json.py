"""TensorFlow Serving's JSON to tensors and back.

A request is ``{"signature_name": ..., "instances": [...]}``, with a value or an object of inputs per row, or
``{"inputs": ...}``, with an object of tensors. The answer has ``predictions`` or ``outputs`` accordingly. Bytes are
``{"b64": "..."}``; other strings are UTF-8. NaN, Infinity and -Infinity are numbers, as in TensorFlow Serving.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from export.server.status import invalid_argument

_DEEPEST = 16
_INTEGERS = {
    name: (np.iinfo(name).min, np.iinfo(name).max)
    for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
}


class Request(NamedTuple):
    """Attributes:
    signature: as asked for, "" for the default one.
    rows: the answer is to be given by row.
    content: of ``instances`` or ``inputs``.
    infinite: the text has Infinity in it.
    """

    signature: str
    rows: bool
    content: Any
    infinite: bool


def parse(body: bytes) -> Request:
    """Reads a request of ``:predict``.

    Raises:
      StatusError: INVALID_ARGUMENT, it is not one.
    """
    if not body.strip():
        raise invalid_argument("JSON Parse error: The document is empty")
    try:
        document = json.loads(body.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise invalid_argument("JSON Parse error: lists or objects are nested too deep") from None
    except UnicodeDecodeError as error:
        raise invalid_argument(f"JSON Parse error: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise invalid_argument(f"JSON Parse error: {error.msg} at offset: {error.pos}") from None
    except ValueError:  # of int(), from some thousand digits on
        raise invalid_argument("JSON Parse error: a number has too many digits") from None
    if not isinstance(document, dict):
        raise invalid_argument("JSON Value: Is not object")
    signature = document.get("signature_name", "")
    if not isinstance(signature, str) or not _is_unicode(signature):
        raise invalid_argument("JSON Value: not formatted correctly. 'signature_name' key must be a string value.")
    if "instances" in document and "inputs" in document:
        raise invalid_argument(
            "JSON Value: Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist"
        )
    if "inputs" in document:
        return Request(signature, False, document["inputs"], b"Infinity" in body)
    if "instances" not in document:
        raise invalid_argument("Missing 'inputs' or 'instances' key")
    instances = document["instances"]
    if not isinstance(instances, list):
        raise invalid_argument("JSON Value: Excepting 'instances' to be an list/array")
    if not instances:
        raise invalid_argument("JSON Value: No values in 'instances' array")
    return Request(signature, True, instances, b"Infinity" in body)


def arrays(request: Request, inputs: Mapping[str, np.dtype[Any]]) -> dict[str, np.ndarray]:
    """The tensors of a request, by input.

    Args:
      inputs: the signature's, with their types (object for strings).

    Raises:
      StatusError: INVALID_ARGUMENT, they are not those of the signature, or not tensors.
    """
    try:
        return {name: _array(value, inputs[name], request) for name, value in _by_input(request, inputs).items()}
    except _NotATensor as error:
        raise invalid_argument(str(error)) from None


def answer(outputs: Mapping[str, np.ndarray], rows: bool) -> bytes:
    """Returns the answer: ``predictions`` by row, or ``outputs`` by name; a single output comes without its name.

    Raises:
      StatusError: INVALID_ARGUMENT, an output does not have one entry per row.
    """
    plain = {name: _plain(array, name) for name, array in outputs.items()}
    if not rows:
        tree: Any = {"outputs": plain if len(plain) != 1 else next(iter(plain.values()))}
        return json.dumps(tree).encode()
    sizes = {array.shape[0] if array.ndim else None for array in outputs.values()}
    if None in sizes or len(sizes) != 1:
        raise invalid_argument('the outputs have no common number of rows: ask with "inputs", not "instances"')
    if len(plain) == 1:
        return json.dumps({"predictions": next(iter(plain.values()))}).encode()
    names = list(plain)
    by_row = [dict(zip(names, row, strict=True)) for row in zip(*plain.values(), strict=True)]
    return json.dumps({"predictions": by_row}).encode()


def error(text: str) -> bytes:
    """An error as JSON."""
    return json.dumps({"error": text}).encode()


class _NotATensor(Exception):
    """The message says why, in TensorFlow Serving's words if it has any."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise invalid_argument(f"JSON Parse error: the key {_short(twice)} occurs twice")
    return tree


def _by_input(request: Request, inputs: Mapping[str, np.dtype[Any]]) -> dict[str, Any]:
    """The nested lists of each input."""
    content, names = request.content, sorted(inputs)
    if request.rows:
        first = content[0]
        if isinstance(first, dict) and not _is_base64(first):
            for place, row in enumerate(content):
                if not isinstance(row, dict):
                    raise _NotATensor(f"Expecting object but got list at item {place} of input list")
                if row.keys() != inputs.keys():
                    raise _NotATensor(
                        f"Failed to process element: {place} of 'instances' list. JSON object: has the keys "
                        f"{_short(','.join(sorted(row)))}, keys must be equal to: {','.join(names)}"
                    )
            return {name: [row[name] for row in content] for name in names}
        if len(inputs) != 1:
            raise _NotATensor(
                "instances is a plain list, but expecting list of objects as multiple input tensors required as per "
                "tensorinfo_map"
            )
        return {names[0]: content}
    if not isinstance(content, dict) or _is_base64(content):
        if len(inputs) != 1:
            raise _NotATensor(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as per "
                "tensorinfo_map"
            )
        return {names[0]: content}
    for name in names:
        if name not in content:
            raise _NotATensor(f"Missing named input: {name} in 'inputs' object.")
    # TensorFlow Serving ignores the others; a misspelt optional input would go unnoticed.
    for name in content:
        if name not in inputs:
            raise _NotATensor(f"JSON object: does not have named input: {_short(name)}")
    return {name: content[name] for name in names}


def _array(value: Any, dtype: np.dtype[Any], request: Request) -> np.ndarray:
    shape: list[int] = []
    level = [value]
    while level and isinstance(level[0], list):
        if len(shape) == _DEEPEST:
            raise _NotATensor("lists are nested too deep for a tensor")
        for item in level:
            if not isinstance(item, list):
                raise _NotATensor(
                    f"JSON Value: {_short(item)} found at incorrect level: {len(shape)} in the JSON DOM: "
                    "elsewhere there are lists"
                )
        size = len(level[0])
        for item in level:
            if len(item) != size:
                raise _NotATensor(
                    f"Encountered list at unexpected size: {len(item)} at level: {len(shape)} expected size: {size}"
                )
        shape.append(size)
        level = list(itertools.chain.from_iterable(level))
    if dtype.kind not in "fiubO" or dtype == np.float16:
        raise _NotATensor(f"Conversion of JSON values to type: {dtype} is not offered")
    for kind, item in {type(item): item for item in level}.items():
        if kind is list:
            raise _NotATensor(f"Encountered list at unexpected level: {len(shape)} expected < {len(shape)}")
        if not _fits(item, dtype):
            raise _NotATensor(f"JSON Value: {_short(item)} is not of expected type: {_type(dtype)}")
    return _flat(level, dtype, request).reshape(shape)


def _fits(item: Any, dtype: np.dtype[Any]) -> bool:
    if dtype.kind == "O":
        return isinstance(item, str | dict)
    if dtype.kind == "b":
        return isinstance(item, bool)
    if isinstance(item, bool):
        return False
    return isinstance(item, int | float) if dtype.kind == "f" else isinstance(item, int)


def _flat(values: list[Any], dtype: np.dtype[Any], request: Request) -> np.ndarray:
    if dtype.kind == "O":
        result = np.empty(len(values), object)
        result[:] = [_bytes(value) for value in values]
        return result
    if dtype.kind == "f":
        # As in TensorFlow Serving: integers that the type cannot hold are refused, fractions are rounded.
        exact = 1 << (np.finfo(dtype).nmant + 1)
        for value in values:
            if isinstance(value, int) and abs(value) >= exact:
                raise _NotATensor(f"Cannot convert JSON value: {_short(value)} to {dtype} without loss of precision.")
        with np.errstate(over="ignore"):
            result = np.array(values, np.float64).astype(dtype)
        if not request.infinite and np.isinf(result).any():
            raise _NotATensor(f"Cannot convert a JSON value to {dtype}: it is too large")
        return result
    if dtype.kind in "iu" and values:
        lowest, highest = _INTEGERS[dtype.name]
        for value in (min(values), max(values)):
            if not lowest <= value <= highest:
                raise _NotATensor(f"JSON Value: {_short(value)} is not of expected type: {_type(dtype)}")
    return np.array(values, dtype)


def _bytes(value: str | dict[str, Any]) -> bytes:
    if isinstance(value, str):
        try:
            return value.encode("utf-8")
        except UnicodeEncodeError:
            raise _NotATensor(f"JSON Value: {_short(value)} has half a surrogate pair, which is not UTF-8") from None
    if not _is_base64(value):
        raise _NotATensor(f"JSON Value: {_short(value)} not formatted correctly for base64 data")
    try:
        return base64.b64decode(value["b64"], validate=True)
    except (binascii.Error, ValueError):
        raise _NotATensor("Unable to base64 decode") from None


def _is_base64(value: dict[str, Any]) -> bool:
    return len(value) == 1 and isinstance(value.get("b64"), str)


def _is_unicode(text: str) -> bool:
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)


def _type(dtype: np.dtype[Any]) -> str:
    return "string" if dtype.kind == "O" else {"float32": "float", "float64": "double"}.get(dtype.name, dtype.name)


def _short(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # too many digits, or lists in lists
        text = "a number"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _plain(array: np.ndarray, name: str) -> Any:
    if array.dtype.hasobject:
        encode = _base64 if name.endswith("_bytes") else _text
        flat = np.empty(array.size, object)
        flat[:] = [encode(value) for value in array.ravel().tolist()]
        return flat.reshape(array.shape).tolist()
    if array.dtype == np.float32:
        # The fewest digits that give the same float32: 0.2, although its double is 0.20000000298.
        numbers = np.fromiter(map(float, array.ravel().astype(str).tolist()), np.float64, array.size)
        return numbers.reshape(array.shape).tolist()
    return array.tolist()


def _base64(value: bytes) -> Any:
    return {"b64": base64.b64encode(value).decode("ascii")}


def _text(value: bytes) -> Any:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return _base64(value)
