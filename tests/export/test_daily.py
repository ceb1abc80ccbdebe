"""stem-daily with the jobs themselves: two days of the bundled sample, a kill, and bad input."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines import manifest as manifests

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--config.train.epochs=1", "--config.model.name=shared_bottom", "--config.data.batch_size=512"]


def test_two_days_of_the_sample(
    tmp_path: Path, job_in_process: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, logs = tmp_path / "state", tmp_path / "logs"
    example = [sys.executable, "-m", "examples.every_day", f"--output={tmp_path}", "--days=2", "--", *SMALL]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    first, second = state / "days" / "2022-04-20", state / "days" / "2022-04-21"

    # Killed in the middle of the second day's training; the jobs end, too, and the same command goes on.
    started = subprocess.Popen(
        example, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    while not any((second / "run").glob("checkpoints/*.index")):
        assert started.poll() is None, started.communicate()[1].decode()
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGKILL)
    started.communicate()
    done = subprocess.run(example, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2022-04-20: convert" not in done.stdout and "2022-04-21: convert" not in done.stdout

    rows = list(csv.DictReader((state / "history.csv").read_text().splitlines()))
    assert [row["day"] for row in rows] == ["2022-04-20", "2022-04-21"] and rows[1]["from"] == "2022-04-20"
    assert [int(row["rows"]) for row in rows] == [40_083, 1_745]
    assert int(rows[0]["new_ids"]) > int(rows[1]["new_ids"]) > 0
    grown = manifests.load(str(second / "data"))
    assert grown.ancestor is not None and grown.ancestor.directory == str(first / "data")
    assert json.loads((second / "run" / "config.json").read_text())["start.run"] == str(first / "run")
    # A run that goes on from another begins with a checkpoint of its own, from which the killed one was resumed.
    assert "going on from step" in (second / "output.txt").read_text()
    assert rows[0]["decision"] == "published" and rows[0]["served_auc"] == "" and float(rows[0]["auc"]) > 0.5
    verdict = json.loads((second / "verdict.json").read_text())
    compared = [check for check in verdict["checks"] if check["rule"] == "auc.margin"]
    assert float(rows[1]["served_auc"]) == round(sum(check["served"] for check in compared) / len(compared), 4)
    versions = sorted(path.name for path in (state / "served").iterdir() if path.name.isdigit())
    assert rows[1]["decision"] == verdict["decision"] and versions == ["1", "2"][: 1 + (not verdict["reasons"])]
    shown = done.stdout.splitlines()[-2:]
    assert [line.split()[:2] for line in shown] == [["2022-04-20", "40,083"], ["2022-04-21", "1,745"]]

    monkeypatch.chdir(ROOT)
    # Bad logs: one sentence each; nothing is published, and the days so far are as they were.
    table = pq.read_table(logs / "2022-04-21.parquet")

    def refused(day: str, *arguments: str) -> str:
        common = ["--config=kuairand_sample", "--schema=kuairand_sample", f"--state={state}"]
        split = "--convert_args=--split=time --split_column=time_ms --processes=1"
        ended = job_in_process("export.jobs.daily", *common, split, f"--log={tmp_path}/{day}.parquet", *arguments)
        assert ended.returncode == 2, ended.stdout + ended.stderr
        return ended.stderr

    pq.write_table(table.slice(0, 0), tmp_path / "2022-04-22.parquet")
    assert "the conversion of 2022-04-22: " in (empty := refused("2022-04-22")) and "the log has no rows" in empty
    pq.write_table(table.drop_columns(["is_like"]), tmp_path / "2022-04-23.parquet")
    assert "'is_like'" in refused("2022-04-23")
    base = first if len(versions) == 1 else second
    shutil.copy(logs / f"{base.name}.parquet", tmp_path / "2022-04-24.parquet")
    assert "already" in refused("2022-04-24")  # learned under another name
    vocabulary = base / "data" / "vocabulary" / "user_id.parquet"
    kept = tmp_path / "vocabulary.parquet"
    shutil.copy(vocabulary, kept)
    pq.write_table(pq.read_table(vocabulary).slice(1), vocabulary)
    pq.write_table(table.slice(1), tmp_path / "2022-04-25.parquet")
    assert "user_id.parquet" in refused("2022-04-25")
    shutil.copy(kept, vocabulary)
    assert sorted(path.name for path in (state / "served").iterdir() if path.name.isdigit()) == versions
    history = list(csv.DictReader((state / "history.csv").read_text().splitlines()))
    assert history[:2] == rows and [row["decision"] for row in history[2:]] == ["left out"] * 3 + ["failed"]
