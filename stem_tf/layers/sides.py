"""The input of a network for many candidates of one request, the request's own share kept apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

Share = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
"""The rows of a kernel ``[..., D, H]`` at columns ``[d]`` of what it multiplies: ``[..., d, H]``."""


def gather_share(kernel: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    """A :data:`Share` that is looked up at every call."""
    return tf.gather(kernel, columns, axis=-2)


class Sides(NamedTuple):
    """Flat embeddings ``[B * N, D]`` of N candidates for each of B requests, in two parts that are never joined.

    ``x W = once W[once_columns] + each W[each_columns]``: the first product, of B rows, serves all N candidates.
    Read by :class:`~stem_tf.layers.mlp.Linear`; a network's later layers see its output, ``[B * N, H]``.

    Attributes:
      once: of user and context features ``[B, D_once]``.
      each: of item features ``[B * N, D_each]``, the candidates of a request one after another.
      once_columns, each_columns: int32, the columns of the joint embedding that the two parts are; D in all.
      share: gives a part's rows of W.
    """

    once: tf.Tensor
    each: tf.Tensor
    once_columns: tf.Tensor
    each_columns: tf.Tensor
    share: Share = gather_share

    def __add__(self, other: Sides) -> Sides:  # type: ignore[override]
        """The sum of two embeddings of the same features, as h_t + h_S in a gate."""
        return self._replace(once=self.once + other.once, each=self.each + other.each)

    def __truediv__(self, number: float) -> Sides:
        return self._replace(once=self.once / number, each=self.each / number)

    def joined(self) -> tf.Tensor:
        """The joint embeddings ``[B * N, D]``, for layers that are not linear in their input."""
        requests, rows = tf.shape(self.once)[0], tf.shape(self.each)[0]
        once = tf.repeat(self.once, rows // tf.maximum(requests, 1), axis=0)
        order = tf.argsort(tf.concat([self.once_columns, self.each_columns], axis=0))
        return tf.gather(tf.concat([once, self.each], axis=1), order, axis=1)


def joined(x: tf.Tensor | Sides) -> tf.Tensor:
    """``x`` as one tensor."""
    return x.joined() if isinstance(x, Sides) else x
