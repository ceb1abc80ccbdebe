"""Vocabularies as binary assets of a SavedModel, one file per vocabulary; any size, any bytes. Without TensorFlow.

::

    strings   count: int64 | length of each value: int32 [count] | the values' bytes, one after another
    int64     count: int64 | values: int64 [count]

All is little-endian. The first value is the empty one, which scores as rare values do (a vocabulary may be empty, a
lookup table may not). The vocabulary follows in the order of its ids, with the empty value for ids that are free. The
format has lengths rather than separators, so that no byte in a value can break it. A text file would break on newlines,
and a constant in the graph would exceed protobuf's limit of 2 GB. The graph reads the file by itself
(`export.vocabulary_table`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.log.casts import EMPTY

COUNT_BYTES, LENGTH_BYTES, INTEGER_BYTES = 8, 4, 8
_ROWS_AT_A_TIME = 1 << 18


def write(values: pa.ChunkedArray, path: Path) -> None:
    """Writes the values of a vocabulary (int64 or binary) in the order of their ids."""
    with open(path, "wb") as file:
        file.write(np.array([1 + len(values)], "<i8").tobytes())
        if pa.types.is_integer(values.type):
            file.write(np.array([EMPTY["int64"]], "<i8").tobytes())
            for chunk in values.chunks:
                file.write(chunk.to_numpy().astype("<i8", copy=False).tobytes())
            return
        file.write(np.zeros(1, "<i4").tobytes())
        for chunk in values.chunks:
            file.write(pc.binary_length(chunk).to_numpy().astype("<i4", copy=False).tobytes())
        for start in range(0, len(values), _ROWS_AT_A_TIME):
            file.write(b"".join(values.slice(start, _ROWS_AT_A_TIME).to_pylist()))


def read(path: Path, dtype: str) -> pa.Array:
    """The values in the order of their ids, int64 or large binary [n]. The file is mapped into memory, not copied.

    Args:
      path: of the asset.
      dtype: ``int64`` or ``string``.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not an asset of that kind.
    """
    size = path.stat().st_size
    with pa.memory_map(str(path)) as file:
        data = file.read_buffer()
    count = int(np.frombuffer(data, "<i8", 1)[0]) if size >= COUNT_BYTES else 0
    each = LENGTH_BYTES if dtype == "string" else INTEGER_BYTES
    if not 1 <= count <= (size - COUNT_BYTES) // each:
        raise ValueError(f"{path} is not a vocabulary")
    first = COUNT_BYTES + each * count
    if dtype != "string":
        if first != size:
            raise ValueError(f"{path} is not a vocabulary")
        return pa.array(np.frombuffer(data, "<i8", count, COUNT_BYTES)[1:])
    lengths = np.frombuffer(data, "<i4", count, COUNT_BYTES)
    offsets = np.cumsum(lengths, dtype=np.int64)  # the empty value comes first: from 0 on
    if lengths.min() < 0 or lengths[0] or offsets[-1] != size - first:
        raise ValueError(f"{path} is not a vocabulary")
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), count - 1, [None, pa.py_buffer(offsets), data.slice(first)]
    )
