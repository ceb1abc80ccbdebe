"""The ranking model around a network: reads packed tables, gives their rows to the network, trains by its own step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from pipelines.manifest import LabelScale
from pipelines.schema import Task
from stem_tf.layers.embedding import Embeddings, PackedTable
from stem_tf.layers.mlp import dropout
from stem_tf.layers.seeds import seeds
from stem_tf.layers.sides import Share, Sides, gather_share
from stem_tf.layers.transforms import InputTransform
from stem_tf.models.network import Network
from stem_tf.models.predictor import Batch, Predictor, ReadRows

if TYPE_CHECKING:
    from stem_tf.training.table_optimizers import TableOptimizer
    from stem_tf.training.train_step import TrainStep


class RankingModel(Predictor):
    """Any network of the papers over packed embedding tables.

    ::

        outputs = network(embeddings(inputs(features)))

    Its ``training_step``, which :func:`stem_tf.training.preparation.prepare` sets, trains it; Keras' ``compile`` is
    given no loss and no optimizer. Checkpoints hold variables under the names of the attributes here.

    Args:
      tasks: the schema's tasks, in its order.
      inputs: numeric transforms.
      embeddings: packed tables.
      network: reads the flat embeddings.
      embedding_dropout: rate on the flat embeddings in training.
      scales: mean and standard deviation of standardised labels, by task.

    Attributes:
      table_optimizers: one per packed table with rows, of a model that is being trained. Beside them it has a
        ``network_optimizer`` and a ``weighting`` then, whose variables are part of a checkpoint.
      global_step: steps done, those of the runs included that this one goes on from.
      schedule_start: the step at which the schedules begin, in a run that goes on from another one; None in others.
      epoch: epochs done.
      first_bad_step, first_bad_task: see :mod:`stem_tf.training.non_finite`.
      loss_mean, loss_means: means over the epoch so far of the loss, and of each task's.
    """

    def __init__(
        self,
        tasks: tuple[Task, ...],
        inputs: InputTransform,
        embeddings: Embeddings,
        network: Network,
        embedding_dropout: float = 0.0,
        scales: Mapping[str, LabelScale] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        # Every replica reports the losses of the global batch; by default Keras would add them up.
        self.distribute_reduction_method = "first"
        self.tasks = tasks
        self.scales = MappingProxyType(dict(scales))  # Keras would wrap a dict
        self.inputs, self.embeddings, self.network = inputs, embeddings, network
        self.embedding_dropout = embedding_dropout
        self._training_step: TrainStep | None = None
        self.table_optimizers: list[TableOptimizer] = []
        self.loss_mean = _Mean(name="loss")
        self.loss_means = {task.name: _Mean(name=f"loss_{task.name}") for task in tasks}
        self.global_step = _counter("global_step", 0, tf.int64)
        self.schedule_start: tf.Variable | None = None
        self.epoch = _counter("epoch", 0, tf.int64)
        self.first_bad_step = _counter("first_bad_step", -1, tf.int64)
        self.first_bad_task = _counter("first_bad_task", -1, tf.int32)

    def build_weights(self) -> None:
        """Creates the network's weights without a batch; call inside the strategy's scope."""
        self.network({name: tf.zeros([1, self.embeddings.flat_width]) for name in self.embeddings.tables})

    @property
    def weight_parts(self) -> dict[str, tf.keras.layers.Layer]:
        return {"embeddings": self.embeddings, "network": self.network}

    @property
    def metrics(self) -> list[tf.keras.metrics.Metric]:
        return [self.loss_mean, *self.loss_means.values()]

    def begin_schedules(self) -> tf.Variable:
        """Adds :attr:`schedule_start`, 0, and returns it."""
        self.schedule_start = _counter("schedule_start", 0, tf.int64)
        return self.schedule_start

    @property
    def schedule_step(self) -> tf.Tensor:
        """Steps done since the schedules began."""
        return self.after_start(self.global_step)

    def after_start(self, step: tf.Tensor) -> tf.Tensor:
        """The steps of ``step`` that were done since the schedules began."""
        return tf.identity(step) if self.schedule_start is None else step - self.schedule_start

    @property
    def training_step(self) -> TrainStep:
        """Makes the steps of training."""
        if self._training_step is None:
            raise ValueError("a model should be prepared for training first: stem_tf.training.preparation.prepare")
        return self._training_step

    @training_step.setter
    def training_step(self, step: TrainStep) -> None:
        self._training_step = step

    def call(
        self, features: Mapping[str, tf.Tensor], training: bool = False, read: ReadRows | None = None
    ) -> dict[str, tf.Tensor]:
        inputs = self.inputs(features)
        return self.forward(inputs, self.embeddings.look_up(inputs, read or self.read_rows), training)

    def rank(
        self,
        inputs: Mapping[str, tf.Tensor],
        once: Sequence[str],
        each: Sequence[str],
        share: Share = gather_share,
        read: ReadRows | None = None,
    ) -> dict[str, tf.Tensor]:
        sides = [{name: inputs[name] for name in side} for side in (once, each)]
        by_side = [self.embeddings(side, self.embeddings.look_up(side, read or self.read_rows)) for side in sides]
        columns = [tf.constant(self.embeddings.columns(side), tf.int32) for side in sides]
        return self.network(
            {
                table: Sides(by_side[0][table], by_side[1][table], columns[0], columns[1], share)
                for table in self.embeddings.tables
            },
            training=False,
        )

    def forward(
        self,
        inputs: Mapping[str, tf.Tensor],
        looked_up: Sequence[tf.Tensor | None],
        training: bool,
        seed: tf.Tensor | None = None,
    ) -> dict[str, tf.Tensor]:
        """Outputs by task ``[B]`` of transformed inputs and what they look up, by group ``[B * P, W]``.

        ``seed`` ``[2]`` determines the dropout masks; ``training`` needs it where there is dropout.
        """
        embedded = self.embeddings(inputs, looked_up)
        if training and self.embedding_dropout:
            network_seed, *table_seeds = itertools.islice(seeds(seed), 1 + len(embedded))
            embedded = {
                table: dropout(h, self.embedding_dropout, table_seed)
                for (table, h), table_seed in zip(embedded.items(), table_seeds, strict=True)
            }
            seed = network_seed
        return self.network(embedded, training=training, seed=seed)

    def read_rows(self, group: PackedTable, ids: tf.Tensor) -> tf.Tensor:
        """Rows of a packed table ``[N, W]`` after all steps so far, also where the table itself is behind."""
        for optimizer in self.table_optimizers:
            if optimizer.table is group.table and (optimizer.defers or optimizer.remote):
                return optimizer.read_batch(ids, self.global_step).at_positions()
        return group.look_up(ids)

    def catch_up(self) -> None:
        """Brings every row of every table up to date: before weights are kept or exported without the slots."""
        with self.distribute_strategy.scope():
            for optimizer in self.table_optimizers:
                optimizer.catch_up(self.global_step)

    def end_training(self) -> None:
        """Drops the optimizers: from now on rows are read as they are in the tables."""
        self._training_step, self.table_optimizers = None, []
        self.__dict__.pop("predict_on_replicas", None)  # compiled to read rows through the optimizers

    @tf.autograph.experimental.do_not_convert
    def train_step(self, data: Batch) -> dict[str, tf.Tensor]:
        return self.training_step(data)

    def compute_loss(self, inputs: Batch, training: bool = False) -> tf.Tensor:
        """The loss of a batch without L2; :class:`tfrs.Model` asks for this method."""
        return self.training_step.loss_of(inputs, training)


class _Mean(tf.keras.metrics.Mean):
    """The mean of values that every replica computes alike, kept like a counter.

    Keras would add the replicas' sums up whenever a mean is read or saved: in every step, over the network.
    """

    def add_weight(self, name: str, *args: Any, **kwargs: Any) -> tf.Variable:
        kwargs |= {
            "aggregation": tf.VariableAggregation.ONLY_FIRST_REPLICA,
            "synchronization": tf.VariableSynchronization.ON_WRITE,
        }
        return super().add_weight(name, *args, **kwargs)


def _counter(name: str, value: int, dtype: tf.DType) -> tf.Variable:
    # Every replica computes the same value: the first one's is written.
    return tf.Variable(
        value, dtype=dtype, trainable=False, name=name, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
    )
