"""Initial weights that a seed determines, or none where they are read from a checkpoint."""

from __future__ import annotations

import contextlib
import contextvars
import random
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

_to_be_read: contextvars.ContextVar[bool] = contextvars.ContextVar("to_be_read", default=False)


@contextlib.contextmanager
def to_be_read() -> Iterator[None]:
    """Weights made inside by :func:`normal` have no values until a checkpoint is read into them.

    Random values of a table would take the memory of three for a moment, and that of a second one while it is read.
    """
    token = _to_be_read.set(True)
    try:
        yield
    finally:
        _to_be_read.reset(token)


def normal(stddev: float) -> Any:
    """N(0, stddev^2), seeded from Python's ``random``: seed that, and a model starts from the same weights again.

    tf_keras 2.16 has a seed of its own for this (``tf.keras.utils.set_random_seed``), but on Python 3.12 an unseeded
    initializer raises after it is set (``randint(1, 1e9)`` with a float).
    """
    if _to_be_read.get():
        return _empty
    return tf.keras.initializers.RandomNormal(stddev=stddev, seed=random.getrandbits(31))


def _empty(shape: tf.TensorShape, dtype: tf.DType = tf.float32, **partition: Any) -> tf.Tensor:
    """A tensor whose memory nobody has written to, so that the system need not have provided it yet."""
    del partition
    return tf.raw_ops.Empty(shape=shape, dtype=dtype)
