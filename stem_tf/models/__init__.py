"""From an experiment's config and a data set's manifest to a model ready to train."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from pipelines.manifest import Manifest
from pipelines.schema import Feature, Schema
from stem_tf import configs
from stem_tf.layers.embedding import Embeddings, Field
from stem_tf.layers.transforms import InputTransform
from stem_tf.models.hyperparameters import Experts
from stem_tf.models.network import Network
from stem_tf.models.ranking_model import RankingModel
from stem_tf.training import preparation
from stem_util.errors import UserError


@contextlib.contextmanager
def precision(policy: str) -> Iterator[None]:
    """Layers made inside compute in ``policy`` (``float32`` or ``mixed_bfloat16``); their weights are float32."""
    before = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy(policy)
    try:
        yield
    finally:
        tf.keras.mixed_precision.set_global_policy(before)


@contextlib.contextmanager
def _initial_weights(seed: int) -> Iterator[None]:
    """Layers made inside start from the weights that ``seed`` gives.

    They draw seeds from Python's ``random`` (see :mod:`stem_tf.layers.initializers`), whose state is restored: the
    caller's random numbers go on as if nothing had been drawn.
    """
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


def build(config: Any, manifest: Manifest, *, training: bool = True) -> RankingModel:
    """The model of ``config.model`` for the features and tasks of ``manifest``, compiled for training.

    Call it inside the scope of the strategy that is to train it. Keys read: ``seed``, ``model``, ``loss``,
    ``optimizer``, ``train.precision`` and ``train.steps_per_execution``. ``training=False`` leaves out the optimizers
    and their slots, which are twice the tables.

    Raises:
      UserError: a task or feature that the config names and the data lacks, or a model that does not fit the data.
    """
    schema, options = manifest.schema, config.model
    configs.check_names(config, schema.task_names, [feature.name for feature in schema.features])
    constants = {f.name: manifest.constants(f.name) for f in schema.features if f.kind == "numeric"}
    fields = [_field(feature, manifest) for feature in schema.features]
    specific = _specific(config, schema)
    inputs = InputTransform(schema.features, constants)
    with _initial_weights(config.seed):
        with precision(config.train.precision):
            network = build_network(config, schema)
        embeddings = Embeddings(fields, options.dim, network.tables, specific, options.init_std, train_tables=False)
        model = RankingModel(
            schema.tasks, inputs, embeddings, network, options.embedding_dropout, manifest.label_scales
        )
        model.build_weights()
    if training:
        preparation.prepare(model, preparation.options(config, schema, network.tables))
    # The model trains itself in train_step: Keras is given no optimizer and no loss.
    model.compile(optimizer=[], steps_per_execution=config.train.steps_per_execution)
    return model


def build_network(config: Any, schema: Schema) -> Network:
    """The network of ``config.model`` with the hyperparameters that this model has.

    Raises:
      UserError: the model does not fit the data.
    """
    model = configs.model_of(config)
    hyper = model.hyperparameters(configs.flat(config), len(schema.features))
    widths = {feature.dim or config.model.dim for feature in schema.features}
    if isinstance(hyper, Experts) and hyper.expert in ("fwfm", "nfwfm"):
        if len(widths) > 1:
            raise UserError(
                f"config.model.expert={hyper.expert} multiplies embeddings of pairs of features, which should be of "
                f"one width, but the schema's are {', '.join(map(str, sorted(widths)))}"
            )
        if len(schema.features) < 2:
            raise UserError(
                f"config.model.expert={hyper.expert} needs pairs of features, but the schema has one feature"
            )
    regressions = [task.name for task in schema.tasks if task.type != "binary"]
    if regressions and hyper.probabilities:
        raise UserError(
            f"config.model.{hyper.probabilities} takes each task's output for a probability: all tasks should be "
            f"binary, but {', '.join(regressions)} should be predicted as a value"
        )
    return model.network(schema.task_names, hyper)


def _field(feature: Feature, manifest: Manifest) -> Field:
    """What the tables hold for a feature.

    A bucketised one is looked up by its bucket's id; one with two ids is the sum of their rows.
    """
    kind = "categorical" if feature.bucketised else feature.kind
    rows = manifest.num_ids(feature.name) if kind in ("categorical", "multivalent") else 0
    pooling, several = feature.pooling, feature.ids_per_value
    if kind == "categorical" and several > 1:
        kind, pooling = "multivalent", "sum"
    return Field(feature.name, kind, rows, feature.dim, pooling, feature.length, several)


def _specific(config: Any, schema: Schema) -> list[str]:
    """The F of STEM-Net-(F): names of the features that have a table for each task.

    Raises:
      UserError: the ids are asked for, and the schema has no feature of its group or item.
    """
    chosen: Any = configs.task_features(config) or config.model.task_features
    if chosen == "ids":
        chosen = tuple(feature.name for feature in schema.features if feature.column in {schema.group, schema.item})
        if not chosen:
            raise UserError(
                "config.model.task_features=ids: the schema has no feature of its group's or its item's column; name "
                "the features"
            )
    if chosen != "schema":
        schema = dataclasses.replace(schema, task_tables=chosen)
    return [feature.name for feature in schema.task_features]
