"""What every model does alike: it learns the same on two replicas and after a resume, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipelines import manifest as manifests
from pipelines.batches.dataset import read_batches
from stem_tf import configs, models
from stem_tf.models.ranking_model import RankingModel
from stem_tf.training.checkpoints import Checkpoints, RunState


def build(settings: dict[str, Any]) -> tuple[RankingModel, tf.data.Dataset]:
    config = configs.checked(settings)
    manifest = manifests.load(config.data.dir)
    reading: dict[str, Any] = {"batch_size": config.data.batch_size, "input_format": "blocks"}
    dataset = read_batches(manifest, "train", training=True, seed=0, epoch=0, start_step=0, device=None, **reading)
    return models.build(config, manifest), dataset


def weights(model: RankingModel) -> list[np.ndarray]:
    return [weight.numpy() for part in model.weight_parts.values() for weight in part.weights]


def test_two_replicas_train_as_one(zoo_settings: dict[str, Any]) -> None:
    single, dataset = build(zoo_settings)
    for batch in dataset.take(2):
        single.train_step(batch)
    # Not the default collectives: a process keeps the shapes of the first model that used them.
    one_device = tf.distribute.ReductionToOneDevice()
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=one_device)
    with strategy.scope():
        mirrored, dataset = build(zoo_settings)
    for batch in strategy.experimental_distribute_dataset(dataset.take(2)):
        strategy.run(mirrored.train_step, args=(batch,))
    for one, two in zip(weights(single), weights(mirrored), strict=True):
        # Adam divides by what may be near 0: where a gradient is rounding noise, so is the direction of its step.
        assert np.mean(np.abs(two - one) > 1e-4) < 0.01


def test_a_resumed_run_is_equal_to_the_bit(zoo_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = zoo_settings | {"model.dropout": 0.3, "model.embedding_dropout": 0.2}
    model, dataset = build(settings)
    batches = list(dataset.take(4))
    for batch in batches[:2]:
        model.train_step(batch)
    Checkpoints(tmp_path, model, RunState()).save()
    for batch in batches[2:]:
        model.train_step(batch)
    resumed, _ = build(settings | {"seed": 0})
    assert Checkpoints(tmp_path, resumed, RunState()).restore()
    for batch in batches[2:]:
        resumed.train_step(batch)
    for one, two in zip(weights(model), weights(resumed), strict=True):
        np.testing.assert_array_equal(one, two)
