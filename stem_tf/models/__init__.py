"""Models by name: from an experiment's config and a data set's manifest to a model ready to train."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from pipelines.manifest import Manifest
from stem_tf.layers.embedding import Embeddings
from stem_tf.layers.inputs import InputTransform
from stem_tf.models.base import RankingModel
from stem_tf.models.stem_net import STEMConfig, STEMNet, task_table
from stem_tf.optimizers import Schedule


@contextlib.contextmanager
def precision(policy: str) -> Iterator[None]:
    """Layers made inside compute in ``policy`` (``float32`` or ``mixed_bfloat16``); their weights are float32."""
    before = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy(policy)
    try:
        yield
    finally:
        tf.keras.mixed_precision.set_global_policy(before)


def build(config: Any, manifest: Manifest, *, training: bool = True) -> RankingModel:
    """The model of ``config.model`` for the features and tasks of ``manifest``, compiled for training.

    Call it inside the scope of the strategy that is to train it. Keys read: ``seed``, ``model``, ``optimizer``,
    ``train.precision`` and ``train.steps_per_execution``. ``training=False`` leaves out the optimizers and their slots,
    which are twice the tables.
    """
    schema, options = manifest.schema, config.model
    constants = {f.name: manifest.constants(f.name) for f in schema.features if f.kind == "numeric"}
    num_ids = {
        f.name: manifest.num_ids(f.name)
        for f in schema.features
        if f.kind in ("categorical", "multivalent") or f.bucketised
    }
    names = {field.name for field in dataclasses.fields(STEMConfig)}
    hyper: dict[str, Any] = {
        key: tuple(v) if isinstance(v, (list, tuple)) else v for key, v in options.items() if key in names
    }

    random.seed(config.seed)  # of the initial weights: see stem_tf.layers.initializers
    embeddings = Embeddings(
        schema.features,
        num_ids,
        options.dim,
        specific=[task_table(task) for task in schema.task_names],
        specific_features=[feature.name for feature in schema.task_features],
        init_std=options.init_std,
    )
    with precision(config.train.precision):
        network = STEMNet(schema.task_names, STEMConfig(**hyper))
    model = RankingModel(schema.tasks, InputTransform(schema.features, constants), embeddings, network)
    model.build_weights()
    if training:
        optimizer = config.optimizer
        model.prepare_training(
            Schedule(
                optimizer.learning_rate,
                optimizer.schedule,
                warmup_steps=optimizer.warmup_steps,
                decay_steps=optimizer.decay_steps,
                decay_rate=optimizer.decay_rate,
                final_fraction=optimizer.final_fraction,
            ),
            table_optimizer=optimizer.tables,
            l2=optimizer.l2,
            clip_norm=optimizer.clip_norm,
            seed=config.seed,
        )
    # The model trains itself in train_step: Keras is given no optimizer and no loss.
    model.compile(optimizer=[], steps_per_execution=config.train.steps_per_execution)
    return model
