"""Ids without a vocabulary: a value's rows of the table are computed from a hash of it.

A value has a code, of 63 bits: of text ``Fingerprint64(UTF-8 bytes) mod (2^63 - 1)``, which is TensorFlow's
``tf.strings.to_hash_bucket_fast(text, 2^63 - 1)``; of an int64 the upper 63 bits of :func:`pipelines.hashing.mix64`.
With B buckets, the value reads the rows::

    first  = 2 + code mod B
    second = 2 + (code div B) mod B      (hashes: 2; the embedding is the sum of both rows)

The remainder and the quotient of one number are the complementary partitions of Shi et al., KDD 2020: two codes share
both only if they are equal modulo B^2. Row 0 is padding, row 1 that of missing values; there is no rare id, because no
value is looked up. A missing value of a feature with two hashes has the rows 1 and 0, and padding is not added.

`export.hashed_ids` computes the same with TensorFlow.
"""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa

from pipelines.farmhash import fingerprint64
from pipelines.hashing import mix64
from pipelines.log.casts import EMPTY
from pipelines.schema import Hash
from pipelines.vocabulary import FIRST_ID, RARE_ID

CODES = 2**63 - 1
"""The number of codes of texts."""
FUNCTIONS = {"int64": "splitmix64", "string": "farmhash64"}
"""What a value's code is made by, by the feature's dtype."""
MISSING = -1
"""Stands for the code of a missing value."""
_KEPT = 4096


def codes(values: pa.Array) -> np.ndarray:
    """The codes, int64 [n], of int64 or string values [n]; `MISSING` for nulls."""
    if pa.types.is_int64(values.type):
        integers = values.fill_null(EMPTY["int64"]) if values.null_count else values
        found = (mix64(integers.to_numpy()) >> np.uint64(1)).view(np.int64)
    else:
        found = (fingerprint64(values) % np.uint64(CODES)).view(np.int64)
    if values.null_count:
        found[values.is_null().to_numpy(zero_copy_only=False)] = MISSING
    return found


def ids(codes: np.ndarray, by: Hash) -> np.ndarray:
    """The rows, int32 [n * by.hashes], of codes [n]; those of a value lie side by side."""
    parts = [codes] if by.hashes == 1 else [codes, codes // by.buckets]
    rows = np.stack([(part % by.buckets + FIRST_ID).astype(np.int32) for part in parts], axis=1)
    rows[codes == MISSING] = [RARE_ID, 0][: by.hashes]
    return rows.reshape(-1)


class Distinct:
    """Counts distinct codes in 32 kB: exactly below 4,096, later by the 4,096 smallest ones (to about 2 %).

    Bar-Yossef et al., RANDOM 2002: of n numbers that are drawn evenly from [0, 1), the k-th smallest is about k / n.
    """

    def __init__(self) -> None:
        self._least = np.zeros(0, np.int64)

    def add(self, codes: np.ndarray) -> None:
        """Adds codes; those of missing values are left out."""
        wanted = codes != MISSING
        if len(self._least) == _KEPT:
            wanted &= codes < self._least[-1]
        if wanted.any():
            self._least = np.unique(np.append(self._least, codes[wanted]))[:_KEPT]

    def merge(self, other: Distinct) -> None:
        """Adds what another object has counted."""
        self.add(other._least)

    @property
    def count(self) -> int:
        if len(self._least) < _KEPT:
            return len(self._least)
        return round((_KEPT - 1) / (float(self._least[-1]) / CODES))


def alike(distinct: int, by: Hash) -> float:
    """The expected share of n ``distinct`` values that the model cannot tell from some other one: all rows are shared.

    With one hash ``1 - (1 - 1/B)^(n - 1)``. With two, another value has the same two rows in either order with
    probability ``2 / B^2``, or ``1 / B^2`` where both rows are the same one, which is so for a share 1/B of the values.
    """
    b = float(by.buckets)
    if by.hashes == 1:
        return _met(1 / b, distinct)
    return (1 - 1 / b) * _met(2 / b**2, distinct) + _met(1 / b**2, distinct) / b


def _met(chance: float, values: int) -> float:
    """The probability that one of the other values does what each of them does by ``chance``."""
    return -math.expm1(max(values - 1, 0) * math.log1p(-chance)) if chance < 1 else float(values > 1)
