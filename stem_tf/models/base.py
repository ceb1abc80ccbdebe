"""The ranking model around a network: reads tables, adds up task losses, trains network and tables together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import tensorflow_recommenders as tfrs

from pipelines.schema import Task
from stem_tf.layers.embedding import Embeddings, Rows
from stem_tf.layers.inputs import InputTransform
from stem_tf.losses import TaskLoss, score
from stem_tf.optimizers import TABLE_OPTIMIZERS, Adam, Rate, Schedule, gather_rows

Batch = Mapping[str, Any]


class RankingModel(tfrs.Model):
    """``{feature: tensor}`` in, ``{task: output}`` out; one training step for every model of the papers.

    A step reads the rows that the batch needs from the packed tables, runs the network on them, and gives the rows'
    gradient back to the tables' own optimizer::

        rows = embeddings.read(inputs)
        loss = sum_t weight_t * sum_i in space_t loss_t(i) / |space_t|          (PLE Eq. 8 and 9; 0 for an empty space)
        network, rows <- Adam(gradient clipped to a global norm)

    What it does not do: it has no ``compile`` with Keras losses or optimizers, and no ``add_loss``.

    Args:
      tasks: of the schema, in its order.
      inputs: numeric transforms.
      embeddings: packed tables.
      network: Keras layer ``({table: [B, D]}, training, seed) -> {task: [B]}``.
    """

    def __init__(
        self, tasks: tuple[Task, ...], inputs: InputTransform, embeddings: Embeddings, network: tf.keras.layers.Layer
    ) -> None:
        super().__init__()
        # Every replica reports the losses of the global batch; by default Keras would add them up.
        self.distribute_reduction_method = "first"
        self.tasks = tasks
        self.inputs, self.embeddings, self.network = inputs, embeddings, network
        self.task_losses = {task.name: TaskLoss(task) for task in tasks}
        self.loss_means = {task.name: tf.keras.metrics.Mean(name=f"loss_{task.name}") for task in tasks}
        self.global_step = _counter("global_step", 0, tf.int64)
        self.first_bad_step = _counter("first_bad_step", -1, tf.int64)
        self.first_bad_task = _counter("first_bad_task", -1, tf.int32)

    def build_weights(self) -> None:
        """Creates the network's weights without a batch; call inside the strategy's scope."""
        self.network({name: tf.zeros([1, self.embeddings.flat_width]) for name in self.embeddings.tables})

    def prepare_training(
        self, schedule: Schedule, table_optimizer: str, l2: float, clip_norm: float, seed: int
    ) -> None:
        """Creates the optimizers' slots and compiles; call inside the strategy's scope after the weights exist.

        Args:
          schedule: learning rate by step, for network and tables.
          table_optimizer: a key of :data:`stem_tf.optimizers.TABLE_OPTIMIZERS`.
          l2: pulls tables (and the vectors of numeric features) to 0 by ``l2 / 2 * ||.||^2``.
          clip_norm: global norm to which the gradient, L2 included, is scaled down; 0 for no clipping.
          seed: keys the dropout masks, with the step.
        """
        self.schedule, self.l2, self.clip_norm, self.seed = schedule, l2, clip_norm, seed
        self.network_optimizer = Adam([*self.embeddings.trainable_variables, *self.network.trainable_variables])
        self.table_optimizers = [
            TABLE_OPTIMIZERS[table_optimizer](group.table, l2) for group in self.embeddings.groups if group.rows
        ]

    @property
    def weight_parts(self) -> dict[str, tf.keras.layers.Layer]:
        """What predictions depend on, without optimizer state: what a best-weights checkpoint holds."""
        return {"embeddings": self.embeddings, "network": self.network}

    @property
    def metrics(self) -> list[tf.keras.metrics.Metric]:
        return list(self.loss_means.values())

    def call(self, features: Mapping[str, tf.Tensor], training: bool = False) -> dict[str, tf.Tensor]:
        """Outputs by task, ``[B]`` float32: logits, or values for regressions."""
        inputs = self.inputs(features)
        return self.forward(inputs, self.embeddings.read(inputs), training)

    def forward(
        self, inputs: Mapping[str, tf.Tensor], rows: list[Rows | None], training: bool, seed: tf.Tensor | None = None
    ) -> dict[str, tf.Tensor]:
        return self.network(self.embeddings(inputs, rows), training=training, seed=seed)

    def compute_loss(self, inputs: Batch, training: bool = False) -> tf.Tensor:
        """The weighted sum of the tasks' mean losses over a batch; what :class:`tfrs.Model` asks of a model."""
        losses = self.mean_losses(inputs, self(inputs["features"], training=training), _spaces(inputs["weights"]))
        return tf.add_n([task.weight * loss for task, loss in zip(self.tasks, tf.unstack(losses), strict=True)])

    def mean_losses(self, batch: Batch, outputs: Mapping[str, tf.Tensor], spaces: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Losses by task ``[T]``; ``spaces`` are the sizes of the tasks' spaces over all replicas."""
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
        seed = tf.stack([tf.cast(step, tf.int32), self.seed])
        if context.num_replicas_in_sync > 1:
            seed = tf.random.experimental.stateless_fold_in(seed, context.replica_id_in_sync_group)
        spaces = context.all_reduce(tf.distribute.ReduceOp.SUM, _spaces(data["weights"]))
        task_weights = tf.constant([task.weight for task in self.tasks])

        inputs = self.inputs(data["features"])
        rows = self.embeddings.read(inputs)
        read = [r for r in rows if r is not None]
        variables = self.network_optimizer.variables_
        with tf.GradientTape() as tape:
            tape.watch([r.values for r in read])
            outputs = self.forward(inputs, rows, training=True, seed=seed)
            losses = self.mean_losses(data, outputs, spaces)
            loss = tf.reduce_sum(task_weights * losses)
        gradients, row_gradients = tape.gradient(
            loss, [variables, [r.values for r in read]], unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        gradients, losses = context.all_reduce(tf.distribute.ReduceOp.SUM, [gradients, losses])

        regularised = len(self.embeddings.trainable_variables)
        gradients = [
            g + self.l2 * v if i < regularised else g for i, (g, v) in enumerate(zip(gradients, variables, strict=True))
        ]
        table_gradients = [
            optimizer.gradient(*gather_rows(r.ids, tf.convert_to_tensor(g), r.inverse.shape[0]))
            for optimizer, r, g in zip(self.table_optimizers, read, row_gradients, strict=True)
        ]
        norm = tf.linalg.global_norm([*gradients, *(g.values for g in table_gradients)])
        if self.clip_norm:
            scale = self.clip_norm / tf.maximum(norm, self.clip_norm)
            gradients = [g * scale for g in gradients]
            table_gradients = [g._replace(values=g.values * scale) for g in table_gradients]

        rate = Rate.at(self.schedule(step), step + 1)
        self.network_optimizer.apply(gradients, rate)
        for optimizer, gradient in zip(self.table_optimizers, table_gradients, strict=True):
            optimizer.apply(gradient, rate)
        self._note_bad(step, losses, norm)
        self.global_step.assign_add(1)
        return self._log(losses)

    def _note_bad(self, step: tf.Tensor, losses: tf.Tensor, norm: tf.Tensor) -> None:
        """Keeps the first step whose loss or gradient norm is not finite, and the task (-1: only the gradient is)."""
        bad = tf.logical_not(tf.math.is_finite(losses))
        first = (self.first_bad_step < 0) & (tf.reduce_any(bad) | tf.logical_not(tf.math.is_finite(norm)))
        task = tf.where(tf.reduce_any(bad), tf.argmax(bad, output_type=tf.int32), -1)
        self.first_bad_task.assign(tf.where(first, task, self.first_bad_task))
        self.first_bad_step.assign(tf.where(first, step, self.first_bad_step))

    def _log(self, losses: tf.Tensor) -> dict[str, tf.Tensor]:
        """Means over the epoch so far of the tasks' losses and of their weighted sum."""
        by_task = dict(zip(self.loss_means, tf.unstack(losses), strict=True))
        for name, loss in by_task.items():
            self.loss_means[name].update_state(loss)
        means = {name: mean.result() for name, mean in self.loss_means.items()}
        return {
            "loss": tf.add_n([task.weight * means[task.name] for task in self.tasks]),
            **{f"loss/{name}": mean for name, mean in means.items()},
        }

    @tf.autograph.experimental.do_not_convert
    def predict_step(self, data: Batch) -> dict[str, Any]:
        """Scores by task ``[B]`` float32 beside the batch's labels, weights and keys."""
        outputs = self(data["features"])
        kept = {key: value for key, value in data.items() if key != "features"}
        return {**kept, "scores": {task.name: score(task, outputs[task.name]) for task in self.tasks}}


def _spaces(weights: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {name: tf.reduce_sum(weight) for name, weight in weights.items()}


def _counter(name: str, value: int, dtype: tf.DType) -> tf.Variable:
    # Every replica computes the same value: the first one's is written.
    return tf.Variable(
        value, dtype=dtype, trainable=False, name=name, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
    )
