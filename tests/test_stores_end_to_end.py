"""Logs, data, runs and exports in a store: each job starts from the bucket alone, as on a fresh machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import stem_tf
from export import publish, stored
from export.loading import requests
from stem_util import copies, owned, stores
from stem_util.errors import UserError

Job = Callable[..., subprocess.CompletedProcess[str]]
Fresh = Callable[[], None]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fresh:
    """Forgets all local copies, as a machine does that has none."""
    caches: Iterator[Path] = (tmp_path / f"machine-{number}" for number in range(1, 99))
    return lambda: monkeypatch.setenv("STEM_TF_CACHE", str(next(caches)))


@pytest.fixture
def data(s3: str, tiny_data: Path) -> str:
    """``tiny_data``, published."""
    with copies.output(f"{s3}/data", owned.DATA, overwrite=False) as directory:
        shutil.copytree(tiny_data, directory, dirs_exist_ok=True)
    return f"{s3}/data"


def test_a_run_goes_from_machine_to_machine(
    s3: str, data: str, tiny_data: Path, tiny_settings: dict[str, Any], tmp_path: Path, fresh: Fresh, run_job: Job
) -> None:
    """Killed on the first, trained to its end on the second, and so on; the same numbers as on one disk."""
    settings = tiny_settings | {"data.dir": data, "train.deterministic": True, "train.checkpoint_every": 2}
    command = ["--config=small", *(f"--config.{key}={value}" for key, value in settings.items())]
    fresh()
    job = subprocess.Popen(
        [sys.executable, "-m", "stem_tf.jobs.train", *command, f"--workdir={s3}/run"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    while job.poll() is None and b"ckpt-3.index" not in (stores.read(f"{s3}/run/{copies.COMPLETE}") or b""):
        time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL

    fresh()
    for where in ((f"--workdir={s3}/run",), (f"--config.data.dir={tiny_data}", f"--workdir={tmp_path / 'run'}")):
        done = run_job("stem_tf.jobs.train", *command, *where)  # in its own process: it has to be deterministic
        assert done.returncode == 0, done.stderr
    run, local = stem_tf.Run(f"{s3}/run"), stem_tf.Run(tmp_path / "run")
    assert run.history().equals(local.history())
    steps = [record["step"] for record in run.workdir.read_metrics() if record["kind"] == "train"]
    assert steps == list(range(1, 37))

    fresh()
    metrics = stem_tf.Run(f"{s3}/run").evaluate("test")
    assert metrics["tasks"] == local.evaluate("test")["tasks"]
    assert not any("lock" in name for name in stores.listing(f"{s3}/run"))

    fresh()
    run = stem_tf.Run(f"{s3}/run")
    run.inspect("test")
    assert run.export(f"{s3}/models") == f"{s3}/models/1"
    assert not list(copies.cache().glob("tmp*"))

    fresh()
    version = stored.fetched(f"{s3}/models")
    assert not publish.damage(version) and json.loads((version / "manifest.json").read_text())["test_metrics"]


def test_data_in_a_store_are_made_by_recipes_and_read_by_comparisons_and_load_tests(
    s3: str, fresh: Fresh, job_in_process: Job
) -> None:
    made = job_in_process(
        "pipelines.jobs.recipe", "contradictory", "--rows=3000", "--users=30", "--processes=1", f"--output={s3}/made"
    )
    assert made.returncode == 0 and f"written to {s3}/made: 3,000 rows" in made.stdout, made.stderr
    fresh()
    rows, schema = requests.find_schema(f"{s3}/made", None, None)
    assert list(Path(rows).glob("*.parquet")) and schema is not None and schema.task_names == ("a", "b")
    plan = job_in_process("stem_tf.jobs.compare", "--models=single_task,mmoe", f"--data={s3}/made", "--dry_run")
    assert plan.returncode == 0 and "single_task" in plan.stdout, plan.stderr


def test_what_a_run_in_a_store_cannot_be(
    s3: str, data: str, tiny_data: Path, job_in_process: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ["--config=small", f"--config.data.dir={tiny_data}"]
    for job, arguments, problem in (
        ("train", [*train, f"--workdir={data}"], f"{data} holds converted data, not a run"),
        ("train", [*train, "--workdir=s3://nowhere/run"], "there is no bucket 'nowhere'"),
        ("train", ["--config=small", f"--config.data.dir={s3}/none"], f"{s3}/none is empty"),
        ("evaluate", [f"--workdir={s3}/none"], f"{s3}/none is empty: it does not hold a run"),
        ("evaluate", [f"--workdir={data}"], f"{data} holds converted data, not a run"),
        ("compare", [f"--runs={s3}/run", f"--output={s3}/x"], "it has to be on this machine, not in a store"),
        ("compare", [f"--runs={s3}/run", "--output=x"], f"--runs: {s3}/run is in a store; runs are compared on this"),
    ):
        done = job_in_process(f"stem_tf.jobs.{job}", *arguments)
        assert done.returncode == 2 and problem in done.stderr and done.stderr.count("\n") == 1, done.stderr
    monkeypatch.setenv(
        "TF_CONFIG", '{"cluster": {"worker": ["localhost:5000"]}, "task": {"type": "worker", "index": 0}}'
    )
    with pytest.raises(UserError, match="the processes of a cluster share their work directory"):
        stem_tf.train("small", tiny_data, f"{s3}/run", overrides={"train.strategy": "multi_worker"})
