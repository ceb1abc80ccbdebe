"""From raw interaction logs to batches: schema, conversion to TFRecord, input pipelines.

This package imports neither ``stem_tf`` nor ``export``. Only :mod:`pipelines.batches.dataset` needs TensorFlow.
"""

import os

# TensorFlow Recommenders works with Keras 2 only; TensorFlow reads this when `tf.keras` is first touched.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
