"""Metrics: names, labels, counts by version, and what is sampled of features and scores."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tensorflow.core.example import example_pb2

from export import vocabulary_asset
from export.server.known_values import KnownValues
from export.server.metrics import UNKNOWN_MODEL, Metrics
from export.server.observation import Observation
from export.server.status import STOPPING
from pipelines.log.casts import EMPTY


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version's directory, as far as metrics read it: items 1 to 3, tags "a" and "b" (also "liked"), a click."""
    path = tmp_path_factory.mktemp("version") / "4"
    (path / "assets").mkdir(parents=True)
    vocabularies = {"item": pa.array([3, 1, 2]), "tags": pa.array([b"a", b"b"], pa.binary())}
    for name, values in vocabularies.items():
        vocabulary_asset.write(pa.chunked_array([values]), path / f"assets/{name}.vocabulary")
    digests = {
        name: hashlib.sha256((path / f"assets/{name}.vocabulary").read_bytes()).hexdigest() for name in vocabularies
    }
    digests["liked"] = digests["tags"]  # features with equal vocabularies share a file
    features = [
        {"name": "item", "kind": "categorical", "dtype": "int64"},
        {"name": "tags", "kind": "multivalent", "dtype": "string"},
        {"name": "liked", "kind": "multivalent", "dtype": "string"},
        {"name": "price", "kind": "numeric", "dtype": "float32"},
        {"name": "vector", "kind": "dense", "dtype": "float32"},
    ]
    tree = {
        "files": {f"assets/{name}.vocabulary": digests[name] for name in vocabularies},
        "vocabularies": {name: {"sha256": digest} for name, digest in digests.items()},
        "schema": {"features": features, "tasks": [{"name": "click", "type": "binary"}]},
    }
    (path / "manifest.json").write_text(json.dumps(tree))
    return path


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.server.drift._PAUSE_SECONDS", 0.0)


def _strings(*values: Any) -> np.ndarray:
    result = np.empty((len(values), len(values[0])), object)
    for place, row in enumerate(values):
        result[place] = row
    return result


def _seen(path: Path, **changes: Any) -> Observation:
    servable: Any = SimpleNamespace(name="ranker", version=4, path=path)
    inputs = {
        "item": np.array([[1, 2, 99, EMPTY["int64"]]]),
        "tags": _strings([b"a", b"zz"], [b"", b""], [b"", b"b"], [b"a", b"a"])[None],
        "liked": _strings([b"a", b"c"]),
        "price": np.array([[1, np.nan, np.inf, 0]], np.float32),
        "vector": np.array([[1, np.nan]], np.float32),
    }
    outputs = {"click": np.array([[0.0005, 0.3, 0.35, 1.0]], np.float32), "like": np.zeros((1, 4), np.float32)}
    fields: dict[str, Any] = {
        "model": "ranker",
        "version": 4,
        "signature": "rank",
        "rows": 4,
        "seconds": 0.02,
        "waited": 0.005,
        "servable": servable,
        "inputs": inputs,
        "outputs": outputs,
    }
    return Observation("Predict", **(fields | changes))


def _samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.text().decode())
    return {(x.name, tuple(sorted(x.labels.items()))): x.value for family in families for x in family.samples}


