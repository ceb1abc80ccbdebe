"""STEM-Net's layer (Su et al., AAAI 2024): experts of each task and shared ones, mixed by stop-gradient gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import tensorflow as tf

from stem_tf.layers.embedding import SHARED, Embedded, task_table
from stem_tf.layers.gate import mixture
from stem_tf.layers.parts import Counts, Parts, count_of, numbered
from stem_tf.layers.seeds import seeds

GateInput = Literal["task+shared", "task", "shared"]


class STEMLayer(tf.keras.layers.Layer):
    """Experts and gates of one layer (Eq. 3 to 5), for tables t in tasks and S shared::

        h_k^t = MLP_k^t(h_t), k <= K1        h_k^S = MLP_k^S(h_S), k <= K2                                  (3)
        g_t   = softmax(MLP(h_t + h_S)), over all K1 T + K2 experts                                         (5)
        o_t   = sum g_t h^t + sum g_t h^S + sum_{t' != t} g_t SG(h^t')                                      (4)

        h_a --> [experts a] --+--> gate a --> o_a        h_b's experts reach gate a through SG: task a's loss
        h_S --> [experts S] --+                          trains experts a and S and tables a and S, nothing of b.
        h_b --> [experts b] ..SG..^

    Between layers the shared path goes on as o_S, from a gate on h_S over all experts.
    Shapes: ``{table: [B, D]}`` -> ``{table: [B, H]}``; the last layer returns the tasks' tables only.

    Args:
      level: of the layer, from 0.
      last: builds no shared gate: nothing would read it.
      others: as in :class:`STEMNet`.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        parts: Parts,
        level: int,
        last: bool,
        task_experts: Counts,
        shared_experts: Counts,
        gate_input: GateInput,
        stop_gradient: bool,
        released_stacking: bool,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        self.gate_input, self.stop_gradient, self.released_stacking = gate_input, stop_gradient, released_stacking
        counts = {task_table(task): count_of(task_experts, level, task) for task in tasks}
        counts[SHARED] = count_of(shared_experts, level)
        readers = {task_table(task): task for task in tasks} | {SHARED: SHARED}
        # A group without experts (K1 = 0 or K2 = 0) adds nothing to a mixture.
        self.experts = {table: parts.experts(count, level) for table, count in counts.items() if count}
        names = [name for table, count in counts.items() if count for name in numbered(readers[table], count)]
        gated = [table for table in counts if not (last and table == SHARED)]
        self.gates = {table: parts.gate(readers[table], names, level) for table in gated}

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
        seed_of = seeds(seed)
        experts = {
            table: group(h[table], training=training, seed=next(seed_of)) for table, group in self.experts.items()
        }
        stopped = {table: tf.stop_gradient(e) if self.stop_gradient else e for table, e in experts.items()}
        mixtures = {}
        for table, gate in self.gates.items():
            weights = gate(self._gate_input(h, table), training=training, seed=next(seed_of))
            live = (
                experts
                if table == SHARED and self.released_stacking
                else stopped | {t: experts[t] for t in (table, SHARED) if t in experts}
            )
            mixtures[table] = mixture(weights, list(live.values()))
        return mixtures

    def _gate_input(self, h: Embedded, table: str) -> tf.Tensor:
        if table == SHARED or self.gate_input == "shared":
            return h[SHARED]
        return h[table] if self.gate_input == "task" else h[table] + h[SHARED]
