"""Adam for the network and for packed tables, and learning-rate schedules.

Two Adams train tables: :class:`DenseTableAdam`, the authors' release's (every row moves every step and L2 pulls on the
whole table), and :class:`SparseTableAdam`, whose work grows with the rows in the batch. Both follow torch's form of
Adam, epsilon outside the bias correction:

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  w = w - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import tensorflow as tf

from stem_tf.layers.embedding import deduplicate

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


class Rate(NamedTuple):
    """What an Adam step needs beside the gradient: lr / (1 - b1^t), and 1 - b2^t."""

    step_size: tf.Tensor
    correction: tf.Tensor

    @staticmethod
    def at(learning_rate: tf.Tensor, step: tf.Tensor) -> Rate:
        """``step`` t counts from 1."""
        t = tf.cast(step, tf.float32)
        # Not 1 - b^t: in float32 1 - b2 alone would be off by 2e-5 of itself.
        return Rate(learning_rate / -tf.math.expm1(t * math.log(BETA_1)), -tf.math.expm1(t * math.log(BETA_2)))


def _moments(m: tf.Tensor, v: tf.Tensor, gradient: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return BETA_1 * m + (1.0 - BETA_1) * gradient, BETA_2 * v + (1.0 - BETA_2) * tf.square(gradient)


def _move(m: tf.Tensor, v: tf.Tensor, rate: Rate) -> tf.Tensor:
    return rate.step_size * m / (tf.sqrt(v / rate.correction) + EPSILON)


def update_mirrors(variable: tf.Variable, update: Callable[..., None], *args: object) -> None:
    """Runs ``update(variable, *args)`` on every replica's copy of ``variable``; called in replica context.

    Variables among ``args`` and per-replica tensors arrive as the copy that belongs to the replica. Writing from a
    replica directly raises under MirroredStrategy; this is the way that it allows.
    """

    def merge(strategy: tf.distribute.Strategy, variable: tf.Variable, *args: object) -> None:
        strategy.extended.update(variable, update, args=args)

    tf.distribute.get_replica_context().merge_call(merge, args=(variable, *args))


def _slot(variable: tf.Variable, name: str) -> tf.Variable:
    return tf.Variable(tf.zeros_like(variable), trainable=False, name=f"{variable.name.split(':')[0]}/{name}")


class Adam(tf.Module):
    """Dense Adam over the network's variables."""

    def __init__(self, variables: Sequence[tf.Variable]) -> None:
        super().__init__(name="adam")
        self.variables_ = list(variables)
        self.m = [_slot(variable, "m") for variable in variables]
        self.v = [_slot(variable, "v") for variable in variables]

    def apply(self, gradients: Sequence[tf.Tensor], rate: Rate) -> None:
        """One step for gradients in the variables' order, already summed over replicas."""
        for variable, m, v, gradient in zip(self.variables_, self.m, self.v, gradients, strict=True):
            update_mirrors(variable, _dense_update, m, v, gradient, rate)


def _dense_update(w: tf.Variable, m: tf.Variable, v: tf.Variable, gradient: tf.Tensor, rate: Rate) -> None:
    new_m, new_v = _moments(m, v, gradient)
    m.assign(new_m, read_value=False)
    v.assign(new_v, read_value=False)
    w.assign_sub(_move(new_m, new_v, rate), read_value=False)


class TableGradient(NamedTuple):
    """Gradient of a packed table: ``values`` ``[U, W]`` of the rows ``ids`` ``[U]``; of all rows where ids is None."""

    ids: tf.Tensor | None
    values: tf.Tensor


class TableOptimizer(Protocol):
    """How a packed table is trained: ``gradient`` makes what the global norm is taken of, ``apply`` writes the step."""

    def gradient(self, ids: tf.Tensor, values: tf.Tensor) -> TableGradient: ...

    def apply(self, gradient: TableGradient, rate: Rate) -> None: ...


class _TableAdam(tf.Module):
    def __init__(self, table: tf.Variable, l2: float | tf.Tensor) -> None:
        super().__init__(name="table_adam")
        self.table, self.l2 = table, l2
        self.m, self.v = _slot(table, "m"), _slot(table, "v")


