"""TensorFlow callables of a signature, one per set of outputs that requests ask for: built once, kept while in use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent import futures

import numpy as np

Outputs = tuple[str, ...]
Run = Callable[[list[np.ndarray]], dict[str, np.ndarray]]

LIMIT = 32
"""Kept at once. To build one takes a quarter of a second of a core, and clients choose the sets."""
IN_USE_SECONDS = 60.0
"""One that was asked for so short a time ago makes no room for another."""
RECENT_SECONDS = 600.0
"""One that was asked for so short a time ago is built for the next version, too."""


class Callables:
    """``callables(outputs)`` computes these outputs from a signature's inputs; it is built on first use.

    Other requests for the same outputs wait for that build; requests for other outputs do not. When `LIMIT` callables
    are in use, further sets of outputs are computed by the callable of all outputs.

    Args:
      build: builds one. If it raises, all requests that wait for it get the exception, and the next one tries again.
      everything: all outputs.
    """

    def __init__(self, build: Callable[[Outputs], Run], everything: Outputs) -> None:
        self._build, self._everything = build, everything
        self._lock = threading.Lock()
        self._built: dict[Outputs, futures.Future[Run]] = {}
        self._used: dict[Outputs, float] = {}  # the same keys, in the order of their last use

    def __call__(self, outputs: Outputs) -> Run:
        return self._get(outputs, time.monotonic())

    def recent(self) -> dict[Outputs, float]:
        """The last use of each set that was used in the last `RECENT_SECONDS`; the latest one is last."""
        with self._lock:
            since = time.monotonic() - RECENT_SECONDS
            return {outputs: used for outputs, used in self._used.items() if used >= since}

    def prepare(self, recent: Mapping[Outputs, float]) -> None:
        """Builds the sets in another version's `recent` that this version has. This does not count as a use."""
        for outputs, used in recent.items():
            if set(outputs) <= set(self._everything):
                self._get(outputs, used)

    def _get(self, outputs: Outputs, used: float) -> Run:
        with self._lock:
            kept = outputs if outputs in self._built or self._room() else self._everything
            future = self._built.get(kept)
            mine = future is None
            if future is None:
                future = self._built[kept] = futures.Future()
            self._used.pop(kept, None)
            self._used[kept] = used
        if mine:
            try:
                future.set_result(self._build(kept))
            except BaseException as error:
                with self._lock:
                    del self._built[kept], self._used[kept]
                future.set_exception(error)
        run = future.result()
        return run if kept == outputs else lambda arrays: _some(run(arrays), outputs)

    def _room(self) -> bool:
        """Whether there is room for one more. Drops the one whose last use is longest ago, unless it is in use."""
        if len(self._built) < LIMIT:
            return True
        oldest = next(outputs for outputs in self._used if outputs != self._everything)
        if not self._built[oldest].done() or self._used[oldest] > time.monotonic() - IN_USE_SECONDS:
            return False
        del self._built[oldest], self._used[oldest]
        return True


def _some(arrays: dict[str, np.ndarray], outputs: Outputs) -> dict[str, np.ndarray]:
    return {alias: arrays[alias] for alias in outputs}
