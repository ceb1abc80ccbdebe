"""What is measured of a trained model: against counts by hand, and against what an export or a trainer has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines import manifest as manifests
from pipelines.batches.dataset import read_batches
from stem_tf import configs, models, trained
from stem_tf.compare import cost, measures
from stem_tf.models.ranking_model import RankingModel
from stem_tf.training.table_optimizers import SLOTS, TABLE_OPTIMIZERS
from stem_tf.workdir import Workdir


def build(settings: dict[str, Any], training: bool = False) -> RankingModel:
    config = configs.checked(settings)
    return models.build(config, manifests.load(config.data.dir), training=training)


@pytest.mark.parametrize("best", ["together", "by_task"])
def test_measures_of_a_run(tmp_path: Path, tiny_settings: dict[str, Any], train: Callable[..., Any], best: str) -> None:
    trainer = train(tmp_path / "run", tiny_settings | {"train.best": best})
    trainer.workdir.report.write_text('{"samples_per_second": 1234.5}')
    found = trained.load(trainer.workdir, trainer.config, trainer.manifest, "best")
    tree = measures.measure(trainer.workdir, trainer.config, trainer.manifest, found)
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    assert (tree["split"], tree["rows"], tree["rows_of_split"]) == ("test", 150, 150)
    assert list(tree["gates"]) == ["click", "watched"] and list(tree["experts"]) == ["click", "watched", "shared"]
    assert tree["cost"]["samples_per_second"] == 1234.5
    assert tree["cost"]["request"]["ms_low"] <= tree["cost"]["request"]["ms"] <= tree["cost"]["request"]["ms_high"]


@pytest.mark.parametrize(
    "zoo_settings",
    ["single_task", "shared_bottom of fwfm", "mmoe of dcn", "ml_mmoe", "sluice", "ple", "me_ple", "stem_net, F"],
    indirect=True,
)
def test_models_of_every_kind_are_measured(zoo_settings: dict[str, Any], tmp_path: Path) -> None:
    config = configs.checked(zoo_settings)
    manifest = manifests.load(config.data.dir)
    found = trained.Trained(models.build(config, manifest, training=False), "ckpt", 1, 0)
    tree = measures.measure(Workdir(tmp_path), config, manifest, found)
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    assert tree["cost"]["samples_per_second"] is None


def test_rows_are_drawn_once_and_kept_in_order(tiny_data: Path) -> None:
    manifest = manifests.load(str(tiny_data))
    data = configs.checked({"experiment": "tiny", "data.dir": str(tiny_data), "data.batch_size": 64}).data
    every = measures.read(manifest, "test", data, 1000)
    whole = next(iter(read_batches(manifest, "test", training=False, batch_size=150, input_format="blocks")))
    tf.nest.map_structure(np.testing.assert_array_equal, every, tf.nest.map_structure(lambda x: x.numpy(), whole))
    some, again = (measures.read(manifest, "test", data, 70) for _ in range(2))
    assert len(set(some["row_id"].tolist())) == 70 and (np.diff(some["row_id"]) > 0).all()
    tf.nest.map_structure(np.testing.assert_array_equal, some, again)
    place = np.searchsorted(every["row_id"], some["row_id"])
    tf.nest.map_structure(lambda part, of: np.testing.assert_array_equal(part, of[place]), some, every)


@pytest.mark.parametrize("tables", TABLE_OPTIMIZERS)
@pytest.mark.parametrize("slots", SLOTS)
def test_bytes_of_slots_are_those_of_the_optimizers(tiny_settings: dict[str, Any], tables: str, slots: str) -> None:
    if slots not in TABLE_OPTIMIZERS[tables].kinds_of_slots:
        return
    model = build(tiny_settings | {"optimizer.tables": tables, "optimizer.slots": slots}, training=True)
    kept = [slot for optimizer in model.table_optimizers for slot in optimizer.slots]
    kept += [model.network_optimizer.m, model.network_optimizer.v]
    assert cost.slot_bytes(model, tables, slots) == sum(slot.numpy().nbytes for slot in kept)


def test_a_request_scores_as_its_rows_do(tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """200 candidates from 150 rows, whose user and context are the first row's."""
    model = build(tiny_settings | {"model.init_std": 0.5})
    manifest = manifests.load(tiny_settings["data.dir"])
    data = configs.checked(tiny_settings).data
    features = measures.read(manifest, "test", data, 150)["features"]
    scored: list[dict[str, np.ndarray]] = []
    scores = model.scores

    def watched(outputs: Any) -> Any:
        found = scores(outputs)
        tf.py_function(lambda *values: scored.append({"click": values[0].numpy()}), [found["click"]], [])
        return found

    monkeypatch.setattr(model, "scores", watched)
    seen = cost.request(manifest.schema, model, features)
    assert seen["candidates"] == 200 and seen["repeats"] >= 1
    rows = {name: values[np.arange(200) % 150] for name, values in features.items()}
    rows["user"] = np.repeat(features["user"][:1], 200)
    np.testing.assert_allclose(scored[0]["click"], scores(model(rows))["click"], rtol=1e-5)


def test_a_model_in_half_precision_is_measured(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    config = configs.checked(tiny_settings | {"train.precision": "mixed_bfloat16", "model.init_std": 0.5})
    manifest = manifests.load(config.data.dir)
    found = trained.Trained(models.build(config, manifest, training=False), "ckpt", 1, 0)
    tree = measures.measure(Workdir(tmp_path), config, manifest, found)
    assert all(abs(sum(gate["mean"]) - 1) < 1e-5 for gate in tree["gates"].values())
    assert all(0 <= expert["zeros"] < 1 for expert in tree["experts"].values())
    assert tree["cost"]["multiply_adds"] > 0 and tree["importance"]["user"]["click"]["sd_rows"] > 0
