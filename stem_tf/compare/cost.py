"""What a model costs: parameters, memory, work per row, and the time of a request."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from pipelines.schema import Schema
from stem_tf.inspection import members
from stem_tf.layers.embedding import Field, PackedTable
from stem_tf.layers.sides import gather_share
from stem_tf.models.predictor import Predictor
from stem_tf.models.ranking_model import RankingModel
from stem_tf.summary import multiply_adds
from stem_tf.training.learning_rate import Schedule
from stem_tf.training.table_optimizers import TABLE_OPTIMIZERS
from stem_tf.workdir import Workdir
from stem_util import files

CANDIDATES = 200
_WARM_UP, _REPEATS, _SECONDS = 5, 100, 2.0
_FLOAT = 4


def cost(
    workdir: Workdir, config: Any, schema: Schema, model: Predictor, features: Mapping[str, NDArray]
) -> dict[str, Any]:
    """The cost of a trained model.

    Args:
      workdir: the run's directory; its report.json says how fast it trained.
      config: the run's config.
      schema: schema of its data.
      model: the model.
      features: rows to score, as a batch holds them.

    Returns:
      ``parameters`` of tables and network, and their ``bytes`` in float32; ``slots``, the optimizers' bytes while it
      trains; ``sets`` of weights, of different epochs, that it needs to score all tasks (the figures before count one);
      ``samples_per_second`` of training, None where the run does not say; ``multiply_adds`` per row, of all sets;
      ``request`` as :func:`request` returns it.
    """
    sets = [member for member, _ in members(model)]
    one = sets[0]
    parameters = {"tables": _size(one.embeddings.weights), "network": _size(one.network.weights)}
    return {
        "parameters": parameters,
        "bytes": {part: count * _FLOAT for part, count in parameters.items()},
        "slots": slot_bytes(one, config.optimizer.tables, config.optimizer.slots),
        "sets": len(sets),
        "samples_per_second": _samples_per_second(workdir),
        "multiply_adds": sum(multiply_adds(member) for member in sets),
        "request": request(schema, model, features),
    }


def slot_bytes(model: RankingModel, tables: str, slots: str) -> int:
    """Bytes that the optimizers keep beside the weights of a model in training.

    Args:
      model: the model.
      tables: a key of :data:`~stem_tf.training.table_optimizers.TABLE_OPTIMIZERS`.
      slots: how the tables' moments are kept.
    """
    total = (
        2 * _FLOAT * _size([*model.embeddings.trainable_variables, *model.network.trainable_variables])
    )  # Adam's m, v
    for group in model.embeddings.groups:
        if group.rows:  # the slots of one row, since those of all could be larger than the memory that is left
            one = PackedTable([Field("row", rows=1)], group.dim, group.tables)
            kept = TABLE_OPTIMIZERS[tables](one, 0.0, Schedule(0.0), slots).slots
            total += group.rows * sum(slot.dtype.size * slot.shape.num_elements() for slot in kept)
    return total


def request(schema: Schema, model: Predictor, features: Mapping[str, NDArray]) -> dict[str, Any]:
    """The time in which this process scores one request of 200 candidates: no network, no lookup of raw values.

    The request's user and context are those of one row, and are looked up and multiplied once, as a server does it.
    Where the schema has no user and context features, or no item features, 200 rows are scored one by one.

    Args:
      schema: schema of the model's data.
      model: the model.
      features: rows to take candidates from.

    Returns:
      ``candidates``; ``repeats``; ``ms``, their median; ``ms_low`` and ``ms_high``, their quartiles.
    """
    once = [feature.name for feature in schema.features if feature.side != "item"]
    each = [feature.name for feature in schema.features if feature.side == "item"]
    shared = bool(once and each)
    rows = len(next(iter(features.values())))
    places = {name: np.zeros(1, int) if shared and name in once else np.arange(CANDIDATES) % rows for name in features}
    asked = {name: tf.constant(values[places[name]]) for name, values in features.items()}
    shares: dict[tuple[int, int], tf.Tensor] = {}

    def share(kernel: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
        """A first layer's weights are taken apart before the requests, as in an export."""
        columns = tf.get_static_value(columns)
        key = (id(kernel), int(columns[0]))  # the two sides have no column in common
        if key not in shares:
            with tf.init_scope():
                shares[key] = tf.Variable(gather_share(kernel, tf.constant(columns)), trainable=False)
        return shares[key]

    @tf.function(autograph=False)
    def score(raw: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        inputs = model.inputs(raw)
        return model.scores(model.rank(inputs, once, each, share) if shared else model(raw))

    for _ in range(_WARM_UP):
        score(asked)
    seconds: list[float] = []
    while len(seconds) < _REPEATS and sum(seconds) < _SECONDS:
        start = time.perf_counter()
        tf.nest.map_structure(lambda values: values.numpy(), score(asked))
        seconds.append(time.perf_counter() - start)
    low, median, high = 1000 * np.quantile(seconds, (0.25, 0.5, 0.75))
    return {
        "candidates": CANDIDATES,
        "repeats": len(seconds),
        "ms": float(median),
        "ms_low": float(low),
        "ms_high": float(high),
    }


def _samples_per_second(workdir: Workdir) -> float | None:
    if not workdir.report.exists():  # a run that was stopped
        return None
    speed: float | None = files.read_json(workdir.report, "go on with stem-train").get("samples_per_second")
    return speed


def _size(weights: list[tf.Variable]) -> int:
    return sum(weight.shape.num_elements() for weight in weights)
