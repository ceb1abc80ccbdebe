"""Packed embedding tables: every table of every field that shares a width in one variable.

::

    variable [rows, W]              row of id i of field f = offset[f] + i
                 task:click   task:like   shared
    user_id  0 |  . . . .   |  . . . .  |  . . . . |
             1 |  . . . .   |  . . . .  |  . . . . |     W = (T + 1) * D
    video_id 0 |  . . . .   |  . . . .  |  . . . . |
             1 |  . . . .   |  . . . .  |  . . . . |

One gather a batch reads every field and every table of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import tensorflow as tf

from pipelines.schema import Feature
from stem_tf.layers.initializers import normal

Embedded = Mapping[str, tf.Tensor]
"""Flat embeddings ``[B, D]`` by the name of their table."""

SHARED = "shared"
"""Name of the table that all tasks share."""


def task_table(task: str) -> str:
    """Name of the table that belongs to ``task`` alone."""
    return f"task:{task}"


class PackedTable(tf.keras.layers.Layer):
    """The tables of one group: features of one width that have the same tables.

    Args:
      features: of the group, of any kind.
      num_ids: rows of each feature that is looked up by id (categorical, multivalent, bucketised).
      dim: D.
      tables: names of the tables, in the order of a row's slices.
      init_std: tables start from N(0, init_std^2); the authors' release uses 1e-4.

    Attributes:
      reader: what a served graph reads rows with, in place of `table`: ``[N]`` to ``[N, W]`` float32.
    """

    reader: Callable[[tf.Tensor], tf.Tensor] | None = None

    def __init__(
        self,
        features: Sequence[Feature],
        num_ids: Mapping[str, int],
        dim: int,
        tables: Sequence[str],
        init_std: float,
        **kwargs: object,
    ) -> None:
        super().__init__(dtype="float32", autocast=False, **kwargs)
        self.dim, self.tables = dim, tuple(tables)
        self.width = dim * len(self.tables)
        self.single = [f for f in features if f.kind == "categorical" or f.bucketised]
        self.bags = [f for f in features if f.kind == "multivalent"]
        self.numeric = [f for f in features if f.kind == "numeric" and not f.bucketised]
        self.dense = [f for f in features if f.kind == "dense"]
        self.order = (*self.single, *self.bags, *self.numeric, *self.dense)
        self.offsets: dict[str, int] = {}
        rows = 0
        for feature in (*self.single, *self.bags):
            self.offsets[feature.name] = rows
            rows += num_ids[feature.name]
        self.rows = rows
        self.index_dtype = tf.int32 if rows < 2**31 else tf.int64
        # Not among trainable_variables: the loss is differentiated by what is looked up, a TableOptimizer writes rows.
        self.table: Any = (
            self.add_weight("table", (rows, self.width), initializer=normal(init_std), trainable=False)
            if rows
            else None
        )
        self.numeric_kernel: Any = (
            self.add_weight("numeric", (len(self.numeric), self.width), initializer=normal(init_std))
            if self.numeric
            else None
        )
        self.dense_kernels = [
            self.add_weight(f"dense_{f.name}", (f.length, self.width), initializer=normal(init_std)) for f in self.dense
        ]

    def ids(self, inputs: Mapping[str, tf.Tensor]) -> tf.Tensor | None:
        """``[B * P]``: the rows that a batch of transformed inputs reads at P positions each; None for no rows."""
        positions = []
        for feature in _present((*self.single, *self.bags), inputs):
            ids = inputs[feature.name] if feature in self.bags else inputs[feature.name][:, tf.newaxis]
            positions.append(tf.cast(ids, self.index_dtype) + tf.constant(self.offsets[feature.name], self.index_dtype))
        if not positions:
            return None
        return tf.reshape(tf.concat(positions, axis=1), [-1])

    def look_up(self, ids: tf.Tensor | None) -> tf.Tensor | None:
        """The table's rows ``[B * P, W]``: read one by one, which costs less than finding the distinct ones."""
        if ids is None:
            return None
        return tf.nn.embedding_lookup(self.table, ids) if self.reader is None else self.reader(ids)

    def call(self, inputs: Mapping[str, tf.Tensor], looked_up: tf.Tensor | None) -> dict[str, tf.Tensor]:
        """Embeddings by table, ``[B, F * D]`` each, fields side by side: single-valued, multivalent, numeric, dense.

        Of features that ``inputs`` lacks there is nothing in the result; ``{}`` where it lacks all.
        """
        fields = []
        if looked_up is not None:
            single, present = _present(self.single, inputs), _present(self.bags, inputs)
            lengths = [len(single), *(inputs[f.name].shape[1] for f in present)]
            by_row = tf.reshape(looked_up, [-1, sum(lengths), self.width])
            singles, *bags = tf.split(by_row, lengths, axis=1)
            fields += [singles] if single else []
            fields += [self._pool(f, inputs[f.name], bag) for f, bag in zip(present, bags, strict=True)]
        if numeric := _present(self.numeric, inputs):
            values = tf.stack([inputs[f.name] for f in numeric], axis=1)
            kernel = tf.stack([self.numeric_kernel[self.numeric.index(f)] for f in numeric])
            fields.append(values[:, :, tf.newaxis] * kernel)
        for feature in _present(self.dense, inputs):
            kernel = self.dense_kernels[self.dense.index(feature)]
            fields.append(tf.matmul(inputs[feature.name], kernel)[:, tf.newaxis])
        if not fields:
            return {}
        stacked = fields[0] if len(fields) == 1 else tf.concat(fields, axis=1)
        flat = stacked.shape[1] * self.dim
        # Not a slice a table, whose gradients would each be as large as all tables'.
        by_table = tf.unstack(tf.reshape(stacked, [-1, stacked.shape[1], len(self.tables), self.dim]), axis=2)
        return {name: tf.reshape(h, [-1, flat]) for name, h in zip(self.tables, by_table, strict=True)}

    def _pool(self, feature: Feature, ids: tf.Tensor, bag: tf.Tensor) -> tf.Tensor:
        """Sum or mean over the values that are not padding; ``[B, L, W]`` -> ``[B, 1, W]``, zeros for an empty bag."""
        mask = tf.cast(ids != 0, tf.float32)
        if feature.pooling == "mean":
            mask = tf.math.divide_no_nan(mask, tf.reduce_sum(mask, axis=1, keepdims=True))
        return tf.matmul(mask[:, tf.newaxis], bag)


