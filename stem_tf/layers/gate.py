"""Gates: a distribution over experts, and the mixture it makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from stem_tf.layers.mlp import MLP


class Gate(tf.keras.layers.Layer):
    """``softmax(MLP(x))`` over E experts (STEM Eq. 5). Shapes: ``[B, D]`` -> ``[B, E]``, float32 under any precision
    policy.

    Args:
      experts: E.
      units: hidden widths; the STEM paper's Eq. 5 has none, its settings and its release [128, 64].
      dropout, batch_norm: as in :class:`MLP`.
    """

    def __init__(
        self, experts: int, units: Sequence[int] = (), dropout: float = 0.0, batch_norm: bool = False, **kwargs: object
    ) -> None:
        super().__init__(**kwargs)
        self.mlp = MLP(units, out=experts, dropout=dropout, batch_norm=batch_norm, out_dtype="float32")

    def call(self, x: tf.Tensor, training: bool = False, seed: tf.Tensor | None = None) -> tf.Tensor:
        return tf.nn.softmax(self.mlp(x, training=training, seed=seed))


def mixture(weights: tf.Tensor, groups: Sequence[tf.Tensor]) -> tf.Tensor:
    """``sum_k weights[:, k] * expert_k`` over all experts of all groups, in the groups' order.

    Args:
      weights: ``[B, E]``, E the number of experts in all groups.
      groups: outputs of expert groups, each ``[K_g, B, H]``.

    Returns:
      ``[B, H]`` in the experts' dtype.
    """
    weights = tf.cast(tf.transpose(weights)[:, :, tf.newaxis], groups[0].dtype)
    parts = tf.split(weights, [group.shape[0] for group in groups])
    return tf.add_n([tf.reduce_sum(part * group, axis=0) for part, group in zip(parts, groups, strict=True)])
