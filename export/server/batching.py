"""A queue of Predict calls with a limit on waiting time. Calls that wait at the same time run in one batch.

A call is cut into pieces of at most ``max_rows`` rows. A free thread takes the most urgent piece, and with it other
waiting pieces of the same signature, outputs and inner shapes. No piece waits only to be joined. Candidates of ``rank``
are filled up to the longest call of the batch, and the answers are cut again, because rows do not depend on each other.

The cost of a call is learned from earlier runs: ``a + b rows`` seconds per signature. It decides

- the order: a piece is due at its call's arrival plus a multiple of its cost (and of the cost of the call's earlier
  pieces). So small calls overtake large ones, but no call is overtaken for ever;
- which calls are refused: those that would wait longer than ``max_wait``, or than half of the time they have left;
- which calls are dropped: those that cannot be scored before their deadline.
"""

from __future__ import annotations

import asyncio
import bisect
import heapq
import itertools
import math
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import grpc
import numpy as np

from export.server.signature import Feeds, Signature
from export.server.status import StatusError

_Outputs = dict[str, np.ndarray]
Result = _Outputs | Exception
Deliver = Callable[[Sequence[tuple["Call", Result]]], None]

_PATIENCE = 10.0
"""A piece is due this many times its cost after its call's arrival."""
_FORGET = 1.01
"""Growth, with each call, of what the smallest of the last calls is believed to cost: tenfold in some 230 calls."""
_WASTE = 1.25
"""Candidates that a batch may compute for each one that was asked for."""


class Call:
    """One Predict call in the queue.

    Args:
      signature: to run.
      feeds: its inputs.
      deadline: by ``time.monotonic()``; infinity for none.

    Attributes:
      started: the time when its first piece began to run; None before that.
      future: gets the result.
    """

    def __init__(self, signature: Signature, feeds: Feeds, deadline: float = math.inf) -> None:
        self.signature, self.feeds, self.deadline = signature, feeds, deadline
        self.arrived = time.monotonic()
        self.started: float | None = None
        self.future: asyncio.Future[_Outputs] | None = None
        self.over = False
        self.pieces: list[_Piece] = []
        self.left = 0

    @property
    def rows(self) -> int:
        return 1 if self.feeds.axes is None else math.prod(self.feeds.axes)


class _Piece:
    """A part of a call that runs at once: its rows (for ``rank``, candidates) from ``start`` to ``stop``."""

    def __init__(self, call: Call, start: tuple[int, ...], stop: tuple[int, ...]) -> None:
        self.call, self.start, self.stop = call, start, stop
        self.place: _Place | None = None  # in the queue, while it waits there
        self.outputs: _Outputs = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def rows(self) -> int:
        return self.call.rows if not self.start else math.prod(self.sizes)

    def inputs(self) -> list[np.ndarray]:
        feeds, shared = self.call.feeds, self.call.signature.axes
        if len(self.call.pieces) == 1 or shared is None:
            return feeds.arrays
        cut = [slice(*ends) for ends in zip(self.start, self.stop, strict=True)]
        return [array[tuple(cut[:axes])] for array, axes in zip(feeds.arrays, shared, strict=True)]


class _Group(NamedTuple):
    """Identifies calls that can run together; ``inner``: the axes that scores do not have, None if calls run alone."""

    signature: Signature
    wanted: tuple[str, ...]
    inner: tuple[tuple[int, ...], ...] | None


