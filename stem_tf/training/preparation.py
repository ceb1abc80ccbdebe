"""Prepares a model for training: from a config to losses, optimizers and the step that uses them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from pipelines.schema import Schema
from stem_tf import configs
from stem_tf.layers.embedding import PackedTable
from stem_tf.training import learning
from stem_tf.training.balancing import Balancing, Conflicts
from stem_tf.training.learning_rate import Schedule
from stem_tf.training.loss_weighting import Weighting
from stem_tf.training.losses import TaskLoss
from stem_tf.training.optimizers import BETAS, Adam, Betas
from stem_tf.training.reach import reach
from stem_tf.training.replicas import Replicas
from stem_tf.training.sharded_tables import ServedAdam, ShardedRows, are_served
from stem_tf.training.table_optimizers import TABLE_OPTIMIZERS, TableOptimizer
from stem_tf.training.train_step import TrainStep
from stem_util.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from stem_tf.models.ranking_model import RankingModel


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
      schedule: learning rate by step.
      tables: a key of :data:`stem_tf.training.table_optimizers.TABLE_OPTIMIZERS`.
      l2: pulls tables (and the vectors of numeric features) to 0 by ``l2 / 2 * ||.||^2``; one number, or one per table,
        by the table's name or the part of it before the colon (``task``, ``expert``).
      network_l2: the same for the network's weights.
      clip_norm: global norm to which the gradient, L2 included, is scaled down; 0 for no clipping.
      seed: determines the dropout masks, together with the step.
      slots: how the tables' moments are kept, one of :data:`stem_tf.training.table_optimizers.SLOTS`.
      tables_schedule: learning rate of the tables by step; ``schedule`` where it is None.
      tables_betas: decay rates of the moments of the tables' Adam.
      xla: what is compiled: ``off`` nothing; ``network`` the network, forward and backward; ``step`` the whole step, in
        static shapes, for a single replica.
      weighting: adds up the tasks' losses; by the schema's weights when None.
      conflicts: what becomes of tasks' gradients that contradict each other, ``sum`` or ``pcgrad``.
      label_smoothing, positive_weight: of :class:`TaskLoss`, by task.
      goes_on: whether the run goes on from another one, so that its schedules may begin at a step other than 0.
      steps_per_execution: steps between returns to Python, as Keras has been told.
    """

    schedule: Schedule
    tables: str = "deferred"
    l2: float | Mapping[str, float] = 0.0
    network_l2: float = 0.0
    clip_norm: float = 0.0
    seed: int = 0
    slots: str = "float32"
    tables_schedule: Schedule | None = None
    tables_betas: Betas = BETAS
    xla: str = "off"
    weighting: Weighting | None = None
    conflicts: Conflicts = "sum"
    label_smoothing: Mapping[str, float] = field(default_factory=dict)
    positive_weight: Mapping[str, float] = field(default_factory=dict)
    goes_on: bool = False
    steps_per_execution: int = 1

    def l2_of(self, table: str) -> float:
        """The L2 of one table."""
        if not isinstance(self.l2, Mapping):
            return self.l2
        return self.l2.get(table, self.l2.get(table.partition(":")[0], 0.0))


def options(config: Any, schema: Schema, tables: Sequence[str]) -> Training:
    """Reads how to train a model with these ``tables`` from ``config.optimizer``, ``loss`` and ``train.xla``.

    Raises:
      UserError: a table that does not exist, or options that do nothing for a task.
    """
    optimizer, loss = config.optimizer, config.loss
    l2 = configs.plain(optimizer.l2)
    known = [*tables, *dict.fromkeys(table.partition(":")[0] for table in tables if ":" in table)]
    for name in l2 if isinstance(l2, dict) else ():
        if name not in known:
            raise UserError(
                f"config.optimizer.l2: {config.model.name} has no table '{name}'{did_you_mean(name, known) or '.'} "
                f"Tables: {', '.join(known)}"
            )
    for path in ("label_smoothing", "positive_weight"):
        value = configs.plain(loss[path])
        for task in schema.tasks:
            if task.type == "regression" and isinstance(value, dict) and task.name in value:
                raise UserError(f"config.loss.{path} would do nothing for '{task.name}', a regression: leave it out")

    def by_task(value: Any, default: float) -> dict[str, float]:
        return {task: configs.of_task(value, task, default) for task in schema.task_names}

    weighting = Weighting(
        schema.tasks,
        list(learning.task_weights(config, schema).values()),
        loss.weighting,
        list(by_task(loss.gamma, 1.0).values()),
        loss.gamma_per,
        loss.gradnorm_alpha,
        loss.gradnorm_learning_rate,
    )

    def schedule(peak: float) -> Schedule:
        return Schedule(
            peak,
            optimizer.schedule,
            warmup_steps=optimizer.warmup_steps,
            decay_steps=optimizer.decay_steps,
            decay_rate=optimizer.decay_rate,
            final_fraction=optimizer.final_fraction,
        )

    return Training(
        schedule(optimizer.learning_rate),
        tables_schedule=schedule(optimizer.tables_learning_rate or optimizer.learning_rate),
        tables_betas=Betas(optimizer.tables_beta_1, optimizer.tables_beta_2),
        tables=optimizer.tables,
        slots=optimizer.slots,
        l2=l2,
        network_l2=optimizer.network_l2,
        clip_norm=optimizer.clip_norm,
        seed=config.seed,
        xla=_xla(config),
        weighting=weighting,
        conflicts=optimizer.conflicts,
        label_smoothing=by_task(loss.label_smoothing, 0.0),
        positive_weight=by_task(loss.positive_weight, 1.0),
        goes_on=bool(config.start.run),
        steps_per_execution=config.train.steps_per_execution,
    )


