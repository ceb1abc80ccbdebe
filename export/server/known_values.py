"""Which raw values a version's vocabularies hold, looked up in bulk in a sorted array of 8 bytes per value.

The tables in the graph know this too, but only answer within a request. Integers are stored as they are, strings as a
64-bit hash. Two different strings have the same hash with a probability of 2^-56.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from export import vocabulary_asset
from pipelines.hashing import mix64
from pipelines.log.casts import EMPTY

_ROWS_AT_A_TIME = 1 << 16  # so few that no step holds the interpreter for long
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class KnownValues:
    """The values of one asset of `export.vocabulary_asset`, without the empty ones.

    Args:
      path: of the asset.
      dtype: ``int64`` or ``string``.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not an asset of that kind.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self._strings = dtype == "string"
        values = vocabulary_asset.read(path, dtype)
        if self._strings:
            keys = self._hashes(values)
        else:
            numbers = values.to_numpy()
            keys = numbers[numbers != EMPTY["int64"]]
        self._keys = np.sort(keys)

    def _hashes(self, values: pa.LargeBinaryArray) -> np.ndarray:
        """The hashes of all values that are not empty, uint64 [n]."""
        _, offsets, data = values.buffers()
        ends, texts = np.frombuffer(offsets, np.int64), np.frombuffer(data, np.uint8)
        lengths = np.diff(ends)
        self._longest = int(lengths.max(initial=0))
        self._factors = mix64(_GAMMA * np.arange(1, self._longest + 1, dtype=np.uint64)) | np.uint64(1)
        keys = np.empty(np.count_nonzero(lengths), np.uint64)
        done = 0
        for start in range(0, len(lengths), _ROWS_AT_A_TIME):
            part = lengths[start : start + _ROWS_AT_A_TIME]
            given = part[part > 0]
            if len(given):
                keys[done : done + len(given)] = self._hashed(texts[ends[start] : ends[start + len(part)]], given)
                done += len(given)
        return keys

    def __len__(self) -> int:
        return len(self._keys)

    def unknown(self, values: np.ndarray) -> int:
        """How many of ``values`` (int64 [n], or bytes objects [n]; none of them empty) are not in the vocabulary."""
        if not self._strings:
            return self._missing(values)
        kept = [value for value in values.tolist() if len(value) <= self._longest]
        data = np.frombuffer(b"".join(kept), np.uint8)
        lengths = np.fromiter(map(len, kept), np.int64, len(kept))
        return len(values) - len(kept) + (self._missing(self._hashed(data, lengths)) if kept else 0)

    def _missing(self, keys: np.ndarray) -> int:
        if not len(self._keys):
            return len(keys)
        places = np.searchsorted(self._keys, keys)
        places[places == len(self._keys)] = 0
        return int(np.count_nonzero(self._keys[places] != keys))

    def _hashed(self, data: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Hashes, uint64 [n], of concatenated strings: sum over places of (byte + 1) x factor[place]."""
        starts = np.cumsum(lengths) - lengths
        places = np.arange(len(data)) - np.repeat(starts, lengths)
        parts = (data.astype(np.uint64) + np.uint64(1)) * self._factors[places]
        # No string is empty: for an empty slice, reduceat would return the next element.
        return np.add.reduceat(parts, starts)
