"""Bottoms and towers (PLE paper, Fig. 1a to 1c): Single-Task, Hard Parameter, Asymmetric and Customized Sharing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import tensorflow as tf

from stem_tf.layers.embedding import SHARED, Embedded, task_table
from stem_tf.layers.seeds import seeds
from stem_tf.models.hyperparameters import Experts, hyperparameter
from stem_tf.models.network import Network, Outputs
from stem_tf.models.registry import register
from stem_util.errors import UserError, did_you_mean

Fusion = Literal["concat", "sum", "mean"]


@register("single_task", "a network and a table for each task, nothing shared")
class SingleTask(Network):
    """A table, a bottom and a tower for each task: the baseline from which the papers measure the gain of the others::

        y_t = tower_t(bottom_t(h_t))

        h_a --> [bottom a] --> tower a --> y_a
        h_b --> [bottom b] --> tower b --> y_b

    Task t's loss trains table, bottom and tower t, and nothing else: there are as many models as tasks, which share the
    batch and the global norm of clipping.

    Shapes: ``{"task:<name>": [B, D]}`` float32 -> ``{task: [B]}`` float32; bottoms ``[1, B, H]``. There is no shared
    table.
    """

    Hyperparameters = Experts
    shares: ClassVar[bool] = False

    def __init__(self, tasks: Sequence[str], hyper: Experts, **kwargs: object) -> None:
        super().__init__(**kwargs)
        parts = hyper.parts
        self.tables = tuple(map(task_table, tasks))
        self.bottoms = {task: parts.experts(1) for task in tasks}
        self.towers = parts.towers(tasks)

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> Outputs:
        seed_of, outputs = seeds(seed), {}
        for task, tower in self.towers.items():
            bottom = self.bottoms[task](h[task_table(task)], training=training, seed=next(seed_of))[0]
            outputs[task] = tower(bottom, training=training, seed=next(seed_of))[:, 0]
        return outputs

    def own_layers(self, task: str) -> list[tf.keras.layers.Layer]:
        return [self.bottoms[task], self.towers[task]]


@register("shared_bottom", "one bottom, a tower for each task; hard parameter sharing")
class SharedBottom(Network):
    """Hard Parameter Sharing (Caruana 1997; PLE paper, Fig. 1a; MMoE paper, Eq. 1)::

        y_t = tower_t(bottom(x))

        x --> [bottom] --+--> tower a --> y_a
                         +--> tower b --> y_b

    Every task's loss trains the table and the bottom; only the towers are one task's.

    Shapes: ``{"shared": [B, D]}`` float32 -> ``{task: [B]}`` float32; bottom ``[1, B, H]``.
    """

    Hyperparameters = Experts

    def __init__(self, tasks: Sequence[str], hyper: Experts, **kwargs: object) -> None:
        super().__init__(**kwargs)
        parts = hyper.parts
        self.bottom = parts.experts(1)
        self.towers = parts.towers(tasks)

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> Outputs:
        seed_of = seeds(seed)
        bottom = self.bottom(h[SHARED], training=training, seed=next(seed_of))[0]
        return {task: tower(bottom, training=training, seed=next(seed_of))[:, 0] for task, tower in self.towers.items()}


@register("asymmetric_sharing", "a bottom for each task; receivers also read their giver's")
class AsymmetricSharing(Network):
    """A bottom for each task; receivers also read their giver's (PLE paper, section 3.2 and Fig. 1b)::

        f_t = bottom_t(x)
        y_t = tower_t(fusion(f_t, f_giver(t))) for receivers t, tower_t(f_t) for the others

        x --+--> [bottom a] --------+--> tower a --> y_a        gives = {b: a}: a gives to b
            |                       v
            +--> [bottom b] --> (fusion) --> tower b --> y_b

    A receiver's loss trains its own bottom and its giver's: the network is plain, without stop-gradient. The loss of a
    task that receives nothing trains its own bottom alone. Every task's loss trains the table; towers are one task's.

    Shapes: ``{"shared": [B, D]}`` float32 -> ``{task: [B]}`` float32; bottoms ``[1, B, H]``, fused ``[B, 2 H]`` by
    ``concat``, ``[B, H]`` else.

    Raises:
      UserError: no receiver, an unknown task, or one that gives to itself.
    """

    @dataclass(frozen=True)
    class Hyperparameters(Experts):
        """Who gives to whom.

        Attributes:
          gives: receivers, each with its giver. A giver may receive as well; what it gives is its own bottom alone.
          fusion: how a receiver's bottom and its giver's are joined: ``concat``, ``sum`` or ``mean``.
        """

        gives: Mapping[str, str] = hyperparameter("", "receivers, each with its giver: like:click", by="task")
        fusion: Fusion = hyperparameter(
            "concat", "how a receiver joins its bottom and its giver's", choices=("concat", "sum", "mean")
        )

    def __init__(self, tasks: Sequence[str], hyper: Hyperparameters, **kwargs: object) -> None:
        super().__init__(**kwargs)
        parts = hyper.parts
        self.gives, self.fusion = _checked_gives(hyper.gives, tasks), hyper.fusion
        self.bottoms = {task: parts.experts(1) for task in tasks}
        self.towers = parts.towers(tasks)

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> Outputs:
        seed_of = seeds(seed)
        f = {task: bottom(h[SHARED], training=training, seed=next(seed_of))[0] for task, bottom in self.bottoms.items()}
        fused = f | {receiver: self._fused(f[receiver], f[giver]) for receiver, giver in self.gives.items()}
        return {
            task: tower(fused[task], training=training, seed=next(seed_of))[:, 0] for task, tower in self.towers.items()
        }

    def _fused(self, own: tf.Tensor, given: tf.Tensor) -> tf.Tensor:
        if self.fusion == "concat":
            return tf.concat([own, given], axis=1)
        return own + given if self.fusion == "sum" else (own + given) / 2.0

    def own_layers(self, task: str) -> list[tf.keras.layers.Layer]:
        own = [] if task in self.gives.values() else [self.bottoms[task]]
        return [*own, self.towers[task]]


def _checked_gives(gives: Mapping[str, str], tasks: Sequence[str]) -> dict[str, str]:
    def wrong(what: str) -> UserError:
        return UserError(
            "config.model.gives should name receivers, each with its giver, whose bottom the receiver's tower also "
            f"reads, as in like:click, but {what}"
        )

    if not gives:
        raise wrong("is empty")
    for receiver, giver in gives.items():
        for name in (receiver, giver):
            if name not in tasks:
                raise wrong(f"'{name}' is none of the tasks {', '.join(tasks)}{did_you_mean(name, tasks)}")
        if receiver == giver:
            raise wrong(f"{receiver} is its own giver")
    return dict(gives)


@register("customized_sharing", "a shared bottom and one for each task")
class CustomizedSharing(Network):
    """A shared bottom and one for each task (PLE paper, section 3.2 and Fig. 1c)::

        y_t = tower_t([bottom_t(x), bottom_S(x)])

            +--> [bottom a] --+--> tower a --> y_a
        x --+--> [bottom S] --+
            +--> [bottom b] --+--> tower b --> y_b

    Task t's loss trains the table, the shared bottom, and bottom and tower t, but nothing of other tasks.

    Shapes: ``{"shared": [B, D]}`` float32 -> ``{task: [B]}`` float32; bottoms ``[1, B, H]``, a tower's input
    ``[B, 2 H]``.
    """

    Hyperparameters = Experts

    def __init__(self, tasks: Sequence[str], hyper: Experts, **kwargs: object) -> None:
        super().__init__(**kwargs)
        parts = hyper.parts
        self.shared_bottom = parts.experts(1)
        self.bottoms = {task: parts.experts(1) for task in tasks}
        self.towers = parts.towers(tasks)

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> Outputs:
        seed_of, outputs = seeds(seed), {}
        shared = self.shared_bottom(h[SHARED], training=training, seed=next(seed_of))[0]
        for task, tower in self.towers.items():
            own = self.bottoms[task](h[SHARED], training=training, seed=next(seed_of))[0]
            both = tf.concat([own, shared], axis=1)
            outputs[task] = tower(both, training=training, seed=next(seed_of))[:, 0]
        return outputs

    def own_layers(self, task: str) -> list[tf.keras.layers.Layer]:
        return [self.bottoms[task], self.towers[task]]
