"""The hashes that records and shuffles depend on. Changing one changes every converted data set."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_GAMMA = 0x9E3779B97F4A7C15  # the odd number nearest 2^64 / golden ratio, the step of splitmix64


def mix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, a bijection of 64-bit integers (Steele et al., OOPSLA 2014).

    Args:
      values: int64 or uint64 [n].

    Returns:
      uint64 [n]; two outputs are equal only if their inputs are.
    """
    z = values.astype(np.uint64)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def _salt(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest(), "little")


def seeded64(values: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """A hash of 64-bit integers that depends on seed and purpose: uint64 [n]; for one such pair it is a bijection."""
    shifted = values.astype(np.uint64)
    shifted *= np.uint64(_GAMMA)
    shifted += np.uint64(_salt(seed, purpose))
    return mix64(shifted)


def key64(values: pa.Array) -> np.ndarray:
    """A 64-bit key of raw values (a user, an item), independent of any vocabulary.

    Integers and bools: the splitmix64 finaliser of the int64. Strings and bytes: BLAKE2b with an 8-byte digest of the
    UTF-8 bytes, read as a little-endian int64.

    Args:
      values: [n] integers, bools, strings or binary, without nulls; dictionary-encoded or not.

    Returns:
      int64 [n].

    Raises:
      ValueError: a null among the values.
      TypeError: values of another type.
    """
    if values.null_count:
        raise ValueError("a null has no key")
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        plain = values.cast(kind)
        integers = plain if pa.types.is_uint64(kind) else plain.cast(pa.int64())
        return mix64(integers.to_numpy(zero_copy_only=False)).view(np.int64)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
        if not pa.types.is_large_binary(kind):
            raise TypeError(f"keys should be integers or strings; received {values.type}")
    encoded = values if pa.types.is_dictionary(values.type) else pc.dictionary_encode(values)
    texts = encoded.dictionary.cast(pa.large_binary()).to_pylist()
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, "<i8")[encoded.indices.to_numpy(zero_copy_only=False)]
