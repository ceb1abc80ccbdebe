"""A model with the weights of several epochs: each task's score comes from the weights of its best epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tensorflow as tf
from numpy.typing import NDArray

from stem_tf.layers.embedding import SHARED, task_table
from stem_tf.layers.sides import Share, gather_share
from stem_tf.models.predictor import Predictor, ReadRows
from stem_tf.models.ranking_model import RankingModel


class Snapshots(Predictor):
    """Tasks learn at different speeds: one set of weights serves each of them at its own best epoch.

    Args:
      members: models with the weights of one epoch each, and the tasks that they score.
    """

    def __init__(self, members: Sequence[tuple[RankingModel, Sequence[str]]]) -> None:
        super().__init__()
        self.members = [model for model, _ in members]
        self.tasks_of = [tuple(tasks) for _, tasks in members]
        self.tasks, self.inputs = self.members[0].tasks, self.members[0].inputs
        self.scales = self.members[0].scales

    @property
    def weight_parts(self) -> dict[str, tf.keras.layers.Layer]:
        return {
            f"{name}_{i}": part for i, member in enumerate(self.members) for name, part in member.weight_parts.items()
        }

    def call(
        self, features: Mapping[str, tf.Tensor], training: bool = False, read: ReadRows | None = None
    ) -> dict[str, tf.Tensor]:
        return self._chosen([member(features, training=training, read=read) for member in self.members])

    def rank(
        self,
        inputs: Mapping[str, tf.Tensor],
        once: Sequence[str],
        each: Sequence[str],
        share: Share = gather_share,
        read: ReadRows | None = None,
    ) -> dict[str, tf.Tensor]:
        return self._chosen([member.rank(inputs, once, each, share, read) for member in self.members])

    def _chosen(self, outputs: Sequence[Mapping[str, tf.Tensor]]) -> dict[str, tf.Tensor]:
        of_task = {task: by_task[task] for by_task, tasks in zip(outputs, self.tasks_of, strict=True) for task in tasks}
        return {task.name: of_task[task.name] for task in self.tasks}


def own_weights(model: RankingModel, task: str) -> list[tuple[tf.Variable, slice]]:
    """The weights that are ``task``'s alone, each with those columns of its last axis that are the task's."""
    weights = []
    for group in model.embeddings.groups:
        if task_table(task) in group.tables:
            first = group.tables.index(task_table(task)) * group.dim
            weights += [(weight, slice(first, first + group.dim)) for weight in group.weights]
    return weights + [(weight, slice(None)) for layer in model.network.own_layers(task) for weight in layer.weights]


def take(model: RankingModel, task: str) -> list[NDArray]:
    """Values of :func:`own_weights`."""
    return [weight.read_value().numpy()[..., columns] for weight, columns in own_weights(model, task)]


def put(model: RankingModel, task: str, values: Sequence[NDArray]) -> None:
    """Writes what :func:`take` took."""
    for (weight, columns), value in zip(own_weights(model, task), values, strict=True):
        whole = weight.read_value().numpy()
        whole[..., columns] = value
        weight.assign(whole)


def own_alone(model: RankingModel) -> bool:
    """Whether every weight is one task's own: a task then scores as in its epoch, whatever epochs the others are of."""
    own = {id(weight) for task in model.tasks for weight, _ in own_weights(model, task.name)}
    shared = any(table == SHARED for group in model.embeddings.groups for table in group.tables)
    return not shared and all(id(weight) in own for part in model.weight_parts.values() for weight in part.weights)
