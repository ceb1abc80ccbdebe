"""Which tasks train which weights: what several tasks share, and what is one task's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tensorflow as tf

from stem_tf.layers.embedding import SHARED, PackedTable

if TYPE_CHECKING:
    from stem_tf.models.ranking_model import RankingModel

Columns = tuple[tuple[int, frozenset[int]], ...]
"""Columns of a weight's last axis, side by side: how many, and the numbers of the tasks that train them."""


@dataclass(frozen=True)
class Reach:
    """The tasks whose losses have a gradient on each weight, by their place in the schema.

    It is a matter of the network's wiring, not of values: a unit that is 0 for a whole batch is reached nevertheless.

    Attributes:
      variables: of each trainable variable of the embeddings, then of the network.
      tables: of each packed table that has rows.
    """

    variables: tuple[Columns, ...]
    tables: tuple[Columns, ...]

    @property
    def shared(self) -> tuple[frozenset[int], ...]:
        """The sets of two and more tasks that share weights."""
        found = {tasks for columns in (*self.variables, *self.tables) for _, tasks in columns if len(tasks) > 1}
        return tuple(sorted(found, key=sorted))


def reach(model: RankingModel) -> Reach:
    """Follows each task's output back through the network; call it in the strategy's scope."""
    network, groups, strategy = model.network, model.embeddings.groups, tf.distribute.get_strategy()
    weights, found = network.trainable_variables, {}

    def trace() -> None:
        h = {table: tf.zeros([1, model.embeddings.flat_width]) for table in model.embeddings.tables}
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(h)
            outputs = network(h, training=False)
        for number, task in enumerate(model.tasks):
            by_table, by_weight = tape.gradient(outputs[task.name], [h, weights])
            found[number] = (
                {table for table, gradient in by_table.items() if gradient is not None},
                [gradient is not None for gradient in by_weight],
            )

    # Only traced: what is connected is known then, and nothing has to be computed.
    tf.function(lambda: strategy.run(trace), autograph=False).get_concrete_function()

    def of_group(group: PackedTable) -> Columns:
        # A field without a table of a task's own stands in that task's embedding as its shared one.
        read = {task: {t if t in group.tables else SHARED for t in tables} for task, (tables, _) in found.items()}
        return tuple((group.dim, frozenset(task for task in read if t in read[task])) for t in group.tables)

    def variables() -> Iterator[Columns]:
        for group in groups:
            yield from [of_group(group)] * len(group.trainable_variables)
        for place, weight in enumerate(weights):
            width = weight.shape[-1] if weight.shape.rank else 1
            yield ((width, frozenset(task for task, (_, reached) in found.items() if reached[place])),)

    return Reach(tuple(variables()), tuple(of_group(group) for group in groups if group.rows))
