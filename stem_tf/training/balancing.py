"""The tasks' gradients one by one: measured, and put together anew, on what several tasks train.

The plain step differentiates the sum of the losses, and no task's own gradient is ever known. A balanced step makes one
forward pass and a backward pass per task, and holds R gradients of every network weight and of every row that the batch
reads: those of the T tasks' weighted losses and, where there is one, that of what is no task's (penalties).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import tensorflow as tf

from stem_tf.training.loss_weighting import Weighting
from stem_tf.training.reach import Columns, Reach

Conflicts = Literal["sum", "pcgrad"]


class Balanced(NamedTuple):
    """The gradient to train with.

    Attributes:
      network: of the network's variables ``[N]``.
      tables: of the rows of each table ``[U, W]``.
    """

    network: tf.Tensor
    tables: list[tf.Tensor]


class Balancing:
    """Puts the tasks' gradients together. Weights that one task trains get the plain sum; on those that several train

    - ``pcgrad`` (Yu et al., NeurIPS 2020, algorithm 1) takes out of each task's gradient what would undo another task.
      For the other tasks j, in an order drawn anew per task and step,

          g_i <- g_i - min(<g_i, g_j>, 0) / ||g_j||^2 g_j, g_j as it was

      and then sums. Products and norms are over the weights that both tasks train, so that no task's loss moves a
      weight that it does not reach.
    - weights of the losses of kind ``gradnorm`` learn from the norms of the gradients.

    Args:
      reach: which tasks train which weights.
      shapes: shapes of the network optimizer's variables, in its order: those of ``reach``, then any of the weighting.
      weighting: the weights of the losses.
      conflicts: what becomes of gradients that contradict each other.
      seed: determines PCGrad's orders, together with the step.
    """

    def __init__(
        self, reach: Reach, shapes: Sequence[tf.TensorShape], weighting: Weighting, conflicts: Conflicts, seed: int
    ) -> None:
        self.weighting, self.conflicts, self.seed = weighting, conflicts, seed
        self._shared, self._tables = reach.shared, reach.tables
        own = [((shape[-1], frozenset[int]()),) for shape in shapes[len(reach.variables) :]]
        self._variables: list[Columns] = [*reach.variables, *own]
        self._sizes = [shape.num_elements() for shape in shapes]
        tasks = range(len(weighting.initial))
        self._trains = tf.constant([[float(task in tasks_) for tasks_ in reach.shared] for task in tasks])  # [T, P]

    def differentiate(
        self,
        tape: tf.GradientTape,
        losses: Sequence[tf.Tensor],
        rest: tf.Tensor,
        variables: Sequence[tf.Variable],
        read: Sequence[tf.Tensor],
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The gradients one by one: of ``variables`` ``[R, N]``, and of the rows ``read`` ``[B * P, R * W]``.

        Args:
          tape: persistent; has watched ``read``.
          losses: T weighted losses, scalars.
          rest: what is added to them, a scalar.
          variables, read: to differentiate by.
        """
        by_loss = [tape.gradient(loss, [*variables, *read]) for loss in (*losses, rest)]
        if all(gradient is None for gradient in by_loss[-1]):
            by_loss.pop()
        by_weight = [
            [tf.zeros_like(weight) if gradient is None else tf.convert_to_tensor(gradient) for gradient in gradients]
            for weight, *gradients in zip([*variables, *read], *by_loss, strict=True)
        ]
        network = [
            tf.stack([tf.reshape(gradient, [-1]) for gradient in gradients])
            for gradients in by_weight[: len(variables)]
        ]
        return tf.concat(network, axis=1), [tf.concat(rows, axis=1) for rows in by_weight[len(variables) :]]

    def __call__(self, network: tf.Tensor, tables: Sequence[tf.Tensor], losses: tf.Tensor, step: tf.Tensor) -> Balanced:
        """Puts the gradients of the global batch together; called in replica context.

        Args:
          network: ``[R, N]``.
          tables: ``[U, R * W]`` each.
          losses: by task ``[T]``, unweighted.
          step: steps done before this one.
        """
        count = network.shape[0]
        pieces = [
            _pieces(tf.reshape(gradient, [count, -1, _width(columns)]), columns)
            for gradient, columns in zip(tf.split(network, self._sizes, axis=1), self._variables, strict=True)
        ]
        pieces += [
            _pieces(tf.transpose(tf.reshape(rows, [-1, count, _width(columns)]), [1, 0, 2]), columns)
            for rows, columns in zip(tables, self._tables, strict=True)
        ]
        products = self._products([piece for part in pieces for piece in part])
        if self.weighting.grad_norm is not None:
            squares = tf.einsum("tp,ptt->t", self._trains, products)
            self.weighting.grad_norm.learn(tf.sqrt(squares), losses, step + 1)
        factors: dict[frozenset[int], tf.Tensor] = {}
        if self.conflicts == "pcgrad":
            seed = tf.random.experimental.stateless_fold_in(tf.stack([tf.cast(step, tf.int32), self.seed]), 1 << 20)
            by_set = tf.matmul(self._trains, self.projections(products, seed), transpose_a=True)
            rest = tf.ones([len(self._shared), count - by_set.shape[1]])
            factors = dict(zip(self._shared, tf.unstack(tf.concat([by_set, rest], axis=1)), strict=True))
        summed = [tf.concat([_summed(piece, factors.get(tasks)) for piece, tasks in part], axis=1) for part in pieces]
        variables = len(self._variables)
        return Balanced(tf.concat([tf.reshape(g, [-1]) for g in summed[:variables]], axis=0), summed[variables:])

    def _products(self, pieces: Sequence[tuple[tf.Tensor, frozenset[int]]]) -> tf.Tensor:
        """``<g_i, g_j>`` of the tasks' gradients over the weights that each set of tasks shares, ``[P, T, T]``."""
        tasks, products = self._trains.shape[0], []
        for shared in self._shared:
            flat = [tf.reshape(g[:tasks], [tasks, -1]) for g, trains in pieces if trains == shared]
            together = tf.concat(flat, axis=1)
            products.append(tf.matmul(together, together, transpose_b=True))
        return tf.stack(products)

    def projections(self, products: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """C ``[T, T]``: the projected gradient of task i is ``sum_k C[i, k] g_k``, on the weights that task i trains.

        Args:
          products: ``[P, T, T]``, see :meth:`_products`.
          seed: ``[2]``, determines the orders.
        """
        tasks = products.shape[1]
        own = tf.range(tasks)
        # [i, k, j]: <g_k, g_j> over the weights that task i shares with others. Those of j alone are not among them.
        products = tf.einsum("ip,pkj->ikj", self._trains, products)
        squares = tf.linalg.diag_part(products)
        orders = tf.argsort(tf.random.stateless_uniform([tasks, tasks], seed), axis=1)
        mixed = tf.eye(tasks)
        for others in tf.unstack(orders, axis=1):
            along = tf.reduce_sum(mixed * tf.gather(products, others, axis=2, batch_dims=1), axis=1)
            conflict = tf.where(others == own, 0.0, tf.minimum(along, 0.0))
            share = tf.math.divide_no_nan(conflict, tf.gather(squares, others, axis=1, batch_dims=1))
            mixed -= share[:, tf.newaxis] * tf.one_hot(others, tasks)
        return mixed


def _width(columns: Columns) -> int:
    return sum(width for width, _ in columns)


def _pieces(gradient: tf.Tensor, columns: Columns) -> list[tuple[tf.Tensor, frozenset[int]]]:
    """``[R, n, W]`` cut into the columns of each set of tasks."""
    cut = tf.split(gradient, [width for width, _ in columns], axis=2)
    return list(zip(cut, (tasks for _, tasks in columns), strict=True))


def _summed(gradients: tf.Tensor, factors: tf.Tensor | None) -> tf.Tensor:
    """``[R, n, w]`` -> ``[n, w]``: the sum, each gradient times its factor of ``[R]``."""
    if factors is not None:
        gradients = gradients * factors[:, tf.newaxis, tf.newaxis]
    return tf.reduce_sum(gradients, axis=0)
