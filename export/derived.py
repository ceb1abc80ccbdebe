"""The outputs of `pipelines.outputs` as TensorFlow operations: what their NumPy functions compute, in the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from pipelines import outputs
from pipelines.expression import LARGEST, SMALLEST
from pipelines.schema import Schema

_NAN = np.float64("nan")


def _nan_if_either(function: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    """NumPy's minimum and maximum are NaN where either value is; TensorFlow's depend on the order."""
    return lambda x, y: tf.where(tf.math.is_nan(x) | tf.math.is_nan(y), _NAN, function(x, y))


TENSORFLOW: Mapping[str, Callable[..., Any]] = {
    "number": lambda value: tf.constant(value, tf.float64),
    "negative": tf.negative,
    "+": tf.add,
    "-": tf.subtract,
    "*": tf.multiply,
    "/": tf.divide,
    "^": tf.pow,
    "log": tf.math.log,
    "log1p": tf.math.log1p,
    "sqrt": tf.sqrt,
    "exp": tf.exp,
    "min": _nan_if_either(tf.minimum),
    "max": _nan_if_either(tf.maximum),
    "default": lambda x, y: tf.where(tf.math.is_nan(x), y, x),
}
"""The operations on float64 tensors; see `pipelines.expression.Formula.compute`."""


def values(schema: Schema, scores: Mapping[str, tf.Tensor], features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """The outputs of a schema by name, float32 of the scores' shape.

    Args:
      schema: the schema of the model's data.
      scores: float32 ``[B]`` or ``[B, N]`` by task.
      features: raw values of numeric features, NaN where missing, of a shape that spreads to the scores'.
    """
    found = {}
    for output in outputs.of(schema):
        numbers = {name: tf.constant(value, tf.float64) for name, value in output.constants.items()}
        numbers |= {name: _normal(features[name]) for name in output.features}
        numbers |= {name: _normal(scores[name]) for name in output.tasks}
        value = output.formula.compute(numbers, TENSORFLOW)
        shape = tf.shape(scores[output.tasks[0]])
        found[output.name] = tf.broadcast_to(_finished(value), shape)
    return found


def _normal(x: tf.Tensor) -> tf.Tensor:
    """Float64, without the denormal numbers of float32, which some of TensorFlow's threads take for 0."""
    x = tf.cast(x, tf.float64)
    return tf.where(tf.abs(x) < SMALLEST, np.float64(0), x)


def _finished(value: tf.Tensor) -> tf.Tensor:
    """See `pipelines.expression.finished`."""
    lowest, largest = np.float64(-LARGEST), np.float64(LARGEST)
    known = tf.where(tf.math.is_nan(value), lowest, tf.clip_by_value(value, lowest, largest))
    return tf.cast(tf.where(tf.abs(known) < SMALLEST, np.float64(0), known), tf.float32)
