"""Fixtures shared by all tests."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stem_tf import configs
from stem_tf.configs.base import models
from stem_util import stores
from tests.stores import KEYS, Server


@pytest.fixture(scope="session")
def run_job() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_job("pipelines.jobs.convert", "--input=x")``: the job in a process of its own, its output and exit code."""

    def run(
        module: str, *arguments: str, cwd: str | os.PathLike[str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        # As a user runs it: the jobs themselves see to TensorFlow's log.
        environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd=cwd,
            env=environment | {"CUDA_VISIBLE_DEVICES": ""},
            timeout=600,
        )

    return run


@pytest.fixture
def job_in_process(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As ``run_job``, in this process: for mistakes that a job notices at once, before TensorFlow has work to do."""

    def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        job = importlib.import_module(module)
        monkeypatch.setattr(sys, "argv", [job.__file__, *arguments])
        handler = signal.getsignal(signal.SIGTERM)
        capfd.readouterr()
        try:
            with mock.patch.dict(os.environ), pytest.raises(SystemExit) as exited:  # jobs set some of it
                job.run()
        finally:
            signal.signal(signal.SIGTERM, handler)
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(exited.value.code or 0), out, err)

    return run


TINY_SCHEMA = """
name: tiny
group: user
item: item
features:
  user: {kind: categorical, side: user, dtype: string}
  item: {kind: categorical, side: item, dtype: int64}
  tags: {kind: multivalent, side: item, dtype: string, separator: "|", max_length: 3}
  length: {kind: numeric, side: item, transform: [log1p, standardise]}
tasks:
  click: {label: {column: clicked}}
  watched: {type: regression, weight: 0.5, label: {column: share, missing: outside}}
"""

CHAIN_TASKS = """
tasks:
  click: {label: {column: clicked}}
  cart: {label: {column: carted}}
  buy: {label: {column: bought}, space: {task: click}}
"""

ZOO: dict[str, dict[str, object]] = {
    "aitm": {"model.follows": {"cart": "click", "buy": "cart"}, "model.calibrator": 0.6},
    "esmm": {"model.follows": {"cart": "click", "buy": "cart"}},
    "asymmetric_sharing": {"model.gives": {"buy": "click"}},
    "sluice": {"model.orthogonality": 0.1},
    "ml_mmoe": {"model.expert_units": ((8,), (6,)), "model.experts": (3, 2)},
    "ple": {"model.expert_units": ((8,), (6,)), "model.task_experts": {"click": 2, "cart": (1, 2), "buy": 1}},
    "stem_net, two layers": {"model.layers": 2, "model.shared_experts": (2, 1)},
    "stem_net, F": {"model.task_features": "user,item", "model.gate_bias": False, "model.gate_units": ()},
    "stem_net of nfwfm": {"model.expert": "nfwfm"},
    "mmoe of dcn": {"model.expert": "dcn"},
    "shared_bottom of fwfm": {"model.expert": "fwfm"},
}
"""What models need or may have beside the defaults; a model's name is the first word."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives a test of ``zoo_settings`` every model there is, unless it names some. Here, as it imports TensorFlow."""
    named = any(mark.args[0] == "zoo_settings" for mark in metafunc.definition.iter_markers("parametrize"))
    if "zoo_settings" in metafunc.fixturenames and not named:
        metafunc.parametrize("zoo_settings", list(dict.fromkeys([*models(), *ZOO])), indirect=True)


@pytest.fixture(scope="session")
def convert_tiny(
    tmp_path_factory: pytest.TempPathFactory, run_job: Callable[..., subprocess.CompletedProcess[str]]
) -> Callable[..., Path]:
    """``convert_tiny(seed)``: 1,500 rows of a generated log, converted by the real job; the data directory.

    With ``tasks`` or ``hashed`` the tasks are others, or the tags have no vocabulary.

    Users differ in how often they click, items in how long they are watched; a third of the rows has no ``watched``.
    """

    @functools.cache
    def convert(seed: int, tasks: str = "", hashed: bool = False) -> Path:
        random = np.random.default_rng(seed)
        rows = 1500
        user, item = random.integers(40, size=rows), random.integers(100, size=rows)
        share = np.clip(item / 100 + random.normal(0, 0.1, rows), 0, 1)
        log = pa.table(
            {
                "user": [f"user-{number}" for number in user],
                "item": item,
                "tags": ["|".join(f"t{number % k}" for k in (3, 5)) for number in item],
                "length": (item % 7 * 1000.0),
                "clicked": (random.random(rows) < user / 40).astype(np.int64),
                "carted": (random.random(rows) < item / 100).astype(np.int64),
                "bought": (random.random(rows) < 0.3).astype(np.int64),
                "share": pa.array(share, mask=random.random(rows) < 1 / 3),
                "time": np.arange(rows),
            }
        )
        directory = tmp_path_factory.mktemp("tiny")
        pq.write_table(log, directory / "log.parquet")
        text = TINY_SCHEMA.partition("\ntasks:")[0] + tasks if tasks else TINY_SCHEMA
        if hashed:
            text = text.replace("max_length: 3", "max_length: 3, hash: {buckets: 7, hashes: 2}")
        (directory / "tiny.yaml").write_text(text, encoding="utf-8")
        job = run_job(
            "pipelines.jobs.convert",
            str(directory / "log.parquet"),
            f"--schema={directory / 'tiny.yaml'}",
            "--split=time",
            "--split_column=time",
            f"--output={directory / 'data'}",
            "--processes=1",
            "--block_rows=64",
        )
        assert job.returncode == 0, job.stderr
        return directory / "data"

    return convert


@pytest.fixture(scope="session")
def tiny_data(convert_tiny: Callable[..., Path]) -> Path:
    """The data directory of ``convert_tiny(0)``: 1,200 train, 150 validation and 150 test rows."""
    return convert_tiny(0)


@pytest.fixture(scope="session")
def chain_data(convert_tiny: Callable[..., Path]) -> Path:
    """The same rows with hashed tags and three binary tasks: click, cart and, where click is 1, buy."""
    return convert_tiny(0, CHAIN_TASKS, hashed=True)


@pytest.fixture(scope="session")
def hashed_data(convert_tiny: Callable[..., Path]) -> Path:
    """The data directory of ``convert_tiny(0)``, with hashed tags."""
    return convert_tiny(0, hashed=True)


@pytest.fixture
def zoo_settings(
    request: pytest.FixtureRequest, tiny_settings: dict[str, object], chain_data: Path
) -> dict[str, object]:
    """Config keys that train a small model of every kind on ``chain_data``."""
    name = request.param.replace(",", " ").split()[0]
    settings = configs.applying(tiny_settings, name)
    return (
        settings | {"data.dir": str(chain_data), "model.name": name, "model.init_std": 0.3} | ZOO.get(request.param, {})
    )


@pytest.fixture(scope="session")
def tiny_settings(tiny_data: Path) -> dict[str, object]:
    """Config keys that train a small network on ``tiny_data`` in 18 steps an epoch."""
    return {
        "experiment": "tiny",
        "data.dir": str(tiny_data),
        "data.batch_size": 64,
        "model.dim": 4,
        "model.expert_units": (8,),
        "model.gate_units": (),
        "model.tower_units": (4,),
        "model.init_std": 0.01,
        "optimizer.learning_rate": 0.02,
        "train.epochs": 2,
        "train.patience": 0,
        "train.log_every": 1,
    }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """moto's S3 server."""
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, ``s3://NAME``, that this process and the jobs that it runs find; copies lie in ``cache``."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_server.port}")
    monkeypatch.setenv("STEM_TF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr(stores, "_WAITS", (0.01,))
    return f"s3://{s3_server.bucket()}"