def _xla(config: Any) -> str:
    """What XLA compiles; ``auto`` takes what was measured to be fastest."""
    chosen, replicas = str(config.train.xla), tf.distribute.get_strategy().num_replicas_in_sync
    if chosen == "step" and replicas > 1:
        raise UserError(f"config.train.xla=step compiles the step of one replica, not of {replicas}; set it to network")
    if chosen != "auto":
        return chosen
    if are_served() or not tf.config.list_logical_devices("GPU"):
        return "off"
    return "step" if replicas == 1 and config.data.batch_size <= 32_768 else "network"


def prepare(model: RankingModel, training: Training) -> None:
    """Gives a model its ``training_step`` and its optimizers' slots.

    Call it in the strategy's scope, after the model's weights exist. Objects that hold variables become attributes of
    the model, under whose names checkpoints hold them.
    """
    embeddings, network = model.embeddings, model.network
    if training.goes_on:
        training = counted_from(training, model.begin_schedules())
    model.weighting = training.weighting or Weighting(model.tasks, [task.weight for task in model.tasks])
    l2 = [_l2(group, training) for group in embeddings.groups]
    model.network_optimizer = (ServedAdam if are_served() else Adam)(
        [*embeddings.trainable_variables, *network.trainable_variables, *model.weighting.trainable_variables],
        [
            *(l2 for l2, group in zip(l2, embeddings.groups, strict=True) for _ in group.trainable_variables),
            *[training.network_l2 for _ in network.trainable_variables],
            *[0.0 for _ in model.weighting.trainable_variables],
        ],
        training.schedule,
    )
    model.table_optimizers = table_optimizers(model, training)
    smoothing, positive = training.label_smoothing, training.positive_weight
    losses = {
        task.name: TaskLoss(
            task, smoothing.get(task.name, 0.0), positive.get(task.name, 1.0), model.scales.get(task.name)
        )
        for task in model.tasks
    }
    model.training_step = TrainStep(
        model,
        losses,
        model.weighting,
        model.network_optimizer,
        model.table_optimizers,
        Replicas(tf.distribute.get_strategy(), static=training.steps_per_execution > 1),
        balancing=_balancing(model, training),
        clip_norm=training.clip_norm,
        seed=training.seed,
        xla=training.xla,
    )


def counted_from(training: Training, first: tf.Variable) -> Training:
    """The same with schedules that begin at the step ``first``."""
    return dataclasses.replace(
        training,
        schedule=training.schedule.counted_from(first),
        tables_schedule=(training.tables_schedule or training.schedule).counted_from(first),
    )


def table_optimizers(model: RankingModel, training: Training) -> list[TableOptimizer]:
    """The optimizers of a model's tables with rows.

    One more set of them, for a model that has its own already, uses the slots of those.
    """
    make: Callable[..., TableOptimizer] = TABLE_OPTIMIZERS[training.tables]
    if are_served():
        make = functools.partial(ShardedRows, training.tables)
    groups = [group for group in model.embeddings.groups if group.rows]
    own: list[Sequence[tf.Variable]] = [optimizer.slots for optimizer in model.table_optimizers] or [() for _ in groups]
    return [
        make(
            group,
            _l2(group, training),
            training.tables_schedule or training.schedule,
            training.slots,
            training.seed,
            clips=bool(training.clip_norm),
            betas=training.tables_betas,
            given=given,
        )
        for group, given in zip(groups, own, strict=True)
    ]


def _balancing(model: RankingModel, training: Training) -> Balancing | None:
    """What puts the tasks' gradients together; None where their losses are just added up."""
    if training.conflicts == "sum" and model.weighting.grad_norm is None:
        return None
    found = reach(model)
    if not found.shared:
        key, default = (
            ("optimizer.conflicts=pcgrad", "sum")
            if training.conflicts == "pcgrad"
            else ("loss.weighting=gradnorm", "static")
        )
        raise UserError(
            f"config.{key} would do nothing: no two tasks of this model train the same weights; leave it at {default}"
        )
    shapes = [variable.shape for variable in model.network_optimizer.variables_]
    return Balancing(found, shapes, model.weighting, training.conflicts, training.seed)


def _l2(group: PackedTable, training: Training) -> float | tf.Tensor:
    """L2 of a packed table: one number, or one per column ``[W]``."""
    by_table = [training.l2_of(table) for table in group.tables]
    if len(set(by_table)) == 1:
        return by_table[0]
    return tf.repeat(tf.constant(by_table), group.dim)
