"""Stateless seeds for the dropout masks of a network's parts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import tensorflow as tf


def seeds(seed: tf.Tensor | None) -> Iterator[tf.Tensor | None]:
    """One seed ``[2]`` after another, all different and determined by ``seed``; None for ever where there is none."""
    for i in count():
        yield None if seed is None else tf.random.experimental.stateless_fold_in(seed, i)
