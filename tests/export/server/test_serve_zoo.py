"""Every model as a SavedModel behind the server: its scores over gRPC are the trainer's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from export import check, graph, vocabulary_asset, warmup
from export.deployment import model as deployed
from export.deployment import render
from pipelines import manifest as manifests
from pipelines import vocabulary
from pipelines.manifest import Manifest
from stem_tf import configs, models
from stem_tf.evaluation import scoring
from stem_tf.models.predictor import Predictor
from stem_tf.models.snapshots import Snapshots
from stem_tf.training.losses import score
from tests.export import serving_rules

Serve = Callable[[Manifest, Predictor, int], None]


def rules_broken(saved: Path, manifest: Manifest, raw: dict[str, np.ndarray], warm_up: Path) -> list[str]:
    """Rules of TensorFlow Serving that a model and its warm-up break, under the batching that stem-deploy gives it."""
    inputs = deployed.signature_inputs(saved)
    warmup.write(warm_up, "ranker", manifest.schema, raw, sorted(inputs))
    model = deployed.Model("ranker", 1, (), manifest.schema, 0, 0, inputs, deployed.warm_up_rows(warm_up))
    limits = deployed.limits(model, cores=2, max_rows=None, execution_rows=16, max_calls=None)
    options = render.Options(True, None, 2, 50.0, 10, "stem-tf", "")
    requests = list(warmup.read(warm_up))
    assert len(requests) == 9
    return serving_rules.broken(render.render(model, limits, options)["batching.config"], inputs, requests)


@pytest.fixture
def check_served(tmp_path: Path, start_server: Callable[..., Any], request_for: Callable[..., Any]) -> Serve:
    """Saves a model, asks the server for scores of the test split's raw rows, and compares them with the trainer's."""

    def check_served(manifest: Manifest, model: Predictor, batch_size: int) -> None:
        features = manifest.schema.features
        data = SimpleNamespace(batch_size=batch_size, input_format="blocks", on_corrupt="fail")
        trained = scoring.predict(model, manifest, "test", data, desc="test")
        vocabularies = {}
        for name in manifest.vocabularies:
            vocabularies[name] = tmp_path / f"{name}.vocabulary"
            vocabulary_asset.write(vocabulary.load(manifest.vocabulary_path(name))["value"], vocabularies[name])
        base = tmp_path / "models"
        base.mkdir()
        graph.ServingModule(manifest.schema, model, vocabularies).save(base / "1")
        server = start_server(base)
        server.versions.poll()

        table = pq.read_table(Path(manifest.data_dir) / "raw" / "test").sort_by("row_id").combine_chunks()
        keys = ("name", "kind", "column", "dtype", "separator", "length", "max_length")
        fields = [{key: getattr(feature, key) for key in keys} for feature in features]
        raw = check.request(fields, table.to_batches()[0])
        order = np.argsort(trained.row_id)
        rows = server.predict(request_for("serving_default", **raw))
        items = [feature.name for feature in features if feature.side == "item"]
        # One request: the first row's user, with the items of all rows as candidates. Beside it, rows with that user.
        one = {name: x[np.newaxis] if name in items else x[:1] for name, x in raw.items()}
        ranked = server.predict(request_for("rank", **one))
        crossed = {name: x if name in items else np.repeat(x[:1], len(x), axis=0) for name, x in raw.items()}
        expected = server.predict(request_for("serving_default", **crossed))
        for task in manifest.schema.task_names:
            np.testing.assert_allclose(rows[task], trained.scores[task][order], atol=1e-6)
            np.testing.assert_allclose(ranked[task][0], expected[task], atol=2e-6)
        assert not rules_broken(base / "1", manifest, raw, tmp_path / "warm_up")

    return check_served


def test_scores_over_grpc_are_the_trainers(zoo_settings: dict[str, Any], check_served: Serve) -> None:
    config = configs.checked(zoo_settings)
    manifest = manifests.load(config.data.dir)
    check_served(manifest, models.build(config, manifest, training=False), config.data.batch_size)


SHARE = """
tasks:
  click: {label: {column: clicked}}
  watched: {type: regression, output: sigmoid, label: {column: share, missing: outside}}
"""


def test_weights_of_several_epochs_and_a_sigmoid_regression(
    tiny_settings: dict[str, Any], convert_tiny: Callable[..., Path], check_served: Serve
) -> None:
    manifest = manifests.load(str(convert_tiny(0, SHARE)))
    settings = tiny_settings | {"data.dir": manifest.data_dir, "model.init_std": 0.3}
    first, second = (
        models.build(configs.checked(settings | {"seed": seed}), manifest, training=False) for seed in (0, 1)
    )
    both = Snapshots([(second, ["watched"]), (first, ["click"])])
    both.compile(optimizer=[])
    check_served(manifest, both, 64)
    features = {"user": tf.constant([3]), "item": tf.constant([4]), "tags": tf.constant([[2, 0, 0]])}
    outputs = both(features | {"length": tf.constant([5.0])})
    assert list(outputs) == ["click", "watched"]
    assert 0.0 < float(score(manifest.schema.tasks[1], outputs["watched"])[0]) < 1.0