def _of(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Values by the values of their labels, these in the order of the labels' names."""
    return {tuple(v for _, v in labels): value for (n, labels), value in _samples(metrics).items() if n == name}


def test_a_call_counts_under_tensorflow_servings_names_and_ours(version: Path) -> None:
    metrics = Metrics(lambda: {"ranker": [4]}, 1.0)
    metrics.observe(_seen(version))
    metrics.observe(_seen(version, entrypoint="REST"))
    metrics.observe(_seen(version, code=grpc.StatusCode.INVALID_ARGUMENT))
    metrics.observe(Observation("GetModelMetadata", model="ranker"))
    metrics.observe_batch(12)
    metrics.observe(_seen(version, code=grpc.StatusCode.UNAVAILABLE, text="it would wait too long"))
    metrics.observe(_seen(version, code=grpc.StatusCode.UNAVAILABLE, text=STOPPING))
    text = metrics.text().decode()
    assert "# TYPE :tensorflow:serving:request_count counter\n" in text
    assert ':tensorflow:serving:request_count{model_name="ranker",status="OK"} 2\n' in text
    assert ':tensorflow:serving:request_count{model_name="ranker",status="INVALID_ARGUMENT"} 1\n' in text
    latency = ':tensorflow:serving:request_latency_count{API="Predict",entrypoint="%s",model_name="ranker"} 1.0\n'
    assert latency % "GRPC" in text and latency % "REST" in text
    runtime = ':tensorflow:serving:runtime_latency_sum{API="Predict",model_name="ranker",runtime="TF1"} '
    assert float(text.split(runtime)[1].split("\n")[0]) == pytest.approx(30_000)
    assert _of(metrics, "stem_serve_rows_total") == {("ranker", "rank", "4"): 8}
    assert _of(metrics, "stem_serve_task_requests_total") == {("ranker", "click", "4"): 2, ("ranker", "like", "4"): 2}
    assert _of(metrics, "stem_serve_version") == {("ranker",): 4}
    refused = {"queue": 1, "stopping": 1, "deadline": 0, "limit": 0, "token": 0}
    assert _of(metrics, "stem_serve_refused_total") == {(reason,): count for reason, count in refused.items()}
    assert _of(metrics, "stem_serve_queue_seconds_count") == {(): 2}
    assert _of(metrics, "stem_serve_batch_rows_sum") == {(): 12}
    assert "_created" not in text and "process_resident_memory_bytes" in text


def test_shares_of_unknown_and_missing_values_and_scores_come_from_the_same_sample(version: Path) -> None:
    metrics = Metrics(lambda: {"ranker": [4]}, 1.0)
    metrics.observe(_seen(version))
    metrics.drift.flush()

    def counts(feature: str) -> list[float | None]:
        key = (feature, "ranker")
        kinds = ("rows", "missing", "values", "unknown")
        return [_of(metrics, f"stem_serve_feature_{kind}_total").get(key) for kind in kinds]

    assert counts("item") == [4, 1, 3, 1]
    assert counts("tags") == [4, 1, 5, 1]  # of four lists one has no value; five values in the others
    assert counts("liked") == [1, 0, 2, 1]
    assert counts("price") == [4, 2, 2, None]  # no vocabulary
    assert counts("vector") == [1, 1, 1, None]
    buckets = _of(metrics, "stem_serve_task_score_bucket")
    assert buckets["0.001", "ranker", "click", "4"] == 1 and buckets["0.3", "ranker", "click", "4"] == 1
    assert buckets["0.4", "ranker", "click", "4"] == 3 and buckets["+Inf", "ranker", "click", "4"] == 4
    assert "like" not in str(buckets), "no task of the manifest"


def test_examples_are_read_for_their_features(version: Path) -> None:
    metrics = Metrics(lambda: {"ranker": [4]}, 1.0)
    example = example_pb2.Example()
    example.features.feature["item"].int64_list.value.append(99)
    example.features.feature["tags"].bytes_list.value.extend([b"a", b"b"])
    examples = np.array([example.SerializeToString(), b""], object)
    metrics.observe(_seen(version, inputs={"examples": examples}))
    metrics.observe(_seen(version, inputs={"examples": np.array([b"\xff"], object)}))  # a traceback, and on it goes
    metrics.observe(_seen(version, inputs={"item": np.array([1])}))
    metrics.drift.flush()
    unknown, rows = (_of(metrics, f"stem_serve_feature_{kind}_total") for kind in ("unknown", "rows"))
    assert unknown["item", "ranker"] == 1 and rows["item", "ranker"] == 3
    assert _of(metrics, "stem_serve_feature_missing_total")["tags", "ranker"] == 1


def test_other_programs_models_have_no_features(tmp_path: Path) -> None:
    metrics = Metrics(lambda: {"ranker": [4]}, 1.0)
    metrics.observe(_seen(tmp_path))
    metrics.drift.flush()
    assert not _of(metrics, "stem_serve_feature_rows_total") and not _of(metrics, "stem_serve_task_score_count")
    assert _of(metrics, "stem_serve_rows_total") == {("ranker", "rank", "4"): 4}


def test_requests_cannot_make_series(version: Path) -> None:
    metrics = Metrics(lambda: {"ranker": [4]}, 1.0)
    for number in range(1000):
        strange: dict[str, Any] = {"servable": None, "code": grpc.StatusCode.NOT_FOUND, "signature": f"s{number}"}
        metrics.observe(_seen(version, model=f"m{number}", **strange))
        metrics.observe(_seen(version, version=number, **strange))
        metrics.observe(_seen(version, signature=f"s{number}", code=grpc.StatusCode.FAILED_PRECONDITION))
    text = metrics.text().decode()
    assert f'model_name="{UNKNOWN_MODEL}",status="NOT_FOUND"}} 1000' in text
    assert 'model_name="ranker",status="NOT_FOUND"} 1000' in text
    assert not re.search(r"[sm]99", text)


def test_series_of_a_version_go_with_it_while_two_scrape(version: Path) -> None:
    loaded = {"ranker": [4]}
    metrics = Metrics(lambda: loaded, 1.0)
    metrics.observe(_seen(version))
    metrics.drift.flush()
    assert 'version="4"' in metrics.text().decode()
    failures: list[BaseException] = []

    def scrape() -> None:
        try:
            for _ in range(20):
                list(text_string_to_metric_families(metrics.text().decode()))
        except BaseException as error:
            failures.append(error)

    scrapers = [threading.Thread(target=scrape) for _ in range(2)]
    for scraper in scrapers:
        scraper.start()
    for number in range(200):
        loaded["ranker"] = [number]
        servable = SimpleNamespace(name="ranker", version=number, path=version)
        metrics.observe(_seen(version, servable=servable, version=number))
    for scraper in scrapers:
        scraper.join()
    metrics.drift.flush()
    metrics.text()
    assert not failures
    assert 'version="4"' not in metrics.text().decode()
    assert _of(metrics, "stem_serve_rows_total") == {("ranker", "rank", "199"): 4}


def test_counters_are_there_before_they_count() -> None:
    text = Metrics(lambda: {"ranker": [4]}, 0.0).text().decode()
    assert ':tensorflow:serving:request_count{model_name="ranker",status="OK"} 0\n' in text
    assert 'stem_serve_refused_total{reason="queue"} 0.0\n' in text


def test_failed_loads_count() -> None:
    metrics = Metrics(dict, 0.0)

    with metrics.loading("ranker"):
        pass
    assert _of(metrics, "stem_serve_version_failures_total") == {("ranker",): 0}
    with pytest.raises(OSError, match="broken"), metrics.loading("ranker"):
        raise OSError("broken")
    assert _of(metrics, "stem_serve_version_failures_total") == {("ranker",): 1}


def test_serving_does_not_wait_for_counting(version: Path) -> None:
    metrics = Metrics(lambda: {"ranker": [4]}, 1.0)
    with metrics.drift.lock:  # its thread is stuck
        for _ in range(200):
            metrics.observe(_seen(version))
    metrics.drift.flush()
    rows = _of(metrics, "stem_serve_feature_rows_total")["item", "ranker"]
    assert 0 < rows < 200 * 4, "what did not fit was dropped"
    assert _of(metrics, "stem_serve_rows_total") == {("ranker", "rank", "4"): 800}


def test_large_calls_are_thinned_evenly(version: Path) -> None:
    metrics = Metrics(lambda: {"ranker": [4]}, 1.0)
    items = np.repeat(np.array([1, 99]), 50_000)[None]  # the second half is unknown
    metrics.observe(_seen(version, inputs={"item": items}))
    metrics.drift.flush()
    rows = _of(metrics, "stem_serve_feature_rows_total")["item", "ranker"]
    unknown = _of(metrics, "stem_serve_feature_unknown_total")["item", "ranker"]
    assert 1000 < rows <= 4096 and unknown / rows == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([5, -7, 2**62], pa.int64()),
        pa.array([b"a", b"ab", b"b\x00", b"b\x00\x00", "é🎬".encode(), b"x" * 5000, b"\n"], pa.binary()),
        pa.array([], pa.int64()),
        pa.array([], pa.binary()),
        pa.array([b"%d" % number for number in range(70_000)], pa.binary()),
    ],
    ids=["int64", "strings", "no integers", "no strings", "many"],
)
def test_known_values_are_those_of_the_asset(values: pa.Array, tmp_path: Path) -> None:
    vocabulary_asset.write(pa.chunked_array([values]), tmp_path / "v")
    integers = pa.types.is_integer(values.type)
    known = KnownValues(tmp_path / "v", "int64" if integers else "string")
    strangers: list[Any] = [4, 0, -1, 2**63 - 1] if integers else [b"b", b"\x00a", b"aa", b"y" * 9000, b"ba", b"70000"]
    asked = np.array([*values.to_pylist(), *strangers], np.int64 if integers else object)
    assert len(known) == len(values) and known.unknown(asked) == len(strangers)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, b"\x09" + bytes(7) + b"\x01" * 40])
@pytest.mark.parametrize("dtype", ["int64", "string"])
def test_damaged_vocabularies_are_refused(content: bytes, dtype: str, tmp_path: Path) -> None:
    (tmp_path / "v").write_bytes(content)
    with pytest.raises(ValueError, match="is not a vocabulary"):
        KnownValues(tmp_path / "v", dtype)
