"""Runs that read the log itself: trained, stopped and resumed, and evaluated as from records."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines import manifest as manifests
from pipelines.batches import log_reader
from stem_tf import configs
from stem_tf.peers import Interrupted
from stem_tf.training.trainer import Trainer
from stem_tf.workdir import Workdir

Make = Callable[..., Trainer]


@pytest.fixture
def make(tmp_path: Path, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Make:
    """``make(directory, **settings)``: a trainer of the tiny run that reads its log in windows of 100 rows."""
    monkeypatch.setattr(log_reader, "WINDOW_ROWS", 100)

    def trainer(directory: str, **settings: Any) -> Trainer:
        config = configs.checked(tiny_settings | {"data.input_format": "parquet", "train.epochs": 1} | settings)
        workdir, manifest = Workdir(tmp_path / directory), manifests.load(config.data.dir)
        with workdir.locked():
            workdir.prepare(config, manifest)
        return Trainer(config, manifest, workdir, say=lambda line: None)

    return trainer


def losses(trainer: Trainer) -> np.ndarray:
    """[steps]: means over the epoch so far."""
    return np.array([r["loss"] for r in trainer.workdir.read_metrics() if r["kind"] == "train"])


def test_resumed_replicas_reach_the_losses_of_one(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    single = make("single")
    single.run()
    assert len(losses(single)) == 18

    settings = {"train.strategy": "mirrored", "train.steps_per_execution": 3}
    replicas = make("replicas", **settings)
    log = replicas._log

    def stop_at_9(logs: Any) -> None:
        log(logs)
        if replicas.state.step == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(replicas, "_log", stop_at_9)
    with pytest.raises(Interrupted):
        replicas.run()
    resumed = make("replicas", **settings)
    assert (resumed.state.epoch, resumed.state.step) == (0, 9)
    resumed.run()
    np.testing.assert_allclose(losses(resumed), losses(single)[2::3], rtol=1e-5)
    assert resumed.state.best_score == pytest.approx(single.state.best_score, abs=1e-3)


def test_trained_from_the_log_and_evaluated_from_either(
    tiny_settings: dict[str, Any], tmp_path: Path, run_job: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    keys = {key: value for key, value in tiny_settings.items() if key != "experiment"} | {"train.epochs": 1}
    trained = run_job(
        "stem_tf.jobs.train",
        "--config=kuairand_sample",
        "--input_format=parquet",
        *(f"--config.{key}={value}" for key, value in keys.items()),
        f"--workdir={tmp_path / 'run'}",
    )
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    results, rows = [], []
    for source in ((), ("--input_format=blocks",)):
        job = run_job("stem_tf.jobs.evaluate", f"--workdir={tmp_path / 'run'}", "--split=test", *source)
        assert job.returncode == 0, job.stderr
        assert job.stderr == ""
        results.append(json.loads((tmp_path / "run/evaluation/test.json").read_text()))
        rows.append(pq.read_table(tmp_path / "run/evaluation/test.parquet"))
    assert results[0]["tasks"]["click"]["auc"] > 0.5
    assert results[0] == results[1]
    assert rows[0].num_rows == 150
    assert rows[0].equals(rows[1])


def test_what_makes_no_sense_is_refused(job_in_process: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    command = ["stem_tf.jobs.train", "--config=kuairand_sample", "--config.data.dir=x"]
    job = job_in_process(*command, "--input_format=parket")
    assert (job.returncode, job.stderr) == (
        2,
        "error: config.data.input_format should be one of blocks, rows, parquet, but is 'parket'; did you mean "
        "'parquet'?\n",
    )
    job = job_in_process(*command, "--input_format=parquet", "--config.data.on_corrupt=skip")
    assert job.returncode == 2
    assert "config.data.on_corrupt=skip would do nothing with config.data.input_format=parquet" in job.stderr
