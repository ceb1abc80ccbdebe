"""PLE's extraction network (Tang et al., RecSys 2020): experts and gates of one level; alone, the layer of CGC."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from stem_tf.layers.embedding import SHARED, Embedded, check_tables, task_table
from stem_tf.layers.gate import mixture
from stem_tf.layers.parts import Counts, LayerOfParts, Parts, count_of, numbered
from stem_tf.layers.seeds import seeds
from stem_util.errors import UserError


@tf.keras.utils.register_keras_serializable("stem_tf")
class ExtractionNetwork(LayerOfParts):
    """The j-th extraction network (PLE Fig. 5): experts and gates of one level, for tasks k and the shared path s::

        E_(k,i) = expert of g^{k,j-1}, i <= m_k        E_(s,i) = expert of g^{s,j-1}, i <= m_s
        g^{k,j} = w^{k,j} S^{k,j}                      w^{k,j} = Softmax(W_g^{k,j} g^{k,j-1})      (2, 3, 6)
        S^{k,j} = [E_(k,1), ..., E_(k,m_k), E_(s,1), ..., E_(s,m_s)]                               (4)
        S^{s,j} = the experts of task 0, of task 1, ..., the shared ones                   (section 4.2)

                            mixed by gate   a        s        b
        g^{a,j-1} --> [experts a] ----------+--------+
        g^{s,j-1} --> [experts s] ----------+--------+--------+
        g^{b,j-1} --> [experts b] ----------|--------+--------+
                                            v        v        v
                                         g^{a,j}  g^{s,j}  g^{b,j}

    Shapes: ``{path: [B, D]}`` -> ``{path: [B, H]}``, with paths ``task:<name>`` and, where it is read, ``shared``.

    >>> layer = ExtractionNetwork(["click", "like"], Parts(expert_units=(32, 16), gate_units=()), shared_gate=True)
    >>> g = {path: tf.ones([5, 8]) for path in ("task:click", "task:like", "shared")}
    >>> {path: tuple(mixed.shape) for path, mixed in layer(g).items()}
    {'task:click': (5, 16), 'task:like': (5, 16), 'shared': (5, 16)}

    Args:
      tasks: names of the tasks.
      parts: makes experts and gates.
      level: j - 1.
      shared_gate: whether there is one: without shared experts on a higher level nothing would read it.
      task_experts: m_k, experts of each task; may differ by task and level.
      shared_experts: m_s; may differ by level.
      released_stacking: the shared gate mixes shared experts only, as in the STEM authors' release.

    Raises:
      UserError: a gate would have no expert to mix.
      ValueError: no tasks, or an input that lacks a path.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        parts: Parts,
        level: int = 0,
        shared_gate: bool = False,
        task_experts: Counts = 1,
        shared_experts: Counts = 1,
        released_stacking: bool = False,
        **kwargs: object,
    ) -> None:
        arguments = {
            "tasks": tasks,
            "parts": parts,
            "level": level,
            "shared_gate": shared_gate,
            "task_experts": task_experts,
            "shared_experts": shared_experts,
            "released_stacking": released_stacking,
        }
        super().__init__(arguments, **kwargs)
        if not tasks:
            raise ValueError("an ExtractionNetwork needs at least one task; received tasks=[]")
        paths = {task_table(task): task for task in tasks}
        counts = {path: count_of(task_experts, level, task) for path, task in paths.items()}
        counts[SHARED] = count_of(shared_experts, level)
        names = {path: numbered(reader, counts[path]) for path, reader in (paths | {SHARED: SHARED}).items()}
        self.selected = {path: [path, SHARED] for path in paths}
        if shared_gate:
            self.selected[SHARED] = [SHARED] if released_stacking else [*paths, SHARED]
        for path, task in paths.items():
            if not counts[path] + counts[SHARED]:
                raise UserError(
                    f"config.model.task_experts should be at least 1 for the task '{task}' on level {level + 1}, which "
                    "has no shared experts either, but is 0"
                )
        if shared_gate and released_stacking and not counts[SHARED]:
            raise UserError(
                f"config.model.shared_experts should be at least 1 on level {level + 1}, whose shared gate sees no "
                "others with config.model.released_stacking, but is 0"
            )
        self.experts = {path: parts.experts(count, level) for path, count in counts.items() if count}
        self.gates = {
            path: parts.gate(paths.get(path, SHARED), [name for group in groups for name in names[group]], level)
            for path, groups in self.selected.items()
        }

    def call(self, g: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
        check_tables(g, dict.fromkeys((*self.experts, *self.gates)))
        seed_of = seeds(seed)
        experts = {path: group(g[path], training=training, seed=next(seed_of)) for path, group in self.experts.items()}
        return {
            path: mixture(
                gate(g[path], training=training, seed=next(seed_of)),
                [experts[group] for group in self.selected[path] if group in experts],
            )
            for path, gate in self.gates.items()
        }
