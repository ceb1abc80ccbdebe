"""A model outside of the tree: trained, resumed, inspected, exported and scored as the shipped ones are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from export import exporter
from pipelines import manifest as manifests
from stem_tf import configs, summary, trained
from stem_tf.training.trainer import Trainer
from stem_tf.workdir import Workdir
from stem_util.errors import UserError

MODULE = "examples.my_model"


@pytest.fixture(scope="module")
def run(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    """Two epochs, the second one in a job that goes on."""
    settings = configs.applying(tiny_settings, "scaled_bottom", MODULE) | {
        "model.module": MODULE, "model.name": "scaled_bottom", "model.strength": 3.0, "model.init_std": 0.3,
    }  # fmt: skip
    workdir = Workdir(tmp_path_factory.mktemp("own") / "run")
    manifest = manifests.load(settings["data.dir"])
    for epochs in (1, 2):
        config = configs.checked(settings | {"train.epochs": epochs})
        with workdir.locked():
            workdir.prepare(config, manifest)
            trainer = Trainer(config, manifest, workdir, say=lambda line: None)
            trainer.run()
    assert trainer.resumed_from and trainer.state.epoch == 2
    return workdir


def test_learns_with_its_own_hyperparameter_and_is_inspected(run: Workdir) -> None:
    config = run.config()
    found: Any = trained.load(run, config, manifests.load(config.data.dir), "best").model
    network = found.network
    assert (network.strength, sorted(network.scales)) == (3.0, ["click", "watched"])
    h = {"shared": tf.random.Generator.from_seed(1).normal([5, found.embeddings.flat_width])}
    bottom = np.asarray(network.bottom(h["shared"])[0])
    scale = 3.0 / (1.0 + np.exp(-np.asarray(network.scales["click"](h["shared"]))))
    np.testing.assert_allclose(network(h)["click"], network.towers["click"](scale * bottom)[:, 0], rtol=1e-5)
    by_owner = {line.split()[0]: line.split()[1:] for line in summary.summary(found).splitlines() if line.strip()}
    assert by_owner["click"] == by_owner["watched"]  # a scale and a tower each


def test_export_scores_as_the_trainer_does(run: Workdir, tmp_path: Path) -> None:
    config = run.config()
    manifest = manifests.load(config.data.dir)
    version, tree = exporter.export(run, config, manifest, "best", tmp_path / "model", "own")  # compares the scores
    assert tree["run"]["config"]["model.module"] == MODULE and tree["check"]["worst"]["serving_default"] < 1e-5
    served = tf.saved_model.load(str(version)).signatures["serving_default"]
    row = {"user": ["user-1"], "item": [7], "tags": [["t1", "t2", ""]], "length": [3000.0]}
    wanted = served.structured_input_signature[1]
    assert set(served(**{name: tf.constant(row[name], spec.dtype) for name, spec in wanted.items()})) == {
        "click",
        "watched",
    }


def test_a_module_that_is_gone_later_is_one_sentence(run: Workdir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)  # as if it could not be imported
    with pytest.raises(UserError, match=f"config.model.module={MODULE}: there is no module '{MODULE}'"):
        run.config()
