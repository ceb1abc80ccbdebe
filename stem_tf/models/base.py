"""The ranking model around a network: reads tables, adds up task losses, trains network and tables together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from pipelines.manifest import LabelScale
from pipelines.schema import Task
from stem_tf.layers.distinct import deduplicate, deduplicate_static
from stem_tf.layers.embedding import Embeddings
from stem_tf.layers.mlp import dropout
from stem_tf.layers.seeds import seeds
from stem_tf.layers.sides import Share, Sides, gather_share
from stem_tf.layers.transforms import InputTransform
from stem_tf.models.network import Network
from stem_tf.runtime import start_xla
from stem_tf.training.losses import TaskLoss, Weighting, score
from stem_tf.training.optimizers import Adam, Rate, Schedule
from stem_tf.training.table_optimizers import TABLE_OPTIMIZERS, RowState, TableOptimizer, gather_rows

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
      schedule: learning rate by step, for network and tables.
      tables: a key of :data:`stem_tf.training.table_optimizers.TABLE_OPTIMIZERS`.
      l2: pulls tables (and the vectors of numeric features) to 0 by ``l2 / 2 * ||.||^2``; one number, or by table: its
        name, or what stands before the colon in it (``task``, ``expert``).
      network_l2: the same for the network's weights.
      clip_norm: global norm to which the gradient, L2 included, is scaled down; 0 for no clipping.
      seed: keys the dropout masks, with the step.
      slots: how the tables' moments are kept, one of :data:`stem_tf.training.table_optimizers.SLOTS`.
      xla: what is compiled: ``off`` nothing; ``network`` the network, forward and backward; ``step`` the whole step, in
        static shapes, for a single replica.
      weighting: adds up the tasks' losses; by the schema's weights when None.
      label_smoothing, positive_weight: of :class:`TaskLoss`, by task.
    """

    schedule: Schedule
    tables: str = "deferred"
    l2: float | Mapping[str, float] = 0.0
    network_l2: float = 0.0
    clip_norm: float = 0.0
    seed: int = 0
    slots: str = "float32"
    xla: str = "off"
    weighting: Weighting | None = None
    label_smoothing: Mapping[str, float] = field(default_factory=dict)
    positive_weight: Mapping[str, float] = field(default_factory=dict)

    def l2_of(self, table: str) -> float:
        """Of one table."""
        if not isinstance(self.l2, Mapping):
            return self.l2
        return self.l2.get(table, self.l2.get(table.partition(":")[0], 0.0))


