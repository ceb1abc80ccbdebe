"""TensorFlow for these tests: two logical CPU devices, so that MirroredStrategy has two replicas to mirror."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stem_tf  # noqa: F401  isort: skip  chooses Keras 2 before TensorFlow comes
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture(scope="session")
def train() -> Callable[[Path, dict[str, Any]], Any]:
    """``train(directory, settings)``: the trainer of a run that it has taken to its end, or gone on with."""
    from stem_tf import configs
    from stem_tf.training.trainer import Trainer
    from stem_tf.workdir import Workdir

    def train(directory: Path, settings: dict[str, Any]) -> Trainer:
        config = configs.checked(settings)
        manifest, workdir = configs.data(config), Workdir(directory)
        with workdir.locked():
            workdir.prepare(config, manifest)
            trainer = Trainer(config, manifest, workdir, say=lambda line: None)
            trainer.run()
        return trainer

    return train


@pytest.fixture(autouse=True)
def _same_initial_weights() -> None:
    random.seed(0)
