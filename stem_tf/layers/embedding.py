"""Packed embedding tables: every table of every field that shares a width in one variable.

::

    variable [rows, W]              row of id i of field f = offset[f] + i
                 task:click   task:like   shared
    user_id  0 |  . . . .   |  . . . .  |  . . . . |
             1 |  . . . .   |  . . . .  |  . . . . |     W = (T + 1) * D
    video_id 0 |  . . . .   |  . . . .  |  . . . . |
             1 |  . . . .   |  . . . .  |  . . . . |

One gather per batch reads every field and every table of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import tensorflow as tf

from stem_tf.layers.initializers import normal

Embedded = Mapping[str, tf.Tensor]
"""Flat embeddings ``[B, D]`` by the name of their table."""

SHARED = "shared"
"""Name of the table that all tasks share."""

TABLE = "table"
"""Name of the variable of a packed table, by which a strategy knows what to shard by rows."""


def task_table(task: str) -> str:
    """Name of the table that belongs to ``task`` alone."""
    return f"task:{task}"


def check_tables(h: Embedded, needed: Iterable[str]) -> None:
    """Raises ValueError where ``h`` lacks a table that a layer reads."""
    missing = [table for table in needed if table not in h]
    if missing:
        raise ValueError(f"the input should hold the tables {', '.join(missing)} too; received {', '.join(h)}")


@dataclass(frozen=True)
class Field:
    """What the tables hold for one feature.

    Attributes:
      name: its key in the inputs.
      kind: ``categorical``, ids ``[B]``; ``multivalent``, ids ``[B, L]`` padded with 0, which are pooled; ``numeric``,
        numbers ``[B]``, each times a learned vector; ``dense``, vectors ``[B, n]``, each times a learned matrix.
        A field whose values have two ids each, the sum of whose rows is the embedding, is multivalent.
      rows: number of ids of a categorical or multivalent field; ids are 0 to rows - 1.
      dim: D, where it is not the layer's.
      pooling: how a multivalent field is pooled, ``mean`` or ``sum``.
      length: n of a dense field.
      ids_per_value: how many of a multivalent field's ids one value has; a mean is one over values.

    Raises:
      ValueError: values that do not fit each other.
    """

    name: str
    kind: Literal["categorical", "multivalent", "numeric", "dense"] = "categorical"
    rows: int = 0
    dim: int | None = None
    pooling: Literal["mean", "sum"] = "mean"
    length: int = 0
    ids_per_value: int = 1

    def __post_init__(self) -> None:
        kinds = ("categorical", "multivalent", "numeric", "dense")
        if self.kind not in kinds:
            raise ValueError(f"field {self.name}: kind should be one of {', '.join(kinds)}; received {self.kind!r}")
        if self.pooling not in ("mean", "sum"):
            raise ValueError(f"field {self.name}: pooling should be mean or sum; received {self.pooling!r}")
        needed = {"categorical": "rows", "multivalent": "rows", "dense": "length"}.get(self.kind)
        if needed and getattr(self, needed) < 1:
            raise ValueError(
                f"field {self.name}: {needed} of a {self.kind} field should be at least 1; "
                f"received {getattr(self, needed)}"
            )


@tf.keras.utils.register_keras_serializable("stem_tf")
class PackedTable(tf.keras.layers.Layer):
    """The tables of one group: fields of one width that have the same tables. See :class:`Embeddings`.

    Weights: ``table`` ``[rows, W]`` of all ids, ``numeric`` ``[number of numeric fields, W]`` and, for each dense
    field, ``dense_<name>`` ``[n, W]``; W = D * number of tables.

    Args:
      fields: the fields of the group, of any kind.
      dim: D.
      tables: names of the tables, in the order of a row's slices.
      init_std: tables start from N(0, init_std^2); the authors' release uses 1e-4.
      train_tables: whether ``table`` is among the trainable variables, for a Keras optimizer to train. False where a
        :class:`stem_tf.training.table_optimizers.TableOptimizer` writes the rows that a batch reads.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        dim: int,
        tables: Sequence[str],
        init_std: float = 1e-4,
        train_tables: bool = True,
        **kwargs: object,
    ) -> None:
        super().__init__(**{"dtype": "float32", "autocast": False} | kwargs)
        self._arguments = _arguments(fields, dim, tables, init_std, train_tables)
        self.dim, self.tables = dim, tuple(tables)
        self.width = dim * len(self.tables)
        self.single = [f for f in fields if f.kind == "categorical"]
        self.bags = [f for f in fields if f.kind == "multivalent"]
        self.numeric = [f for f in fields if f.kind == "numeric"]
        self.dense = [f for f in fields if f.kind == "dense"]
        self.order = (*self.single, *self.bags, *self.numeric, *self.dense)
        self.offsets: dict[str, int] = {}
        rows = 0
        for field in (*self.single, *self.bags):
            self.offsets[field.name] = rows
            rows += field.rows
        self.rows = rows
        self.index_dtype = tf.int32 if rows < 2**31 else tf.int64
        self.table: Any = (
            self.add_weight(TABLE, (rows, self.width), initializer=normal(init_std), trainable=train_tables)
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

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._arguments}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PackedTable:
        return cls(**_with_fields(config))

    def ids(self, inputs: Mapping[str, tf.Tensor]) -> tf.Tensor | None:
        """``[B * P]``: the rows that a batch of transformed inputs reads at P positions each; None for no rows."""
        positions = []
        for field in _present((*self.single, *self.bags), inputs):
            ids = inputs[field.name] if field in self.bags else inputs[field.name][:, tf.newaxis]
            positions.append(tf.cast(ids, self.index_dtype) + tf.constant(self.offsets[field.name], self.index_dtype))
        if not positions:
            return None
        return tf.reshape(tf.concat(positions, axis=1), [-1])

    def look_up(self, ids: tf.Tensor) -> tf.Tensor:
        """The table's rows ``[B * P, W]``: read one by one, which costs less than finding the distinct ones."""
        return gather_rows(self.table, ids)

    def call(self, inputs: Mapping[str, tf.Tensor], looked_up: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
        """Embeddings by table, ``[B, F * D]`` each, fields side by side: single-valued, multivalent, numeric, dense.

        Rows are looked up here when not given.
        Fields that ``inputs`` lacks are left out; ``{}`` where it lacks all.
        """
        ids = self.ids(inputs) if looked_up is None else None  # without :=, which AutoGraph does not know
        if ids is not None:
            looked_up = self.look_up(ids)
        fields = []
        if looked_up is not None:
            single, present = _present(self.single, inputs), _present(self.bags, inputs)
            lengths = [len(single), *(inputs[f.name].shape[1] for f in present)]
            by_row = tf.reshape(looked_up, [-1, sum(lengths), self.width])
            singles, *bags = tf.split(by_row, lengths, axis=1)
            fields += [singles] if single else []
            fields += [self._pool(f, inputs[f.name], bag) for f, bag in zip(present, bags, strict=True)]
        numeric = _present(self.numeric, inputs)
        if numeric:
            values = tf.stack([inputs[f.name] for f in numeric], axis=1)
            kernel = tf.stack([self.numeric_kernel[self.numeric.index(f)] for f in numeric])
            fields.append(values[:, :, tf.newaxis] * kernel)
        for field in _present(self.dense, inputs):
            kernel = self.dense_kernels[self.dense.index(field)]
            fields.append(tf.matmul(inputs[field.name], kernel)[:, tf.newaxis])
        if not fields:
            return {}
        stacked = fields[0] if len(fields) == 1 else tf.concat(fields, axis=1)
        flat = stacked.shape[1] * self.dim
        # Not one slice per table: the gradient of each would be as large as that of all tables.
        by_table = tf.unstack(tf.reshape(stacked, [-1, stacked.shape[1], len(self.tables), self.dim]), axis=2)
        return {name: tf.reshape(h, [-1, flat]) for name, h in zip(self.tables, by_table, strict=True)}

    def _pool(self, field: Field, ids: tf.Tensor, bag: tf.Tensor) -> tf.Tensor:
        """Sum or mean over the values that are not padding; ``[B, L, W]`` -> ``[B, 1, W]``, zeros for an empty bag."""
        mask = tf.cast(ids != 0, tf.float32)
        if field.pooling == "mean":
            mask = tf.math.divide_no_nan(field.ids_per_value * mask, tf.reduce_sum(mask, axis=1, keepdims=True))
        return tf.matmul(mask[:, tf.newaxis], bag)


def _present(fields: Sequence[Field], inputs: Mapping[str, tf.Tensor]) -> list[Field]:
    """The fields that ``inputs`` has, which should have the shape of their kind."""
    present = [field for field in fields if field.name in inputs]
    for field in present:
        shape = "[B, L]" if field.kind == "multivalent" else "[B, n]" if field.kind == "dense" else "[B]"
        received = inputs[field.name].shape
        if received.rank not in (None, shape.count(",") + 1):
            raise ValueError(f"input '{field.name}' is {field.kind} and should be {shape}; received shape {received}")
    return present


def _arguments(
    fields: Sequence[Field], dim: int, tables: Sequence[str], init_std: float, train_tables: bool
) -> Mapping[str, Any]:
    """A layer's arguments in plain values, as its config holds them; not a dict, which Keras would track."""
    return MappingProxyType(
        {
            "fields": [dataclasses.asdict(field) for field in fields],
            "dim": dim,
            "tables": list(tables),
            "init_std": init_std,
            "train_tables": train_tables,
        }
    )


def _with_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "fields": [Field(**field) for field in config["fields"]]}


