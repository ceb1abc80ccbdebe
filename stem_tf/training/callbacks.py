"""What happens around the steps of an epoch: display, checkpoints, and a clean end on a signal.

None of these reads a tensor at every step: the host would wait for the device each time.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any, Self

import tensorflow as tf

from stem_tf.models.ranking_model import RankingModel
from stem_tf.peers import Peers
from stem_tf.training.checkpoints import RunState
from stem_util.progress import Progress

Logs = Mapping[str, tf.Tensor]


class Signals:
    """Inside this context SIGTERM and Ctrl-C are noted, and acted upon between two steps; a second one ends at once.

    Args:
      peers: the processes that stop together, after the same step.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other thread can handle signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def launch(self) -> None:
        """Call before each execution of steps; raises as :meth:`check`."""
        self._peers.launch()

    def check(self) -> None:
        """Raises :class:`stem_tf.peers.Interrupted` when a signal has come."""
        self._peers.check()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._peers.ask_to_stop(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Callback(tf.keras.callbacks.Callback):
    """Base of callbacks whose batch hooks get tensors: Keras would otherwise fetch every step's losses."""

    def __init__(self) -> None:
        super().__init__()
        self._supports_tf_logs = True


class RestoredMeans(Callback):
    """Restores the running means of the losses, which Keras resets at the start of the epoch that is resumed."""

    def __init__(self, model: RankingModel) -> None:
        super().__init__()
        self._variables = [variable for metric in model.metrics for variable in metric.variables]
        self._values = [variable.read_value().numpy() for variable in self._variables]

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        for variable, value in zip(self._variables, self._values, strict=True):
            variable.assign(value)


class Steps(Callback):
    """Keeps ``state`` in step with the model, and calls the actions that are due after a step.

    It has to be the first of the callbacks.

    Args:
      state: state of the run; ``state.step`` counts on from its value.
      batch_size: rows per step.
      actions: (every, action) pairs; ``action`` is called in this order with the last step's losses whenever
        ``state.step`` reaches or passes a multiple of ``every`` (with several steps per execution it may pass it).
      signals: checked after every step, after the actions.
      compiling: whether the first execution also compiles the step; it then does not count for the run's speed.

    Attributes:
      logs: the last step's losses.
    """

    def __init__(
        self,
        state: RunState,
        batch_size: int,
        actions: list[tuple[int, Callable[[Logs], None]]],
        signals: Signals,
        *,
        compiling: bool,
    ) -> None:
        super().__init__()
        self._compiling = compiling
        self._state, self._batch_size, self._actions, self._signals = state, batch_size, actions, signals
        self._start = state.step
        self._clock = 0.0
        self.logs: Logs = {}

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        self._clock = time.monotonic()

    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        self._signals.launch()

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        before, after = self._state.step, self._start + batch + 1
        now = time.monotonic()
        self._state.step = after
        if not self._compiling:
            self._state.samples += (after - before) * self._batch_size
            self._state.seconds += now - self._clock
        self._compiling = False
        self._clock = now
        self.logs = logs or {}
        for every, action in self._actions:
            if after // every > before // every:
                action(self.logs)
        self._signals.check()

    def losses(self) -> dict[str, float]:
        """The epoch's mean losses so far; waits for the device."""
        return numbers(self.logs)


class Display(Callback):
    """One live line on a terminal, a plain line per minute elsewhere.

    It shows the epoch, its rows so far and per second, the step, each task's mean loss so far, and the time left.
    """

    def __init__(self, desc: str, state: RunState, steps: int, batch_size: int) -> None:
        super().__init__()
        self._state, self._steps, self._batch_size = state, steps, batch_size
        self._shown = state.step
        self._logs: Logs = {}
        self._progress = Progress(
            steps * batch_size, unit="rows", desc=desc, initial=state.step * batch_size, note=self._note
        )

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        self._logs = logs or {}
        self._progress.update((self._state.step - self._shown) * self._batch_size)
        self._shown = self._state.step

    def close(self) -> None:
        """Removes the live line."""
        self._progress.__exit__(None, None, None)

    def _note(self) -> str:
        losses = " ".join(f"{task} {value:.4f}" for task, value in by_task(numbers(self._logs)).items())
        return f"step {self._state.step:,} of {self._steps:,}, loss {losses}"


def numbers(logs: Logs) -> dict[str, float]:
    """The losses of a step as numbers; waits for the device."""
    return {name: float(value) for name, value in logs.items()}


def by_task(losses: Mapping[str, float]) -> dict[str, float]:
    """``{"loss/click": x}`` -> ``{"click": x}``, without the sum."""
    return {name.removeprefix("loss/"): value for name, value in losses.items() if name.startswith("loss/")}
