"""Training on parameter servers: processes on this machine, some of which are killed or stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines import manifest as manifests
from stem_tf import configs, trained
from stem_tf.evaluation import scoring
from stem_tf.jobs.launch import free_ports
from stem_tf.training import dealing, preconditions
from stem_tf.training.trainer import Trainer
from stem_tf.workdir import Workdir
from stem_util.errors import UserError

LAZY = {"optimizer.tables": "lazy", "model.dropout": 0.1, "train.log_every": 3, "train.checkpoint_every": 6}
SERVERS = {"train.strategy": "parameter_server", "train.peer_timeout": 60}
GOING_ON = re.compile(r"going on from step ([0-9]+)")


class Cluster:
    """The processes of a run; the name of one is its kind and number, as in ``worker 0``."""

    def __init__(self, directory: Path, settings: dict[str, Any], workers: int, servers: int) -> None:
        self._directory = directory
        self._config = directory.with_suffix(".py")
        self._config.write_text(
            f"from stem_tf.configs import base\n\n\ndef get_config():\n    return base.from_flat({settings!r})\n"
        )
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(1 + workers + servers)]
        self._cluster = {
            "chief": self.addresses[:1],
            "worker": self.addresses[1 : 1 + workers],
            "ps": self.addresses[1 + workers :],
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for kind, addresses in self._cluster.items():
            for index in range(len(addresses)):
                self.start(kind, index)

    def start(self, kind: str, index: int) -> None:
        task = {"cluster": self._cluster, "task": {"type": kind, "index": index}}
        environment = os.environ | {"TF_CONFIG": json.dumps(task), "CUDA_VISIBLE_DEVICES": ""}
        with open(self._log(f"{kind} {index}"), "ab") as log:
            self.processes[f"{kind} {index}"] = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "stem_tf.jobs.train",
                    f"--workdir={self._directory}",
                    f"--config={self._config}",
                ],
                stdout=log,
                stderr=log,
                env=environment,
            )

    def _log(self, name: str) -> Path:
        return self._directory.with_name(f"{self._directory.name}, {name}.log")

    def said(self, name: str) -> str:
        return self._log(name).read_text()

    def signal(self, name: str, number: int) -> None:
        self.processes[name].send_signal(number)

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline and self.processes["chief 0"].poll() is None, self.said("chief 0")
            time.sleep(0.01)

    def codes(self) -> dict[str, int]:
        """The exit codes of all processes, once they have ended."""
        return {name: process.wait(300) for name, process in self.processes.items()}

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        return max((record["step"] for record in Workdir(self._directory).read_metrics()), default=0)


@pytest.fixture
def start() -> Iterator[Callable[..., Cluster]]:
    """``start(directory, settings, workers, servers)``: a :class:`Cluster`, ended with the test."""
    started: list[Cluster] = []

    def start(*arguments: Any) -> Cluster:
        started.append(Cluster(*arguments))
        return started[-1]

    yield start
    for cluster in started:
        for process in cluster.processes.values():
            process.kill()
            process.wait()


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in Workdir(run).read_metrics() if record["kind"] == "train"}


def scores(run: Path, data: str) -> dict[str, np.ndarray]:
    config, manifest = Workdir(run).config(), manifests.load(data)
    model = trained.load(Workdir(run), config, manifest, "latest", calibrated=False).model
    return scoring.predict(model, manifest, "test", config.data, desc="").scores


def test_one_worker_trains_as_one_process_and_kills_and_hangs_end_well(
    tmp_path: Path,
    tiny_settings: dict[str, Any],
    hashed_data: Path,
    train: Callable[[Path, dict[str, Any]], Trainer],
    start: Callable[..., Cluster],
) -> None:
    settings = tiny_settings | LAZY | {"data.dir": str(hashed_data), "train.calibration": "platt"}
    run, alone = tmp_path / "run", tmp_path / "alone"
    always = SERVERS | {"train.epochs": 200, "train.checkpoint_every": 1, "train.peer_timeout": 40}
    hung = start(tmp_path / "hung", settings | always, 1, 1)
    train(run, settings | {"train.epochs": 1})
    shutil.copytree(run, alone)
    train(alone, settings)

    hung.until(lambda: hung.step() > 3)
    hung.signal("worker 0", signal.SIGSTOP)

    one = start(run, settings | SERVERS, 1, 2)
    assert set(one.codes().values()) == {0}, one.said("chief 0")
    expected = losses(alone)
    assert set(expected) == {3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36}
    np.testing.assert_allclose([losses(run)[step] for step in expected], list(expected.values()), rtol=1e-5)
    # A checkpoint of two servers, in a table of one process.
    data = str(settings["data.dir"])
    of_servers = scores(run, data)
    for task, values in scores(alone, data).items():
        np.testing.assert_allclose(of_servers[task], values, atol=1e-5)
    fitted = [json.loads(Workdir(path).calibration.read_text())["tasks"]["click"] for path in (run, alone)]
    assert fitted[0]["after"] == pytest.approx(fitted[1]["after"], rel=1e-3)

    # Another number of servers goes on, and is killed while it writes a checkpoint.
    endless = settings | SERVERS | {"train.epochs": 200}
    few = start(run, endless, 1, 1)
    few.until(lambda: few.step() > 48 and (run / "checkpoints/.stem-tf-writing").exists())
    few.signal("ps 0", signal.SIGKILL)
    assert few.codes() == {"chief 0": 1, "worker 0": 1, "ps 0": -9}
    why = f"ps 0 ({few.addresses[2]}) is gone, and its rows with it: start all processes again"
    assert few.said("chief 0").splitlines()[-1].startswith(f"error: {why}")
    assert f"error: chief 0 ({few.addresses[0]}) has failed: {why}" in few.said("worker 0")
    killed_at = few.step()

    # Two workers go on. One is killed, then the other, and both come back.
    many = start(run, endless, 2, 2)
    many.until(lambda: len(GOING_ON.findall(many.said("chief 0"))) == 3)
    assert killed_at - 12 <= int(GOING_ON.findall(many.said("chief 0"))[-1]) <= killed_at
    many.until(lambda: many.step() > killed_at)
    many.signal("worker 1", signal.SIGKILL)
    gone = f"worker 1 ({many.addresses[2]}) is gone: the other workers have trained on its batches"
    many.until(lambda: gone in many.said("chief 0"))
    many.signal("worker 0", signal.SIGKILL)
    for index in (0, 1):
        many.processes[f"worker {index}"].wait()
        many.start("worker", index)
    killed_at = many.step()
    many.until(lambda: many.step() > killed_at + 8)
    # A server is asked to stop: the chief writes a checkpoint first.
    many.signal("ps 1", signal.SIGTERM)
    codes = many.codes()
    assert codes == {"chief 0": 143, "worker 0": 1, "worker 1": 1, "ps 0": 143, "ps 1": 143}
    stopped = re.findall(r"SIGTERM: stopped at step (\d+), checkpoint written", many.said("chief 0"))
    assert [int(step) for step in stopped] == [pytest.approx(many.step(), abs=2)]
    assert f"SIGTERM: ps 0 ({many.addresses[3]}) has stopped; to go on: " in many.said("ps 0")
    last = many.said("worker 1").splitlines()[-1]  # it came late: the chief has told it nothing
    assert last.startswith(f"error: chief 0 ({many.addresses[0]}) is gone before the run was finished")

    # Meanwhile the chief of the worker that hangs has given up, though it is just writing a checkpoint.
    assert hung.processes["chief 0"].wait(120) == 1
    named = f"error: no answer from worker 0 ({hung.addresses[1]}) for 40 seconds; start all processes again with"
    assert hung.said("chief 0").splitlines()[-1].startswith(named)


def test_a_worker_that_dies_before_it_is_asked_what_came_of_a_batch_ends_nothing() -> None:
    class Remote:
        """A batch whose worker dies once; then another worker has done it."""

        def __init__(self, *errors: str) -> None:
            self._errors = list(errors)

        def fetch(self) -> str:
            if self._errors:
                raise tf.errors.UnavailableError(None, None, self._errors.pop())
            return "done"

    called = "failed to connect: from remote target /job:{}/replica:0/task:1/device:CPU:0 while calling Enqueue"
    assert dealing._fetched(Remote(called.format("worker"))) == "done"
    with pytest.raises(tf.errors.UnavailableError):
        dealing._fetched(Remote(called.format("ps")))


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        (
            "optimizer.tables",
            "deferred",
            "needs config.optimizer.tables=lazy or adagrad, not deferred: its workers are",
        ),
        ("optimizer.tables", "dense", "needs config.optimizer.tables=lazy or adagrad, not dense"),
        ("loss.weighting", "gradnorm", "needs config.loss.weighting=static or decaying or uncertainty, not gradnorm"),
        ("model.batch_norm", True, "needs config.model.batch_norm=False, not True"),
        ("train.xla", "step", "needs config.train.xla=auto or off, not step"),
        ("train.deterministic", True, "needs config.train.deterministic=False"),
        ("train.steps_per_execution", 4, "needs config.train.steps_per_execution=1, not 4"),
        ("start.run", "run", "cannot go on from another run"),
        ("train.best", "own", "cannot put weights of several epochs together"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    tmp_path: Path, tiny_settings: dict[str, Any], key: str, value: object, why: str
) -> None:
    config = configs.checked(tiny_settings | LAZY | SERVERS | {key: value})
    with pytest.raises(UserError, match=why), preconditions.prepared(config, tmp_path / "run", None):
        pass
    assert not (tmp_path / "run").exists()


def test_a_path_that_is_a_pattern_is_refused(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    config = configs.checked(tiny_settings | LAZY | SERVERS)
    with (
        pytest.raises(UserError, match="would read as a pattern"),
        preconditions.prepared(config, tmp_path / "run[1]", None),
    ):
        pass
