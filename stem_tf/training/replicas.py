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

    Attributes:
      count: how many there are.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self.count = strategy.num_replicas_in_sync
        # Over a network, collectives pad to the size of the largest replica; between devices, sizes have to be static.
        self._of_any_size = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)

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

    def union(self, ids: tf.Tensor, values: tf.Tensor, size: int) -> tuple[tf.Tensor, tf.Tensor]:
        """The union of every replica's distinct rows; gradients of rows that several replicas read are added up.

        Args:
          ids: ``[U]`` distinct rows of this replica.
          values: ``[U, W]`` their gradients.
          size: positions P in a replica's batch, at least U; both are padded to it for collectives of static size.

        Returns:
          ids ``[V]`` and values ``[V, W]``, the same on every replica.
        """
        context = tf.distribute.get_replica_context()
        if not self._of_any_size:
            padding = size - tf.shape(ids)[0]
            ids = tf.ensure_shape(tf.pad(ids, [[0, padding]], constant_values=-1), [size])
            values = tf.ensure_shape(tf.pad(values, [[0, padding], [0, 0]]), [size, values.shape[1]])
        ids, values = context.all_gather(ids, axis=0), context.all_gather(values, axis=0)
        if not self._of_any_size:
            kept = ids >= 0
            ids, values = tf.boolean_mask(ids, kept), tf.boolean_mask(values, kept)
        distinct, place = deduplicate(ids)
        return distinct, tf.math.unsorted_segment_sum(values, place, tf.shape(distinct)[0])


def update_mirrors(variable: tf.Variable, update: Callable[..., None], *args: object) -> None:
    """Runs ``update(variable, *args)`` on every replica's copy of ``variable``; called in replica context.

    Variables among ``args`` (nested ones too) and per-replica tensors arrive as the copy that belongs to the replica.
    Under MirroredStrategy a replica may not write to a variable directly.
    """

    def merge(strategy: tf.distribute.Strategy, variable: tf.Variable, *args: object) -> None:
        strategy.extended.update(variable, update, args=args)

    tf.distribute.get_replica_context().merge_call(merge, args=(variable, *args))
