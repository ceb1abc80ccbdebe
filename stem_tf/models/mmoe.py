"""Mixtures of experts that all tasks share: OMoE, MMoE (Ma et al., KDD 2018), ML-MMoE (PLE) and ME-MMoE (STEM)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import tensorflow as tf

from stem_tf.layers.embedding import SHARED, Embedded
from stem_tf.layers.gate import mixture
from stem_tf.layers.parts import count_of, numbered
from stem_tf.layers.seeds import seeds
from stem_tf.layers.sides import Sides, joined
from stem_tf.models.hyperparameters import CommonExperts, Gates, Levels
from stem_tf.models.network import Network, Outputs
from stem_tf.models.registry import register


@register("omoe", "mixture of experts with one gate for all tasks")
class OMoE(Network):
    """One-gate Mixture-of-Experts (MMoE paper, Eq. 5 in place of the shared bottom of Eq. 1)::

        f(x) = sum_i g(x)_i f_i(x)        g(x) = softmax(W_g x)                            (5)
        y_k  = h^k(f(x))                                                                   (1)

        x --+--> [expert 1] --+                   +--> tower a --> y_a
            +--> [expert E] --+--> gate --> f(x) --+
            +---- selector ---------^             +--> tower b --> y_b

    Every task's loss trains the table, all experts and the gate; only the towers are one task's.

    Shapes: ``{"shared": [B, D]}`` float32 -> ``{task: [B]}`` float32; experts ``[E, B, H]``.
    """

    Hyperparameters = CommonExperts

    def __init__(self, tasks: Sequence[str], hyper: CommonExperts, **kwargs: object) -> None:
        super().__init__(**kwargs)
        parts, count = hyper.parts, count_of(hyper.experts)
        self.experts = parts.experts(count)
        self.gate = parts.gate("all tasks", numbered("expert", count))
        self.towers = parts.towers(tasks)

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> Outputs:
        seed_of, x = seeds(seed), h[SHARED]
        experts = self.experts(x, training=training, seed=next(seed_of))
        mixed = mixture(self.gate(x, training=training, seed=next(seed_of)), [experts])
        return {task: tower(mixed, training=training, seed=next(seed_of))[:, 0] for task, tower in self.towers.items()}


class GatePerTask(Network):
    """A gate and a tower for each task over the same experts (MMoE paper, Eq. 6 to 8); the models below end in it.

    Args:
      tasks: names of the tasks.
      hyper: says how gates and towers are made.
      experts: how many there are.
      level: the experts' level.
    """

    def __init__(self, tasks: Sequence[str], hyper: Gates, experts: int, level: int = 0, **kwargs: object) -> None:
        super().__init__(**kwargs)
        parts = hyper.parts
        self.gates = {task: parts.gate(task, numbered("expert", experts), level) for task in tasks}
        self.towers = parts.towers(tasks)

    def answer(
        self, x: tf.Tensor | Sides, experts: tf.Tensor, training: bool, seed_of: Iterator[tf.Tensor | None]
    ) -> Outputs:
        """``h^k(sum_i g^k(x)_i f_i)`` by task ``[B]``, of the selector x ``[B, D]`` and the experts ``[E, B, H]``."""
        outputs = {}
        for task, gate in self.gates.items():
            mixed = mixture(gate(x, training=training, seed=next(seed_of)), [experts])
            outputs[task] = self.towers[task](mixed, training=training, seed=next(seed_of))[:, 0]
        return outputs

    def own_layers(self, task: str) -> list[tf.keras.layers.Layer]:
        return [self.gates[task], self.towers[task]]


@register("mmoe", "mixture of experts with a gate for each task")
class MMoE(GatePerTask):
    """Multi-gate Mixture-of-Experts (MMoE paper, Eq. 6 to 8)::

        y_k    = h^k(f^k(x))                                                               (6)
        f^k(x) = sum_i g^k(x)_i f_i(x)                                                     (7)
        g^k(x) = softmax(W_gk x)                                                           (8)

        x --+--> [expert 1] --+--> gate a --> tower a --> y_a
            +--> [expert E] --+--> gate b --> tower b --> y_b
            +---- selector of every gate ^

    Every task's loss trains the table and all experts; gate k and tower k are task k's. With experts ``nfwfm`` this is
    the production model that the STEM paper compares with, before it gets task-specific embeddings.

    Shapes: ``{"shared": [B, D]}`` float32 -> ``{task: [B]}`` float32; experts ``[E, B, H]``.
    """

    Hyperparameters = CommonExperts

    def __init__(self, tasks: Sequence[str], hyper: CommonExperts, **kwargs: Any) -> None:
        count = count_of(hyper.experts)
        super().__init__(tasks, hyper, count, **kwargs)
        self.experts = hyper.parts.experts(count)

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> Outputs:
        seed_of, x = seeds(seed), h[SHARED]
        experts = self.experts(x, training=training, seed=next(seed_of))
        return self.answer(x, experts, training, seed_of)


@register("ml_mmoe", "levels of experts, all gates read the input")
class MLMMoE(GatePerTask):
    """Multi-layer MMoE (PLE paper, section 5.1.2 and Fig. 1h): levels of experts, and one selector for all gates, x::

        f_i^1 = expert of x
        f_i^j = expert of sum_m g_i^{j-1}(x)_m f_m^{j-1}, 1 < j <= N        g_i^j(x) = softmax(W_i^j x)
        y_k   = h^k(sum_m g^k(x)_m f_m^N)

        x --+--> [expert 1] --+--> gate 1 --> [expert 1] --+--> gate a --> tower a --> y_a
            +--> [expert E] --+--> gate E --> [expert E] --+--> gate b --> tower b --> y_b
            +---- selector of every gate ^ ---------------------------^

    Every task's loss trains the table, all experts and the gates between levels; the gate on the last level and the
    tower are one task's. One level is MMoE.

    Shapes: ``{"shared": [B, D]}`` float32 -> ``{task: [B]}`` float32; experts of level j ``[E_j, B, H_j]``.
    """

    @dataclass(frozen=True)
    class Hyperparameters(Levels, CommonExperts):
        """E_j = ``experts``, one number or one per level; N = ``layers``."""

        own_depth: ClassVar[int] = 2

    def __init__(self, tasks: Sequence[str], hyper: Hyperparameters, **kwargs: Any) -> None:
        parts, depth = hyper.parts, hyper.depth
        counts = [count_of(hyper.experts, level) for level in range(depth)]
        super().__init__(tasks, hyper, counts[-1], depth - 1, **kwargs)
        self.levels = [parts.experts(count, level) for level, count in enumerate(counts)]
        names = [numbered("expert", count) for count in counts]
        # By level but the last: the gates over its experts, one for each expert of the next level.
        self.between = [
            [parts.gate(reader, names[level], level) for reader in names[level + 1]] for level in range(depth - 1)
        ]

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> Outputs:
        seed_of, x = seeds(seed), h[SHARED]
        first, *higher = self.levels
        experts = first(x, training=training, seed=next(seed_of))
        for gates, level in zip(self.between, higher, strict=True):
            weights = [gate(x, training=training, seed=next(seed_of)) for gate in gates]
            mixed = tf.stack([mixture(w, [experts]) for w in weights])
            experts = level(mixed, training=training, seed=next(seed_of))
        return self.answer(x, experts, training, seed_of)


@register("me_mmoe", "MMoE with a table for each expert")
class MEMMoE(MMoE):
    """MMoE with a table for each expert, the STEM paper's ME-MMoE::

        f_i = expert i of h_i        x = (h_1 + ... + h_E) / E
        y_k = h^k(sum_i g^k(x)_i f_i)        g^k(x) = softmax(W_gk x)

        h_1 --+--> [expert 1] --+--> gate a --> tower a --> y_a
        h_E --+--> [expert E] --+--> gate b --> tower b --> y_b
              +-- mean: selector ^

    The STEM paper gives no equation and does not say what the gates read: the mean of the experts' embeddings is our
    reading. Every task's loss trains all tables and all experts, so that no table is a task's own.

    Shapes: ``{"expert:0": [B, D], ..., "expert:<E - 1>": [B, D]}`` float32 -> ``{task: [B]}`` float32; experts
    ``[E, B, H]``, the first one on table ``expert:0``. There is no shared table.
    """

    def __init__(self, tasks: Sequence[str], hyper: CommonExperts, **kwargs: object) -> None:
        super().__init__(tasks, hyper, **kwargs)
        self.tables = tuple(f"expert:{i}" for i in range(count_of(hyper.experts)))

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> Outputs:
        seed_of = seeds(seed)
        x = functools.reduce(operator.add, [h[table] for table in self.tables]) / len(self.tables)
        own = tf.stack([joined(h[table]) for table in self.tables])
        experts = self.experts(own, training=training, seed=next(seed_of))
        return self.answer(x, experts, training, seed_of)
