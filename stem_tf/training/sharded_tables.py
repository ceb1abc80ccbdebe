"""Variables on parameter servers: each is read and updated by operations that run where it lies.

::

    worker                                  parameter server k: rows [bounds[k], bounds[k + 1]) of a table, their slots
    distinct ids of the batch    -- ids -->
                                 <-- w  --  gather
    gradient of these rows       -- g  -->  under the shard's lock: gather w and slots, step, scatter

What crosses is U ids, U rows and U gradients, U the batch's distinct rows: slots stay where they are, and no table is
ever read as a whole. A lock makes the update of a shard one step: of two workers that move the same row, the second
reads what the first has written, so no gradient is lost. The rows that a worker differentiates by may be older than
those that its gradient meets (asynchronous stochastic gradient descent, as in Dean et al., NeurIPS 2012).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from stem_tf.layers.embedding import TABLE, PackedTable
from stem_tf.training.optimizers import Adam
from stem_tf.training.table_optimizers import TABLE_OPTIMIZERS, RowOptimizer, RowState, TableGradient, TableOptimizer

ShardedVariable: Any = tf.__internal__.distribute.ShardedVariable
"""What ParameterServerStrategy makes of a variable that it partitions: checkpoints hold it as one tensor in slices, so
that it can be restored as one variable, or in another number of shards."""

_servers: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("servers", default=())
_device: contextvars.ContextVar[str | None] = contextvars.ContextVar("device", default=None)


@contextlib.contextmanager
def served(devices: Sequence[str]) -> Iterator[None]:
    """Variables made inside lie on servers: packed tables on all ``devices``, by rows; all others on the first."""
    token = _servers.set(tuple(devices))
    try:
        with tf.variable_creator_scope(_create):
            yield
    finally:
        _servers.reset(token)


def are_served() -> bool:
    """Whether variables that are made now lie on servers."""
    return bool(_servers.get())


@contextlib.contextmanager
def on(device: str) -> Iterator[None]:
    """Operations inside run on ``device``, and variables made inside lie there."""
    token = _device.set(device)
    try:
        with tf.device(device):
            yield
    finally:
        _device.reset(token)


def _create(make: Callable[..., tf.Variable], **kwargs: Any) -> Any:
    """A variable creator, see :func:`served`."""
    devices = _servers.get()
    if kwargs.get("name") != TABLE or _device.get() is not None:
        with tf.device(_device.get() or devices[0]):
            return make(**kwargs)
    rows, width = kwargs["shape"]
    bounds, shards = _bounds(rows, len(devices)), []
    for number, (device, start, end) in enumerate(zip(devices, bounds, bounds[1:], strict=False)):
        part = tf.TensorShape([end - start, width])
        # Keras' initializers draw other values for another offset.
        initial = functools.partial(kwargs["initial_value"], partition_shape=part, partition_offset=(start, 0))
        own = {"initial_value": initial, "shape": part, "name": f"{TABLE}/part_{number}"}
        with tf.device(device):
            shards.append(make(**kwargs | own))
    return ShardedVariable(shards, name=TABLE)


def _bounds(rows: int, servers: int) -> list[int]:
    """Where the shards of a table begin, and its end: ``[S + 1]``; no shard is empty."""
    shards = min(rows, servers)
    return [rows * shard // shards for shard in range(shards + 1)]


def locked(section: tf.CriticalSection, inputs: Sequence[tf.Tensor], update: Callable[[], None]) -> None:
    """Runs ``update`` in a graph while it holds a lock, once ``inputs`` are there, until all that it does is done."""

    def run() -> tf.Operation:
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        update()
        # By itself the lock would be held until what `run` returns is computed, which writes nothing.
        with tf.control_dependencies(graph.get_operations()[before:]):
            return tf.no_op()

    with tf.control_dependencies(inputs):
        section.execute(run)


class _Shard(NamedTuple):
    """What an optimizer needs of the rows of a packed table on one server; see :class:`PackedTable`."""

    table: tf.Variable
    rows: int
    index_dtype: tf.DType
    tables: tuple[str, ...]
    dim: int


class ShardedRows(TableOptimizer):
    """Trains a packed table whose rows lie on several servers, each shard by a :class:`RowOptimizer` of its own.

    Arguments as in :class:`TableOptimizer`; the name of the shards' optimizer comes first: one whose result does not
    depend on steps that a row has missed.
    """

    remote = True

    def __init__(self, name: str, packed: PackedTable, *settings: Any, **options: Any) -> None:
        kind = TABLE_OPTIMIZERS[name]
        assert issubclass(kind, RowOptimizer)
        self.kinds_of_slots = kind.kinds_of_slots
        super().__init__(packed, *settings, **options)
        shards, sections = [], []
        for number, variable in enumerate(self.table.variables):
            with on(variable.device):
                shard: Any = _Shard(variable, variable.shape[0], self.index_dtype, packed.tables, packed.dim)
                shards.append(kind(shard, *settings, **options))
                sections.append(tf.CriticalSection(shared_name=f"{packed.name}_{number}"))
        # Checkpoints hold the shards of a slot as one tensor, under the key that it has without servers; the shards'
        # own optimizers are hidden from them, or they would hold it twice.
        slots_of_shards = zip(*(shard.slots for shard in shards), strict=True)
        self.slots = [ShardedVariable(of_slot, name=f"slot_{i}") for i, of_slot in enumerate(slots_of_shards)]
        self._shards = lambda: zip(shards, sections, strict=True)
        self._starts = _bounds(self.rows, len(shards))[:-1]

    def read(self, ids: tf.Tensor, step: tf.Tensor, most: int | None = None) -> RowState:
        (there, places), rows = self._by_shard(ids, tf.range(tf.size(ids))), []
        for (shard, _), of_shard in zip(self._shards(), there, strict=True):
            with tf.device(shard.table.device):
                rows.append(tf.gather(shard.table, of_shard))
        return RowState(ids, self._unpacked(tf.dynamic_stitch(places, rows)), ())

    def gradient(self, state: RowState, values: tf.Tensor) -> TableGradient:
        return TableGradient(state, self._unpacked(values) + self.l2 * state.w)

    def apply(self, gradient: TableGradient, step: tf.Tensor, scale: float | tf.Tensor = 1.0) -> None:
        assert gradient.state is not None
        there, values = self._by_shard(gradient.state.ids, gradient.values)
        for (shard, section), ids, of_rows in zip(self._shards(), there, values, strict=True):
            with tf.device(shard.table.device):
                arrived = [tf.identity(tensor) for tensor in (ids, of_rows, step)]
                locked(section, arrived, functools.partial(_apply, shard, *arrived))

    def _by_shard(self, ids: tf.Tensor, values: tf.Tensor) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """Rows ``[U]`` by shard, counted from the shard's first row, and the ``values`` ``[U, ...]`` that belong to
        them."""
        starts = tf.constant(self._starts, ids.dtype)
        shard = tf.searchsorted(starts, ids, side="right") - 1
        count = len(self._starts)
        there = tf.dynamic_partition(ids - tf.gather(starts, shard), shard, count)
        return there, tf.dynamic_partition(values, shard, count)


def _apply(shard: RowOptimizer, ids: tf.Tensor, gradient: tf.Tensor, step: tf.Tensor) -> None:
    shard.apply(TableGradient(shard.read(ids, step), gradient), step)


class ServedAdam(Adam):
    """:class:`Adam` for variables that lie on one server: its moments lie beside them, and a step is made there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with on(self.m.device):
            self._section = tf.CriticalSection(shared_name="network")

    def apply(self, gradient: tf.Tensor, step: tf.Tensor) -> None:
        with tf.device(self.m.device):
            arrived = [tf.identity(gradient), tf.identity(step)]
            locked(self._section, arrived, functools.partial(super().apply, *arrived))
