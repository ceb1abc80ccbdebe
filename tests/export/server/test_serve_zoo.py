"""Every model as a SavedModel behind the server: its scores over gRPC are the trainer's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from export import check, graph, vocabulary_asset
from pipelines import manifest as manifests
from pipelines import vocabulary
from stem_tf import configs, models, predictions


def test_scores_over_grpc_are_the_trainers(
    zoo_settings: dict[str, Any], tmp_path: Path, start_server: Callable[..., Any], request_for: Callable[..., Any]
) -> None:
    config = configs.checked(zoo_settings)
    manifest = manifests.load(config.data.dir)
    model, features = models.build(config, manifest, training=False), manifest.schema.features
    trained = predictions.predict(model, manifest, "test", config.data, desc="test")

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
    fields = [
        {key: getattr(feature, key) for key in ("name", "kind", "column", "dtype", "separator", "length")}
        for feature in features
    ]
    raw = check.request(fields, table.to_batches()[0])
    order = np.argsort(trained.row_id)
    rows = server.predict(request_for("serving_default", **raw))
    items = [feature.name for feature in features if feature.side == "item"]
    # One request for the first row's user, with the items of all rows as its candidates; and rows with that user.
    ranked = server.predict(request_for("rank", **{n: x[np.newaxis] if n in items else x[:1] for n, x in raw.items()}))
    crossed = {n: x if n in items else np.repeat(x[:1], len(x), axis=0) for n, x in raw.items()}
    expected = server.predict(request_for("serving_default", **crossed))
    for task in manifest.schema.task_names:
        np.testing.assert_allclose(rows[task], trained.scores[task][order], atol=1e-6)
        np.testing.assert_allclose(ranked[task][0], expected[task], atol=2e-6)
