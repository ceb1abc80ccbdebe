"""STEM-Net (Su et al., AAAI 2024): shared and task-specific embeddings, experts of each, and a stop-gradient gate."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from stem_tf.layers.embedding import SHARED, Embedded, task_table
from stem_tf.layers.parts import Counts, Parts
from stem_tf.layers.seeds import seeds
from stem_tf.layers.stem import GateInput, STEMLayer
from stem_tf.models.network import Network, Outputs


class STEMNet(Network):
    """STEM layers, then a tower a task: ``y_t = sigma(MLP_t(o_t))`` (Eq. 6). Returns what sigma is taken of.

    Task t's loss trains the tables and experts t and S, gate t and tower t. With experts ``nfwfm`` this is the paper's
    production model with shared and task-specific embeddings (our reading of it: a group of experts per table).

    Shapes: ``{table: [B, D]}`` float32 with tables ``task:<name>`` and ``shared`` -> ``{task: [B]}`` float32.

    Args:
      tasks: names of the tasks.
      parts: makes experts, gates and towers.
      task_experts: K1, experts of each task.
      shared_experts: K2.
      layers: STEM layers one upon the other; the paper has one.
      gate_input: what task t's gate reads: ``task+shared`` h_t + h_S (Eq. 5), ``task`` h_t or ``shared`` h_S.
      stop_gradient: SG on the other tasks' experts (Eq. 4).
      released_stacking: with several layers, the shared gate without stop-gradient, as in the authors' release. There
        task t's loss leaks into other tasks' tables; the default stops it.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        parts: Parts,
        task_experts: Counts = 1,
        shared_experts: Counts = 1,
        layers: int = 1,
        gate_input: GateInput = "task+shared",
        stop_gradient: bool = True,
        released_stacking: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        self.tables = (*map(task_table, tasks), SHARED)
        self.stem_layers = [
            STEMLayer(
                tasks,
                parts,
                level,
                level == layers - 1,
                task_experts,
                shared_experts,
                gate_input,
                stop_gradient,
                released_stacking,
                name=f"stem_{level}",
            )
            for level in range(layers)
        ]
        self.towers = parts.towers(tasks)

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> Outputs:
        seed_of = seeds(seed)
        for layer in self.stem_layers:
            h = layer(h, training=training, seed=next(seed_of))
        return {
            task: tower(h[task_table(task)], training=training, seed=next(seed_of))[:, 0]
            for task, tower in self.towers.items()
        }

    def own_layers(self, task: str) -> list[tf.keras.layers.Layer]:
        table = task_table(task)
        own = [part[table] for layer in self.stem_layers for part in (layer.experts, layer.gates) if table in part]
        return [*own, self.towers[task]]
