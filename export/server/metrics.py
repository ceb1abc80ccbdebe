"""Metrics in Prometheus' text format: those of TensorFlow Serving, by the same names, and more.

Label values come from loaded models, never from requests alone, so clients cannot create series without limit. The
series of a version end when it is unloaded.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import grpc
import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from export.server.drift import Drift, Key
from export.server.observation import Observation
from export.server.status import STOPPING

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
UNKNOWN_MODEL = "(unknown)"
"""The model's label where a call asks for one that is not served."""

_REQUEST_COUNT = ":tensorflow:serving:request_count"
# TensorFlow Serving's: from 10 us, each bound 1.8 times the one before, up to some 20 minutes.
_MICROSECONDS = tuple(10 * 1.8**power for power in range(33))
_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_REFUSALS = {
    grpc.StatusCode.UNAVAILABLE: "queue",
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "limit",
    grpc.StatusCode.UNAUTHENTICATED: "token",
}
_STOPPING = "stopping"
_ROWS = tuple(float(1 << power) for power in range(15))


@dataclasses.dataclass
class _Version:
    """Counts of a version: rows by signature, requests by task."""

    rows: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    tasks: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class _Histogram:
    """Counts values by the first of ``bounds`` that is not below them. Faster than prometheus-client's histogram."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value


class Metrics(Collector):
    """Counts calls, and writes the counts.

    Args:
      loaded: the versions that are loaded, by model; the largest number serves.
      sample: share of the calls whose features and scores are counted, 0 to 1.

    Attributes:
      drift: the counts of features and scores.
    """

    def __init__(self, loaded: Callable[[], Mapping[str, Collection[int]]], sample: float) -> None:
        self._loaded = loaded
        self._lock = threading.Lock()
        self._requests: collections.Counter[tuple[str, str]] = collections.Counter()
        self._versions: dict[Key, _Version] = {}
        self._failures: collections.Counter[str] = collections.Counter()
        # Counters exist from the start at 0: otherwise a rate would not see their first event.
        self._refused = collections.Counter(dict.fromkeys([*_REFUSALS.values(), _STOPPING], 0))
        self.drift = Drift(sample, loaded)
        self._registry = prometheus_client.CollectorRegistry()
        self._latency: dict[tuple[str, str], _Histogram] = {}
        self._runtime: dict[str, _Histogram] = {}
        self._waited, self._batch_rows = _Histogram(_SECONDS), _Histogram(_ROWS)
        prometheus_client.ProcessCollector(registry=self._registry)
        prometheus_client.GCCollector(self._registry)
        self._registry.register(self)

    def observe(self, seen: Observation) -> None:
        """Counts an answered call, in some microseconds. Any thread may call it."""
        if seen.method != "Predict":
            return
        servable = seen.servable
        if servable is not None:
            model = servable.name
        else:
            model = seen.model if seen.model in self._loaded() else UNKNOWN_MODEL
        reason = _STOPPING if seen.text == STOPPING else _REFUSALS.get(seen.code)
        with self._lock:
            self._requests[model, seen.code.name] += 1
            if reason is not None:
                self._refused[reason] += 1
        if seen.code is not grpc.StatusCode.OK or servable is None:
            return
        key, place = (model, servable.version), (model, seen.entrypoint)
        with self._lock:
            if key not in self._versions:
                self._versions[key] = _Version()
            if place not in self._latency:
                self._latency[place] = _Histogram(_MICROSECONDS)
                self._runtime.setdefault(model, _Histogram(_MICROSECONDS))
            self._latency[place].add(seen.seconds * 1e6)
            self._runtime[model].add((seen.seconds - seen.waited) * 1e6)
            self._waited.add(seen.waited)
            version = self._versions[key]
            version.rows[seen.signature] += seen.rows
            version.tasks.update(list(seen.outputs or ()))
        self.drift.offer(seen)

    def observe_batch(self, rows: int) -> None:
        """Counts a run of the model."""
        with self._lock:
            self._batch_rows.add(rows)

    @contextlib.contextmanager
    def loading(self, name: str) -> Iterator[None]:
        """Counts an exception in the block as a failed load of a version of the model ``name``."""
        with self._lock:
            self._failures[name] += 0
        try:
            yield
        except Exception:
            with self._lock:
                self._failures[name] += 1
            raise

    def text(self) -> bytes:
        """All metrics as text. Any thread may call it at any time."""
        # prometheus-client appends _total to the name of a counter; TensorFlow Serving does not.
        lines = [f"# HELP {_REQUEST_COUNT} The total number of requests.", f"# TYPE {_REQUEST_COUNT} counter"]
        loaded = self._loaded()
        with self._lock:
            for model in loaded:
                self._requests[model, "OK"] += 0
            requests = sorted(self._requests.items())
        for (model, status), count in requests:
            lines.append(f'{_REQUEST_COUNT}{{model_name="{_escaped(model)}",status="{status}"}} {count}')
        return "\n".join([*lines, ""]).encode() + prometheus_client.generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The interface of prometheus-client."""
        loaded = self._loaded()
        serving = GaugeMetricFamily("stem_serve_version", "The version that serves.", labels=["model"])
        for model, versions in loaded.items():
            if versions:
                serving.add_metric([model], max(versions))
        yield serving
        with self._lock:
            for name, version in [key for key in self._versions if key[1] not in loaded.get(key[0], ())]:
                del self._versions[name, version]
            counted = {key: (dict(x.rows), dict(x.tasks)) for key, x in self._versions.items()}
            failures, refused = dict(self._failures), dict(self._refused)
            histograms = [
                _histogram(
                    ":tensorflow:serving:request_latency",
                    "Microseconds from a request's first byte to its answer; of calls that were answered with OK.",
                    ["model_name", "API", "entrypoint"],
                    {(model, "Predict", entrypoint): x for (model, entrypoint), x in self._latency.items()},
                ),
                _histogram(
                    ":tensorflow:serving:runtime_latency",
                    "Microseconds of that without the time in the queue.",
                    ["model_name", "API", "runtime"],
                    {(model, "Predict", "TF1"): x for model, x in self._runtime.items()},
                ),
                _histogram("stem_serve_queue_seconds", "Time that calls waited.", [], {(): self._waited}),
                _histogram("stem_serve_batch_rows", "Rows of a run of the model.", [], {(): self._batch_rows}),
            ]
        yield from histograms
        yield _counter(
            "stem_serve_version_failures",
            "Loads of a version that failed.",
            ["model"],
            {(model,): count for model, count in failures.items()},
        )
        yield _counter(
            "stem_serve_refused",
            "Calls that were not run, by why.",
            ["reason"],
            {(reason,): count for reason, count in refused.items()},
        )
        yield _counter(
            "stem_serve_rows",
            "Rows that were scored.",
            ["model", "version", "signature"],
            {
                (*_labels(key), signature): count
                for key, (rows, _) in counted.items()
                for signature, count in rows.items()
            },
        )
        yield _counter(
            "stem_serve_task_requests",
            "Calls that a task answered.",
            ["model", "version", "task"],
            {(*_labels(key), task): count for key, (_, tasks) in counted.items() for task, count in tasks.items()},
        )
        yield from self._drifting(loaded)

    def _drifting(self, loaded: Mapping[str, Collection[int]]) -> Iterator[Metric]:
        drift = self.drift
        scores = HistogramMetricFamily(
            "stem_serve_task_score", "Scores, of a sample of calls.", labels=["model", "version", "task"]
        )
        with drift.lock:
            for name, version in [key for key in drift.scores if key[1] not in loaded.get(key[0], ())]:
                del drift.scores[name, version]
            for key, tasks in drift.scores.items():
                for task, distribution in tasks.items():
                    scores.add_metric(
                        [*_labels(key), task],
                        _buckets(distribution.bounds, distribution.counts.cumsum().tolist()),
                        distribution.total,
                    )
            features = {key: dataclasses.replace(counts) for key, counts in drift.features.items()}
        yield scores
        for what, of in (
            ("rows", "Places for a feature's value or list, in a sample of calls."),
            ("missing", "Places of stem_serve_feature_rows_total that were empty."),
            ("values", "Values of a feature, in the same sample of calls."),
            ("unknown", "Values of stem_serve_feature_values_total that are not in the version's vocabulary."),
        ):
            yield _counter(
                f"stem_serve_feature_{what}",
                of,
                ["model", "feature"],
                {key: count for key, counts in features.items() if (count := getattr(counts, what)) is not None},
            )


def _counter(name: str, text: str, labels: list[str], values: Mapping[tuple[str, ...], int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family


def _labels(key: Key) -> tuple[str, str]:
    return key[0], str(key[1])


def _histogram(
    name: str, text: str, labels: list[str], values: Mapping[tuple[str, ...], _Histogram]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(list(key), _buckets(value.bounds, itertools.accumulate(value.counts)), value.total)
    return family


def _buckets(bounds: Iterable[float], counts: Iterable[int]) -> list[tuple[str, float]]:
    return list(zip([*map(str, bounds), "+Inf"], counts, strict=True))


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