def _present(features: Sequence[Feature], inputs: Mapping[str, tf.Tensor]) -> list[Feature]:
    return [feature for feature in features if feature.name in inputs]


class Embeddings(tf.keras.layers.Layer):
    """Shared and task-specific embeddings of all features (STEM Eq. 1 and 2).

    ``h_S = [v_1^S, ..., v_F^S]`` and ``h_t = [v_1^t, ..., v_F^t]``, where a feature outside ``specific`` (the F of
    STEM-Net-(F)) stands in h_t with its shared embedding. The fields' order is fixed and the same in every table, so
    that h_t + h_S adds like to like.

    Args:
      features: the schema's features.
      num_ids: rows of each feature that is looked up by id.
      dim: D of features that name no width of their own.
      tables: names of the tables that the network reads; without ``shared`` among them every feature has all.
      specific: names of the features that have all ``tables``; the others have the shared one only.
      init_std: see :class:`PackedTable`.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        num_ids: Mapping[str, int],
        dim: int,
        tables: Sequence[str],
        specific: Collection[str],
        init_std: float = 1e-4,
        **kwargs: object,
    ) -> None:
        super().__init__(dtype="float32", autocast=False, **kwargs)
        self.tables = tuple(tables)
        groups: dict[tuple[int, tuple[str, ...]], list[Feature]] = {}
        for feature in features:
            own = self.tables if SHARED not in self.tables or feature.name in specific else (SHARED,)
            groups.setdefault((feature.dim or dim, own), []).append(feature)
        self.groups = [
            PackedTable(members, num_ids, width, own, init_std, name=f"packed_{i}")
            for i, ((width, own), members) in enumerate(groups.items())
        ]

    def ids(self, inputs: Mapping[str, tf.Tensor]) -> list[tf.Tensor | None]:
        """The rows that the batch reads, one entry a group; see :meth:`PackedTable.ids`."""
        return [group.ids(inputs) for group in self.groups]

    def call(
        self, inputs: Mapping[str, tf.Tensor], looked_up: Sequence[tf.Tensor | None] | None = None
    ) -> dict[str, tf.Tensor]:
        """Flat embeddings by table name: ``[B, sum of widths]``, float32. Rows are looked up here when not given.

        ``inputs`` may hold some of the features only: the result has the :meth:`columns` of those.
        """
        if looked_up is None:
            looked_up = [group.look_up(ids) for group, ids in zip(self.groups, self.ids(inputs), strict=True)]
        parts = [group(inputs, rows) for group, rows in zip(self.groups, looked_up, strict=True)]
        return {
            name: tf.concat([part[name if name in part else SHARED] for part in parts if part], axis=1)
            for name in self.tables
        }

    def columns(self, features: Collection[str]) -> list[int]:
        """Which of the columns of all features' embeddings belong to ``features`` (names), in the columns' order."""
        owners = [feature.name for group in self.groups for feature in group.order for _ in range(group.dim)]
        return [column for column, owner in enumerate(owners) if owner in features]

    @property
    def flat_width(self) -> int:
        """Width of a flat embedding of all features."""
        return sum(group.dim * len(group.order) for group in self.groups)