class Predictor(tfrs.Model):
    """``{feature: tensor}`` in, ``{task: output}`` out: what evaluation and export need of a trained model.

    Attributes:
      tasks: of the schema, in its order.
      inputs: numeric transforms.
      scales: of standardised labels, by task.
    """

    tasks: tuple[Task, ...]
    inputs: InputTransform
    scales: Mapping[str, LabelScale]

    @property
    def weight_parts(self) -> dict[str, tf.keras.layers.Layer]:
        """What predictions depend on, without optimizer state: what a best-weights checkpoint holds."""
        raise NotImplementedError

    def rank(
        self,
        inputs: Mapping[str, tf.Tensor],
        once: Sequence[str],
        each: Sequence[str],
        share: Share = gather_share,
    ) -> dict[str, tf.Tensor]:
        """Outputs by task ``[B * N]`` of N candidates for each of B requests.

        Args:
          inputs: transformed; ``[B, ...]`` of the features ``once``, ``[B * N, ...]`` of the features ``each``.
          once: names of user and context features, looked up and multiplied by weights once a request.
          each: names of item features.
          share: gives the two sides' rows of a first layer's weights.
        """
        raise NotImplementedError

    @tf.autograph.experimental.do_not_convert
    def predict_step(self, data: Batch) -> dict[str, Any]:
        """Scores by task ``[B]`` float32 beside the batch's labels, weights and keys."""
        outputs = self(data["features"])
        kept = {key: value for key, value in data.items() if key != "features"}
        return {**kept, "scores": self.scores(outputs)}

    def scores(self, outputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Scores by task, in the units of their labels, of outputs of any shape."""
        return {task.name: score(task, outputs[task.name], self.scales.get(task.name)) for task in self.tasks}


class RankingModel(Predictor):
    """``{feature: tensor}`` in, ``{task: output}`` out; one training step for every model of the papers.

    A step reads the rows that the batch needs from the packed tables, runs the network on them, and gives the rows'
    gradient back to the tables' own optimizer::

        rows = table_optimizers.read(distinct ids)
        loss = sum_t weight_t * sum_i w_ti loss_t(i) / sum_i w_ti        (PLE Eq. 8 and 9; 0 where all w_ti are 0)
               + the network's own penalty, where it has one
        w_ti: the weight of row i for task t, 1 where the schema has none; 0 outside the task's space. Sums are over
              the rows of the batch on all replicas.
        network, rows <- Adam(gradient clipped to a global norm)

    What it does not do: it has no ``compile`` with Keras losses or optimizers, and no ``add_loss``.

    Args:
      tasks: of the schema, in its order.
      inputs: numeric transforms.
      embeddings: packed tables.
      network: of flat embeddings.
      embedding_dropout: rate on the flat embeddings in training.
      scales: of standardised labels, by task.
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
        self.table_optimizers: list[TableOptimizer] = []
        self.loss_mean = tf.keras.metrics.Mean(name="loss")
        self.loss_means = {task.name: tf.keras.metrics.Mean(name=f"loss_{task.name}") for task in tasks}
        self.global_step = _counter("global_step", 0, tf.int64)
        self.epoch = _counter("epoch", 0, tf.int64)
        self.first_bad_step = _counter("first_bad_step", -1, tf.int64)
        self.first_bad_task = _counter("first_bad_task", -1, tf.int32)

    def build_weights(self) -> None:
        """Creates the network's weights without a batch; call inside the strategy's scope."""
        self.network({name: tf.zeros([1, self.embeddings.flat_width]) for name in self.embeddings.tables})

    def prepare_training(self, training: Training) -> None:
        """Creates losses and the optimizers' slots; call inside the strategy's scope after the weights exist."""
        self.training_options, self.schedule = training, training.schedule
        smoothing, positive = training.label_smoothing, training.positive_weight
        self.task_losses = {
            task.name: TaskLoss(
                task, smoothing.get(task.name, 0.0), positive.get(task.name, 1.0), self.scales.get(task.name)
            )
            for task in self.tasks
        }
        self.weighting = training.weighting or Weighting(self.tasks, [task.weight for task in self.tasks])
        groups = [group for group in self.embeddings.groups if group.rows]
        self.network_optimizer = Adam(
            [
                *self.embeddings.trainable_variables,
                *self.network.trainable_variables,
                *self.weighting.trainable_variables,
            ],
            [
                *(self._l2(group.tables) for group in self.embeddings.groups for _ in group.trainable_variables),
                *[training.network_l2 for _ in self.network.trainable_variables],
                *[0.0 for _ in self.weighting.trainable_variables],
            ],
        )
        self.table_optimizers = [
            TABLE_OPTIMIZERS[training.tables](
                group,
                self._l2(group.tables),
                training.schedule,
                training.slots,
                training.seed,
                clips=bool(training.clip_norm),
            )
            for group in groups
        ]
        if training.xla != "off":
            start_xla()

        def compiled(name: str, part: Callable[..., Any]) -> Callable[..., Any]:
            return tf.function(part, jit_compile=True, autograph=False) if training.xla == name else part

        self._network_program = compiled("network", self.differentiate)
        self._step_program = compiled("step", self._update)

    def _l2(self, tables: tuple[str, ...]) -> float | tf.Tensor:
        """L2 of a group with these tables: one number, or one a column ``[W]``."""
        by_table = [self.training_options.l2_of(table) for table in tables]
        if len(set(by_table)) == 1:
            return by_table[0]
        width = next(group.width for group in self.embeddings.groups if group.tables == tables)
        return tf.repeat(tf.constant(by_table), width // len(tables))

    @property
    def weight_parts(self) -> dict[str, tf.keras.layers.Layer]:
        return {"embeddings": self.embeddings, "network": self.network}

    @property
    def metrics(self) -> list[tf.keras.metrics.Metric]:
        return [self.loss_mean, *self.loss_means.values()]

    def call(self, features: Mapping[str, tf.Tensor], training: bool = False) -> dict[str, tf.Tensor]:
        """Outputs by task, ``[B]`` float32: logits, or values for regressions."""
        inputs = self.inputs(features)
        return self.forward(inputs, self._look_up(inputs), training)

    def _look_up(self, inputs: Mapping[str, tf.Tensor]) -> list[tf.Tensor | None] | None:
        """What the batch reads of the tables, where it is not simply what stands there: rows that are behind."""
        if not any(optimizer.defers for optimizer in self.table_optimizers):
            return None
        return self._looked_up(self._read(inputs, self.global_step))

    def _read(self, inputs: Mapping[str, tf.Tensor], step: tf.Tensor, static: bool = False) -> list[_Read]:
        """The distinct rows of every table that the batch needs, as ``step`` steps leave them."""
        pairs = zip(self.embeddings.groups, self.embeddings.ids(inputs), strict=True)
        read = []
        for (group, ids), optimizer in zip([p for p in pairs if p[0].rows], self.table_optimizers, strict=True):
            distinct, inverse = deduplicate_static(ids, group.rows) if static else deduplicate(ids)
            read.append(_Read(optimizer.read(distinct, step, inverse.shape[0]), inverse))
        return read

    def _looked_up(self, read: Sequence[_Read]) -> list[tf.Tensor | None]:
        """By group ``[B * P, W]``, None where there is no table."""
        rows = iter(read)
        return [next(rows).at_positions(group.width) if group.rows else None for group in self.embeddings.groups]

    def catch_up(self) -> None:
        """Brings every row of every table up to date: before weights are kept or exported without the slots."""
        with self.distribute_strategy.scope():
            for optimizer in self.table_optimizers:
                optimizer.catch_up(self.global_step)

    def forward(
        self,
        inputs: Mapping[str, tf.Tensor],
        looked_up: Sequence[tf.Tensor | None] | None,
        training: bool,
        seed: tf.Tensor | None = None,
    ) -> dict[str, tf.Tensor]:
        """Outputs by task of transformed inputs and what they look up (of the tables as they stand, where None)."""
        embedded = self.embeddings(inputs, looked_up)
        if training and self.embedding_dropout:
            network_seed, *table_seeds = itertools.islice(seeds(seed), 1 + len(embedded))
            embedded = {
                table: dropout(h, self.embedding_dropout, table_seed)
                for (table, h), table_seed in zip(embedded.items(), table_seeds, strict=True)
            }
            seed = network_seed
        return self.network(embedded, training=training, seed=seed)

    def rank(
        self,
        inputs: Mapping[str, tf.Tensor],
        once: Sequence[str],
        each: Sequence[str],
        share: Share = gather_share,
    ) -> dict[str, tf.Tensor]:
        by_side = [self.embeddings({name: inputs[name] for name in side}) for side in (once, each)]
        columns = [tf.constant(self.embeddings.columns(side), tf.int32) for side in (once, each)]
        return self.network(
            {
                table: Sides(by_side[0][table], by_side[1][table], columns[0], columns[1], share)
                for table in self.embeddings.tables
            },
            training=False,
        )

    def compute_loss(self, inputs: Batch, training: bool = False) -> tf.Tensor:
        """The loss of a batch, L2 apart; what :class:`tfrs.Model` asks of a model."""
        outputs, spaces = self(inputs["features"], training=training), _spaces(inputs["weights"])
        return self._total(inputs, outputs, self.mean_losses(inputs, outputs, spaces), spaces)

    def _total(
        self,
        batch: Batch,
        outputs: dict[str, tf.Tensor],
        losses: tf.Tensor,
        spaces: Mapping[str, tf.Tensor],
        share: float = 1.0,
    ) -> tf.Tensor:
        """What is differentiated; ``share`` is this replica's of what no row has a part in."""
        total = self.weighting(losses, self.global_step, self.epoch, share)
        return total + self.network.penalty(outputs, batch["weights"], spaces, share)

    def shared_gradients(self, batch: Batch) -> dict[str, float]:
        """Norms by task of the gradient that its weighted loss has on what several tasks train, tables and layers.

        Of one batch, without dropout and L2; ``{}`` where tasks share nothing. Called outside of any step: it costs a
        backward pass a task, and writes nothing.
        """
        strategy, compute = self.distribute_strategy, self._squared_gradients
        if strategy.num_replicas_in_sync > 1:  # each of which is given the whole batch
            compute = tf.function(compute, autograph=False)
        squares = strategy.experimental_local_results(strategy.run(compute, [batch]))[0].numpy()
        shared = squares[:, np.count_nonzero(squares, axis=0) > 1]
        if not shared.size:
            return {}
        return {task.name: float(norm) for task, norm in zip(self.tasks, np.sqrt(shared.sum(axis=1)), strict=True)}

    def _squared_gradients(self, batch: Batch) -> tf.Tensor:
        """Of the tasks' weighted losses, summed over each table and each of the network's variables, ``[T, parts]``."""
        inputs, spaces = self.inputs(batch["features"]), _spaces(batch["weights"])
        looked_up = self._looked_up(self._read(inputs, self.global_step))
        groups = self.embeddings.groups
        rows = [(looked, len(g.tables)) for looked, g in zip(looked_up, groups, strict=True) if looked is not None]
        kernels = [(weight, len(group.tables)) for group in groups for weight in group.trainable_variables]
        parts = [*rows, *kernels, *((weight, 1) for weight in self.network.trainable_variables)]
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([looked for looked, _ in rows])
            losses = self.mean_losses(batch, self.forward(inputs, looked_up, training=False), spaces)
            losses = tf.unstack(self.weighting.weights(self.global_step, self.epoch) * losses)
        squares = []
        for loss in losses:
            gradients = tape.gradient(
                loss, [part for part, _ in parts], unconnected_gradients=tf.UnconnectedGradients.ZERO
            )
            # Tables stand side by side in the last axis.
            by_table = [tf.reshape(g, [-1, n, g.shape[-1] // n]) for g, (_, n) in zip(gradients, parts, strict=True)]
            squares.append(tf.concat([tf.reduce_sum(tf.square(g), axis=[0, 2]) for g in by_table], axis=0))
        return tf.stack(squares)

    def mean_losses(self, batch: Batch, outputs: Mapping[str, tf.Tensor], spaces: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Losses by task ``[T]``; ``spaces`` are the sums of the tasks' weights over all replicas."""
        return tf.stack(
            [
                tf.math.divide_no_nan(
                    self.task_losses[name](batch["labels"][name], outputs[name], batch["weights"][name]), spaces[name]
                )
                for name in self.task_losses
            ]
        )

    # Python control flow only: AutoGraph would find nothing to convert, and take three quarters of the tracing time.
    @tf.autograph.experimental.do_not_convert
    def train_step(self, data: Batch) -> dict[str, tf.Tensor]:
        context = tf.distribute.get_replica_context()
        step = tf.identity(self.global_step)
        seed = tf.stack([tf.cast(step, tf.int32), self.training_options.seed])
        if context.num_replicas_in_sync > 1:
            seed = tf.random.experimental.stateless_fold_in(seed, context.replica_id_in_sync_group)
        spaces = context.all_reduce(tf.distribute.ReduceOp.SUM, _spaces(data["weights"]))
        batch = {"inputs": self.inputs(data["features"]), "labels": data["labels"], "weights": data["weights"]}
        losses, loss, norm = self._step_program(batch, spaces, step, seed)
        self._note_bad(step, losses, norm)
        self.global_step.assign_add(1)
        return self._log(loss, losses)

    def _update(
        self, batch: Batch, spaces: Mapping[str, tf.Tensor], step: tf.Tensor, seed: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """One step of network and tables; returns the tasks' losses ``[T]``, the loss and the gradient's norm."""
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        read = self._read(batch["inputs"], step, static=self.training_options.xla == "step")
        gradient, by_position, losses, loss = self._network_program(
            batch, self._looked_up(read), spaces, seed, 1.0 / replicas
        )
        states = [rows.state for rows in read]
        by_row = [
            tf.math.unsorted_segment_sum(g, rows.inverse, tf.shape(rows.state.ids)[0])
            for g, rows in zip(by_position, read, strict=True)
        ]
        if replicas > 1:
            gradient, losses, loss = context.all_reduce(tf.distribute.ReduceOp.SUM, [gradient, losses, loss])
            for i, (optimizer, rows) in enumerate(zip(self.table_optimizers, read, strict=True)):
                positions = rows.inverse.shape[0]
                union, by_row[i] = gather_rows(rows.state.ids, by_row[i], positions)
                states[i] = optimizer.read(union, step, replicas * positions)

        gradient = self.network_optimizer.regularised(gradient)
        table_gradients = [
            optimizer.gradient(state, g)
            for optimizer, state, g in zip(self.table_optimizers, states, by_row, strict=True)
        ]
        norm = tf.linalg.global_norm([gradient, *(g.values for g in table_gradients)])
        scale: float | tf.Tensor = 1.0
        if clip_norm := self.training_options.clip_norm:
            scale = clip_norm / tf.maximum(norm, clip_norm)
            gradient = gradient * scale
            table_gradients = [g._replace(values=g.values * scale) for g in table_gradients]

        rate = Rate.at(self.schedule(step), step + 1, scale)
        self.network_optimizer.apply(gradient, rate)
        for optimizer, table_gradient in zip(self.table_optimizers, table_gradients, strict=True):
            optimizer.apply(table_gradient, rate, step + 1)
        return losses, loss, norm

    def differentiate(
        self,
        batch: Batch,
        looked_up: Sequence[tf.Tensor | None],
        spaces: Mapping[str, tf.Tensor],
        seed: tf.Tensor,
        share: float,
    ) -> tuple[tf.Tensor, list[tf.Tensor], tf.Tensor, tf.Tensor]:
        """Forward and backward, L2 apart.

        Args:
          batch: with transformed ``inputs`` in place of features.
          looked_up: by group ``[B * P, W]``, None where there is no table.
          spaces: sums of the tasks' weights over all replicas.
          seed: of dropout, ``[2]``.
          share: this replica's of what no row has a part in.

        Returns:
          Gradient of the network's variables ``[N]``, gradients of what was looked up, losses by task ``[T]``, loss.
        """
        variables, read = self.network_optimizer.variables_, [rows for rows in looked_up if rows is not None]
        with tf.GradientTape() as tape:
            tape.watch(read)
            outputs = self.forward(batch["inputs"], looked_up, training=True, seed=seed)
            losses = self.mean_losses(batch, outputs, spaces)
            loss = self._total(batch, outputs, losses, spaces, share)
        gradients, by_position = tape.gradient(
            loss, [variables, read], unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return self.network_optimizer.flatten(gradients), by_position, losses, loss

    def _note_bad(self, step: tf.Tensor, losses: tf.Tensor, norm: tf.Tensor) -> None:
        """Keeps the first step whose loss or gradient norm is not finite, and the task (-1: only the gradient is)."""
        bad = tf.logical_not(tf.math.is_finite(losses))
        first = (self.first_bad_step < 0) & (tf.reduce_any(bad) | tf.logical_not(tf.math.is_finite(norm)))
        task = tf.where(tf.reduce_any(bad), tf.argmax(bad, output_type=tf.int32), -1)
        self.first_bad_task.assign(tf.where(first, task, self.first_bad_task))
        self.first_bad_step.assign(tf.where(first, step, self.first_bad_step))

    def _log(self, loss: tf.Tensor, losses: tf.Tensor) -> dict[str, tf.Tensor]:
        """Means over the epoch so far of the loss and of the tasks' own; weights that change, as they are.

        A squared error is logged in the units of its label, standardised or not.
        """
        self.loss_mean.update_state(loss)
        for (name, mean), task_loss in zip(self.loss_means.items(), tf.unstack(losses), strict=True):
            scale = self.scales.get(name)
            mean.update_state(task_loss if scale is None else task_loss * scale.std**2)
        logs = {"loss": self.loss_mean.result()}
        logs |= {f"loss/{name}": mean.result() for name, mean in self.loss_means.items()}
        if self.weighting.kind != "static":
            weights = tf.unstack(self.weighting.weights(self.global_step, self.epoch))
            logs |= {f"weight/{task.name}": weight for task, weight in zip(self.tasks, weights, strict=True)}
        return logs


class _Read(NamedTuple):
    """Distinct rows of one table, and the place among them of each of the batch's positions, int32 ``[B * P]``."""

    state: RowState
    inverse: tf.Tensor

    def at_positions(self, width: int) -> tf.Tensor:
        """``[B * P, W]``."""
        return tf.gather(tf.reshape(self.state.w, [-1, width]), self.inverse)


def _spaces(weights: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {name: tf.reduce_sum(weight) for name, weight in weights.items()}


def _counter(name: str, value: int, dtype: tf.DType) -> tf.Variable:
    # Every replica computes the same value: the first one's is written.
    return tf.Variable(
        value, dtype=dtype, trainable=False, name=name, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
    )
