"""FarmHash Fingerprint64 of many byte strings at once, in NumPy: TensorFlow's ``tf.strings.to_hash_bucket_fast``.

The function is ``farmhashna::Hash64`` of https://github.com/google/farmhash (MIT licence), whose values never change.
Values of one range of lengths take the same steps, so that each step is one operation on all of them.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

_K0 = np.uint64(0xC3A5C85C97CB3127)
_K1 = np.uint64(0xB492B66FBE98F273)
_K2 = np.uint64(0x9AE16A3B2F90404F)
_SEED = np.array([81], np.uint64)  # no scalar, whose products warn where they wrap around
_LONGEST = (0, 3, 7, 16, 32, 64)  # the longest value of each range but the last
_BLOCK = 64
_AT_A_TIME = 1 << 14  # values, so that each step's numbers stay in the processor's caches


def fingerprint64(values: pa.Array) -> np.ndarray:
    """The fingerprints, uint64 [n], of strings or binary values [n]; any number for a null."""
    values = values.cast(pa.large_binary())
    starts = np.frombuffer(values.buffers()[1], np.int64)[values.offset : values.offset + len(values) + 1]
    sizes = np.diff(starts)
    text = _Text(values.buffers()[2])
    found = np.full(len(values), _K2)  # that of the empty string
    for start in range(0, len(values), _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        ranges = np.searchsorted(_LONGEST, sizes[part], side="left")
        for number, hashed in enumerate((_of_1_to_3, _of_4_to_7, _of_8_to_16, _of_17_to_32, _of_33_to_64, _of_more), 1):
            inside = np.flatnonzero(ranges == number)
            if len(inside):
                found[part][inside] = hashed(text, starts[:-1][part][inside], sizes[part][inside])
    return found


class _Text:
    """The bytes of all values, read as little-endian numbers at any places [n]."""

    def __init__(self, data: pa.Buffer | None) -> None:
        self._bytes = np.frombuffer(data if data is not None else b"", np.uint8)

    def byte(self, at: np.ndarray) -> np.ndarray:
        return self._bytes[at].astype(np.uint64)

    def fetch32(self, at: np.ndarray) -> np.ndarray:
        return self._numbers("<u4", 4)[at].astype(np.uint64)

    def fetch(self, at: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._numbers("<u8", 8)[at]
        return found

    def _numbers(self, kind: str, size: int) -> np.ndarray:
        """A view of the bytes: the number that begins at each of them."""
        return np.ndarray((len(self._bytes) - size + 1,), kind, self._bytes, strides=(1,))


def _rotated(x: np.ndarray, by: int) -> np.ndarray:
    """Rotated to the right."""
    return (x >> np.uint64(by)) | (x << np.uint64(64 - by))


def _mixed(x: np.ndarray) -> np.ndarray:
    return x ^ (x >> np.uint64(47))


def _factor(sizes: np.ndarray) -> np.ndarray:
    return _K2 + sizes.astype(np.uint64) * np.uint64(2)


def _of_16(u: np.ndarray, v: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """The hash of two numbers."""
    a = _mixed((u ^ v) * factor)
    return _mixed((v ^ a) * factor) * factor


def _of_1_to_3(text: _Text, at: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    y = text.byte(at) + (text.byte(at + (sizes >> 1)) << np.uint64(8))
    z = sizes.astype(np.uint64) + (text.byte(at + sizes - 1) << np.uint64(2))
    return _mixed(y * _K2 ^ z * _K0) * _K2


def _of_4_to_7(text: _Text, at: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    first = sizes.astype(np.uint64) + (text.fetch32(at) << np.uint64(3))
    return _of_16(first, text.fetch32(at + sizes - 4), _factor(sizes))


def _of_8_to_16(text: _Text, at: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    factor = _factor(sizes)
    a, b = text.fetch(at) + _K2, text.fetch(at + sizes - 8)
    return _of_16(_rotated(b, 37) * factor + a, (_rotated(a, 25) + b) * factor, factor)


def _of_17_to_32(text: _Text, at: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    factor, end = _factor(sizes), at + sizes
    a, b = text.fetch(at) * _K1, text.fetch(at + 8)
    c, d = text.fetch(end - 8) * factor, text.fetch(end - 16) * _K2
    return _of_16(_rotated(a + b, 43) + _rotated(c, 30) + d, a + _rotated(b + _K2, 18) + c, factor)


def _of_33_to_64(text: _Text, at: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    factor, end = _factor(sizes), at + sizes
    a, b = text.fetch(at) * _K2, text.fetch(at + 8)
    c, d = text.fetch(end - 8) * factor, text.fetch(end - 16) * _K2
    y = _rotated(a + b, 43) + _rotated(c, 30) + d
    z = _of_16(y, a + _rotated(b + _K2, 18) + c, factor)
    e, f = text.fetch(at + 16) * factor, text.fetch(at + 24)
    g, h = (y + text.fetch(end - 32)) * factor, (z + text.fetch(end - 24)) * factor
    return _of_16(_rotated(e + f, 43) + _rotated(g, 30) + h, e + _rotated(f + a, 18) + g, factor)


def _of_more(text: _Text, at: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """A state of 56 bytes, mixed with blocks of 64 bytes; the last block ends where the value does."""
    blocks = (sizes - 1) // _BLOCK
    order = np.argsort(-blocks, kind="stable")  # so that the values that have another block are the first ones
    at, sizes, blocks = at[order], sizes[order], blocks[order]
    state = np.zeros((7, len(at)), np.uint64)  # x, y, z, v, w
    state[0] = _SEED * _K2 + text.fetch(at)
    state[1] = _SEED * _K1 + np.uint64(113)
    state[2] = _mixed(state[1] * _K2 + np.uint64(113)) * _K2
    for number in range(int(blocks[0])):
        more = int(np.searchsorted(-blocks, -number, side="left"))
        state[:, :more] = _with_block(text, at[:more] + number * _BLOCK, state[:, :more], _K1)
    x, y, z, v0, v1, w0, w1 = state
    factor = _K1 + ((z & np.uint64(0xFF)) << np.uint64(1))
    w0 = w0 + ((sizes - 1) & (_BLOCK - 1)).astype(np.uint64)
    v0 = v0 + w0
    w0 = w0 + v0
    last = np.stack([x, y, z, v0, v1, w0, w1])
    x, y, z, v0, v1, w0, w1 = _with_block(text, at + sizes - _BLOCK, last, factor, times=9)
    found = np.empty(len(at), np.uint64)
    found[order] = _of_16(_of_16(v0, w0, factor) + _mixed(y) * _K0 + z, _of_16(v1, w1, factor) + x, factor)
    return found


def _with_block(
    text: _Text, at: np.ndarray, state: np.ndarray, factor: np.ndarray | np.uint64, times: int = 1
) -> np.ndarray:
    """The state after a block; two parts of the old state count ``times``."""
    x, y, z, v0, v1, w0, w1 = state
    x = _rotated(x + y + v0 + text.fetch(at + 8), 37) * factor
    y = _rotated(y + v1 + text.fetch(at + 48), 42) * factor
    x = x ^ (w1 * np.uint64(times))
    y = y + v0 * np.uint64(times) + text.fetch(at + 40)
    z = _rotated(z + w0, 33) * factor
    v = _weak(text, at, v1 * factor, x + w0)
    w = _weak(text, at + 32, z + w1, y + text.fetch(at + 16))
    return np.stack([z, y, x, *v, *w])  # x and z are swapped


def _weak(text: _Text, at: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mixes 32 bytes into two numbers."""
    w, x, y, z = (text.fetch(at + place) for place in (0, 8, 16, 24))
    a = a + w
    b = _rotated(b + a + z, 21)
    c = a
    a = a + x + y
    return a + z, b + _rotated(a, 44) + c
