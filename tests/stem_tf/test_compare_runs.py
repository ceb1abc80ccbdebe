"""Finished runs are grouped into arms; runs that cannot be compared are refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines import manifest as manifests
from stem_tf.compare import cells, runs
from stem_tf.configs import base
from stem_tf.evaluation import predictions
from stem_tf.evaluation.predictions import Predictions
from stem_tf.workdir import Workdir
from stem_util.errors import UserError

Made = Callable[..., Path]


@pytest.fixture
def made(tmp_path: Path, tiny_data: Path) -> Made:
    """``made("a", seed=1, **{"model.name": "ple"})``: the files that a comparison reads of a finished run."""
    manifest = manifests.load(str(tiny_data))
    random = np.random.default_rng(0)

    def make(name: str, **settings: Any) -> Path:
        run = tmp_path / name
        (run / "evaluation").mkdir(parents=True)
        values = {key: declared.default for key, declared in base.KEYS.items()}
        values |= {"data.dir": str(tiny_data), **settings}
        (run / "config.json").write_text(json.dumps(values))
        (run / "report.json").write_text("{}")
        shutil.copy(tiny_data / "manifest.json", run)
        for split in runs.SPLITS:
            rows = manifest.rows(split)
            scores = {task: random.random(rows, np.float32) for task in manifest.schema.task_names}
            labels = {task: np.round(values) for task, values in scores.items()}
            predicted = Predictions(np.arange(rows) + 1200, labels, scores, {}, np.arange(rows), None)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(predictions, "raw_values", lambda raw, column, ids: ids)
                predictions.write(run / "evaluation" / f"{split}.parquet", manifest, split, predicted)
            metrics = {"split": split, "checkpoint": f"{run}/best/ckpt-1", "tasks": {}}
            (run / "evaluation" / f"{split}.json").write_text(json.dumps(metrics))
        return run

    return make


def test_runs_of_one_config_are_an_arm(made: Made) -> None:
    paths = [
        made("s1", seed=1, **{"model.name": "single_task"}),
        made("p", **{"model.name": "ple", "optimizer.l2": 1e-4}),
        made("q", **{"model.name": "ple", "optimizer.l2": 1e-5, "model.dim": 16}),
        made("s0", seed=0, **{"model.name": "single_task", "train.log_every": 7}),
    ]
    found = runs.compare(runs.grouped([*paths, paths[0]]), name="x", incumbent="ple, optimizer.l2=1e-05")
    assert list(found.arms) == ["single_task", "ple, optimizer.l2=0.0001", "ple, optimizer.l2=1e-05"]
    assert [run.seed for run in found.arms["single_task"].runs] == [0, 1]
    assert found.single == "single_task" and found.arms["ple, optimizer.l2=0.0001"].model == "ple"
    assert found.arms["ple, optimizer.l2=1e-05"].overrides == {"model.name": "ple", "optimizer.l2": 1e-5}
    run = found.arms["single_task"].runs[1]
    assert len(run.predictions("test").row_id) == 150 and run.metrics("test")["split"] == "test" and not run.measures


def test_runs_are_found_by_directory_and_by_pattern(made: Made, tmp_path: Path, monkeypatch: Any) -> None:
    one, two, begun, trial = made("all/ple/seed-1"), made("all/ple/seed-0"), made("all/mmoe [x]"), made("all/trial")
    (begun / "report.json").unlink()
    cells.done_file(Workdir(trial)).parent.mkdir()
    cells.done_file(Workdir(trial)).write_text(json.dumps({"report": False, "seconds": 1.0}))
    (tmp_path / "all" / "seed-0.log").touch()
    assert runs.found_at(f"{tmp_path}/all/ple/seed-1") == ([one], [])
    assert runs.found_at(str(begun)) == ([begun], []) and runs.found_at(str(trial)) == ([trial], [])
    assert runs.found_at(f"{tmp_path}/all") == ([two, one], [begun])
    assert runs.found_at(f"{tmp_path}/all/*") == ([two, one], [begun])
    assert runs.found_at(f"{tmp_path}/**/seed-*") == ([two, one], [])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runs.found_at("~/all/p*") == ([two, one], [])
    with pytest.raises(UserError, match="no run at or below .*evaluation;"):
        runs.found_at(str(one / "evaluation"))
    with pytest.raises(UserError, match="there is no nowhere"):
        runs.found_at("nowhere*")


def damage_report(run: Path, other: Path) -> None:
    (run / "report.json").unlink()


def damage_manifest(run: Path, other: Path) -> None:
    (run / "manifest.json").write_text("{}")


def damage_evaluation(run: Path, other: Path) -> None:
    (run / "evaluation" / "test.json").unlink()


def damage_checkpoint(run: Path, other: Path) -> None:
    (run / "evaluation" / "validation.json").write_text(json.dumps({"checkpoint": "r/checkpoints/ckpt-1"}))


def damage_rows(run: Path, other: Path) -> None:
    table = pq.read_table(run / "evaluation" / "test.parquet")
    pq.write_table(table.slice(1), run / "evaluation" / "test.parquet")


def damage_seed(run: Path, other: Path) -> None:
    shutil.copy(other / "config.json", run / "config.json")


def damage_config(run: Path, other: Path) -> None:
    (run / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (damage_report, "b is not trained to its end"),
        (damage_manifest, "b was trained on other data than"),
        (damage_evaluation, r"b/evaluation/test.json is missing; run stem-compare again"),
        (damage_checkpoint, "is not of the run's best weights"),
        (damage_rows, "a was tested on 150 rows and .*b on 149, which are not the same ones"),
        (damage_seed, "are runs of the same config and seed 0"),
        (damage_config, "b holds no run"),
    ],
)
def test_what_cannot_be_compared_is_refused(made: Made, damage: Callable[[Path, Path], None], why: str) -> None:
    paths = [made("a"), made("b", seed=1)]
    damage(paths[1], paths[0])
    with pytest.raises(UserError, match=why):
        runs.compare(runs.grouped(paths), name="x")


def test_names_of_arms_are_checked(made: Made) -> None:
    with pytest.raises(UserError, match="incumbent: no arm 'stem_ne'; did you mean 'stem_net'"):
        runs.compare(runs.grouped([made("a")]), name="x", incumbent="stem_ne")
    with pytest.raises(UserError, match=r"single: no arm 'none'\. Arms: stem_net"):
        runs.compare(runs.grouped([made("b")]), name="x", single="none")
    with pytest.raises(UserError, match="no runs to compare"):
        runs.compare(runs.grouped([]), name="x")


def test_data_without_test_rows_or_with_one_class_are_refused(tiny_data: Path) -> None:
    manifest = manifests.load(str(tiny_data))
    test = manifest.splits["test"]
    manifest.splits["test"] = manifests.Split(0, test.tasks, {}, {})
    with pytest.raises(UserError, match="has no test rows"):
        runs.check_data(manifest)
    one_class = {"click": manifests.TaskCounts(150, 0.0), "watched": manifests.TaskCounts(0, None)}
    manifest.splits["test"] = manifests.Split(150, one_class, {}, {})
    with pytest.raises(UserError, match=r"no task has test labels of both classes \(rates: click \.0000, watched -\)"):
        runs.check_data(manifest)