class DenseTableAdam(_TableAdam):
    """Exact dense Adam with L2 ``l2 / 2 * ||table||^2`` over the whole table, as in the authors' release.

    Every step reads and writes every row: for small tables and for parity.
    """

    def gradient(self, ids: tf.Tensor, values: tf.Tensor) -> TableGradient:
        loss = tf.tensor_scatter_nd_add(tf.zeros_like(self.table), ids[:, tf.newaxis], values)
        return TableGradient(None, loss + self.l2 * self.table)

    def apply(self, gradient: TableGradient, rate: Rate) -> None:
        update_mirrors(self.table, _dense_update, self.m, self.v, gradient.values, rate)


class SparseTableAdam(_TableAdam):
    """Lazy Adam: only the rows of the batch move, and L2 pulls only on them."""

    def gradient(self, ids: tf.Tensor, values: tf.Tensor) -> TableGradient:
        return TableGradient(ids, values + self.l2 * tf.nn.embedding_lookup(self.table, ids))

    def apply(self, gradient: TableGradient, rate: Rate) -> None:
        update_mirrors(self.table, _sparse_update, self.m, self.v, gradient.ids, gradient.values, rate)


def _sparse_update(
    w: tf.Variable, m: tf.Variable, v: tf.Variable, ids: tf.Tensor, gradient: tf.Tensor, rate: Rate
) -> None:
    new_m, new_v = _moments(tf.gather(m, ids), tf.gather(v, ids), gradient)
    m.scatter_update(tf.IndexedSlices(new_m, ids))
    v.scatter_update(tf.IndexedSlices(new_v, ids))
    w.scatter_sub(tf.IndexedSlices(_move(new_m, new_v, rate), ids))


TABLE_OPTIMIZERS: dict[str, type[_TableAdam]] = {"dense": DenseTableAdam, "sparse": SparseTableAdam}


def gather_rows(ids: tf.Tensor, values: tf.Tensor, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The union of every replica's distinct rows, gradients of rows that several replicas read added up.

    Args:
      ids: ``[U]`` distinct rows of this replica.
      values: ``[U, W]`` their gradients.
      size: positions P in a replica's batch, at least U: collectives need a static size, so both are padded to it.

    Returns:
      ids ``[V]`` and values ``[V, W]``, the same on every replica.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return ids, values
    padding = size - tf.shape(ids)[0]
    ids = tf.ensure_shape(tf.pad(ids, [[0, padding]], constant_values=-1), [size])
    values = tf.ensure_shape(tf.pad(values, [[0, padding], [0, 0]]), [size, values.shape[1]])
    ids, values = context.all_gather(ids, axis=0), context.all_gather(values, axis=0)
    kept = ids >= 0
    distinct, place = deduplicate(tf.boolean_mask(ids, kept))
    return distinct, tf.math.unsorted_segment_sum(tf.boolean_mask(values, kept), place, tf.shape(distinct)[0])


class Schedule:
    """Learning rate by step: a linear warm-up over ``warmup_steps``, then ``kind``.

    - ``constant``: the peak.
    - ``cosine``: from the peak to ``final_fraction`` of it over ``decay_steps``, then flat.
    - ``exponential``: peak * decay_rate ^ (steps since the warm-up / decay_steps).
    """

    def __init__(
        self,
        peak: float,
        kind: str = "constant",
        warmup_steps: int = 0,
        decay_steps: int = 1,
        decay_rate: float = 1.0,
        final_fraction: float = 0.0,
    ) -> None:
        if kind not in ("constant", "cosine", "exponential"):
            raise ValueError(f"schedule should be constant, cosine or exponential; received {kind!r}")
        self.peak, self.kind, self.warmup_steps = peak, kind, warmup_steps
        self.decay_steps, self.decay_rate, self.final_fraction = decay_steps, decay_rate, final_fraction

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """``step`` counts from 0; float32 scalar."""
        done = tf.cast(step, tf.float32)
        after = tf.maximum(done - self.warmup_steps, 0.0)
        factor = tf.constant(1.0)
        if self.kind == "cosine":
            progress = tf.minimum(after / self.decay_steps, 1.0)
            factor = self.final_fraction + (1.0 - self.final_fraction) * 0.5 * (1.0 + tf.cos(math.pi * progress))
        elif self.kind == "exponential":
            factor = tf.pow(self.decay_rate, after / self.decay_steps)
        if self.warmup_steps:
            factor = tf.where(done < self.warmup_steps, (done + 1.0) / self.warmup_steps, factor)
        return self.peak * factor
