"""PLE (Tang et al., RecSys 2020): experts of each task and shared ones, separated level by level; CGC and ME-PLE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import tensorflow as tf

from stem_tf.layers.embedding import SHARED, Embedded, task_table
from stem_tf.layers.extraction import ExtractionNetwork
from stem_tf.layers.parts import count_of
from stem_tf.layers.seeds import seeds
from stem_tf.models.hyperparameters import ReleasedStacking, TaskExperts, TaskTables
from stem_tf.models.network import Network, Outputs
from stem_tf.models.registry import register


class Extraction(Network):
    """A stack of extraction networks, then a tower for each task: what the models below are made of.

    Args:
      tasks: names of the tasks.
      hyper: m_k = ``task_experts`` of each task (and level), m_s = ``shared_experts`` (of each level), N = ``depth``.
      released_stacking: the shared gate mixes shared experts only, as in the STEM authors' release. Then a task's
        experts and gates are its own on all levels.

    Raises:
      UserError: a gate would have no expert to mix.
    """

    def __init__(
        self, tasks: Sequence[str], hyper: TaskExperts, released_stacking: bool = False, **kwargs: object
    ) -> None:
        super().__init__(**kwargs)
        self.paths = (*map(task_table, tasks), SHARED)
        self.levels = [
            ExtractionNetwork(
                tasks,
                hyper.parts,
                level,
                any(count_of(hyper.shared_experts, above) for above in range(level + 1, hyper.depth)),
                hyper.task_experts,
                hyper.shared_experts,
                released_stacking,
                name=f"extraction_{level}",
            )
            for level in range(hyper.depth)
        ]
        self.towers = hyper.parts.towers(tasks)

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> Outputs:
        seed_of = seeds(seed)
        g = {path: h[path] if path in self.tables else h[SHARED] for path in self.paths}
        for level in self.levels:
            g = level(g, training=training, seed=next(seed_of))
        return {
            task: tower(g[task_table(task)], training=training, seed=next(seed_of))[:, 0]
            for task, tower in self.towers.items()
        }

    def own_layers(self, task: str) -> list[tf.keras.layers.Layer]:
        path = task_table(task)
        # Other tasks' losses come through a shared gate over the task's experts, and from these to the gates below.
        open_gates = [level.selected.get(SHARED, ()) for level in self.levels]
        reached = [j for j, level in enumerate(self.levels) if path in level.experts and path in open_gates[j]]
        top = max(reached, default=-1)
        own = [level.experts[path] for level in self.levels[top + 1 :] if path in level.experts]
        return [*own, *(level.gates[path] for level in self.levels[max(top, 0) :]), self.towers[task]]


@register("cgc", "experts of each task and shared ones; one level of PLE")
class CGC(Extraction):
    """Customized Gate Control (PLE paper, Eq. 2 to 5): PLE with one level, on which nothing is shared but experts::

        y^k(x) = t^k(g^k(x))        g^k(x) = Softmax(W_g^k x) S^k(x)                               (2, 3, 5)
        S^k(x) = [E_(k,1), ..., E_(k,m_k), E_(s,1), ..., E_(s,m_s)], all experts of x              (4)

            +--> [experts a] --+--> gate a --> tower a --> y^a
        x --+--> [experts s] --+
            +--> [experts b] --+--> gate b --> tower b --> y^b

    Task k's loss trains the table, the shared experts, and the experts, the gate and the tower of task k.

    Shapes: ``{"shared": [B, D]}`` float32 -> ``{task: [B]}`` float32.
    """

    Hyperparameters = TaskExperts


@register("ple", "levels of CGC, progressively separated")
class PLE(Extraction):
    """Progressive Layered Extraction: N extraction networks on the input x, then a tower for each task::

        g^{k,0} = g^{s,0} = x        g^{k,j}, g^{s,j}: see ExtractionNetwork, j <= N               (2 to 4, 6)
        y^k = t^k(g^{k,N})                                                                         (7; 5 for N = 1)

        x --+--> [extraction 1] --g^{a,1}--> [extraction 2] --g^{a,2}--> tower a --> y^a
            +-->        "       --g^{s,1}-->        "
            +-->        "       --g^{b,1}-->        "       --g^{b,2}--> tower b --> y^b

    Task k's loss trains the table and, on the last level, gate k, the experts of task k and the shared ones, but
    nothing of other tasks. Below, the shared gate leads it to every task's experts, and from there to their gates on
    the level before: parameters are separated progressively.

    Shapes: ``{"shared": [B, D]}`` float32 -> ``{task: [B]}`` float32.
    """

    @dataclass(frozen=True)
    class Hyperparameters(ReleasedStacking, TaskExperts):
        """N = ``layers``."""

        own_depth: ClassVar[int] = 2

    def __init__(self, tasks: Sequence[str], hyper: Hyperparameters, **kwargs: object) -> None:
        super().__init__(tasks, hyper, hyper.released_stacking, **kwargs)


@register("me_ple", "PLE with a table for each task and a shared one")
class MEPLE(Extraction):
    """PLE with a table for each task and a shared one, the STEM paper's ME-PLE: g^{k,0} = h_k, g^{s,0} = h_S::

        h_a --> [experts a] --+--> gate a --> ... tower a --> y^a
        h_S --> [experts s] --+
        h_b --> [experts b] --+--> gate b --> ... tower b --> y^b

    The STEM paper gives no equation: that task k's experts and gate read h_k, the shared ones h_S, is our reading.
    With one level task k's loss trains tables k and S and the experts k and s; with more, through the shared gate,
    every table, unlike STEM-Net's: gradients are not stopped.

    Shapes: ``{table: [B, D]}`` float32 with tables ``task:<name>`` and ``shared`` -> ``{task: [B]}`` float32.
    """

    @dataclass(frozen=True)
    class Hyperparameters(ReleasedStacking, TaskExperts, TaskTables):
        """N = ``layers``; one where nothing is said, unlike PLE's two."""

    def __init__(self, tasks: Sequence[str], hyper: Hyperparameters, **kwargs: object) -> None:
        super().__init__(tasks, hyper, hyper.released_stacking, **kwargs)
        self.tables = self.paths
