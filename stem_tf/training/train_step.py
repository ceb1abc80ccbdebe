"""One step of training: network and tables together, on one replica or several.

::

    rows   = the distinct rows of every table that the batch reads
    losses = L_t = sum_i w_ti loss_t(i) / sum_i w_ti          (PLE Eq. 8 and 9; 0 where all w_ti are 0)
    loss   = weighting(losses) + the network's own penalty, where it has one
    network, rows <- Adam(gradient of the loss, and of L2, clipped to a global norm)

Where the tasks' gradients are balanced, each is taken by itself, and :class:`~stem_tf.training.balancing.Balancing`
puts them together after they were added up over the replicas.

``w_ti`` is the weight of row i for task t: 1 where the schema has none, 0 outside the task's space. Sums run over the
rows of the batch on all replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from stem_tf.layers.distinct import deduplicate
from stem_tf.runtime import start_xla
from stem_tf.training import loss_logs, non_finite
from stem_tf.training.balancing import Balancing
from stem_tf.training.loss_weighting import Weighting
from stem_tf.training.losses import TaskLoss
from stem_tf.training.optimizers import Adam
from stem_tf.training.replicas import Replicas
from stem_tf.training.table_optimizers import BatchRows, TableOptimizer

if TYPE_CHECKING:
    from stem_tf.models.predictor import Batch
    from stem_tf.models.ranking_model import RankingModel


class Gradients(NamedTuple):
    """The results of one forward and one backward pass.

    Attributes:
      network: gradient of the network's variables ``[N]``, see :class:`~stem_tf.training.optimizers.Adam`; where
        gradients are balanced, R of them ``[R, N]``.
      looked_up: gradients of the rows that the batch looked up ``[B * P, W]``, or ``[B * P, R * W]``, one per table.
      losses: losses by task ``[T]``.
      loss: the loss that was differentiated, a scalar.
    """

    network: tf.Tensor
    looked_up: list[tf.Tensor]
    losses: tf.Tensor
    loss: tf.Tensor


class Taken(NamedTuple):
    """What a step reports about the global batch.

    Attributes:
      losses: losses by task ``[T]``.
      loss: the loss without L2, a scalar.
      norm: norm of the whole gradient, L2 included, before it is clipped.
    """

    losses: tf.Tensor
    loss: tf.Tensor
    norm: tf.Tensor


class TrainStep:
    """Makes the steps of a model; called in replica context, by each replica with its part of the batch.

    Args:
      model: its weights are built; holds the counters and the running means.
      losses: the loss of each task.
      weighting: adds the tasks' losses up.
      network_optimizer: trains all variables but the packed tables.
      table_optimizers: one per packed table that has rows.
      replicas: the replicas that share a batch.
      balancing: puts the tasks' gradients together; None differentiates the sum of the losses.
      clip_norm: global norm to which the gradient, L2 included, is scaled down; 0 for no clipping.
      seed: determines the dropout masks, together with the step.
      xla: what is compiled: ``off`` nothing; ``network`` :meth:`differentiate`; ``step`` :meth:`update`, in static
        shapes, for a single replica.
    """

    def __init__(
        self,
        model: RankingModel,
        losses: Mapping[str, TaskLoss],
        weighting: Weighting,
        network_optimizer: Adam,
        table_optimizers: Sequence[TableOptimizer],
        replicas: Replicas,
        *,
        balancing: Balancing | None = None,
        clip_norm: float = 0.0,
        seed: int = 0,
        xla: str = "off",
    ) -> None:
        self.model, self.task_losses, self.weighting = model, losses, weighting
        self.network_optimizer, self.table_optimizers = network_optimizer, table_optimizers
        self.replicas, self.balancing = replicas, balancing
        self.clip_norm, self.seed, self.static = clip_norm, seed, xla == "step"
        self._differentiate = _compiled(self.differentiate) if xla == "network" else self.differentiate
        self._update = _compiled(self.update) if xla == "step" else self.update

    # Python control flow only: AutoGraph would find nothing to convert, and take three quarters of the tracing time.
    @tf.autograph.experimental.do_not_convert
    def __call__(self, data: Batch) -> dict[str, tf.Tensor]:
        """Makes one step with a batch; returns the losses that Keras logs."""
        model, step = self.model, tf.identity(self.model.global_step)
        taken = self.take(data, step)
        non_finite.note(model, step, taken.losses, taken.norm)
        model.global_step.assign_add(1)
        return loss_logs.updated(model, self.weighting, taken.losses, taken.loss)

    def take(self, data: Batch, step: tf.Tensor) -> Taken:
        """Makes the step after ``step`` steps, which keys the dropout masks; counts and logs nothing."""
        seed = self.replicas.own_seed(tf.stack([tf.cast(step, tf.int32), self.seed]))
        spaces = self.replicas.sum(sizes(data["weights"]))
        inputs = self.model.inputs(data["features"])
        batch = {"inputs": inputs, "labels": data["labels"], "weights": data["weights"]}
        return self._update(batch, spaces, step, seed)

    def update(self, batch: Batch, spaces: Mapping[str, tf.Tensor], step: tf.Tensor, seed: tf.Tensor) -> Taken:
        """Reads rows, differentiates, adds up over the replicas, regularises, clips, writes.

        Args:
          batch: with transformed ``inputs`` in place of features.
          spaces: sums of the tasks' weights over all replicas.
          step: steps done before this one.
          seed: this replica's seed of dropout, ``[2]``.
        """
        inputs = batch["inputs"]
        rows = self.read(inputs, step, self.static) if self.replicas.count == 1 else self.read_together(inputs, step)
        found = self._differentiate(batch, self.looked_up(rows), spaces, seed)
        by_row = [self._summed(read, by_position) for read, by_position in zip(rows, found.looked_up, strict=True)]
        network, losses, loss, by_row = self.replicas.sum([found.network, found.losses, found.loss, by_row])
        if self.replicas.static:
            by_row = [gradient[: read.count] for read, gradient in zip(rows, by_row, strict=True)]
        if self.balancing is not None:
            network, by_row = self.balancing(network, by_row, losses, step)

        network = self.network_optimizer.regularised(network)
        tables = [
            optimizer.gradient(read.state, gradient)
            for optimizer, read, gradient in zip(self.table_optimizers, rows, by_row, strict=True)
        ]

        norm = tf.linalg.global_norm([network, *(table.values for table in tables)])
        scale: float | tf.Tensor = 1.0
        if self.clip_norm:
            scale = self.clip_norm / tf.maximum(norm, self.clip_norm)
            network = network * scale
            tables = [table._replace(values=table.values * scale) for table in tables]

        self.network_optimizer.apply(network, step + 1)
        for optimizer, table in zip(self.table_optimizers, tables, strict=True):
            optimizer.apply(table, step + 1, scale)
        return Taken(losses, loss, norm)

    def differentiate(
        self,
        batch: Batch,
        looked_up: Sequence[tf.Tensor | None],
        spaces: Mapping[str, tf.Tensor],
        seed: tf.Tensor,
    ) -> Gradients:
        """Forward and backward pass, without L2.

        Args:
          batch, spaces, seed: as in :meth:`update`.
          looked_up: looked-up rows by group ``[B * P, W]``, None where there is no table.
        """
        variables, read = self.network_optimizer.variables_, [rows for rows in looked_up if rows is not None]
        with tf.GradientTape(persistent=self.balancing is not None) as tape:
            tape.watch(read)
            outputs = self.model.forward(batch["inputs"], looked_up, training=True, seed=seed)
            losses = self.losses(batch, outputs, spaces)
            loss = self.loss(batch, outputs, losses, spaces)
            terms = None if self.balancing is None else self.terms(batch, outputs, losses, spaces)
        if self.balancing is not None and terms is not None:
            return Gradients(*self.balancing.differentiate(tape, *terms, variables, read), losses, loss)
        gradients, by_position = tape.gradient(
            loss, [variables, read], unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return Gradients(self.network_optimizer.flatten(gradients), by_position, losses, loss)

    def losses(self, batch: Batch, outputs: Mapping[str, tf.Tensor], spaces: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """This replica's part of each L_t, ``[T]``."""
        return tf.stack(
            [
                tf.math.divide_no_nan(loss(batch["labels"][name], outputs[name], batch["weights"][name]), spaces[name])
                for name, loss in self.task_losses.items()
            ]
        )

    def loss(
        self, batch: Batch, outputs: dict[str, tf.Tensor], losses: tf.Tensor, spaces: Mapping[str, tf.Tensor]
    ) -> tf.Tensor:
        """This replica's part of the loss that is differentiated, a scalar."""
        model, share = self.model, 1.0 / self.replicas.count
        total = self.weighting(losses, model.schedule_step, model.epoch, share)
        return total + model.network.penalty(outputs, batch["weights"], spaces, share)

    def terms(
        self, batch: Batch, outputs: dict[str, tf.Tensor], losses: tf.Tensor, spaces: Mapping[str, tf.Tensor]
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """What :meth:`loss` is the sum of, scalars: each task's weighted loss, and what is no task's."""
        model, share = self.model, 1.0 / self.replicas.count
        weighted = tf.unstack(self.weighting.weights(model.schedule_step, model.epoch) * losses)
        return weighted, self.weighting.rest(share) + model.network.penalty(outputs, batch["weights"], spaces, share)

    def read(self, inputs: Mapping[str, tf.Tensor], step: tf.Tensor, static: bool = False) -> list[BatchRows]:
        """The distinct rows of every table that transformed inputs need, after ``step`` steps."""
        return [optimizer.read_batch(ids, step, static) for optimizer, ids in self._by_table(inputs)]

    def read_together(self, inputs: Mapping[str, tf.Tensor], step: tf.Tensor) -> list[BatchRows]:
        """As :meth:`read`, with the rows that the inputs of the other replicas need.

        Every replica updates all of them, so each is read, and brought up to date, once.
        """
        return [self._read_union(optimizer, ids, step) for optimizer, ids in self._by_table(inputs)]

    def _read_union(self, optimizer: TableOptimizer, ids: tf.Tensor, step: tf.Tensor) -> BatchRows:
        positions = ids.shape[0]
        own, place = deduplicate(ids)
        union, moved = self.replicas.union(own, positions)
        return BatchRows(optimizer.read(union, step, self.replicas.count * positions), tf.gather(moved, place))

    def _by_table(self, inputs: Mapping[str, tf.Tensor]) -> Iterable[tuple[TableOptimizer, tf.Tensor]]:
        ids = [ids for ids in self.model.embeddings.ids(inputs) if ids is not None]
        return zip(self.table_optimizers, ids, strict=True)

    def looked_up(self, rows: Sequence[BatchRows]) -> list[tf.Tensor | None]:
        """Looked-up rows by group ``[B * P, W]``, None where there is no table."""
        read = iter(rows)
        return [next(read).at_positions() if group.rows else None for group in self.model.embeddings.groups]

    def _summed(self, rows: BatchRows, by_position: tf.Tensor) -> tf.Tensor:
        """The gradient of each row, with zeros behind them where sums over replicas should always have one size."""
        return rows.summed(by_position, self.replicas.count * by_position.shape[0] if self.replicas.static else None)

    def loss_of(self, data: Batch, training: bool = False) -> tf.Tensor:
        """The loss of a whole batch without L2, a scalar; trains nothing."""
        outputs, spaces = self.model(data["features"], training=training), sizes(data["weights"])
        return self.loss(data, outputs, self.losses(data, outputs, spaces), spaces)


def sizes(weights: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Sums of the rows' weights ``[B]``, by task."""
    return {name: tf.reduce_sum(weight) for name, weight in weights.items()}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    start_xla()
    return tf.function(function, jit_compile=True, autograph=False)
