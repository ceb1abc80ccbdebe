"""Models by name: from an experiment's config and a data set's manifest to a model ready to train."""

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
from stem_tf.layers.parts import Parts
from stem_tf.layers.transforms import InputTransform
from stem_tf.models.chains import AITM, ESMM
from stem_tf.models.mmoe import MEMMoE, MLMMoE, MMoE, OMoE
from stem_tf.models.network import Network
from stem_tf.models.ple import CGC, MEPLE, PLE
from stem_tf.models.ranking_model import RankingModel
from stem_tf.models.sharing import AsymmetricSharing, CustomizedSharing, SharedBottom, SingleTask
from stem_tf.models.stem_net import STEMNet
from stem_tf.models.stitch import CrossStitch, Sluice
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


NETWORKS: dict[str, type[Network]] = {
    "single_task": SingleTask,
    "shared_bottom": SharedBottom,
    "asymmetric_sharing": AsymmetricSharing,
    "customized_sharing": CustomizedSharing,
    "cross_stitch": CrossStitch,
    "sluice": Sluice,
    "omoe": OMoE,
    "mmoe": MMoE,
    "ml_mmoe": MLMMoE,
    "me_mmoe": MEMMoE,
    "cgc": CGC,
    "ple": PLE,
    "me_ple": MEPLE,
    "esmm": ESMM,
    "aitm": AITM,
    "stem_net": STEMNet,
}


def build(config: Any, manifest: Manifest, *, training: bool = True) -> RankingModel:
    """The model of ``config.model`` for the features and tasks of ``manifest``, compiled for training.

    Call it inside the scope of the strategy that is to train it. Keys read: ``seed``, ``model``, ``loss``,
    ``optimizer``, ``train.precision`` and ``train.steps_per_execution``. ``training=False`` leaves out the optimizers
    and their slots, which are twice the tables.

    Raises:
      UserError: a task or feature that the config names and the data has not, or a model that does not fit the data.
    """
    schema, options = manifest.schema, config.model
    configs.check_names(config, schema.task_names, [feature.name for feature in schema.features])
    constants = {f.name: manifest.constants(f.name) for f in schema.features if f.kind == "numeric"}
    random.seed(config.seed)  # of the initial weights: see stem_tf.layers.initializers
    with precision(config.train.precision):
        network = build_network(config, schema)
    fields = [_field(feature, manifest) for feature in schema.features]
    specific = _specific(config, schema)
    embeddings = Embeddings(fields, options.dim, network.tables, specific, options.init_std, train_tables=False)
    inputs = InputTransform(schema.features, constants)
    model = RankingModel(schema.tasks, inputs, embeddings, network, options.embedding_dropout, manifest.label_scales)
    model.build_weights()
    if training:
        preparation.prepare(model, preparation.options(config, schema, network.tables))
    # The model trains itself in train_step: Keras is given no optimizer and no loss.
    model.compile(optimizer=[], steps_per_execution=config.train.steps_per_execution)
    return model


def build_network(config: Any, schema: Schema) -> Network:
    """The network of ``config.model``: its class with the keys that this model has."""
    options, name = config.model, config.model.name
    parts = {field.name: options[field.name] for field in dataclasses.fields(Parts) if field.name != "fields"}
    widths = {feature.dim or options.dim for feature in schema.features}
    if options.expert in ("fwfm", "nfwfm") and len(widths) > 1:
        raise UserError(
            f"config.model.expert={options.expert} multiplies embeddings of pairs of features, which should be of one "
            f"width, but the schema's are {', '.join(map(str, sorted(widths)))}"
        )
    if options.expert in ("fwfm", "nfwfm") and len(schema.features) < 2:
        raise UserError(f"config.model.expert={options.expert} needs pairs of features, but the schema has one feature")
    hyper = {key: configs.plain(options[key]) for key in configs.network_keys(name) if key not in parts}
    if "layers" in hyper:
        hyper["layers"] = configs.depth(config)
    regressions = [task.name for task in schema.tasks if task.type != "binary"]
    if regressions and (name == "esmm" or hyper.get("calibrator")):
        cause = "name=esmm" if name == "esmm" else f"calibrator={hyper['calibrator']}"
        raise UserError(
            f"config.model.{cause} takes each task's output for a probability: all tasks should be binary, but "
            f"{', '.join(regressions)} should be predicted as a value"
        )
    return NETWORKS[name](schema.task_names, Parts(**parts, fields=len(schema.features)), **hyper)


def _field(feature: Feature, manifest: Manifest) -> Field:
    """What the tables hold for a feature: a bucketised one is looked up by its bucket's id."""
    kind = "categorical" if feature.bucketised else feature.kind
    rows = manifest.num_ids(feature.name) if kind in ("categorical", "multivalent") else 0
    return Field(feature.name, kind, rows, feature.dim, feature.pooling, feature.length)


def _specific(config: Any, schema: Schema) -> list[str]:
    """The F of STEM-Net-(F): names of the features that have a table for each task."""
    chosen: Any = configs.task_features(config) or config.model.task_features
    if chosen != "schema":
        schema = dataclasses.replace(schema, task_tables=chosen)
    return [feature.name for feature in schema.task_features]
