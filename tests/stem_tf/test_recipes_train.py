"""Shipped experiments train on the data of their recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import stem_tf
from stem_tf.workdir import Workdir
from tests.pipelines import test_recipes_of_big_logs as raw

FILES: dict[str, Callable[[Path], Path]] = {
    "tiktok": lambda path: raw.tiktok_log(path, [raw.tiktok_line(row) for row in range(100)]),
    "qk_video": lambda path: raw.qk_log(path, raw.qk_rows([1] * 60 + [2] * 60)),
    "kuairand_1k": lambda path: raw.kuairand_files(path, "kuairand_1k"),
    "ali_ccp": raw.ali_files,
}


@pytest.mark.parametrize("name", FILES)
def test_an_experiment_trains_on_the_data_of_its_recipe(name: str, tmp_path: Path) -> None:
    data = raw.made(name, FILES[name](tmp_path / "raw"), tmp_path / "data").manifest
    # Two steps, narrow experts and three tasks: the papers' are slow to compile.
    changes = {"train.epochs": 1, "data.batch_size": data.rows("train") // 2, "model.tower_units": (4,)}
    changes |= {"data.tasks": ",".join(data.schema.task_names[:3])}
    changes |= {"model.expert_units": ((4,), (4,)) if name == "ali_ccp" else (4,)}
    run = stem_tf.train(name, data, tmp_path / "run", overrides=changes, say=None)
    assert run.config.experiment == name
    assert "validation" in {record["kind"] for record in Workdir(tmp_path / "run").read_metrics()}
