"""STEM-Net's layer (Su et al., AAAI 2024): experts of each task and shared ones, mixed by stop-gradient gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import tensorflow as tf

from stem_tf.layers.embedding import SHARED, Embedded, check_tables, task_table
from stem_tf.layers.gate import mixture
from stem_tf.layers.parts import Counts, LayerOfParts, Parts, count_of, numbered
from stem_tf.layers.seeds import seeds

GateInput = Literal["task+shared", "task", "shared"]


@tf.keras.utils.register_keras_serializable("stem_tf")
class STEMLayer(LayerOfParts):
    """Experts and gates of one layer (Eq. 3 to 5), for tables t in tasks and S shared::

        h_k^t = MLP_k^t(h_t), k <= K1        h_k^S = MLP_k^S(h_S), k <= K2                                  (3)
        g_t   = softmax(MLP(h_t + h_S)), over all K1 T + K2 experts                                         (5)
        o_t   = sum g_t h^t + sum g_t h^S + sum_{t' != t} g_t SG(h^t')                                      (4)

        h_a --> [experts a] --+--> gate a --> o_a        h_b's experts reach gate a through SG: task a's loss
        h_S --> [experts S] --+                          trains experts a and S and tables a and S, nothing of b.
        h_b --> [experts b] ..SG..^

    Between layers the shared path goes on as o_S, from a gate on h_S over all experts.
    Shapes: ``{table: [B, D]}`` -> ``{table: [B, H]}``, with tables ``task:<name>`` and ``shared``; the last layer
    returns the tasks' tables only.

    >>> layer = STEMLayer(["click", "like"], Parts(expert_units=(32, 16), gate_units=()), task_experts=2)
    >>> h = {table: tf.ones([5, 8]) for table in ("task:click", "task:like", "shared")}
    >>> {table: tuple(mixed.shape) for table, mixed in layer(h).items()}
    {'task:click': (5, 16), 'task:like': (5, 16)}

    Args:
      tasks: names of the tasks.
      parts: makes experts and gates.
      level: the layer's level, from 0.
      last: builds no shared gate: nothing would read it.
      task_experts: K1, experts of each task.
      shared_experts: K2.
      gate_input: what task t's gate reads: ``task+shared`` h_t + h_S (Eq. 5), ``task`` h_t or ``shared`` h_S.
      stop_gradient: SG on the other tasks' experts (Eq. 4).
      released_stacking: the shared gate without stop-gradient, as in the authors' release.

    Raises:
      ValueError: no tasks or no experts, an unknown ``gate_input``, or an input that lacks a table.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        parts: Parts,
        level: int = 0,
        last: bool = True,
        task_experts: Counts = 1,
        shared_experts: Counts = 1,
        gate_input: GateInput = "task+shared",
        stop_gradient: bool = True,
        released_stacking: bool = False,
        **kwargs: object,
    ) -> None:
        arguments = {
            "tasks": tasks,
            "parts": parts,
            "level": level,
            "last": last,
            "task_experts": task_experts,
            "shared_experts": shared_experts,
            "gate_input": gate_input,
            "stop_gradient": stop_gradient,
            "released_stacking": released_stacking,
        }
        super().__init__(arguments, **kwargs)
        if not tasks:
            raise ValueError("a STEMLayer needs at least one task; received tasks=[]")
        if gate_input not in get_args(GateInput):
            raise ValueError(f"gate_input should be one of {', '.join(get_args(GateInput))}; received {gate_input!r}")
        self.gate_input, self.stop_gradient, self.released_stacking = gate_input, stop_gradient, released_stacking
        counts = {task_table(task): count_of(task_experts, level, task) for task in tasks}
        counts[SHARED] = count_of(shared_experts, level)
        if not any(counts.values()):
            raise ValueError("a STEMLayer needs experts; received none of any task and no shared ones")
        readers = {task_table(task): task for task in tasks} | {SHARED: SHARED}
        # A group without experts (K1 = 0 or K2 = 0) adds nothing to a mixture.
        self.experts = {table: parts.experts(count, level) for table, count in counts.items() if count}
        names = [name for table, count in counts.items() if count for name in numbered(readers[table], count)]
        gated = [table for table in counts if not (last and table == SHARED)]
        self.gates = {table: parts.gate(readers[table], names, level) for table in gated}

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
        shared = () if self.gate_input == "task" else (SHARED,)
        check_tables(h, dict.fromkeys((*self.experts, *self.gates, *shared)))
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
