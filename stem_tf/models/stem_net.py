"""STEM-Net (Su et al., AAAI 2024): shared and task-specific embeddings, experts of each, and a stop-gradient gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf

from stem_tf.layers.embedding import SHARED, Embedded, task_table
from stem_tf.layers.seeds import seeds
from stem_tf.layers.stem import GateInput, STEMLayer
from stem_tf.models.hyperparameters import ReleasedStacking, TaskExperts, TaskTables, hyperparameter
from stem_tf.models.network import Network, Outputs
from stem_tf.models.registry import register


@register("stem_net", "STEM-Net")
class STEMNet(Network):
    """STEM layers, then a tower for each task: ``y_t = sigma(MLP_t(o_t))`` (Eq. 6). Returns what sigma is taken of.

    Task t's loss trains the tables and experts t and S, gate t and tower t. With experts ``nfwfm`` this is the paper's
    production model with shared and task-specific embeddings (our reading of it: a group of experts per table).

    Shapes: ``{table: [B, D]}`` float32 with tables ``task:<name>`` and ``shared`` -> ``{task: [B]}`` float32.
    """

    @dataclass(frozen=True)
    class Hyperparameters(ReleasedStacking, TaskExperts, TaskTables):
        """K1 = ``task_experts``, K2 = ``shared_experts``; the paper has one STEM layer.

        Attributes:
          gate_input: what task t's gate reads: ``task+shared`` h_t + h_S (Eq. 5), ``task`` h_t or ``shared`` h_S.
          stop_gradient: SG on the other tasks' experts (Eq. 4).
          released_stacking: with several layers, the shared gate without stop-gradient, as in the authors' release.
            There task t's loss leaks into other tasks' tables; the default stops it.
        """

        gate_input: GateInput = hyperparameter(
            "task+shared",
            "what a task's gate reads: h_t + h_S, h_t or h_S",
            choices=("task+shared", "task", "shared"),
        )
        stop_gradient: bool = hyperparameter(True, "keep a task's loss from other tasks' experts and tables")

    def __init__(self, tasks: Sequence[str], hyper: Hyperparameters, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.tables = (*map(task_table, tasks), SHARED)
        self.stem_layers = [
            STEMLayer(
                tasks,
                hyper.parts,
                level,
                level == hyper.depth - 1,
                hyper.task_experts,
                hyper.shared_experts,
                hyper.gate_input,
                hyper.stop_gradient,
                hyper.released_stacking,
                name=f"stem_{level}",
            )
            for level in range(hyper.depth)
        ]
        self.towers = hyper.parts.towers(tasks)

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
