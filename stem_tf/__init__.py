"""STEM-Net and its rivals: layers, models, optimizers, training and evaluation.

Importing this package does not import TensorFlow; it makes sure that TensorFlow, when it comes, brings Keras 2
(tf_keras), the only Keras that TensorFlow Recommenders works with.
"""

import sys

import pipelines  # noqa: F401  sets TF_USE_LEGACY_KERAS

if "tensorflow" in sys.modules:
    import tensorflow as tf

    # `tf.keras` is loaded when first touched: this fails only where somebody touched it before the variable was set.
    if "tf_keras" not in tf.keras.__name__:
        raise ImportError(
            f"tf.keras is {tf.keras.__name__}, but stem_tf needs Keras 2: import stem_tf before tf.keras "
            "is first used, or set TF_USE_LEGACY_KERAS=1 in the environment."
        )
