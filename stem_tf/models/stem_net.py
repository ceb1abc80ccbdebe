"""STEM-Net (Su et al., AAAI 2024): shared and task-specific embeddings, experts of each, and a stop-gradient gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tensorflow as tf

from stem_tf.layers.embedding import SHARED
from stem_tf.layers.gate import Gate, mixture
from stem_tf.layers.mlp import MLP
from stem_tf.layers.seeds import seeds

Embedded = Mapping[str, tf.Tensor]


def task_table(task: str) -> str:
    """Name of the table that belongs to ``task`` alone."""
    return f"task:{task}"


@dataclass(frozen=True)
class STEMConfig:
    """Hyper-parameters of :class:`STEMNet`.

    Attributes:
      task_experts: K1, experts of each task.
      shared_experts: K2.
      expert_units: widths of an expert's layers, ReLU after every one.
      gate_units: hidden widths of a gate; () is Eq. 5's linear gate, (128, 64) the paper's settings and release.
      gate_input: what task t's gate reads: ``task+shared`` h_t + h_S (Eq. 5), ``task`` h_t or ``shared`` h_S.
      stop_gradient: SG on the other tasks' experts (Eq. 4).
      layers: STEM layers one upon the other; the paper has one.
      released_stacking: with several layers, the shared gate without stop-gradient, as in the authors' release. There
        task t's loss leaks into other tasks' tables; the default stops it.
      tower_units: hidden widths of a tower.
      dropout: rate after every hidden layer of experts, gates and towers.
      batch_norm: in experts, gates and towers.
    """

    task_experts: int = 1
    shared_experts: int = 1
    expert_units: tuple[int, ...] = (512, 512, 512)
    gate_units: tuple[int, ...] = (128, 64)
    gate_input: Literal["task+shared", "task", "shared"] = "task+shared"
    stop_gradient: bool = True
    layers: int = 1
    released_stacking: bool = False
    tower_units: tuple[int, ...] = (128, 64)
    dropout: float = 0.0
    batch_norm: bool = False


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
      tables: the tasks' table names.
      config: see :class:`STEMConfig`.
      last: builds no shared gate: nothing would read it.
    """

    def __init__(self, tables: Sequence[str], config: STEMConfig, last: bool, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.tables, self.config, self.last = tuple(tables), config, last
        counts = dict.fromkeys(tables, config.task_experts) | {SHARED: config.shared_experts}
        # A group without experts (K1 = 0 or K2 = 0) adds nothing to a mixture.
        counts = {table: count for table, count in counts.items() if count}
        hyper: dict[str, Any] = {"dropout": config.dropout, "batch_norm": config.batch_norm}
        self.experts = {table: MLP(config.expert_units, count=count, **hyper) for table, count in counts.items()}
        gated = self.tables if last else (*self.tables, SHARED)
        self.gates = {table: Gate(sum(counts.values()), config.gate_units, **hyper) for table in gated}

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
        seed_of = seeds(seed)
        experts = {
            table: group(h[table], training=training, seed=next(seed_of)) for table, group in self.experts.items()
        }
        stopped = {table: tf.stop_gradient(e) if self.config.stop_gradient else e for table, e in experts.items()}
        leak = self.config.released_stacking
        mixtures = {}
        for table, gate in self.gates.items():
            weights = gate(self._gate_input(h, table), training=training, seed=next(seed_of))
            live = (
                experts
                if table == SHARED and leak
                else stopped | {t: experts[t] for t in (table, SHARED) if t in experts}
            )
            mixtures[table] = mixture(weights, list(live.values()))
        return mixtures

    def _gate_input(self, h: Embedded, table: str) -> tf.Tensor:
        if table == SHARED or self.config.gate_input == "shared":
            return h[SHARED]
        return h[table] if self.config.gate_input == "task" else h[table] + h[SHARED]


class STEMNet(tf.keras.layers.Layer):
    """STEM layers, then a tower a task: ``y_t = sigma(MLP_t(o_t))`` (Eq. 6). Returns what sigma is taken of.

    Shapes: ``{table: [B, D]}`` float32 with tables ``task:<name>`` and ``shared`` -> ``{task: [B]}`` float32.

    Args:
      tasks: names of the tasks.
      config: see :class:`STEMConfig`.
    """

    def __init__(self, tasks: Sequence[str], config: STEMConfig, **kwargs: object) -> None:
        super().__init__(**kwargs)
        tables = [task_table(task) for task in tasks]
        self.stem_layers = [
            STEMLayer(tables, config, last=i == config.layers - 1, name=f"stem_{i}") for i in range(config.layers)
        ]
        self.towers = {
            task: MLP(config.tower_units, 1, dropout=config.dropout, batch_norm=config.batch_norm, out_dtype="float32")
            for task in tasks
        }

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
        seed_of = seeds(seed)
        for layer in self.stem_layers:
            h = layer(h, training=training, seed=next(seed_of))
        return {
            task: tower(h[task_table(task)], training=training, seed=next(seed_of))[:, 0]
            for task, tower in self.towers.items()
        }
