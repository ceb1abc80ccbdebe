"""Distinct ids of a batch: each row of a table is read and written once per step, however often the batch names it."""

from __future__ import annotations

import tensorflow as tf


def deduplicate(ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Distinct ``ids`` ``[U]`` of ``[N]``, in order of appearance, and each id's place among them ``[N]`` int32."""
    unique = tf.unique(ids)
    return unique.y, unique.idx


def deduplicate_static(ids: tf.Tensor, padding: int) -> tuple[tf.Tensor, tf.Tensor]:
    """:func:`deduplicate` in the static shapes that XLA needs: N values, the distinct ids ascending, then ``padding``.

    ``padding`` is larger than every id. tf.unique sends a GPU's ids to the host and back, and leaves it idle meanwhile.
    """
    order = tf.argsort(ids, stable=True)
    ordered = tf.gather(ids, order)
    first = tf.concat([tf.zeros([1], tf.int32), tf.cast(ordered[1:] != ordered[:-1], tf.int32)], axis=0)
    place = _prefix_sum(first)
    size = ids.shape[0]
    distinct = tf.minimum(tf.math.unsorted_segment_min(ordered, place, size), tf.constant(padding, ids.dtype))
    return distinct, tf.scatter_nd(order[:, tf.newaxis], place, [size])


def _prefix_sum(values: tf.Tensor) -> tf.Tensor:
    """Inclusive prefix sum of zeros and ones, int32 ``[N]``, N static and at most 2^28, by products with a triangle.

    XLA's own on a GPU takes most of a millisecond for 32,768 values. A GPU rounds a product's factors to 11 bits (TF32)
    or 8 (bfloat16) and sums in float32: no factor here has more than 8 bits, no sum more than 24, so all are exact.
    """
    if values.shape[0] > 1 << 28:
        raise ValueError(f"a batch should look up at most {1 << 28:,} rows per step, but looks up {values.shape[0]:,}")
    side = 1 << (max(values.shape[0] - 1, 1).bit_length() + 1) // 2
    square = tf.reshape(tf.pad(tf.cast(values, tf.float32), [[0, side * side - values.shape[0]]]), [side, side])
    triangle = tf.linalg.band_part(tf.ones([side, side]), 0, -1)  # [i, j] is 1 for i <= j
    within = tf.cast(tf.matmul(square, triangle), tf.int32)
    before = _sums_before(within[:, -1], triangle)
    return tf.reshape(within + before[:, tf.newaxis], [-1])[: values.shape[0]]


def _sums_before(totals: tf.Tensor, triangle: tf.Tensor) -> tf.Tensor:
    """Exclusive prefix sum of ``totals``, int32 ``[side]``, at most 2^14 each: two digits apart keep it exact."""
    digits = tf.stack([totals // 256, totals % 256])
    high, low = tf.unstack(tf.cast(tf.matmul(tf.cast(digits, tf.float32), triangle), tf.int32))
    return 256 * high + low - totals
