"""Small trained runs to export: every kind of feature, values that break text formats, both precisions."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from export import exporter
from pipelines import manifest as manifests
from pipelines.manifest import Manifest
from stem_tf import configs, trained
from stem_tf.models.ranking_model import RankingModel
from stem_tf.training.trainer import Trainer
from stem_tf.workdir import Workdir

SCHEMA = """
name: nasty
group: user
task_tables: [user, item, tags]
features:
  user: {kind: categorical, side: user, dtype: string, dim: 6}
  age: {kind: numeric, side: user, bucketise: {boundaries: [18, 30, 60]}}
  history: {kind: multivalent, side: user, dtype: int64, max_length: 3}
  hour: {kind: categorical, side: context, dtype: int64}
  weekend: {kind: categorical, side: context, dtype: int64}
  temperature: {kind: numeric, side: context, transform: [standardise]}
  item: {kind: categorical, side: item, dtype: int64}
  never_twice: {kind: categorical, side: item, dtype: string, min_count: 1000000}
  never_again: {kind: categorical, side: item, dtype: int64, column: row, min_count: 1000000}
  tags: {kind: multivalent, side: item, dtype: string, separator: "|", max_length: 2, pooling: sum}
  length: {kind: numeric, side: item, transform: [log1p, standardise]}
  image: {kind: dense, side: item, length: 3}
tasks:
  click: {label: {column: clicked}}
  watched: {type: regression, label: {column: seconds, standardise: true, missing: outside}}
ranking:
  score: click^a * log1p(default(length, 10)) + 0.001 * default(temperature, 20) * watched
  gain: click + max(watched, 0) / 100
  parameters: {a: {value: 2, low: 0, high: 4}}
"""

NASTY = [
    "plain", "two\nlines", "a\r\nb", 'quo"te', "it's", "tab\there", "back\\slash", "nul\x00inside\x00", " spaces ",
    "\n", ",", "ünïcödé", "日本語", "🦊", "e\u0301", "x" * 3000, "\u2028", "None", "0",
]  # fmt: skip

ROWS = 600


class Run(NamedTuple):
    """A trained run."""

    workdir: Workdir
    config: Any
    manifest: Manifest

    def model(self) -> RankingModel:
        """The trained model."""
        model = trained.load(self.workdir, self.config, self.manifest, "best").model
        assert isinstance(model, RankingModel)
        return model

    def export(self, output: Path) -> tuple[Path, dict[str, Any]]:
        """Publishes it under ``output``; the version's directory and manifest."""
        return exporter.export(self.workdir, self.config, self.manifest, "best", output, "nasty")


def log(rows: int = ROWS) -> pa.Table:
    """A log of every kind of feature, with missing values of every kind."""
    random = np.random.default_rng(0)

    def some(values: Any) -> list[Any]:
        """``values``, one in eight missing."""
        return [None if missing else value for value, missing in zip(values, random.random(rows) < 1 / 8, strict=True)]

    user = random.integers(len(NASTY), size=rows)
    clicked = (random.random(rows) < (user + 1) / (len(NASTY) + 2)).astype(np.int64)
    words = [*NASTY[:7], "", "unseen"]
    return pa.table(
        {
            "user": pa.array([NASTY[u] for u in user], pa.string()),
            "age": pa.array([float(20 + u) for u in user]),
            "history": pa.array([[h or None for h in range(u % 6)] or None for u in user], pa.list_(pa.int32())),
            "hour": pa.array(some(random.integers(24, size=rows)), pa.uint8()),
            "weekend": pa.array(some(random.random(rows) < 0.5), pa.bool_()),
            "temperature": pa.array(some(random.normal(20, 5, rows)), pa.float64()),
            "item": pa.array(some(random.choice([-(2**63) + 1, -1, 0, 1, 2**40, 2**63 - 1], rows)), pa.int64()),
            "never_twice": pa.array(some(["n" + NASTY[u] for u in user])),
            "row": np.arange(rows),
            "tags": pa.array(some(["|".join(random.choice(words, random.integers(5))) for _ in range(rows)])),
            "length": pa.array(some(random.integers(0, 10**6, rows)), pa.int64()),
            "image": pa.array(some(random.normal(size=(rows, 3)).tolist()), pa.list_(pa.float32())),
            "clicked": clicked,
            "seconds": pa.array(some(100.0 * clicked + user)),
        }
    )


