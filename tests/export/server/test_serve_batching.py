"""What waits together runs together, in an order and a queue that deadlines decide."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from export.server import batching
from export.server.batching import Call, Result, Scheduler
from export.server.signature import Feeds
from export.server.status import StatusError


class Adds:
    """``sum = user + item`` of user [B] and item [B] or [B, N]; a user of -1 is refused. Runs when the gate is open."""

    def __init__(self, candidates: bool = False, seconds_per_row: float = 0.0) -> None:
        self.axes: tuple[int, ...] | None = (1, 2 if candidates else 1)
        self.order = ("user", "item")
        self.gate = threading.Event()
        self.gate.set()
        self.seconds_per_row = seconds_per_row
        self.runs: list[tuple[int, ...]] = []

    def run(self, arrays: list[np.ndarray], wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
        user, item = arrays
        self.runs.append(item.shape)
        self.gate.wait(20)
        time.sleep(self.seconds_per_row * item.size)
        if (user == -1).any():
            raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, "user -1")
        return {"sum": user[:, None] + item if item.ndim == 2 else user + item}

    def call(self, user: list[int], item: Any, seconds: float = math.inf) -> Call:
        arrays = [np.array(user), np.array(item)]
        feeds = Feeds(arrays, ("sum",), arrays[1].shape if self.axes else None)
        return Call(self, feeds, time.monotonic() + seconds)  # type: ignore[arg-type]


class Results(dict[Call, Result]):
    """What was delivered; ``wait(calls)`` for it."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = threading.Condition()

    def deliver(self, done: Any) -> None:
        with self.condition:
            self.update(done)
            self.condition.notify_all()

    def wait(self, *calls: Call) -> list[Any]:
        with self.condition:
            assert self.condition.wait_for(lambda: all(call in self for call in calls), 20)
        return [self[call]["sum"].tolist() if isinstance(self[call], dict) else self[call] for call in calls]  # type: ignore[index]


Make = Callable[..., tuple[Scheduler, Results]]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Scheduler] = []

    def make(max_rows: int = 8, max_wait: float = 60.0, threads: int = 2) -> tuple[Scheduler, Results]:
        results = Results()
        made.append(Scheduler(threads, max_rows=max_rows, max_wait=max_wait, deliver=results.deliver))
        return made[-1], results

    yield make
    for scheduler in made:
        scheduler.stop()


def occupied(scheduler: Scheduler, signature: Adds) -> Call:
    """A call that runs until the gate opens."""
    signature.gate.clear()
    call = signature.call([0], [[0]] if signature.axes == (1, 2) else [0])
    scheduler.submit(call)
    end = time.monotonic() + 20
    while not signature.runs and time.monotonic() < end:
        time.sleep(0.001)
    return call


def test_an_idle_scheduler_runs_a_call_by_itself(make: Make) -> None:
    scheduler, results = make()
    signature = Adds()
    for item in range(3):
        call = signature.call([1], [item])
        scheduler.submit(call)
        assert results.wait(call) == [[1 + item]]
    assert signature.runs == [(1,), (1,), (1,)]


def test_waiting_calls_are_joined_up_to_the_limit(make: Make) -> None:
    scheduler, results = make(max_rows=8)
    signature = Adds()
    first = occupied(scheduler, signature)
    calls = [signature.call([n, n, n], [0, 1, 2]) for n in range(5)]
    for call in calls:
        scheduler.submit(call)
    signature.gate.set()
    assert results.wait(first, *calls) == [[0], *([n, n + 1, n + 2] for n in range(5))]
    assert signature.runs == [(1,), (6,), (6,), (3,)]


def test_candidates_are_filled_up_and_cut_again(make: Make) -> None:
    scheduler, results = make(max_rows=100)
    signature = Adds(candidates=True)
    occupied(scheduler, signature)
    calls = [signature.call([1], [[1, 2, 3, 4]]), signature.call([2, 3], [[1, 2, 3]] * 2), signature.call([4], [[]])]
    for call in calls:
        scheduler.submit(call)
    signature.gate.set()
    assert results.wait(*calls) == [[[2, 3, 4, 5]], [[3, 4, 5], [4, 5, 6]], [[]]]
    assert signature.runs[1] == (3, 4)  # no candidates at all would cost more than they are worth


def test_lengths_that_differ_much_are_not_joined(make: Make) -> None:
    scheduler, results = make(max_rows=1000)
    signature = Adds(candidates=True)
    occupied(scheduler, signature)
    calls = [signature.call([1], [list(range(n))]) for n in (100, 10, 10)]
    for call in calls:
        scheduler.submit(call)
    signature.gate.set()
    results.wait(*calls)
    assert sorted(signature.runs[1:]) == [(1, 100), (2, 10)]


@pytest.mark.parametrize("shape", [(20,), (3, 7), (2, 30), (1, 30)])
def test_large_calls_are_cut_and_put_together_again(make: Make, shape: tuple[int, ...]) -> None:
    scheduler, results = make(max_rows=8)
    signature = Adds(candidates=len(shape) == 2)
    item = np.arange(math.prod(shape)).reshape(shape)
    user = np.arange(shape[0]) * 1000
    call = signature.call(user.tolist(), item)
    scheduler.submit(call)
    assert results.wait(call) == [(item.T + user).T.tolist()]
    assert len(signature.runs) > 1 and max(math.prod(run) for run in signature.runs) <= 8


