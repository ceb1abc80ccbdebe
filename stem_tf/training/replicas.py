"""What the replicas of a step do together: sums, unions of rows, and writing to every replica's variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from stem_tf.layers.distinct import deduplicate


class Replicas:
    """The replicas that share a batch; each of them calls the methods, in replica context.

    Args:
      strategy: the strategy that they run under.
      static: whether what they sum has the same shape in every step, as collectives inside a loop need it.

    Attributes:
      count: how many there are.
      static: as given; False for a single replica.
    """

    def __init__(self, strategy: tf.distribute.Strategy, static: bool = False) -> None:
        self.count = strategy.num_replicas_in_sync
        self.static = static and self.count > 1

    def sum(self, tensors: Any) -> Any:
        """A structure of tensors, each summed over the replicas."""
        if self.count == 1:
            return tensors
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tensors)

    def own_seed(self, seed: tf.Tensor) -> tf.Tensor:
        """A seed ``[2]`` that differs between replicas; ``seed`` itself where there is one replica."""
        if self.count == 1:
            return seed
        context = tf.distribute.get_replica_context()
        return tf.random.experimental.stateless_fold_in(seed, context.replica_id_in_sync_group)

    def union(self, ids: tf.Tensor, size: int) -> tuple[tf.Tensor, tf.Tensor]:
        """The rows that any replica reads.

        Args:
          ids: ``[U]`` distinct rows of this replica, 0 or larger.
          size: the largest U of any replica, to which they are padded: between devices, collectives have static shapes.

        Returns:
          ids ``[V]``, in the same order on every replica, and the place of this replica's rows among them ``[U]``.
        """
        context = tf.distribute.get_replica_context()
        padded = tf.ensure_shape(tf.pad(ids, [[0, size - tf.size(ids)]], constant_values=-1), [size])
        gathered = context.all_gather(padded, axis=0)
        there = gathered >= 0
        distinct, place = deduplicate(tf.boolean_mask(gathered, there))
        first = tf.math.count_nonzero(there[: size * context.replica_id_in_sync_group], dtype=tf.int32)
        return distinct, place[first : first + tf.size(ids)]


def update_mirrors(variable: tf.Variable, update: Callable[..., None], *args: object) -> None:
    """Runs ``update(variable, *args)`` on every replica's copy of ``variable``; called in replica context.

    Variables among ``args`` (nested ones too) and per-replica tensors arrive as the copy that belongs to the replica.
    Under MirroredStrategy a replica may not write to a variable directly.
    """

    def merge(strategy: tf.distribute.Strategy, variable: tf.Variable, *args: object) -> None:
        strategy.extended.update(variable, update, args=args)

    tf.distribute.get_replica_context().merge_call(merge, args=(variable, *args))
