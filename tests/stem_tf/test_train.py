"""The two jobs as processes: killed and resumed, then evaluated; and their answers to mistakes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from stem_tf.training.checkpoints import latest
from stem_util import owned

Job = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, Any]) -> list[str]:
    """Of a run with dropout whose checkpoints fall inside epochs, from a config of one's own."""
    path = tmp_path_factory.mktemp("config") / "mine.py"
    path.write_text(
        "from stem_tf.configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"
        + "".join(f"    config.{key} = {value!r}\n" for key, value in tiny_settings.items() if key != "data.dir")
        + "    return config\n"
    )
    settings = {"model.dropout": 0.3, "train.deterministic": True, "train.checkpoint_every": 5, "train.epochs": 3}
    # Overrides before --config on purpose.
    return [
        f"--config.data.dir={tiny_settings['data.dir']}",
        f"--config={path}",
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory, run_job: Job) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    job = run_job("stem_tf.jobs.train", *arguments, f"--workdir={workdir}")
    assert job.returncode == 0, job.stderr
    assert job.stderr == ""  # nothing of TensorFlow's own log
    assert "tiny: stem_net, 2 tasks, " in job.stdout
    assert "18 steps per epoch, 64 rows each, up to 3 epochs" in job.stdout
    assert "Stopped: all 3 epochs done" in job.stdout
    assert f"next: stem-evaluate --workdir={workdir} --split=test" in job.stdout
    return workdir


def stopped_by(number: int, step: int, workdir: Path, arguments: list[str]) -> tuple[int, str]:
    """Starts the job, sends it the signal some milliseconds after it logged ``step``; its exit code and stdout."""
    job = subprocess.Popen(
        [sys.executable, "-m", "stem_tf.jobs.train", *arguments, f"--workdir={workdir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    metrics = workdir / "metrics.jsonl"
    while job.poll() is None and (not metrics.exists() or f'"step": {step},' not in metrics.read_text()):
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.02))
    job.send_signal(number)
    output, _ = job.communicate(timeout=300)
    return job.returncode, output


def test_killed_and_resumed_runs_end_with_the_same_bits(
    undisturbed: Path, arguments: list[str], tmp_path: Path, run_job: Job
) -> None:
    code, _ = stopped_by(signal.SIGKILL, random.randint(6, 17), tmp_path, arguments)
    assert code == -signal.SIGKILL
    code, output = stopped_by(signal.SIGTERM, random.randint(24, 34), tmp_path, arguments)
    assert code == 128 + signal.SIGTERM
    assert "going on from step " in output and "SIGTERM: stopped at step " in output
    assert "to go on: python -m stem_tf.jobs.train --config.data.dir=" in output
    job = run_job("stem_tf.jobs.train", *arguments, f"--workdir={tmp_path}")
    assert job.returncode == 0, job.stderr

    for directory in ("checkpoints", "best"):
        one, other = (tf.train.load_checkpoint(latest(run / directory)) for run in (undisturbed, tmp_path))
        names = set(one.get_variable_to_shape_map())
        assert names == set(other.get_variable_to_shape_map())
        for name in names - {"save_counter/.ATTRIBUTES/VARIABLE_VALUE", "state/.ATTRIBUTES/py_state"}:
            np.testing.assert_array_equal(one.get_tensor(name), other.get_tensor(name), err_msg=name)
    # Every step is there once, with the same numbers.
    assert (tmp_path / "metrics.jsonl").read_text() == (undisturbed / "metrics.jsonl").read_text()


def test_report(undisturbed: Path) -> None:
    report = json.loads((undisturbed / "report.json").read_text())
    assert report["epochs"] == 3 and report["steps"] == 54 and len(report["learning_curves"]) == 3
    assert report["best"]["score"] == max(record["score"] for record in report["learning_curves"])
    assert report["samples_per_second"] > 0
    assert "stem_tf.jobs.train" in report["command"] and f"--workdir={undisturbed}" in report["command"]
    assert {"stem-tf", "Python", "tensorflow"} <= set(report["versions"])
    picture = undisturbed / "learning_curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_evaluation_of_the_best_weights(undisturbed: Path, tiny_data: Path, tmp_path: Path, run_job: Job) -> None:
    job = run_job("stem_tf.jobs.evaluate", f"--workdir={undisturbed}", "--split=validation", f"--output={tmp_path}")
    assert job.returncode == 0, job.stderr
    assert job.stderr == ""
    result = json.loads((tmp_path / "validation.json").read_text())
    best = json.loads((undisturbed / "report.json").read_text())["best"]
    assert result["epoch"] == best["epoch"]
    assert result["mean_auc"] == result["tasks"]["click"]["auc"] == pytest.approx(best["auc/click"], abs=1e-9)
    assert result["tasks"]["watched"]["mse"] == pytest.approx(best["mse/watched"], rel=1e-6)
    assert "per user, per item: what the train mean of the label" in job.stdout
    assert result["tasks"]["click"]["interval"][0] < result["mean_auc"] < result["tasks"]["click"]["interval"][1]
    assert set(result["tasks"]["watched"]["over_trivial"]) == {"user", "item", "user + item"}

    # The trivial answers, from the raw log: rows are in order of time, 1,200 train and 150 validation.
    log = pq.read_table(tiny_data.parent / "log.parquet").to_pandas()
    train, rows = log[:1200], log[1200:1350]
    totals = train.groupby("user")["clicked"].agg(["sum", "count"])
    mean = train["clicked"].mean()
    means = (totals["sum"] + 5 * mean) / (totals["count"] + 5)
    scores = rows["user"].map(means).fillna(mean)
    positive, negative = scores[rows["clicked"] == 1].to_numpy(), scores[rows["clicked"] == 0].to_numpy()
    wins = (positive[:, None] > negative).mean() + (positive[:, None] == negative).mean() / 2
    assert result["tasks"]["click"]["trivial"]["user"] == pytest.approx(wins, abs=1e-9)

    predictions = pq.read_table(tmp_path / "validation.parquet").to_pandas()
    assert list(predictions) == ["row_id", "user", "label_click", "score_click", "label_watched", "score_watched"]
    assert predictions["row_id"].tolist() == list(range(1200, 1350))
    assert predictions["user"].tolist() == rows["user"].tolist()
    assert predictions["label_click"].tolist() == rows["clicked"].tolist()
    np.testing.assert_allclose(predictions["label_watched"], rows["share"], rtol=1e-6)  # NaN where outside
    assert predictions["score_click"].between(0, 1).all()
    assert list(undisturbed.glob("trivial-*.npz"))


