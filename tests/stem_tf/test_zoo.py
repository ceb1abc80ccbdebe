"""What every model does alike: it learns the same on two replicas and after a resume, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines import manifest as manifests
from pipelines.batches.dataset import read_batches
from stem_tf import configs, models
from stem_tf.models.ranking_model import RankingModel
from stem_tf.training import catch_up, optimizers
from stem_tf.training.checkpoints import Checkpoints, RunState


@pytest.fixture(scope="module")
def dataset(chain_data: Path) -> tf.data.Dataset:
    """Three batches, which every model here learns from."""
    reading: dict[str, Any] = {"batch_size": 64, "input_format": "blocks", "device": None}
    manifest = manifests.load(str(chain_data))
    return read_batches(manifest, "train", training=True, seed=0, epoch=0, start_step=0, **reading).take(3).cache()


def build(settings: dict[str, Any]) -> RankingModel:
    config = configs.checked(settings)
    return models.build(config, manifests.load(config.data.dir))


def weights(model: RankingModel) -> list[np.ndarray]:
    return [weight.numpy() for part in model.weight_parts.values() for weight in part.weights]


def test_two_replicas_train_as_one(
    zoo_settings: dict[str, Any], dataset: tf.data.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Adam hides the size of a gradient, and makes full steps of rounding noise near 0. Not with this epsilon.
    for module in (optimizers, catch_up):
        monkeypatch.setattr(module, "EPSILON", 0.01)
    single = build(zoo_settings)
    for batch in dataset.take(2):
        single.train_step(batch)
    # Not the default collectives: a process keeps the shapes of the first model that used them.
    one_device = tf.distribute.ReductionToOneDevice()
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=one_device)
    with strategy.scope():
        mirrored = build(zoo_settings)
    for batch in strategy.experimental_distribute_dataset(dataset.take(2)):
        strategy.run(mirrored.train_step, args=(batch,))
    for one, two in zip(weights(single), weights(mirrored), strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)


def test_a_resumed_run_is_equal_to_the_bit(
    zoo_settings: dict[str, Any], dataset: tf.data.Dataset, tmp_path: Path
) -> None:
    settings = zoo_settings | {"model.dropout": 0.3, "model.embedding_dropout": 0.2}
    model = build(settings)
    *before, after = dataset
    for batch in before:
        model.train_step(batch)
    Checkpoints(tmp_path, model, RunState()).save()
    model.train_step(after)
    resumed = build(settings | {"seed": 0})
    assert Checkpoints(tmp_path, resumed, RunState()).restore()
    resumed.train_step(after)
    for one, two in zip(weights(model), weights(resumed), strict=True):
        np.testing.assert_array_equal(one, two)
