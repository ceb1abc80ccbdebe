"""What the papers' networks have in common."""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

from stem_tf.layers.embedding import SHARED

Outputs = dict[str, tf.Tensor]


class Network(tf.keras.layers.Layer):
    """Base of the papers' models.

    Shapes: ``{table: [B, D]}`` float32 -> ``{task: [B]}`` float32, of logits or of what a regression's value is made.

    Attributes:
      tables: names of the tables that it reads.
      towers: the last layers of each task.
    """

    tables: tuple[str, ...] = (SHARED,)
    towers: Mapping[str, tf.keras.layers.Layer]

    def own_layers(self, task: str) -> list[tf.keras.layers.Layer]:
        """The layers that are ``task``'s alone, beside the table of its name; its tower where nothing else is said."""
        return [self.towers[task]]

    def penalty(
        self, outputs: Outputs, weights: Mapping[str, tf.Tensor], spaces: Mapping[str, tf.Tensor], share: float
    ) -> tf.Tensor:
        """This replica's part of what the model adds to the tasks' losses, a scalar; nothing, for most.

        Args:
          outputs: by task ``[B]``.
          weights: of the rows by task ``[B]``, 0 outside its space.
          spaces: sizes of the spaces over all replicas.
          share: this replica's of what no row has a part in, 1 / replicas.
        """
        return tf.constant(0.0)
