"""PLE (Tang et al., RecSys 2020): experts of each task and shared ones, separated level by level; CGC and ME-PLE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from stem_tf.layers.embedding import SHARED, Embedded, task_table
from stem_tf.layers.extraction import ExtractionNetwork
from stem_tf.layers.parts import Counts, Parts, count_of
from stem_tf.layers.seeds import seeds
from stem_tf.models.network import Network, Outputs


class PLE(Network):
    """Progressive Layered Extraction: N extraction networks on the input x, then a tower a task::

        g^{k,0} = g^{s,0} = x        g^{k,j}, g^{s,j}: see ExtractionNetwork, j <= N               (2 to 4, 6)
        y^k = t^k(g^{k,N})                                                                         (7; 5 for N = 1)

        x --+--> [extraction 1] --g^{a,1}--> [extraction 2] --g^{a,2}--> tower a --> y^a
            +-->        "       --g^{s,1}-->        "
            +-->        "       --g^{b,1}-->        "       --g^{b,2}--> tower b --> y^b

    Task k's loss trains the table and, on the last level, gate k and the experts of task k and the shared ones, of
    other tasks nothing. Below, the shared gate leads it to every task's experts, and from there to their gates on the
    level before: parameters are separated progressively.

    Shapes: ``{"shared": [B, D]}`` float32 -> ``{task: [B]}`` float32.

    Args:
      tasks: names of the tasks.
      parts: makes experts, gates and towers.
      task_experts: m_k, experts of each task; may differ by task and level.
      shared_experts: m_s; may differ by level.
      layers: N.
      released_stacking: the shared gate mixes shared experts only, as in the STEM authors' release. Then a task's
        experts and gates are its own on all levels.

    Raises:
      UserError: a gate would have no expert to mix.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        parts: Parts,
        task_experts: Counts = 1,
        shared_experts: Counts = 1,
        layers: int = 2,
        released_stacking: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        self.paths = (*map(task_table, tasks), SHARED)
        self.levels = [
            ExtractionNetwork(
                tasks,
                parts,
                level,
                any(count_of(shared_experts, above) for above in range(level + 1, layers)),
                task_experts,
                shared_experts,
                released_stacking,
                name=f"extraction_{level}",
            )
            for level in range(layers)
        ]
        self.towers = parts.towers(tasks)

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


class CGC(PLE):
    """Customized Gate Control (PLE paper, Eq. 2 to 5): PLE with one level, on which nothing is shared but experts::

        y^k(x) = t^k(g^k(x))        g^k(x) = Softmax(W_g^k x) S^k(x)                               (2, 3, 5)
        S^k(x) = [E_(k,1), ..., E_(k,m_k), E_(s,1), ..., E_(s,m_s)], all experts of x              (4)

            +--> [experts a] --+--> gate a --> tower a --> y^a
        x --+--> [experts s] --+
            +--> [experts b] --+--> gate b --> tower b --> y^b

    Task k's loss trains the table, the shared experts, and the experts, the gate and the tower of task k.

    Shapes: ``{"shared": [B, D]}`` float32 -> ``{task: [B]}`` float32.

    Args:
      tasks: names of the tasks.
      parts: makes experts, gates and towers.
      task_experts: m_k, experts of each task; may differ by task.
      shared_experts: m_s.

    Raises:
      UserError: a task has neither experts of its own nor shared ones.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        parts: Parts,
        task_experts: Counts = 1,
        shared_experts: Counts = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(tasks, parts, task_experts, shared_experts, layers=1, **kwargs)


class MEPLE(PLE):
    """PLE with a table for each task and a shared one, the STEM paper's ME-PLE: g^{k,0} = h_k, g^{s,0} = h_S::

        h_a --> [experts a] --+--> gate a --> ... tower a --> y^a
        h_S --> [experts s] --+
        h_b --> [experts b] --+--> gate b --> ... tower b --> y^b

    The STEM paper has no equation of it: that task k's experts and gate read h_k, the shared ones h_S, is our reading.
    With one level task k's loss trains tables k and S and the experts k and s; with more, through the shared gate,
    every table, unlike STEM-Net's: gradients are not stopped.

    Shapes: ``{table: [B, D]}`` float32 with tables ``task:<name>`` and ``shared`` -> ``{task: [B]}`` float32.

    Args:
      others: as in :class:`PLE`.
      layers: N.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        parts: Parts,
        task_experts: Counts = 1,
        shared_experts: Counts = 1,
        layers: int = 1,
        released_stacking: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(tasks, parts, task_experts, shared_experts, layers, released_stacking, **kwargs)
        self.tables = self.paths
