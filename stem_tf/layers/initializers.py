"""Initial weights that a seed determines."""

from __future__ import annotations

import random

import tensorflow as tf


def normal(stddev: float) -> tf.keras.initializers.Initializer:
    """N(0, stddev^2), seeded from Python's ``random``: seed that, and a model starts from the same weights again.

    tf_keras 2.16 has a seed of its own for this (``tf.keras.utils.set_random_seed``), but on Python 3.12 an unseeded
    initializer raises after it is set (``randint(1, 1e9)`` with a float).
    """
    return tf.keras.initializers.RandomNormal(stddev=stddev, seed=random.getrandbits(31))
