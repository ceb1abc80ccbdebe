"""A run that goes on from an exported model: its vocabularies and weights are those of the run that was exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import exporter, graph, read_back
from export import tables as stored_tables
from pipelines import vocabulary
from stem_tf import configs, models, start_from
from stem_tf.training import start
from stem_tf.training.checkpoints import RunState
from stem_util.errors import UserError


def test_weights_and_vocabularies_of_an_export(
    nasty_export: Path, nasty_run: Callable[[str], Any], tmp_path: Path
) -> None:
    run = nasty_run("float32")
    found = start_from.find(str(nasty_export))
    for name in run.manifest.vocabularies:
        assert (
            found.values(name).to_pylist() == vocabulary.load(run.manifest.vocabulary_path(name))["value"].to_pylist()
        )
    config = configs.checked(configs.flat(run.config) | {"start.run": str(nasty_export)})
    model, state = models.build(config, run.manifest), RunState()
    lines = start.start(model, state, config, run.manifest, pytest.fail)
    assert "moments and schedules start anew" in lines[0] and state.ancestor["kind"] == "export"
    served = run.model()
    for (name, one), two in zip(served.weight_parts.items(), model.weight_parts.values(), strict=True):
        for weight, other in zip(one.weights, two.weights, strict=True):
            np.testing.assert_array_equal(weight, other, err_msg=name)
    assert int(model.global_step) == 0 and state.first_step == 0


def test_rounded_tables_are_read_as_they_are_served(nasty_run: Callable[[str], Any], tmp_path: Path) -> None:
    run = nasty_run("float32")
    model = run.model()
    vocabularies = exporter.write_vocabularies(run.workdir, run.manifest, tmp_path)
    stored = stored_tables.store(model, "int8")
    graph.ServingModule(run.manifest.schema, model, vocabularies, stored).save(tmp_path / "int8")
    weights = read_back.weights(tmp_path / "int8")
    for number, group in enumerate(stored_tables.packed(model)):
        np.testing.assert_array_equal(weights.table(number), group.table)  # storing has rounded the model's


def test_an_export_that_lacks_something_is_named(nasty_export: Path, tmp_path: Path) -> None:
    version = next(path for path in (nasty_export, *nasty_export.iterdir()) if (path / "saved_model.pb").exists())
    copy = tmp_path / "1"
    shutil.copytree(version, copy)
    (copy / "schema.yaml").write_text("changed")
    with pytest.raises(UserError, match="is not the version that was published: schema.yaml"):
        start_from.find(str(copy))
    shutil.copy(version / "schema.yaml", copy / "schema.yaml")
    tree = json.loads((copy / "manifest.json").read_text())
    del tree["data"]["numerics"]
    (copy / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="manifest.json lacks what a run needs to go on from it .KeyError"):
        start_from.find(str(copy))
