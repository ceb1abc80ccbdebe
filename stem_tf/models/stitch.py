"""A network for each task, their layers mixed by learned weights: Cross-Stitch (CVPR 2016) and Sluice (AAAI 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tensorflow as tf

from stem_tf.layers.embedding import SHARED, Embedded
from stem_tf.layers.mlp import MLP
from stem_tf.layers.seeds import seeds
from stem_tf.models.hyperparameters import HiddenLayers, hyperparameter
from stem_tf.models.network import Network, Outputs
from stem_tf.models.registry import register
from stem_util.errors import UserError

SUBSPACES = 2
"""G, of each task and layer of a sluice network."""


class Stitch(tf.keras.layers.Layer):
    """``h_i <- sum_j A[i, j] h_j``: a cross-stitch unit (Misra et al., Eq. 1) for N paths.

    Shapes: ``[N, B, H]`` -> ``[N, B, H]``. Weight: A ``[N, N]``, .9 on its diagonal, the rest of 1 shared out over the
    row.

    Args:
      paths: N.
    """

    def __init__(self, paths: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        own = 0.9 if paths > 1 else 1.0
        rest = (1.0 - own) / max(paths - 1, 1)
        start = [[own if i == j else rest for j in range(paths)] for i in range(paths)]
        self.matrix = self.add_weight("matrix", (paths, paths), initializer=tf.constant_initializer(start))

    def call(self, h: tf.Tensor) -> tf.Tensor:
        return tf.tensordot(self.matrix, h, axes=1)


def _layers(tasks: Sequence[str], hyper: HiddenLayers) -> list[MLP]:
    """One hidden layer per level, of every task side by side: ``[B, D]`` or ``[T, B, D]`` -> ``[T, B, H_l]``."""
    return [
        MLP((units,), count=len(tasks), dropout=hyper.dropout, batch_norm=hyper.batch_norm)
        for units in hyper.parts.units()
    ]


@register("cross_stitch", "a bottom for each task, stitched after each layer")
class CrossStitch(Network):
    """A bottom for each task, stitched after each of its L layers (Misra et al., CVPR 2016; PLE paper, Fig. 1f)::

        h_t^l <- layer_t^l(h_t^(l-1)), h_t^0 = x        h_t^l <- sum_s A^l[t, s] h_s^l        (Misra et al., Eq. 1)
        y_t = tower_t(h_t^L)

        x --+--> [layer a] --.   .--> [layer a] --.   .--> tower a --> y_a
            |                 (A)                  (A)
            +--> [layer b] --'   '--> [layer b] --'   '--> tower b --> y_b

    Task t's loss trains the table, all tasks' layers and all of A, but of the last A only row t; its tower is its own.

    Shapes: ``{"shared": [B, D]}`` float32 -> ``{task: [B]}`` float32; h ``[T, B, H_l]``, A ``[T, T]``.
    """

    Hyperparameters = HiddenLayers

    def __init__(self, tasks: Sequence[str], hyper: HiddenLayers, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.bottoms = _layers(tasks, hyper)
        self.stitches = [Stitch(len(tasks)) for _ in self.bottoms]
        self.towers = hyper.parts.towers(tasks)

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> Outputs:
        seed_of, x = seeds(seed), h[SHARED]
        for layer, stitch in zip(self.bottoms, self.stitches, strict=True):
            x = stitch(layer(x, training=training, seed=next(seed_of)))
        return {
            task: tower(h_t, training=training, seed=next(seed_of))[:, 0]
            for (task, tower), h_t in zip(self.towers.items(), tf.unstack(x), strict=True)
        }


@register("sluice", "Cross-Stitch on subspaces, towers read all layers")
class Sluice(Network):
    """Cross-Stitch on the G = 2 halves of each layer; towers read all layers (Ruder et al., AAAI 2019; PLE Fig. 1g)::

        [h_t1^l, h_t2^l] <- layer_t^l(h_t^(l-1)), h_t^0 = x
        h_tg^l <- sum_{s, f} A^l[tg, sf] h_sf^l             h_t^l = [h_t1^l, h_t2^l]
        y_t = tower_t(sum_l b_t[l] h_t^l)
        penalty: orthogonality * sum_{t, l} ||S_t1^l' S_t2^l||_F^2, S_tg^l the columns of layer t that make h_tg^l

        x --+--> [layer a] --> a1, a2 --.   .--> h_a^1 --> [layer a] ...        h_a^1, ..., h_a^L --> (b_a) --> tower a
            |                           (A)
            +--> [layer b] --> b1, b2 --'   '--> h_b^1 --> [layer b] ...        h_b^1, ..., h_b^L --> (b_b) --> tower b

    Task t's loss trains the table, all tasks' layers and all of A, but of the last A only the rows of task t's halves,
    and of b only b_t; its tower is its own. The penalty trains the layers.

    Shapes: ``{"shared": [B, D]}`` float32 -> ``{task: [B]}`` float32; h ``[T, B, H]``, A ``[2 T, 2 T]`` with the first
    halves of all tasks before the second ones, b ``[T, L]`` from 1 / L.

    Raises:
      UserError: the layers are not of one even width.
    """

    @dataclass(frozen=True)
    class Hyperparameters(HiddenLayers):
        """The weight of the penalty, which keeps a task's halves apart: ``orthogonality``."""

        orthogonality: float = hyperparameter(0.0, "weight that keeps a task's subspaces apart", low=0)

    def __init__(self, tasks: Sequence[str], hyper: Hyperparameters, **kwargs: object) -> None:
        super().__init__(**kwargs)
        units = hyper.parts.units()
        if len(set(units)) > 1 or units[0] % SUBSPACES:
            raise UserError(
                "config.model.expert_units should be one even width for all layers of a sluice network, which halves "
                f"each and mixes all, but is {units}"
            )
        self.orthogonality = hyper.orthogonality
        self.bottoms = _layers(tasks, hyper)
        self.stitches = [Stitch(SUBSPACES * len(tasks)) for _ in units]
        self.mixture = self.add_weight(
            "mixture", (len(tasks), len(units)), initializer=tf.constant_initializer(1.0 / len(units))
        )
        self.towers = hyper.parts.towers(tasks)

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> Outputs:
        seed_of, x = seeds(seed), h[SHARED]
        levels = []
        for layer, stitch in zip(self.bottoms, self.stitches, strict=True):
            halves = tf.split(layer(x, training=training, seed=next(seed_of)), SUBSPACES, axis=-1)
            x = tf.concat(tf.split(stitch(tf.concat(halves, axis=0)), SUBSPACES), axis=-1)
            levels.append(x)
        mixed = tf.einsum("tl,ltbh->tbh", self.mixture, tf.stack(levels))
        return {
            task: tower(h_t, training=training, seed=next(seed_of))[:, 0]
            for (task, tower), h_t in zip(self.towers.items(), tf.unstack(mixed), strict=True)
        }

    def penalty(
        self, outputs: Outputs, weights: Mapping[str, tf.Tensor], spaces: Mapping[str, tf.Tensor], share: float
    ) -> tf.Tensor:
        if not self.orthogonality:
            return super().penalty(outputs, weights, spaces, share)
        halves = [tf.split(layer.linears[0].kernel, SUBSPACES, axis=-1) for layer in self.bottoms]
        overlap = [tf.reduce_sum(tf.square(tf.matmul(s1, s2, transpose_a=True))) for s1, s2 in halves]
        return share * self.orthogonality * tf.add_n(overlap)
