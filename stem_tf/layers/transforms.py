"""From a batch's raw feature tensors to what the tables read: the only place where numeric transforms are applied."""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

from pipelines.manifest import Constants
from pipelines.schema import Feature

RARE = 1
"""The id of rare, unseen and missing values; ids of a vocabulary or of buckets follow it."""


class InputTransform(tf.keras.layers.Layer):
    """Numeric transforms and bucketising, in float32, the same in training, evaluation and export.

    - numeric: ``log1p`` and ``standardise`` ((x - mean) / std) in the schema's order; NaN becomes the train mean after
    the transform.
    - bucketised: bucket b = number of boundaries <= x becomes id b + 2; NaN becomes id 1.
    - dense: NaN becomes 0.
    - categorical, multivalent: ids pass unchanged.

    Shapes: a dict of ``[B]`` or ``[B, L]`` int32 ids, ``[B]`` float32 numerics and ``[B, n]`` float32 vectors, to a
    dict of ids (int32, now also for bucketised features) and floats (float32) of the same shapes.

    Args:
      features: the schema's features.
      constants: fitted on train, by feature name, for numeric features.
    """

    def __init__(self, features: tuple[Feature, ...], constants: Mapping[str, Constants], **kwargs: object) -> None:
        # float32 whatever the precision policy: bfloat16 would merge neighbouring values and buckets.
        super().__init__(dtype="float32", autocast=False, **kwargs)
        self.features, self.constants = features, dict(constants)

    def call(self, inputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {feature.name: self._transform(feature, inputs[feature.name]) for feature in self.features}

    def _transform(self, feature: Feature, x: tf.Tensor) -> tf.Tensor:
        if feature.kind == "dense":
            return tf.where(tf.math.is_nan(x), 0.0, x)
        if feature.kind != "numeric":
            return x
        constants = self.constants[feature.name]
        missing = tf.math.is_nan(x)
        if feature.bucketised:
            ids = RARE + 1 + tf.raw_ops.Bucketize(input=x, boundaries=list(constants.boundaries))
            return tf.where(missing, RARE, ids)
        for step in feature.transform:
            x = tf.math.log1p(x) if step == "log1p" else (x - constants.mean) / constants.std
        return tf.where(missing, tf.constant(constants.mean_after, tf.float32), x)
