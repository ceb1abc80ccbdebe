"""What all networks have in common, and what a network of your own defines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import tensorflow as tf

from stem_tf.layers.embedding import SHARED
from stem_tf.models import hyperparameters

Outputs = dict[str, tf.Tensor]


class Network(tf.keras.layers.Layer):
    """Base of all models: a layer ``Network(tasks, hyper)`` of the tasks' names and its :class:`Hyperparameters`.

    Shapes: ``{table: [B, D]}`` float32 -> ``{task: [B]}`` float32: logits, or a regression's value before its sigmoid
    or scale. ``call`` takes ``training`` and ``seed``, an int ``[2]`` that determines the dropout masks, or None.

    Attributes:
      Hyperparameters: the frozen dataclass of the model's config keys.
      shares: whether tasks share anything; where they do not, each keeps the weights of its own best epoch.
      tables: names of the tables that it reads.
      towers: the last layers of each task.
    """

    Hyperparameters: type[hyperparameters.Hyperparameters] = hyperparameters.Hyperparameters
    shares: ClassVar[bool] = True
    tables: tuple[str, ...] = (SHARED,)
    towers: Mapping[str, tf.keras.layers.Layer]

    def own_layers(self, task: str) -> list[tf.keras.layers.Layer]:
        """The layers that are ``task``'s alone, beside the table of its name; by default its tower."""
        return [self.towers[task]]

    def penalty(
        self, outputs: Outputs, weights: Mapping[str, tf.Tensor], spaces: Mapping[str, tf.Tensor], share: float
    ) -> tf.Tensor:
        """This replica's part of what the model adds to the tasks' losses, a scalar; 0 for most models.

        Args:
          outputs: outputs by task ``[B]``.
          weights: weights of the rows by task ``[B]``, 0 outside its space.
          spaces: sums of these weights over all replicas, by task.
          share: 1 / replicas, the weight of terms that are not sums over rows.
        """
        return tf.constant(0.0)
