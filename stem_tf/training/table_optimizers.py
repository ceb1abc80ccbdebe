"""How packed tables are trained: each optimizer reads the rows of a batch, and writes them once per step.

| key | a step | rows that the batch does not read |
|---|---|---|
| ``dense`` | Adam on every row, L2 on the whole table: the authors' release | move at once |
| ``deferred`` | Adam on the batch's rows | make up for the steps that they missed when they are next read |
| ``lazy`` | Adam on the batch's rows | do not move: another regulariser than the release's |
| ``adagrad`` | row-wise Adagrad on the batch's rows, as FBGEMM has it | do not move |

All but the first work on U rows, whatever the table's size: one gather and one scatter of the table and of each slot.
Shapes: U distinct rows of N tables side by side, D wide each; W = N * D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from stem_tf.layers.distinct import deduplicate, deduplicate_static
from stem_tf.layers.embedding import PackedTable, gather_rows
from stem_tf.runtime import start_xla
from stem_tf.training.catch_up import AdamRows, catch_up
from stem_tf.training.learning_rate import Schedule
from stem_tf.training.optimizers import BETAS, EPSILON, Betas, Rate, moments, move
from stem_tf.training.replicas import update_mirrors

SLOTS = ("float32", "bfloat16", "rowwise")
"""How moments are kept: in full; in half the memory, rounded up or down at random so that small changes count on
average; or one second moment per embedding (FBGEMM's partial row-wise Adam)."""

_COMPILED = 1 << 18  # elements of a batch's rows from which compiling catch_up (a second per shape) pays
_KEPT_SCALES = 1 << 16  # steps whose clipping is remembered; rows not read for longer get the mean of these
_SLICE_ROWS = 1 << 16  # of a table, brought up to date at a time


class RowState(NamedTuple):
    """Rows of a table and their optimizer state as of a step.

    Attributes:
      ids: distinct rows ``[U]``; ids at or above the table's number of rows are padding.
      w: weights ``[U, N, D]``.
      slots: slots of the same rows; () for an optimizer that updates all rows at once.
    """

    ids: tf.Tensor
    w: tf.Tensor
    slots: tuple[tf.Tensor, ...]


class BatchRows(NamedTuple):
    """The distinct rows of a table that a batch reads.

    Attributes:
      state: the distinct rows and their state.
      place: for each of the batch's positions the place of its row among them, int32 ``[B * P]``.
    """

    state: RowState
    place: tf.Tensor

    def at_positions(self) -> tf.Tensor:
        """The rows, as often as the batch reads them, ``[B * P, W]``."""
        return tf.gather(tf.reshape(self.state.w, [-1, self.state.w.shape[1:].num_elements()]), self.place)

    @property
    def count(self) -> tf.Tensor:
        """U, an int32 scalar."""
        return tf.shape(self.state.ids)[0]

    def summed(self, by_position: tf.Tensor, size: int | None = None) -> tf.Tensor:
        """The gradient of each distinct row ``[U, W]``, from those at the batch's positions ``[B * P, W]``.

        With a ``size`` of at least U the result is ``[size, W]``, zeros behind the rows.
        """
        return tf.math.unsorted_segment_sum(by_position, self.place, self.count if size is None else size)


class TableGradient(NamedTuple):
    """Gradient of a packed table: ``values`` ``[U, N, D]`` of the rows of ``state``, or of all rows if that is None."""

    state: RowState | None
    values: tf.Tensor


class TableOptimizer(tf.Module):
    """Base of the optimizers of one packed table. A step reads rows, is given their gradient, and writes them.

    Args:
      packed: the table.
      l2: ``l2 / 2 * ||.||^2``, one number, or one per column ``[W]``.
      schedule: learning rate by step.
      slots: one of :data:`SLOTS`.
      seed: determines the rounding of bfloat16 slots, together with the step.
      clips: whether gradients may be scaled down to a norm.
      betas: decay rates of Adam's moments.
      given: slots to use, as another optimizer of this kind has them; new ones if empty.

    Attributes:
      defers: whether rows of the table may be behind; :meth:`read` brings what it reads up to date.
      remote: whether the table lies in other processes, so that a row should be fetched once per batch.
      kinds_of_slots: those of :data:`SLOTS` that it knows.

    Raises:
      ValueError: a kind of slots that it does not know.
    """

    defers = remote = False
    kinds_of_slots: tuple[str, ...] = ("float32",)

    def __init__(
        self,
        packed: PackedTable,
        l2: float | tf.Tensor,
        schedule: Schedule,
        slots: str = "float32",
        seed: int = 0,
        clips: bool = False,
        betas: Betas = BETAS,
        given: Sequence[tf.Variable] = (),
    ) -> None:
        super().__init__(name="table_optimizer")
        if slots not in self.kinds_of_slots:
            name, kinds = type(self).__name__, ", ".join(self.kinds_of_slots)
            raise ValueError(f"slots of {name} should be one of: {kinds}; received {slots!r}")
        self.table, self.schedule, self.seed, self.clips, self.betas = packed.table, schedule, seed, clips, betas
        self.rows, self.index_dtype, self.shape = packed.rows, packed.index_dtype, (len(packed.tables), packed.dim)
        self.l2 = l2 if isinstance(l2, float) else tf.reshape(l2, self.shape)
        self.rowwise = slots == "rowwise"
        self.slots: list[tf.Variable] = list(given)
        self._given = bool(given)
        self._slot_dtype = tf.bfloat16 if slots == "bfloat16" else tf.float32

    def add_slot(self, name: str, width: int | None = None, dtype: tf.DType | None = None) -> None:
        """Adds a slot of zeros, ``[rows, width]``, by default W wide; ``[rows]`` for a width of 0."""
        if self._given:
            return
        shape = [self.rows, self.table.shape[1] if width is None else width]
        zeros = tf.zeros(shape if width != 0 else shape[:1], dtype or self._slot_dtype)
        self.slots.append(tf.Variable(zeros, trainable=False, name=f"{self.table.name.split(':')[0]}/{name}"))

    def read(self, ids: tf.Tensor, step: tf.Tensor, most: int | None = None) -> RowState:
        """The rows ``ids`` ``[U]`` after ``step`` steps; ``most`` is the largest U. Writes nothing."""
        # Padding reads zeros, so that L2 finds nothing in it.
        known = tf.cast(ids < self.rows, tf.float32)[:, tf.newaxis, tf.newaxis]
        return RowState(ids, known * self._unpacked(gather_rows(self.table, self._inside(ids))), ())

    def read_batch(self, ids: tf.Tensor, step: tf.Tensor, static: bool = False) -> BatchRows:
        """The distinct rows of a batch's ``ids`` ``[B * P]``; with ``static`` in the static shapes that XLA needs."""
        distinct, place = deduplicate_static(ids, self.rows) if static else deduplicate(ids)
        return BatchRows(self.read(distinct, step, place.shape[0]), place)

    def gradient(self, state: RowState, values: tf.Tensor) -> TableGradient:
        """The gradient that counts for the global norm: the loss's, ``values`` ``[U, W]`` (0 for padding), and L2's."""
        raise NotImplementedError

    def apply(self, gradient: TableGradient, step: tf.Tensor, scale: float | tf.Tensor = 1.0) -> None:
        """Makes step ``step``, which counts from 1.

        ``scale`` is the factor by which ``gradient`` was clipped; it also clips the L2 of rows outside ``gradient``.
        """
        raise NotImplementedError

    def catch_up(self, step: tf.Tensor) -> None:
        """Brings the whole table up to date, in the strategy's scope; does nothing unless steps are deferred."""

    def _inside(self, ids: tf.Tensor) -> tf.Tensor:
        """Ids that can be looked up: padding becomes the last row's id."""
        return tf.minimum(ids, self.rows - 1)

    def _unpacked(self, values: tf.Tensor) -> tf.Tensor:
        """``[U, W]`` -> ``[U, N, D]``."""
        return tf.reshape(values, [-1, *self.shape])


class RowOptimizer(TableOptimizer):
    """Base of the optimizers that read and write only the batch's rows."""

    def read(self, ids: tf.Tensor, step: tf.Tensor, most: int | None = None) -> RowState:
        there = self._inside(ids)
        slots = tuple(self._slot_rows(slot, there) for slot in self.slots)
        return self._current(super().read(ids, step)._replace(slots=slots), step, most)

    def _current(self, state: RowState, step: tf.Tensor, most: int | None) -> RowState:
        """The rows after ``step`` steps."""
        return state

    def gradient(self, state: RowState, values: tf.Tensor) -> TableGradient:
        return TableGradient(state, self._unpacked(values) + self.l2 * state.w)

    def apply(self, gradient: TableGradient, step: tf.Tensor, scale: float | tf.Tensor = 1.0) -> None:
        state = gradient.state
        assert state is not None
        w, slots = self._updated(state, gradient.values, step)
        self._write(state.ids, w, slots, step)

    def _updated(
        self, state: RowState, gradient: tf.Tensor, step: tf.Tensor
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
        """The rows' weights and slots after a step."""
        raise NotImplementedError

    def _write(self, ids: tf.Tensor, w: tf.Tensor, slots: tuple[tf.Tensor, ...], step: tf.Tensor) -> None:
        news = zip((w, *slots), (self.table, *self.slots), strict=True)
        stored = [self._packed(new, variable, step, number) for number, (new, variable) in enumerate(news)]
        update_mirrors(self.table, _scatter, self.slots, ids, stored)

    def _slot_rows(self, slot: tf.Variable, ids: tf.Tensor) -> tf.Tensor:
        values = gather_rows(slot, ids)
        if values.shape.rank == 1:
            return values
        return tf.cast(tf.reshape(values, [-1, self.shape[0], slot.shape[1] // self.shape[0]]), tf.float32)

    def _packed(self, values: tf.Tensor, variable: tf.Variable, step: tf.Tensor, number: int) -> tf.Tensor:
        """Values as they are kept in ``variable``; ``number`` tells the variables' roundings apart."""
        if values.shape.rank == 3:
            values = tf.reshape(values, [-1, variable.shape[1]])
        if variable.dtype == tf.bfloat16:
            seed = tf.stack([tf.cast(step, tf.int32), self.seed])
            return stochastic_bfloat16(values, tf.random.experimental.stateless_fold_in(seed, number))
        return values

    def _square(self, gradient: tf.Tensor) -> tf.Tensor:
        """The square that the second moment averages: ``[U, N, D]``, or its mean over an embedding ``[U, N, 1]``."""
        square = tf.square(gradient)
        return tf.reduce_mean(square, axis=-1, keepdims=True) if self.rowwise else square


def _scatter(table: tf.Variable, slots: list[tf.Variable], ids: tf.Tensor, values: list[tf.Tensor]) -> None:
    for variable, value in zip([table, *slots], values, strict=True):
        variable.scatter_update(tf.IndexedSlices(value, ids))


def stochastic_bfloat16(values: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Rounds float32 to bfloat16, up or down at random so that the mean is the value; ``seed`` ``[2]`` determines it.

    A second moment that decays by .001 per step would never change if it were rounded to the nearest of 8 bits.
    """
    noise = tf.random.stateless_uniform(tf.shape(values), seed, minval=0, maxval=1 << 16, dtype=tf.int32)
    bits = tf.bitwise.bitwise_and(tf.bitcast(values, tf.int32) + noise, -(1 << 16))
    return tf.cast(tf.bitcast(bits, tf.float32), tf.bfloat16)


class LazyAdam(RowOptimizer):
    """Adam on the batch's rows: other rows do not move, and L2 pulls on the batch's rows only."""

    kinds_of_slots = SLOTS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_slot("m", dtype=tf.float32 if self.rowwise else None)
        self.add_slot("v", self.shape[0] if self.rowwise else None)

    def _updated(
        self, state: RowState, gradient: tf.Tensor, step: tf.Tensor
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
        rate = Rate.at(self.schedule(step - 1), step, self.betas)
        m, v = moments(state.slots[0], state.slots[1], gradient, self._square(gradient), self.betas)
        return state.w - move(m, v, rate), (m, v)


class DeferredAdam(LazyAdam):
    """Dense Adam's result for lazy Adam's work: a row makes up for the steps that it missed when it is next read.

    See :func:`stem_tf.training.catch_up.catch_up`. A third slot, int32 ``[rows]``, holds the last step that each row
    has made. Where gradients are clipped, so is the L2 of missed steps: ``sums``, float64 ``[S, 2]``, holds, for each
    of the last S steps, the sum of the clipping factors of all steps up to it, and the sum of their squares.
    """

    defers = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_slot("last", 0, tf.int32)
        if self.clips:
            self.sums = tf.Variable(tf.zeros([_KEPT_SCALES, 2], tf.float64), trainable=False, name="clipping_sums")
        self._compiled = tf.function(self._catch_up, jit_compile=True, autograph=False)

    def _current(self, state: RowState, step: tf.Tensor, most: int | None) -> RowState:
        m, v, last = state.slots
        rows, now = AdamRows(state.w, m, v), tf.cast(step, tf.int32)
        if most is None or most * self.table.shape[1] < _COMPILED:
            return RowState(state.ids, *_split(self._catch_up(rows, last, now), last))
        start_xla()
        # XLA compiles every number of rows anew (a second each), so pad to one of 16 numbers. Fused, the chunks take a
        # fifth of the processor time that they take one operation after another.
        size, grain = tf.shape(last)[0], max(most // 16, 1)
        fill = (-size) % grain
        padded = [tf.pad(x, [[0, fill], [0, 0], [0, 0]]) for x in rows]
        done = self._compiled(AdamRows(*padded), tf.pad(last, [[0, fill]], constant_values=2**31 - 1), now)
        return RowState(state.ids, *_split(AdamRows(*(x[:size] for x in done)), last))

    def _catch_up(self, rows: AdamRows, last: tf.Tensor, now: tf.Tensor) -> AdamRows:
        def scales(a: tf.Tensor, steps: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            # At least one step, among those that are kept.
            first = tf.clip_by_value(tf.cast(a, tf.int32), now + 1 - _KEPT_SCALES, now - 1)
            end = tf.clip_by_value(tf.cast(a + steps, tf.int32), first + 1, now)
            sums = tf.gather(self.sums, end % _KEPT_SCALES) - tf.gather(self.sums, first % _KEPT_SCALES)
            means = tf.cast(sums / tf.cast(end - first, tf.float64)[..., tf.newaxis], tf.float32)
            return means[..., 0], means[..., 1]

        return catch_up(
            rows,
            tf.minimum(last, now),
            now,
            l2=self.l2,
            rate=self.schedule,
            square=self._square,
            scales=scales if self.clips else None,
            betas=self.betas,
        )

    def apply(self, gradient: TableGradient, step: tf.Tensor, scale: float | tf.Tensor = 1.0) -> None:
        super().apply(gradient, step, scale)
        if self.clips:
            factor = tf.cast(tf.convert_to_tensor(scale), tf.float64)
            before, now = ((tf.cast(step, tf.int32) - back) % _KEPT_SCALES for back in (1, 0))
            update_mirrors(self.sums, _note, now, self.sums[before] + tf.stack([factor, tf.square(factor)]))

    def _updated(
        self, state: RowState, gradient: tf.Tensor, step: tf.Tensor
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
        w, slots = super()._updated(state, gradient, step)
        return w, (*slots, self._now(state, step))

    def catch_up(self, step: tf.Tensor) -> None:
        strategy = tf.distribute.get_strategy()

        def bring(first: tf.Tensor) -> None:
            state = self.read(tf.range(first, tf.minimum(first + _SLICE_ROWS, self.rows)), step, _SLICE_ROWS)
            self._write(state.ids, state.w, (*state.slots[:2], self._now(state, step)), step)

        run = tf.function(lambda first: strategy.run(bring, (first,)), autograph=False)
        for first in range(0, self.rows, _SLICE_ROWS):
            run(tf.constant(first, self.index_dtype))

    def _now(self, state: RowState, step: tf.Tensor) -> tf.Tensor:
        return tf.fill(tf.shape(state.slots[2]), tf.cast(step, tf.int32))


def _note(sums: tf.Variable, place: tf.Tensor, value: tf.Tensor) -> None:
    sums.scatter_update(tf.IndexedSlices(value[tf.newaxis], place[tf.newaxis]))


def _split(rows: AdamRows, last: tf.Tensor) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
    return rows.w, (rows.m, rows.v, last)


class RowwiseAdagrad(RowOptimizer):
    """Row-wise Adagrad, one sum s per embedding: ``s = s + mean(g^2), w = w - lr g / (sqrt(s) + eps)``.

    L2 pulls on the batch's rows only. It needs larger learning rates than Adam.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rowwise = True
        self.add_slot("sum", self.shape[0])

    def _updated(
        self, state: RowState, gradient: tf.Tensor, step: tf.Tensor
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
        total = state.slots[0] + self._square(gradient)
        return state.w - self.schedule(step - 1) * gradient / (tf.sqrt(total) + EPSILON), (total,)


class DenseAdam(TableOptimizer):
    """Exact dense Adam with L2 ``l2 / 2 * ||table||^2`` over the whole table, as in the authors' release.

    Every step reads and writes every row: for small tables and for parity.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in "mv":
            self.add_slot(name)

    def gradient(self, state: RowState, values: tf.Tensor) -> TableGradient:
        there = self._inside(state.ids)[:, tf.newaxis]
        loss = tf.tensor_scatter_nd_add(tf.zeros_like(self.table), there, values)
        return TableGradient(None, self._unpacked(loss) + self.l2 * self._unpacked(self.table))

    def apply(self, gradient: TableGradient, step: tf.Tensor, scale: float | tf.Tensor = 1.0) -> None:
        values = tf.reshape(gradient.values, self.table.shape)
        rate = Rate.at(self.schedule(step - 1), step, self.betas)
        update_mirrors(self.table, _update_all, self.slots, values, rate, self.betas)


def _update_all(w: tf.Variable, slots: list[tf.Variable], gradient: tf.Tensor, rate: Rate, betas: Betas) -> None:
    m, v = slots
    new_m, new_v = moments(m, v, gradient, tf.square(gradient), betas)
    m.assign(new_m, read_value=False)
    v.assign(new_v, read_value=False)
    w.assign_sub(move(new_m, new_v, rate), read_value=False)


TABLE_OPTIMIZERS: dict[str, type[TableOptimizer]] = {
    "deferred": DeferredAdam,
    "dense": DenseAdam,
    "lazy": LazyAdam,
    "adagrad": RowwiseAdagrad,
}