def gather_rows(table: tf.Variable, ids: tf.Tensor) -> tf.Tensor:
    """The rows ``ids`` ``[U]`` of a table ``[R, W]``; read from this replica's copy where each replica has one.

    tf.gather would read a mirrored variable whole before it takes the rows, which costs a copy of the table per call.
    """
    copies = tf.distribute.get_strategy().experimental_local_results(table)
    replica = tf.distribute.get_replica_context()  # without :=, which AutoGraph does not know
    if len(copies) > 1 and replica is not None:
        copies = [copy for copy in copies if copy.device in tf.nest.flatten(replica.devices)]
    return tf.gather(copies[0], ids)


def rows_between(table: tf.Variable | tf.Tensor, start: int, stop: int) -> tf.Tensor:
    """The rows ``start`` to ``stop`` - 1 of a table ``[R, ...]``.

    A slice would copy the whole table first: TensorFlow reads a variable so once rows of it were gathered.
    """
    return tf.gather(table, tf.range(start, stop))


@tf.keras.utils.register_keras_serializable("stem_tf")
class Embeddings(tf.keras.layers.Layer):
    """Shared and task-specific embeddings of all fields (STEM Eq. 1 and 2).

    ``h_S = [v_1^S, ..., v_F^S]`` and ``h_t = [v_1^t, ..., v_F^t]``, where a field outside ``specific`` (the F of
    STEM-Net-(F)) has its shared embedding in h_t. The fields' order is fixed and the same in every table, so
    that h_t + h_S adds like to like. Fields of one width and the same tables lie in one :class:`PackedTable`, which one
    gather reads.

    >>> embeddings = Embeddings(
    ...     [Field("user", rows=100), Field("tags", "multivalent", rows=50), Field("age", "numeric")],
    ...     dim=4,
    ...     tables=["task:click", "shared"],
    ... )
    >>> h = embeddings({
    ...     "user": tf.constant([7, 8]),
    ...     "tags": tf.constant([[1, 2, 0], [3, 0, 0]]),
    ...     "age": tf.constant([0.5, -1.0]),
    ... })
    >>> {table: tuple(embedding.shape) for table, embedding in h.items()}
    {'task:click': (2, 12), 'shared': (2, 12)}

    Args:
      fields: the features.
      dim: D of fields that name no width of their own.
      tables: names of the tables that the network reads; without ``shared`` among them every field has all.
      specific: names of the fields that have all ``tables``, the others have the shared one only; all where None.
      init_std, train_tables: see :class:`PackedTable`.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        dim: int,
        tables: Sequence[str] = (SHARED,),
        specific: Collection[str] | None = None,
        init_std: float = 1e-4,
        train_tables: bool = True,
        **kwargs: object,
    ) -> None:
        super().__init__(**{"dtype": "float32", "autocast": False} | kwargs)
        self._arguments = _arguments(fields, dim, tables, init_std, train_tables)
        self._specific = None if specific is None else frozenset(specific)
        self.tables = tuple(tables)
        groups: dict[tuple[int, tuple[str, ...]], list[Field]] = {}
        for field in fields:
            has_all = SHARED not in self.tables or self._specific is None or field.name in self._specific
            groups.setdefault((field.dim or dim, self.tables if has_all else (SHARED,)), []).append(field)
        self.groups = [
            PackedTable(members, width, own, init_std, train_tables, name=f"packed_{i}")
            for i, ((width, own), members) in enumerate(groups.items())
        ]

    def get_config(self) -> dict[str, Any]:
        specific = None if self._specific is None else sorted(self._specific)
        return {**super().get_config(), **self._arguments, "specific": specific}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Embeddings:
        return cls(**_with_fields(config))

    def ids(self, inputs: Mapping[str, tf.Tensor]) -> list[tf.Tensor | None]:
        """The rows that the batch reads, one entry per group; see :meth:`PackedTable.ids`."""
        return [group.ids(inputs) for group in self.groups]

    def look_up(
        self, inputs: Mapping[str, tf.Tensor], read: Callable[[PackedTable, tf.Tensor], tf.Tensor] = PackedTable.look_up
    ) -> list[tf.Tensor | None]:
        """What a batch looks up, by group ``[B * P, W]``, None for no rows; ``read`` gives a group's rows at ids."""
        pairs = zip(self.groups, self.ids(inputs), strict=True)
        return [None if ids is None else read(group, ids) for group, ids in pairs]

    def call(
        self, inputs: Mapping[str, tf.Tensor], looked_up: Sequence[tf.Tensor | None] | None = None
    ) -> dict[str, tf.Tensor]:
        """Flat embeddings by table name: ``[B, sum of widths]``, float32. Rows are looked up here when not given.

        ``inputs`` may hold some of the fields only: the result has the :meth:`columns` of those.
        """
        if looked_up is None:
            looked_up = self.look_up(inputs)
        parts = [group(inputs, rows) for group, rows in zip(self.groups, looked_up, strict=True)]
        if not any(parts):
            names = [field.name for group in self.groups for field in group.order]
            raise ValueError(f"inputs should hold at least one of {', '.join(names)}; received {', '.join(inputs)}")
        return {
            name: tf.concat([part[name if name in part else SHARED] for part in parts if part], axis=1)
            for name in self.tables
        }

    def columns(self, fields: Collection[str]) -> list[int]:
        """Which of the columns of all fields' embeddings belong to ``fields`` (names), in the columns' order."""
        owners = [field.name for group in self.groups for field in group.order for _ in range(group.dim)]
        return [column for column, owner in enumerate(owners) if owner in fields]

    @property
    def flat_width(self) -> int:
        """Width of a flat embedding of all fields."""
        return sum(group.dim * len(group.order) for group in self.groups)