class Scheduler:
    """Runs calls in threads.

    Args:
      threads: how many calls run at once. At most half as many batches run, because TensorFlow gives a batch several
        cores, and calls that wait meanwhile make the next batch larger.
      max_rows: of a batch and of a piece of a call.
      max_wait: a call that is expected to wait longer, in seconds, gets UNAVAILABLE.
      deliver: called in these threads with finished calls and their outputs or errors.
      observe: called with the rows of every batch.
    """

    def __init__(
        self,
        threads: int,
        *,
        max_rows: int,
        max_wait: float,
        deliver: Deliver,
        observe: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self._max_rows, self._max_wait = max_rows, max_wait
        self._deliver, self._observe = deliver, observe
        self._condition = threading.Condition()
        self._costs = _Costs()
        self._groups: dict[_Group, list[_Place]] = {}
        self._numbers = itertools.count()
        # All waiting pieces by their due time, with their cost: a call waits for those that are due before it.
        self._line: list[tuple[float, int]] = []
        self._seconds: list[float] = []
        self._batches, self._max_batches = 0, max(1, threads // 2)
        self._least = 0.0  # seconds from arrival to due time, for the smallest of the last calls
        self._stopped = False
        self._threads = [threading.Thread(target=self._work, name=f"predict-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def admit(self, seconds: float) -> None:
        """Refuses a call of which only the remaining time is known.

        Raises:
          StatusError: UNAVAILABLE, even the smallest call would wait too long.
        """
        with self._condition:
            now = time.monotonic()
            self._refuse(now + self._least, self._max_batches, seconds)

    def submit(self, call: Call) -> None:
        """Queues a call. It is delivered later, unless it is dropped.

        Raises:
          StatusError: UNAVAILABLE, it would have to wait too long.
        """
        group, pieces = _group(call), _cut(call, self._max_rows)
        with self._condition:
            fixed, per_row = self._costs.line(call.signature)
            patience = _PATIENCE * (fixed + per_row * pieces[0].rows)
            self._least = min(patience, self._least * _FORGET + 1e-6)
            due = call.arrived + patience
            at_once = len(self._threads) if group.inner is None else self._max_batches
            self._refuse(due, at_once, call.deadline - time.monotonic())
            call.pieces, call.left = pieces, len(pieces)
            queue = self._groups.setdefault(group, [])
            due = call.arrived
            for piece in pieces:
                due += _PATIENCE * (fixed + per_row * piece.rows)
                place = piece.place = _Place((due, next(self._numbers)), piece)
                heapq.heappush(queue, place)
                index = bisect.bisect(self._line, place.due)
                self._line.insert(index, place.due)
                # Calls that run together share the fixed cost.
                share = 1.0 if group.inner is None else piece.rows / self._max_rows
                self._seconds.insert(index, fixed * share + per_row * piece.rows)
            if self._may_run(group):
                self._condition.notify()

    def _refuse(self, due: float, at_once: int, seconds: float) -> None:
        """Refuses a call that is ``due`` if the calls before it, with ``at_once`` running, would take too long."""
        wait = sum(self._seconds[: bisect.bisect(self._line, (due, -1))]) / at_once
        if wait > self._max_wait or wait > seconds / 2:
            raise StatusError(
                grpc.StatusCode.UNAVAILABLE,
                "The batch scheduling queue to which this task was submitted is full; "
                f"a call would wait {wait * 1e3:.0f} ms",
            )

    def drop(self, call: Call) -> None:
        """Removes a call whose client has gone. Pieces that already run finish; the others never run."""
        if not call.left:
            return
        with self._condition:
            call.over = True
            if call.started is None:
                # A client that calls and leaves again and again would otherwise fill the memory.
                call.feeds = call.feeds._replace(arrays=[])
            for piece in call.pieces:
                if piece.place is not None:
                    self._seconds[self._index(piece.place)] = 0.0

    def stop(self) -> None:
        """Ends the threads after their current runs; waiting calls are not run."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()

    def _work(self) -> None:
        going = True
        while going:
            try:
                going = self._turn()
            except Exception:  # a bug in our code must not end the thread
                traceback.print_exc()

    def _turn(self) -> bool:
        """Waits for a piece and runs it; returns False when the thread should end.

        A separate method, so that a waiting thread holds no signature: it would keep an unloaded version alive.
        """
        with self._condition:
            while (group := self._next()) is None and not self._stopped:
                self._condition.wait()
            if group is None or self._stopped:
                return False
            pieces, late = self._take(group)
            batch = bool(pieces) and group.inner is not None
            self._batches += batch
            # Waking a thread for nothing costs as much as a small call, so each wakes the next one only if needed.
            if self._next() is not None:
                self._condition.notify()
        try:
            if late:
                self._deliver([(call, _expired()) for call in late])
            if pieces:
                self._run(pieces)
        except Exception as error:
            # A bug in our code. Its calls must end too.
            self._finish(pieces, error)
            raise
        finally:
            with self._condition:
                self._batches -= batch
        return True

    def _next(self) -> _Group | None:
        """Returns the group of the most urgent piece that may run now."""
        groups = filter(self._may_run, self._groups)
        return min(groups, key=lambda group: self._groups[group][0], default=None)

    def _may_run(self, group: _Group) -> bool:
        return group.inner is None or self._batches < self._max_batches

    def _take(self, group: _Group) -> tuple[list[_Piece], list[Call]]:
        """Takes the most urgent piece and those that run with it, and the calls that cannot meet their deadline."""
        queue, taken, late = self._groups[group], list[_Piece](), list[Call]()
        now, rows, users, longest = time.monotonic(), 0, 0, 0
        while queue:
            piece = queue[0].piece
            call = piece.call
            fixed, per_row = self._costs.line(call.signature)
            if not call.over and now + fixed + per_row * piece.rows > call.deadline:
                call.over = True
                late.append(call)
                self._costs.doubt(call.signature)
            if not call.over:
                wider = piece.sizes if len(piece.start) == 2 else (piece.rows, 1)
                filled = (users + wider[0]) * max(longest, wider[1])
                if taken and (filled > self._max_rows or filled > _WASTE * (rows + piece.rows)):
                    break
                rows, users, longest = rows + piece.rows, users + wider[0], max(longest, wider[1])
                taken.append(piece)
                call.started = call.started or now
            self._leave(heapq.heappop(queue))
            if taken and group.inner is None:
                break
        if not queue:
            del self._groups[group]
        return taken, late

    def _leave(self, place: _Place) -> None:
        index = self._index(place)
        del self._line[index], self._seconds[index]
        place.piece.place = None

    def _index(self, place: _Place) -> int:
        return bisect.bisect_left(self._line, place.due)

    def _run(self, pieces: list[_Piece]) -> None:
        signature, wanted = pieces[0].call.signature, pieces[0].call.feeds.wanted
        begun = time.monotonic()
        try:
            _split(signature.run(_join(pieces), wanted), pieces)
        except Exception as error:
            if len(pieces) > 1:
                # A request that the model refuses must not fail the others of its batch.
                for piece in pieces:
                    self._run([piece])
            else:
                self._finish(pieces, error)
            return
        rows = sum(piece.rows for piece in pieces)
        with self._condition:
            self._costs.learn(signature, rows, time.monotonic() - begun)
        self._observe(rows)
        self._finish(pieces, None)

    def _finish(self, pieces: list[_Piece], error: Exception | None) -> None:
        done: list[tuple[Call, Result]] = []
        for piece in pieces:
            call = piece.call
            with self._condition:
                call.left -= 1
                ended = not call.over and (error is not None or not call.left)
                call.over = call.over or ended
            if ended:
                done.append((call, _result(call) if error is None else error))
        if done:
            self._deliver(done)


class _Place(NamedTuple):
    """A piece in the queue of its group. ``due``: a time, and a number that orders equal times."""

    due: tuple[float, int]
    piece: _Piece


class _Costs:
    """Seconds per run of each signature, ``fixed + per_row * rows``: least squares with decaying weights of runs."""

    _KEPT = 0.98

    def __init__(self) -> None:
        self._sums: weakref.WeakKeyDictionary[Signature, list[float]] = weakref.WeakKeyDictionary()
        self._lines: weakref.WeakKeyDictionary[Signature, tuple[float, float]] = weakref.WeakKeyDictionary()

    def line(self, signature: Signature) -> tuple[float, float]:
        """Returns ``fixed, per_row``; 0 for a signature that never ran."""
        return self._lines.get(signature, (0.0, 0.0))

    def learn(self, signature: Signature, rows: int, seconds: float) -> None:
        sums = self._sums.setdefault(signature, [0.0] * 5)
        for place, value in enumerate((1.0, rows, seconds, rows * rows, rows * seconds)):
            sums[place] = sums[place] * self._KEPT + value
        count, x, y, xx, xy = sums
        mean = y / x if x else 0.0
        spread = count * xx - x * x
        # If all runs had equally many rows, the two cannot be told apart: all cost is assigned to the rows.
        slope = (count * xy - x * y) / spread if spread > 1e-6 * count * xx else mean
        per_row = min(max(slope, 0.0), mean)
        self._lines[signature] = (y - per_row * x) / count, per_row

    def doubt(self, signature: Signature) -> None:
        """Lowers the estimate after a call was dropped: if all were dropped, no run would correct it."""
        fixed, per_row = self.line(signature)
        self._lines[signature] = fixed * 0.99, per_row * 0.99


def _group(call: Call) -> _Group:
    feeds, shared = call.feeds, call.signature.axes
    if feeds.axes is None or shared is None:
        return _Group(call.signature, feeds.wanted, None)
    inner = tuple(array.shape[axes:] for array, axes in zip(feeds.arrays, shared, strict=True))
    return _Group(call.signature, feeds.wanted, inner)


def _cut(call: Call, max_rows: int) -> list[_Piece]:
    """Cuts a call into pieces of at most ``max_rows`` rows, in the order of its rows."""
    axes = call.feeds.axes
    if axes is None or call.rows <= max_rows:
        axes = axes or ()
        return [_Piece(call, (0,) * len(axes), axes)]
    inner = min(math.prod(axes[1:]), max_rows)
    steps = (max_rows // inner, *[inner] * (len(axes) - 1))
    starts = itertools.product(*(range(0, size, step) for size, step in zip(axes, steps, strict=True)))
    return [
        _Piece(call, start, tuple(min(s + step, size) for s, step, size in zip(start, steps, axes, strict=True)))
        for start in starts
    ]


def _join(pieces: list[_Piece]) -> list[np.ndarray]:
    """Joins the inputs of a batch."""
    if len(pieces) == 1:
        return pieces[0].inputs()
    shared, parts = pieces[0].call.signature.axes, [piece.inputs() for piece in pieces]
    assert shared is not None
    return [_stack(list(arrays), axes) for arrays, axes in zip(zip(*parts, strict=True), shared, strict=True)]


def _stack(arrays: list[np.ndarray], axes: int) -> np.ndarray:
    """Concatenates arrays ``[B, ...]`` or ``[B, N, ...]``; N becomes the largest, filled up with 0 or ""."""
    if axes == 1 or len({array.shape[1] for array in arrays}) == 1:
        return np.concatenate(arrays)
    first = arrays[0]
    shape = (sum(map(len, arrays)), max(array.shape[1] for array in arrays), *first.shape[2:])
    stacked = np.full(shape, b"", object) if first.dtype.hasobject else np.zeros(shape, first.dtype)
    start = 0
    for array in arrays:
        stacked[start : start + len(array), : array.shape[1]] = array
        start += len(array)
    return stacked


def _split(outputs: _Outputs, pieces: list[_Piece]) -> None:
    """Gives each piece its part of a batch's outputs.

    Raises:
      ValueError: an output does not have the axes of the inputs, so its scores cannot be assigned to calls.
    """
    if len(pieces) == 1 and len(pieces[0].call.pieces) == 1:
        pieces[0].outputs = outputs
        return
    rows = [piece.sizes for piece in pieces]
    expected = (sum(sizes[0] for sizes in rows), *map(max, zip(*(sizes[1:] for sizes in rows), strict=True)))
    for alias, output in outputs.items():
        if output.shape[: len(expected)] != expected:
            raise ValueError(f"output '{alias}' has shape {output.shape} where {expected} was expected")
    start = 0
    for piece in pieces:
        part = (slice(start, start + piece.sizes[0]), *(slice(size) for size in piece.sizes[1:]))
        piece.outputs = {alias: output[part] for alias, output in outputs.items()}
        start += piece.sizes[0]


def _result(call: Call) -> Result:
    try:
        return _assemble(call)
    except Exception as error:  # no memory, for example: the call must still end
        return error


def _assemble(call: Call) -> _Outputs:
    """Joins the outputs of a call's pieces."""
    first = call.pieces[0]
    if len(call.pieces) == 1:
        return first.outputs
    assert call.feeds.axes is not None
    axes = call.feeds.axes
    whole = {alias: np.empty((*axes, *x.shape[len(axes) :]), x.dtype) for alias, x in first.outputs.items()}
    for piece in call.pieces:
        place = tuple(itertools.starmap(slice, zip(piece.start, piece.stop, strict=True)))
        for alias, output in piece.outputs.items():
            whole[alias][place] = output
    return whole


def _expired() -> StatusError:
    return StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline comes before the scores would")
