"""A model of your own: one bottom, whose units each task scales.

    PYTHONPATH=. stem-train --config=small --config.model.module=examples.my_model \
        --config.model.name=scaled_bottom --config.model.strength=3 --config.data.dir=DATA --workdir=RUN
"""

from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf

from stem_tf.layers.embedding import SHARED, Embedded
from stem_tf.layers.mlp import Linear
from stem_tf.layers.seeds import seeds
from stem_tf.models.hyperparameters import Experts, hyperparameter
from stem_tf.models.network import Network, Outputs
from stem_tf.models.registry import register


@register("scaled_bottom", "one bottom, whose units each task scales")
class ScaledBottom(Network):
    """``y_t = tower_t(strength * sigmoid(W_t x + b_t) * bottom(x))``: ``{"shared": [B, D]}`` -> ``{task: [B]}``."""

    @dataclass(frozen=True)
    class Hyperparameters(Experts):
        strength: float = hyperparameter(2.0, "what a task multiplies a unit of the bottom by, at most", above=0)

    def __init__(self, tasks: Sequence[str], hyper: Hyperparameters, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.strength = hyper.strength
        self.bottom = hyper.parts.experts(1)
        self.scales = {task: Linear(hyper.parts.units()[-1]) for task in tasks}
        self.towers = hyper.parts.towers(tasks)

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> Outputs:
        seed_of, x = seeds(seed), h[SHARED]
        bottom = self.bottom(x, training=training, seed=next(seed_of))[0]
        scaled = {task: self.strength * tf.sigmoid(scale(x)) * bottom for task, scale in self.scales.items()}
        return {
            task: tower(scaled[task], training=training, seed=next(seed_of))[:, 0]
            for task, tower in self.towers.items()
        }

    def own_layers(self, task: str) -> list[tf.keras.layers.Layer]:
        return [self.scales[task], self.towers[task]]
