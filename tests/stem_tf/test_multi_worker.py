"""Training over several processes: real ones on loopback, started by stem-launch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stem_tf import configs
from stem_tf.cluster import Cluster
from stem_tf.peers import Peers
from stem_tf.training.preconditions import prepared
from stem_tf.training.trainer import Trainer
from stem_tf.workdir import Workdir
from stem_util.errors import UserError

STEPS = 20  # an epoch, of 60 rows each


@pytest.fixture
def settings(tiny_settings: dict[str, Any], hashed_data: Path) -> dict[str, Any]:
    """A hashed feature, deferred decay, clipping, and six parts, which one, two or three processes can share."""
    return tiny_settings | {
        "data.dir": str(hashed_data),
        "data.batch_size": 60,
        "data.parts": 6,
        "optimizer.l2": 1e-3,
        "optimizer.clip_norm": 0.5,
        "train.checkpoint_every": 3,
    }


@pytest.fixture
def launch(tmp_path: Path, settings: dict[str, Any]) -> Callable[..., subprocess.Popen[str]]:
    """``launch("--workers=2")``: stem-launch of a training in RUN, whose processes log to LOGS."""
    config = tmp_path / "config.py"
    config.write_text(
        "from stem_tf.configs import base\n"
        "def get_config():\n"
        f"    return base.from_flat({{k: v.default for k, v in base.keys().items()}} | {settings!r})\n"
    )
    # What a test's process has set for its own TensorFlow does not concern these.
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}

    def launch(*flags: str, **overrides: Any) -> subprocess.Popen[str]:
        keys = {"train.strategy": "multi_worker"} | overrides
        train = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
        train += [f"--config.{key}={value}" for key, value in keys.items()]
        words = [sys.executable, "-m", "stem_tf.jobs.launch", f"--logs={tmp_path / 'logs'}", *flags, "--"]
        return subprocess.Popen(
            [*words, sys.executable, "-m", "stem_tf.jobs.train", *train],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        )

    return launch


def losses(directory: Path) -> dict[int, float]:
    """By step: means over the epoch so far."""
    return {r["step"]: r["loss"] for r in Workdir(directory).read_metrics() if r["kind"] == "train"}


def await_step(directory: Path, step: int) -> None:
    until = time.monotonic() + 120
    while max(losses(directory), default=0) < step:
        assert time.monotonic() < until, "the processes do not get on"
        time.sleep(0.02)


def worker(job: subprocess.Popen[str], index: int) -> int:
    """The process id of a worker."""
    for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"TF_CONFIG=") and json.loads(entry[10:])["task"]["index"] == index:
                return int(pid)
    raise AssertionError(f"no worker {index}")


def test_any_number_of_processes_makes_one_run(
    tmp_path: Path,
    settings: dict[str, Any],
    launch: Callable[..., subprocess.Popen[str]],
    train: Callable[[Path, dict[str, Any]], Any],
) -> None:
    """One; two, stopped in epoch 2; three, of which one is killed; two, whose chief is killed; two replicas; one."""
    run = tmp_path / "run"
    train(run, settings | {"train.epochs": 1})
    job = launch("--workers=2")
    await_step(run, STEPS + 5)
    os.kill(worker(job, 1), signal.SIGTERM)  # not the chief
    out, err = job.communicate(timeout=120)
    assert job.returncode == 128 + signal.SIGTERM, err
    stopped = max(losses(run))
    said = f"SIGTERM: stopped at step {stopped}, checkpoint written to"
    assert said in out and said in (tmp_path / "logs/worker-1.log").read_text()

    job = launch("--workers=3")
    await_step(run, stopped + 5)
    os.kill(worker(job, 2), signal.SIGKILL)
    out, err = job.communicate(timeout=240)
    assert job.returncode == 128 + signal.SIGKILL, err
    assert f"going on from step {stopped} (epoch 2, step {stopped - STEPS} of {STEPS})" in out
    assert "worker 2 (127.0.0.1:" in err and "was killed by SIGKILL" in err
    assert "has ended without a word: killed, or out of memory" in err  # says the chief
    assert len(list((run / "tensorboard/train").iterdir())) == 3  # one process of each start has written

    killed = max(losses(run))
    job = launch("--workers=2", **{"train.epochs": 3})
    await_step(run, killed + 3)
    os.kill(worker(job, 0), signal.SIGKILL)
    out, err = job.communicate(timeout=240)
    assert job.returncode == 128 + signal.SIGKILL and "worker 0 (127.0.0.1:" in err, err
    assert "worker 0 (127.0.0.1:" in (said := (tmp_path / "logs/worker-1.log").read_text()) and "without a word" in said

    for epochs, strategy in ((3, "mirrored"), (4, "none")):
        moved = train(run, settings | {"train.strategy": strategy, "train.epochs": epochs})
        assert moved.resumed_from is not None and moved.resumed_from.startswith(str(run / "checkpoints/ckpt-"))
    single = train(tmp_path / "single", settings | {"train.epochs": 4})
    expected = losses(tmp_path / "single")
    assert list(losses(run)) == list(expected) == list(range(1, 4 * STEPS + 1))  # each step once
    np.testing.assert_allclose(list(losses(run).values()), list(expected.values()), rtol=1e-5)
    ours, theirs = (
        [r for r in Workdir(path).read_metrics() if r["kind"] == "validation"] for path in (run, tmp_path / "single")
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one.pop("kind") == other.pop("kind") and one == pytest.approx(other, rel=1e-4)
    assert single.manifest.rows("train") == STEPS * 60


def test_a_batch_that_processes_cannot_share(settings: dict[str, Any], tmp_path: Path) -> None:
    config = configs.checked(settings | {"train.strategy": "multi_worker", "data.batch_size": 61})
    sentence = "config.data.batch_size=61 does not divide by the 2 processes of config.train.strategy=multi_worker"
    two = Cluster({"worker": ("a:1", "b:1")}, "worker", 0)
    with pytest.raises(UserError, match=sentence), prepared(config, tmp_path / "run", two):
        pass
    assert not (tmp_path / "run").exists()


class _Three(Peers):
    """The chief of three processes."""

    count = 3


def test_an_epoch_goes_on_with_processes_that_can_share_its_parts(settings: dict[str, Any], tmp_path: Path) -> None:
    """One that two processes began."""
    config = configs.checked(settings | {"data.parts": 0})
    manifest, workdir = configs.data(config), Workdir(tmp_path / "run")
    workdir.path.mkdir()
    begun = Trainer(config, manifest, workdir)
    begun.state.step, begun.state.parts = 5, 2
    begun.checkpoints.save()
    assert Trainer(config, manifest, workdir).state.parts == 2
    with pytest.raises(UserError, match="dealt out to 2 parts, which 3 processes cannot share: go on with 1 or 2"):
        Trainer(config, manifest, workdir, peers=_Three())
