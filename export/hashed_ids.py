"""The ids of :mod:`pipelines.hashed_ids`, computed with TensorFlow operations that every TensorFlow Serving has."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from pipelines.hashed_ids import CODES
from pipelines.log.casts import EMPTY
from pipelines.schema import Hash
from pipelines.vocabulary import FIRST_ID, PADDING_ID, RARE_ID


def ids(raw: tf.Tensor, by: Hash) -> tf.Tensor:
    """The ids of raw int64 or string values of any shape ``[...]``: int32 ``[...]``, or ``[..., 2]`` for two hashes."""
    missing = raw == tf.constant(EMPTY[raw.dtype.name], raw.dtype)
    codes = tf.strings.to_hash_bucket_fast(raw, CODES) if raw.dtype == tf.string else _codes(raw)
    first = tf.where(missing, RARE_ID, _row(codes, by))
    if by.hashes == 1:
        return first
    return tf.stack([first, tf.where(missing, PADDING_ID, _row(codes // by.buckets, by))], axis=-1)


def _row(codes: tf.Tensor, by: Hash) -> tf.Tensor:
    return tf.cast(codes % by.buckets + FIRST_ID, tf.int32)


def _codes(integers: tf.Tensor) -> tf.Tensor:
    """The upper 63 bits of `pipelines.hashing.mix64`."""
    z = tf.bitcast(integers, tf.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = _shifted(z, shift) * tf.constant(np.uint64(factor))
    return tf.bitcast(tf.bitwise.right_shift(_shifted(z, 31), tf.constant(np.uint64(1))), tf.int64)


def _shifted(z: tf.Tensor, shift: int) -> tf.Tensor:
    return tf.bitwise.bitwise_xor(z, tf.bitwise.right_shift(z, tf.constant(np.uint64(shift))))