@pytest.fixture(scope="session")
def nasty_values() -> list[str]:
    """Distinct values that some text format or other would break."""
    return NASTY


@pytest.fixture(scope="session")
def convert(
    tmp_path_factory: pytest.TempPathFactory, run_job: Callable[..., subprocess.CompletedProcess[str]]
) -> Callable[..., Path]:
    """``convert(schema, log, *flags)``: the data directory of a log, converted by the real job."""

    def convert(schema: str, table: pa.Table, *flags: str) -> Path:
        directory = tmp_path_factory.mktemp("served")
        pq.write_table(table, directory / "log.parquet")
        (directory / "schema.yaml").write_text(schema, encoding="utf-8")
        job = run_job(
            "pipelines.jobs.convert",
            str(directory / "log.parquet"),
            f"--schema={directory / 'schema.yaml'}",
            "--split=random",
            "--fractions=0.6,0.3,0.1",
            f"--output={directory / 'data'}",
            "--processes=1",
            *flags,
        )
        assert job.returncode == 0, job.stderr
        return directory / "data"

    return convert


@pytest.fixture(scope="session")
def nasty_data(convert: Callable[[str, pa.Table], Path]) -> Path:
    """The data directory of `log` under `SCHEMA`."""
    return convert(SCHEMA, log())


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """``train(data, **{"model.layers": 2})``: a run of one epoch on converted data."""

    def train(data: Path, **settings: Any) -> Run:
        small = {
            "data.dir": str(data),
            "data.batch_size": 64,
            "model.dim": 4,
            "model.expert_units": (8,),
            "model.gate_units": (4,),
            "model.tower_units": (4,),
            "model.init_std": 0.3,
            "optimizer.learning_rate": 0.02,
            "train.epochs": 1,
        }
        config, manifest = configs.checked(small | settings), manifests.load(str(data))
        workdir = Workdir(tmp_path_factory.mktemp("run"))
        with workdir.locked():
            workdir.prepare(config, manifest)
            Trainer(config, manifest, workdir, say=lambda line: None).run()
        return Run(workdir, config, manifest)

    return train


@pytest.fixture(scope="session")
def nasty_run(nasty_data: Path, train: Callable[..., Run]) -> Callable[[str], Run]:
    """``nasty_run(precision)``: a run on `nasty_data`; two layers and batch norm under mixed_bfloat16."""

    @functools.cache
    def run(precision: str) -> Run:
        more = (
            {"model.layers": 2, "model.batch_norm": True, "model.expert_norm": "batch"}
            if precision == "mixed_bfloat16"
            else {}
        )
        return train(nasty_data, **{"train.precision": precision}, **more)

    return run


@pytest.fixture(scope="session")
def nasty_export(nasty_run: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of versions, with one of the float32 run; not to be changed."""
    version, _ = nasty_run("float32").export(tmp_path_factory.mktemp("models") / "a [b]*")  # a pattern, to TensorFlow
    return version.parent


class Served(NamedTuple):
    """host:port of a server's gRPC, REST and metrics."""

    grpc: str
    rest: str
    metrics: str


@pytest.fixture(scope="session")
def nasty_server(nasty_export: Path) -> Iterator[Served]:
    """A server of that export, under the name nasty, which it was exported under."""
    flags = [
        f"--model_base_path={nasty_export}",
        *(f"--{port}=0" for port in ("port", "rest_api_port", "metrics_port")),
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "export.jobs.serve", *flags, "--metrics_sample=1"], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            metrics, serving = (server.stdout.readline() for _ in range(2))
            # metrics and health on A; serving nasty version 1 on B, REST on C
            yield Served(serving.split()[-4].removesuffix(","), serving.split()[-1], metrics.split()[-1])
        finally:
            server.terminate()


@pytest.fixture(scope="session")
def nasty_target(nasty_server: Served) -> str:
    """host:port of the gRPC of that server."""
    return nasty_server.grpc