def test_evaluation_by_slice_with_other_places(undisturbed: Path, tmp_path: Path, run_job: Job) -> None:
    flags = [f"--workdir={undisturbed}", f"--output={tmp_path}", "--k=3", "--slice=length,item:rare"]
    job = run_job("stem_tf.jobs.evaluate", *flags)
    assert job.returncode == 0, job.stderr
    result = json.loads((tmp_path / "test.json").read_text())
    assert result["k"] == 3 and "NDCG@3" in job.stdout and 0 < result["tasks"]["click"]["ndcg@3"] <= 1
    scores = pq.read_table(tmp_path / "test.parquet").to_pandas()
    by_length = [one for one in result["slices"] if one["column"] == "length"]
    assert sum(one["rows"] for one in by_length) == result["rows"] == len(scores)
    for one in result["slices"]:
        assert f"\n{one['name']} " in job.stdout
    # A version without intervals and slices wrote less; its evaluation can be replaced.
    kept = {key: result[key] for key in ("split", "rows", "checkpoint", "tasks", "mean_auc")}
    (tmp_path / "test.json").write_text(json.dumps(kept))
    assert owned.check_for_evaluation(tmp_path, "test")


def test_mistakes_get_one_line(
    undisturbed: Path,
    arguments: list[str],
    tmp_path: Path,
    run_job: Job,
    job_in_process: Job,
    convert_tiny: Callable[[int], Path],
) -> None:
    train, evaluate, of_run = "stem_tf.jobs.train", "stem_tf.jobs.evaluate", f"--workdir={undisturbed}"
    cases = [
        (job_in_process, train, [*arguments, "--config.model.dim=5", of_run], "(model.dim: 4 -> 5)"),
        (
            job_in_process,
            train,
            ["--config=census_income", "--config.data.dir=nowhere"],
            "nowhere holds no converted data",
        ),
        (job_in_process, evaluate, [f"--workdir={tmp_path}"], "holds no run"),
        (job_in_process, evaluate, [of_run, f"--output={convert_tiny(1)}"], "holds converted data, not"),
        (job_in_process, evaluate, [of_run, "--split=tets"], "no such split; did you mean 'test'?"),
        (job_in_process, evaluate, [of_run, f"--data={convert_tiny(1)}"], "is other data than"),
        (job_in_process, evaluate, [of_run, "--k=0"], "k=0: NDCG needs 1 place or more"),
        (job_in_process, evaluate, [of_run, "--slice=lenght"], "slice 'lenght': the data keep no column 'lenght'; did"),
        (job_in_process, evaluate, [of_run, "--slice=length:new"], "length has no vocabulary"),
        (job_in_process, evaluate, [of_run, "--slice=user", "--split=train"], "no raw rows"),
        (run_job, evaluate, [of_run, "--checkpoint=ckpt-9"], "there is no such checkpoint"),
    ]
    for run, module, flags, words in cases:
        job = run(module, *flags)
        assert job.returncode == 2, (job.stdout, job.stderr)
        assert job.stderr.startswith("error: ") and job.stderr.count("\n") == 1, job.stderr
        assert words in job.stderr


def test_help_of_evaluate_does_not_import_tensorflow() -> None:
    code = (
        "import sys; sys.argv = ['stem-evaluate', '--help']; from stem_tf.jobs import evaluate, train\n"
        "try:\n    evaluate.run()\nexcept SystemExit: pass\nassert 'tensorflow' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "--checkpoint" in shown.stdout


def test_help_lists_the_keys_of_every_model_and_of_ones_own(run_job: Job) -> None:
    job = run_job("stem_tf.jobs.train", "--help", "--config.model.module=examples.my_model")
    assert (job.returncode, job.stderr) == (0, "")
    for words in ("optimizer.learning_rate=0.001 ", "model.follows= ", "model.strength=2.0 ", "scaled_bottom "):
        assert f"\n  {words}" in job.stdout


def test_a_flag_file_holds_config_keys(run_job: Job, tmp_path: Path) -> None:
    path = tmp_path / "train.flags"
    path.write_text("--config=kuairand_sample\n--config.model.dimm=8\n")
    job = run_job("stem_tf.jobs.train", f"--flagfile={path}")
    assert (job.returncode, job.stdout) == (2, "")
    assert job.stderr == "error: --config.model.dimm: the config has no such key; did you mean 'model.dim'?\n"
