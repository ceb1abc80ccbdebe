"""TensorFlow for these tests: two logical CPU devices, so that MirroredStrategy has two replicas to mirror."""

import random

import pytest

import stem_tf  # noqa: F401  isort: skip  chooses Keras 2 before TensorFlow comes
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture(autouse=True)
def _same_initial_weights() -> None:
    random.seed(0)
