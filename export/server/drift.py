"""Counts for drift alarms, from a sample of calls: missing and unknown values by feature, scores by task.

A separate thread counts a few calls per second. Calls hand it copies of at most some thousand values through a short
queue. If the queue is full, the sample is dropped, so that counting never slows a busy server.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import queue
import random
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from export import publish
from export.server.known_values import KnownValues
from export.server.observation import Observation
from pipelines import manifest as manifests
from pipelines.log.casts import EMPTY

BINARY_BOUNDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0),
)
OUTPUT_BOUNDS = (*(-(10.0**power) for power in range(6, -4, -1)), 0.0, *(10.0**power for power in range(-12, 7)))
"""For outputs made of scores, which may be of any size."""
REGRESSION_BOUNDS = (0.0, *(digit * 10.0**power for power in range(-3, 6) for digit in (1, 3)))

_WAITING = 16
_PAUSE_SECONDS = 0.05  # after each sample, so that counting takes at most a hundredth of a core
_VALUES = 4096  # of a feature or a task in a call
_EXAMPLES = 64
_LARGEST_REQUEST = 4 << 20  # the queue holds values of requests, and strings are not copied

Key = tuple[str, int]
"""A model's name and a version."""


class Distribution:
    """A histogram: ``counts[i]`` values are at most ``bounds[i]``, the last ones above all bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts, self.total = np.zeros(len(bounds) + 1, np.int64), 0.0

    def add(self, values: np.ndarray) -> None:
        finite = values[np.isfinite(values)].astype(np.float64)
        places = np.searchsorted(self.bounds, finite, side="left")
        self.counts += np.bincount(places, minlength=len(self.counts))
        self.total += float(finite.sum())


@dataclasses.dataclass
class FeatureCounts:
    """Counts of one feature in the sampled calls.

    Attributes:
      rows: how many rows or items had to give a value or a list.
      missing: how many of these were empty.
      values: how many values were given.
      unknown: how many of these are not in the vocabulary; None where there is none: numbers, vectors, hashed ids.
    """

    rows: int = 0
    missing: int = 0
    values: int = 0
    unknown: int | None = None

    def add(self, other: FeatureCounts) -> None:
        self.rows += other.rows
        self.missing += other.missing
        self.values += other.values
        if other.unknown is not None:
            self.unknown = (self.unknown or 0) + other.unknown


@dataclasses.dataclass(frozen=True)
class _Feature:
    name: str
    kind: str
    dtype: str
    known: KnownValues | None


@dataclasses.dataclass(frozen=True)
class _Export:
    """What a version's manifest says of its features, and the bounds of histograms by task and output."""

    features: tuple[_Feature, ...]
    bounds: Mapping[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class _Sample:
    key: Key
    path: Path
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


class Drift:
    """Counts features and scores of a share of the calls.

    Args:
      share: of the calls, 0 to 1.
      loaded: the versions that are loaded, by model.

    Attributes:
      lock: held to read ``features`` and ``scores``.
      features: counts by model and feature.
      scores: histograms by model and version, and by task.
    """

    def __init__(self, share: float, loaded: Callable[[], Mapping[str, Collection[int]]]) -> None:
        self._share, self._loaded = share, loaded
        self._queue: queue.Queue[_Sample | None] = queue.Queue(_WAITING)
        self._exports: dict[Key, _Export | None] = {}
        self._known: dict[str, KnownValues] = {}
        self.lock = threading.Lock()
        self.features: dict[tuple[str, str], FeatureCounts] = collections.defaultdict(FeatureCounts)
        self.scores: dict[Key, dict[str, Distribution]] = {}
        self._thread = threading.Thread(target=self._run, name="drift", daemon=True)
        self._thread.start()

    def offer(self, seen: Observation) -> None:
        """May take a call for the sample. Does not block."""
        if not seen.inputs or not seen.outputs or seen.servable is None or seen.request_bytes > _LARGEST_REQUEST:
            return
        if random.random() >= self._share or self._queue.full():
            return
        sample = _Sample(
            (seen.servable.name, seen.servable.version),
            seen.servable.path,  # not the servable, so that it can be freed
            {
                name: _thinned(array, _EXAMPLES if name == "examples" else _VALUES)
                for name, array in seen.inputs.items()
            },
            {name: _thinned(array, _VALUES) for name, array in seen.outputs.items()},
        )
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(sample)

    def close(self) -> None:
        """Ends the thread after it has counted the queued calls."""
        self._queue.put(None)
        self._thread.join()

    def flush(self) -> None:
        """Waits until all queued calls are counted."""
        self._queue.join()

    def _run(self) -> None:
        while True:
            sample = self._queue.get()
            try:
                if sample is None:
                    return
                self._count(sample)
            except Exception:
                # A damaged file or a bug loses this sample, but not later ones.
                traceback.print_exc()
            finally:
                self._queue.task_done()
            time.sleep(_PAUSE_SECONDS)

    def _count(self, sample: _Sample) -> None:
        if sample.key not in self._exports:
            self._open(sample.key, sample.path)
        export = self._exports.get(sample.key)
        if export is None:
            return
        inputs = sample.inputs
        if "examples" in inputs:
            counted = list(_of_examples(export.features, inputs["examples"]))
        else:
            counted = [(x.name, _counts(x, inputs[x.name])) for x in export.features if x.name in inputs]
        with self.lock:
            for name, new in counted:
                self.features[sample.key[0], name].add(new)
            scores = self.scores.setdefault(sample.key, {})
            for task, array in sample.outputs.items():
                if task in export.bounds and array.dtype.kind == "f":
                    scores.setdefault(task, Distribution(export.bounds[task])).add(array.ravel())

    def _open(self, key: Key, path: Path) -> None:
        """Reads the version's manifest and vocabularies; drops those that no loaded version needs."""
        loaded = self._loaded()
        self._exports = {(n, v): export for (n, v), export in self._exports.items() if v in loaded.get(n, ())}
        self._exports[key] = None  # a file that cannot be read is not tried again for each sample
        self._exports[key] = self._read(path)
        used = {id(x.known) for export in self._exports.values() if export is not None for x in export.features}
        self._known = {digest: known for digest, known in self._known.items() if id(known) in used}

    def _read(self, path: Path) -> _Export | None:
        if not (path / manifests.FILENAME).exists():
            return None  # another program's SavedModel
        tree = json.loads((path / manifests.FILENAME).read_bytes())
        vocabularies = publish.vocabularies(tree)
        features = []
        for feature in tree["schema"]["features"]:
            known = None
            if feature["name"] in vocabularies:
                name = vocabularies[feature["name"]]
                digest = tree["files"][name]
                if digest not in self._known:
                    self._known[digest] = KnownValues(path / name, feature["dtype"])
                known = self._known[digest]
            features.append(_Feature(feature["name"], feature["kind"], feature["dtype"], known))
        bounds: dict[str, Any] = {"binary": BINARY_BOUNDS, "regression": REGRESSION_BOUNDS}
        of_tasks = {task["name"]: bounds[task["type"]] for task in tree["schema"]["tasks"]}
        return _Export(tuple(features), of_tasks | {o["name"]: OUTPUT_BOUNDS for o in tree.get("outputs", [])})


def _thinned(array: np.ndarray, limit: int) -> np.ndarray:
    """A copy of evenly spaced rows, then candidates; the first candidates are often the best, so not those."""
    for axis in range(array.ndim):
        step = -(-array.size // limit)
        if step > 1:
            last = axis == 2 or axis == array.ndim - 1 > 1
            # Lists are cut, as the model does it, not spaced.
            array = array[..., :limit] if last else array[(slice(None),) * axis + (slice(None, None, step),)]
    return array.copy()


def _counts(feature: _Feature, array: np.ndarray) -> FeatureCounts:
    """Counts a tensor of values [...], lists [..., L] (empty values are padding) or vectors [..., n]."""
    if array.dtype.kind == "f":
        given = np.isfinite(array)
    else:
        given = array != EMPTY["string" if array.dtype.hasobject else "int64"]
    if feature.kind == "multivalent":
        present = given.any(axis=-1)
    elif feature.kind == "dense":
        present = given.all(axis=-1)
    else:
        present = given
    unknown = None if feature.known is None else feature.known.unknown(array[given])
    filled = int(np.count_nonzero(present))
    return FeatureCounts(present.size, present.size - filled, int(np.count_nonzero(given)), unknown)


def _of_examples(features: Iterable[_Feature], examples: np.ndarray) -> Iterable[tuple[str, FeatureCounts]]:
    from tensorflow.core.example import example_pb2

    parsed = [example_pb2.Example.FromString(example).features.feature for example in examples.ravel().tolist()]
    for feature in features:
        field = {"int64": "int64_list", "string": "bytes_list", "float32": "float_list"}[feature.dtype]
        dtype = {"int64": np.int64, "string": object, "float32": np.float32}[feature.dtype]
        total = FeatureCounts()
        for example in parsed:
            values = list(getattr(example[feature.name], field).value) if feature.name in example else []
            total.add(_counts(feature, np.array([values or [EMPTY[feature.dtype]]], dtype)))
        yield feature.name, total
