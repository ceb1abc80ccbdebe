"""TensorProto to numpy and back, ten times as fast as ``tf.make_ndarray`` and ``tf.make_tensor_proto``.

Reading follows TensorFlow's C++ ``Tensor::FromProto``, which TensorFlow Serving uses: it takes `tensor_content` if
there is any, else the `*_val` field of the type. Too few values are filled up with the last one (so a single value
broadcasts), no values become zeros, and too many are cut.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from tensorflow.core.framework import tensor_pb2, types_pb2

from export.server.limits import MAX_ELEMENTS

_MAX_RANK = 32  # numpy's


class _Layout(NamedTuple):
    dtype: np.dtype[Any]
    field: str


_LAYOUTS = {
    types_pb2.DT_FLOAT: _Layout(np.dtype("<f4"), "float_val"),
    types_pb2.DT_DOUBLE: _Layout(np.dtype("<f8"), "double_val"),
    types_pb2.DT_INT64: _Layout(np.dtype("<i8"), "int64_val"),
    types_pb2.DT_INT32: _Layout(np.dtype("<i4"), "int_val"),
    types_pb2.DT_INT16: _Layout(np.dtype("<i2"), "int_val"),
    types_pb2.DT_INT8: _Layout(np.dtype("i1"), "int_val"),
    types_pb2.DT_UINT16: _Layout(np.dtype("<u2"), "int_val"),
    types_pb2.DT_UINT8: _Layout(np.dtype("u1"), "int_val"),
    types_pb2.DT_UINT32: _Layout(np.dtype("<u4"), "uint32_val"),
    types_pb2.DT_UINT64: _Layout(np.dtype("<u8"), "uint64_val"),
    types_pb2.DT_BOOL: _Layout(np.dtype("?"), "bool_val"),
    types_pb2.DT_STRING: _Layout(np.dtype(object), "string_val"),
}
_TYPES = {layout.dtype: number for number, layout in _LAYOUTS.items()}


def shape_of(proto: tensor_pb2.TensorProto) -> tuple[int, ...]:
    """The shape that a tensor states; nothing is allocated.

    Raises:
      ValueError: it is not a shape.
    """
    dimensions = proto.tensor_shape.dim
    if proto.tensor_shape.unknown_rank or len(dimensions) > _MAX_RANK:
        raise ValueError("shape")
    shape = tuple(dimension.size for dimension in dimensions)
    if any(size < 0 for size in shape):
        raise ValueError("shape")
    return shape


def decode(proto: tensor_pb2.TensorProto, max_elements: int = MAX_ELEMENTS) -> np.ndarray:
    """The tensor as an array (of bytes objects for strings; read-only if it shares the message's memory).

    Raises:
      ValueError: the message is not a tensor: type, shape, number of bytes, or more than ``max_elements`` elements.
    """
    layout = _LAYOUTS.get(proto.dtype)
    if layout is None:
        raise ValueError(f"type {proto.dtype}")
    shape = shape_of(proto)
    elements = math.prod(shape)
    if elements > max_elements:
        raise ValueError(f"{elements} elements")
    if not elements:
        # Beside an axis of 0 the others may be of any size, but numpy limits their product.
        if math.prod(size for size in shape if size) > max_elements:
            raise ValueError("shape")
        return np.empty(shape, layout.dtype)
    if proto.tensor_content:
        # Strings in tensor_content have no numpy layout, and no client library sends them.
        if layout.dtype.hasobject or len(proto.tensor_content) != elements * layout.dtype.itemsize:
            raise ValueError("tensor_content")
        return np.frombuffer(proto.tensor_content, layout.dtype).reshape(shape)
    values = getattr(proto, layout.field)
    given = len(values)
    read = np.dtype(np.int32) if layout.field == "int_val" else layout.dtype
    array = np.fromiter(values if given <= elements else values[:elements], read, min(given, elements))
    if given < elements:
        filled = np.empty(elements, read)
        filled[:given] = array
        # fill() takes a bytes object as it is; an assignment would make a numpy string and cut trailing NULs.
        filled[given:].fill(values[-1] if given else (b"" if read.hasobject else 0))
        array = filled
    return array.astype(layout.dtype, copy=False).reshape(shape)


def encode(array: np.ndarray, proto: tensor_pb2.TensorProto, as_content: bool) -> None:
    """Writes ``array`` into the empty ``proto``: as ``tensor_content``, or in the `*_val` field of its type."""
    number = _TYPES[array.dtype]
    proto.dtype = number
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    if array.dtype.hasobject:
        proto.string_val.extend(array.ravel().tolist())
    elif as_content:
        proto.tensor_content = array.tobytes()
    elif array.dtype == np.float32 and array.size:
        # A packed float_val is the array's own bytes on the wire: parsing it is a copy, extend() converts each value.
        content = array.tobytes()
        proto.MergeFromString(_FLOAT_VAL_TAG + _varint(len(content)) + content)
    else:
        getattr(proto, _LAYOUTS[number].field).extend(array.ravel().tolist())


_FLOAT_VAL_TAG = bytes([tensor_pb2.TensorProto.FLOAT_VAL_FIELD_NUMBER << 3 | 2])


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
