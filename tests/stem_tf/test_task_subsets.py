"""Runs that train some of the tasks of converted data."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stem_tf
from pipelines import manifest as manifests
from pipelines import schema_yaml
from pipelines.batches.dataset import read_batches
from stem_tf import configs
from stem_util.errors import UserError

Job = Callable[..., subprocess.CompletedProcess[str]]


def test_batches_have_the_labels_of_the_chosen_tasks(chain_data: Path) -> None:
    whole = manifests.load(str(chain_data))
    some = whole.of_tasks(["buy", "click"])
    assert some.schema.task_names == ("click", "buy")  # in the schema's order
    reading: dict[str, Any] = {"batch_size": 32, "input_format": "blocks", "seed": 3, "epoch": 1}
    for training in (True, False):
        expected = next(iter(read_batches(whole, "train", training=training, **reading)))
        found = next(iter(read_batches(some, "train", training=training, **reading)))
        assert list(found["labels"]) == list(found["weights"]) == ["click", "buy"]
        np.testing.assert_array_equal(found["row_id"], expected["row_id"])
        for task in ("click", "buy"):
            np.testing.assert_array_equal(found["labels"][task], expected["labels"][task])
            np.testing.assert_array_equal(found["weights"][task], expected["weights"][task])


def test_a_space_of_a_task_that_is_left_out(chain_data: Path) -> None:
    buy = manifests.load(str(chain_data)).of_tasks(["buy"])
    assert [task.space for task in buy.schema.tasks] == [None]
    batch = next(iter(read_batches(buy, "validation", training=False, batch_size=150)))
    assert 0 < np.mean(batch["weights"]["buy"]) < 1  # still outside where click is 0
    assert schema_yaml.loads(schema_yaml.dumps(buy.schema), "copy").task_names == ("buy",)


def test_a_run_of_some_tasks_is_that_of_data_with_these_tasks_only(
    chain_data: Path, convert_tiny: Callable[..., Path], tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    tasks = "\ntasks:\n  click: {label: {column: clicked}}\n  cart: {label: {column: carted}}\n"
    alone = convert_tiny(0, tasks, hashed=True)
    settings = tiny_settings | {"train.epochs": 1}
    runs = [
        stem_tf.train(settings, data, tmp_path / str(number), overrides={"data.tasks": tasks}, say=None)
        for number, (data, tasks) in enumerate([(chain_data, "cart, click"), (alone, "")])
    ]
    some, whole = runs
    for split in ("validation", "test"):
        found, expected = some.evaluate(split), whole.evaluate(split)
        assert list(found["tasks"]) == ["click", "cart"]
        for task in found["tasks"]:
            assert found["tasks"][task]["auc"] == pytest.approx(expected["tasks"][task]["auc"], abs=1e-4)
            assert found["tasks"][task]["logloss"] == pytest.approx(expected["tasks"][task]["logloss"], abs=1e-5)
    assert some.schema.task_names == ("click", "cart")
    version = Path(some.export(tmp_path / "versions"))
    assert schema_yaml.load(str(version / "schema.yaml")).task_names == ("click", "cart")


def test_unknown_tasks(chain_data: Path, tmp_path: Path, job_in_process: Job) -> None:
    with pytest.raises(UserError, match=r"has no task 'byu'; did you mean 'buy'\?"):
        manifests.load(str(chain_data)).of_tasks(["click", "byu"])
    arguments = ["--config=small", f"--config.data.dir={chain_data}", "--tasks=click,clck", f"--workdir={tmp_path}/run"]
    job = job_in_process("stem_tf.jobs.train", *arguments)
    assert (job.returncode, job.stderr.count("\n")) == (2, 1)
    assert "has no task 'clck'; did you mean 'click'?" in job.stderr
    assert not (tmp_path / "run").exists()


def test_tasks_of_a_config(chain_data: Path) -> None:
    config = configs.load("small", {"data.dir": str(chain_data), "data.tasks": "cart"})
    assert configs.data(config).schema.task_names == ("cart",)
    assert configs.data(configs.load("small", {"data.dir": str(chain_data)})).schema.task_names == (
        "click",
        "cart",
        "buy",
    )