def test_calls_of_other_outputs_or_inner_shapes_or_unknown_models_run_apart(make: Make) -> None:
    scheduler, results = make(max_rows=8)
    signature, unknown = Adds(), Adds()
    unknown.axes = None
    first = occupied(scheduler, signature)
    other = signature.call([1], [1])
    other.feeds = other.feeds._replace(wanted=("sum", "more"))
    alone = [unknown.call([n], [n]) for n in range(2)]
    for call in (other, *alone):
        scheduler.submit(call)
    # A model whose rows may depend on one another does not wait for the batches of another.
    assert results.wait(*alone) == [[0], [2]] and unknown.runs == [(1,), (1,)]
    signature.gate.set()
    assert results.wait(first, other) == [[0], [2]]


def test_a_request_that_is_refused_does_not_fail_its_neighbours(make: Make) -> None:
    scheduler, results = make()
    signature = Adds()
    occupied(scheduler, signature)
    calls = [signature.call([user], [1]) for user in (5, -1, 6)]
    for call in calls:
        scheduler.submit(call)
    signature.gate.set()
    good, refused, also_good = results.wait(*calls)
    assert (good, also_good) == ([6], [7]) and isinstance(refused, StatusError)
    assert signature.runs[1:] == [(3,), (1,), (1,), (1,)]


def learned(scheduler: Scheduler, results: Results, signature: Adds, rows: int) -> None:
    """Lets the scheduler see what ``rows`` rows cost."""
    for _ in range(3):
        call = signature.call([0] * rows, [0] * rows)
        scheduler.submit(call)
        results.wait(call)
    signature.runs.clear()


def test_small_calls_pass_large_ones_and_large_ones_end(make: Make) -> None:
    scheduler, results = make(max_rows=10)
    signature = Adds(seconds_per_row=0.001)
    learned(scheduler, results, signature, 10)
    occupied(scheduler, signature)
    large = signature.call([0] * 100, range(100))
    scheduler.submit(large)
    small = [signature.call([n], [n]) for n in range(5)]
    for call in small:
        scheduler.submit(call)
    signature.gate.set()
    results.wait(*small)
    assert large not in results
    assert results.wait(large) == [list(range(100))]


def test_a_call_that_would_wait_too_long_is_refused(make: Make) -> None:
    scheduler, results = make(max_rows=10, max_wait=0.5)
    signature = Adds(seconds_per_row=0.01)
    learned(scheduler, results, signature, 10)
    first = occupied(scheduler, signature)
    accepted: list[Call] = []
    with pytest.raises(StatusError, match="queue to which this task was submitted is full") as caught:
        while len(accepted) < 1000:
            call = signature.call([0] * 10, [0] * 10)
            scheduler.submit(call)
            accepted.append(call)
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE
    # 0.1 s each, one batch at a time: about five of them are half a second.
    assert 3 <= len(accepted) <= 10
    with pytest.raises(StatusError):  # half of what is left of its time
        scheduler.submit(signature.call([0] * 10, [0] * 10, seconds=0.6))
    signature.gate.set()
    results.wait(first, *accepted)


def test_expired_calls_are_dropped_before_they_run(make: Make) -> None:
    scheduler, results = make()
    signature = Adds()
    first = occupied(scheduler, signature)
    late, cancelled, good = (signature.call([1], [n], seconds) for n, seconds in enumerate((0.05, 60, 60)))
    for call in (late, cancelled, good):
        scheduler.submit(call)
    scheduler.drop(cancelled)
    time.sleep(0.06)
    signature.gate.set()
    error, scores = results.wait(late, good)
    assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED and scores == [3]
    results.wait(first)
    assert signature.runs == [(1,), (1,)] and cancelled not in results


def test_calls_that_were_dropped_let_others_in(make: Make) -> None:
    scheduler, results = make(max_rows=10, max_wait=0.5)
    signature = Adds(seconds_per_row=0.01)
    learned(scheduler, results, signature, 10)
    first = occupied(scheduler, signature)
    for _ in range(50):
        gone = signature.call([0] * 20, [0] * 20)
        scheduler.submit(gone)
        scheduler.drop(gone)
        assert not gone.feeds.arrays  # their memory is free at once
    good = signature.call([1] * 10, [1] * 10)
    scheduler.submit(good)
    signature.gate.set()
    assert results.wait(first, good) == [[0], [2] * 10]
    assert signature.runs == [(1,), (10,)]


@pytest.mark.parametrize("where", ["observe", "_assemble"])
def test_calls_end_also_where_we_are_wrong(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(anything: Any) -> Any:
        raise MemoryError("no memory")

    if where != "observe":
        monkeypatch.setattr(batching, where, fail)
    results, signature = Results(), Adds()
    scheduler = Scheduler(
        2, max_rows=8, max_wait=60, deliver=results.deliver, observe=fail if where == "observe" else lambda rows: None
    )
    for _ in range(3):  # the threads live on
        calls = [signature.call([1] * 3, [1] * 3), signature.call([1] * 30, [1] * 30)]
        for call in calls:
            scheduler.submit(call)
        assert [type(result) for result in results.wait(*calls)] == [MemoryError, MemoryError]
    scheduler.stop()


def test_belief_in_a_cost_that_was_an_accident_fades(make: Make) -> None:
    """Were every call dropped for a cost that is believed, nothing would run that could correct it."""
    scheduler, results = make()
    signature = Adds(seconds_per_row=0.5)
    learned(scheduler, results, signature, 1)
    signature.seconds_per_row = 0.0
    for _ in range(200):
        call = signature.call([1], [1], seconds=0.3)
        scheduler.submit(call)
        (result,) = results.wait(call)
        if result == [2]:
            return
    raise AssertionError("every call was dropped")
