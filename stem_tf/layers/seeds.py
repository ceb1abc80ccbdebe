"""Stateless seeds for the dropout masks of a network's parts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import tensorflow as tf


def seeds(seed: tf.Tensor | None) -> Iterator[tf.Tensor | None]:
    """Yields one seed ``[2]`` after another, all different and determined by ``seed``; only None where that is None."""
    for i in count():
        yield None if seed is None else tf.random.experimental.stateless_fold_in(seed, i)
