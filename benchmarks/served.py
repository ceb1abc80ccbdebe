"""Requests to a served export, and the processor time of its server: for the benchmarks of servers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import tfrecord
from stem_util.errors import JobError


@contextlib.contextmanager
def server(base: Path, *flags_: str, checkout: str | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = start(base, "--port=0", *flags_, checkout=checkout)
    try:
        yield process, process.address  # type: ignore[attr-defined]
    finally:
        process.terminate()
        process.communicate()


def start(base: Path, *flags_: str, checkout: str | None = None) -> subprocess.Popen[str]:
    """Starts a server and waits until it answers; its address is the attribute ``address``."""
    where = checkout or os.getcwd()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "export.jobs.serve",
            f"--model_base_path={base.resolve()}",
            "--model_name=ranker",
            *flags_,
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=where,
        env=os.environ | {"PYTHONPATH": where},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("serving "):
        raise JobError(f"the server did not start: {line}")
    process.address = line.split()[-1]  # type: ignore[attr-defined]
    return process


def request(path: Path, key: str, candidates: int) -> Any:
    """A PredictRequest of one user (the first row of the warm-up requests) and ``candidates`` items."""
    from tensorflow_serving.apis import predict_pb2

    from export.server import tensors

    rank, default = warm_up(path, "rank"), warm_up(path, "serving_default")
    rows = {alias: tensors.decode(proto) for alias, proto in default.inputs.items()}
    built = predict_pb2.PredictRequest()
    built.model_spec.name, built.model_spec.signature_name = "ranker", key
    for alias, values in rows.items():
        # In `rank` an item feature has one more axis, the candidates.
        item = len(rank.inputs[alias].tensor_shape.dim) > values.ndim
        if item:
            values = np.resize(values, (candidates, *values.shape[1:]))
            values = values[None] if key == "rank" else values
        else:
            values = np.repeat(values[:1], 1 if key == "rank" else candidates, axis=0)
        tensors.encode(values, built.inputs[alias], as_content=True)
    return built


def warm_up(path: Path, key: str) -> Any:
    """The warm-up request of a signature that has the most rows."""
    from tensorflow_serving.apis import prediction_log_pb2

    from export.server.servable import WARM_UP

    logs = [prediction_log_pb2.PredictionLog.FromString(x) for _, x in tfrecord.scan(str(path / WARM_UP))]
    found = [log.predict_log.request for log in logs if log.predict_log.request.model_spec.signature_name == key]
    if not found:
        raise JobError(f"{path / WARM_UP} has no request for {key}")
    return max(found, key=lambda request: request.ByteSize())


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
