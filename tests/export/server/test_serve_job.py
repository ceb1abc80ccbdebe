"""stem-serve as a process: its lines, its exit codes, its signals."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

RequestFor = Callable[..., predict_pb2.PredictRequest]
ROOT = Path(__file__).resolve().parents[3]


@contextlib.contextmanager
def job(*flags: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "export.jobs.serve", "--port=0", *flags],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    killer = threading.Timer(60, process.kill)
    killer.start()
    try:
        yield process
    finally:
        killer.cancel()
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_serves_new_versions_and_drains_on_sigterm(publish: Any, tmp_path: Path, request_for: RequestFor) -> None:
    publish(tmp_path, 4, 4.0, [request_for("rank", user=[1], item=[[1, 2]])])
    with job(f"--model_base_path={tmp_path}", "--poll_seconds=0.1", "--grace_seconds=30") as process:
        ready = re.fullmatch(r"serving ranker version 4 on (127\.0\.0\.1:\d+)", line_of(process))
        assert ready is not None
        with grpc.insecure_channel(ready[1]) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert next(health).status == health_pb2.HealthCheckResponse.SERVING
            publish(tmp_path, 5, 5.0)
            assert re.fullmatch(
                r"ranker: version 5 serves in place of version 4 \(loaded in [0-9.]+ s, 0 warm-up requests\)",
                line_of(process),
            )
            slow = stub.Predict.future(request_for("slow", turns=np.int64(500_000)), timeout=60)
            assert stub.Predict(request_for(user=[1], item=[0]), timeout=20).outputs["click"].float_val == [5]
            process.send_signal(signal.SIGTERM)
            assert line_of(process) == "ranker: stopping; calls in flight have 30 s"
            assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.RpcError) as caught:
                while not slow.done():  # until the server has got from health to Predict
                    stub.Predict(request_for(user=[1], item=[0]), timeout=5)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert caught.value.details() == "the server is stopping"
            assert slow.result().outputs["turn"].int64_val == [500_000]
        assert process.wait(timeout=20) == 0
        assert process.stderr is not None and process.stderr.read() == ""


def test_waits_for_a_first_version_and_stops_on_ctrl_c(publish: Any, tmp_path: Path) -> None:
    with job(f"--model_base_path={tmp_path}", "--wait", "--poll_seconds=0.1", "--model_name=feed") as process:
        waiting = line_of(process)
        assert waiting == f"waiting for a version of feed in {tmp_path}; 127.0.0.1:0 is not open until it serves"
        publish(tmp_path, 1)
        assert re.fullmatch(r"serving feed version 1 on 127\.0\.0\.1:\d+", line_of(process))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0


def test_serves_on_when_nobody_reads_its_output(publish: Any, tmp_path: Path, request_for: RequestFor) -> None:
    publish(tmp_path, 1, 1.0)
    with job(f"--model_base_path={tmp_path}", "--poll_seconds=0.1") as process:
        address = line_of(process).rsplit(" ", 1)[1]
        assert process.stdout is not None
        process.stdout.close()
        publish(tmp_path, 2, 2.0)
        with grpc.insecure_channel(address) as channel:
            stub, answered = prediction_service_pb2_grpc.PredictionServiceStub(channel), [1.0]
            while answered == [1.0]:
                answered = list(stub.Predict(request_for(user=[1], item=[0]), timeout=20).outputs["click"].float_val)
        assert answered == [2.0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


def test_a_call_that_outlives_the_grace_period_is_cancelled(
    publish: Any, tmp_path: Path, request_for: RequestFor
) -> None:
    publish(tmp_path, 1)
    with job(f"--model_base_path={tmp_path}", "--grace_seconds=0.2") as process:
        address = line_of(process).rsplit(" ", 1)[1]
        with grpc.insecure_channel(address) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            endless = stub.Predict.future(request_for("slow", turns=np.int64(1 << 60)), timeout=60)
            for _ in range(20):  # calls of one connection may overtake one another
                stub.Predict(request_for(user=[1], item=[0]), timeout=20)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
            assert endless.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        assert process.stderr is not None
        assert process.stderr.read() == "ranker: calls were still running after 0.2 s and were cancelled\n"


def test_no_version_loads(run_job: Any, tmp_path: Path) -> None:
    (tmp_path / "2").mkdir()
    done = run_job("export.jobs.serve", f"--model_base_path={tmp_path}", "--port=0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"{tmp_path}: version 2 does not load, no version serves: saved_model.pb is missing\n"
        f"error: no version in {tmp_path} loads; --wait goes on trying\n"
    )


def test_models_of_a_file_and_a_list_that_replaces_it(publish: Any, tmp_path: Path, request_for: RequestFor) -> None:
    def entry(name: str, more: str = "") -> str:
        return f'config {{ name: "{name}" base_path: "{tmp_path / name}" model_platform: "tensorflow" {more} }}'

    for name, versions in (("feed", (1, 2)), ("shop", (7,)), ("ranker", (3,))):
        (tmp_path / name).mkdir()
        for version in versions:
            publish(tmp_path / name, version, float(version))
    file = tmp_path / "models.config"
    both = 'model_version_policy { latest { num_versions: 2 } } version_labels { key: "stable" value: 1 }'
    file.write_text(f"model_config_list {{ {entry('feed', both)} {entry('shop')} }}")
    with job(f"--model_config_file={file}", "--model_config_file_poll_wait_seconds=1") as process:
        line = line_of(process)
        assert line.startswith("serving feed version 2, 1 on 127.0.0.1:")
        address = line.rsplit(" ", 1)[1]
        assert line_of(process) == f"serving shop version 7 on {address}"
        with grpc.insecure_channel(address) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            request = request_for(user=[1], item=[0])
            request.model_spec.name, request.model_spec.version_label = "feed", "stable"
            assert stub.Predict(request, timeout=20).outputs["click"].float_val == [1]
            (tmp_path / "beside").write_text(f"model_config_list {{ {entry('ranker')} }}")
            (tmp_path / "beside").replace(file)
            assert line_of(process) == f"serving ranker version 3 on {address}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        assert process.stderr is not None and "feed: is served no more" in process.stderr.read()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "--model_base_path is required, or --model_config_file in its place"),
        (["--model_base_path=GOOD", "--model_config_file=x"], 2, "names the models: leave out --model_base_path"),
        (["--model_name=x", "--model_config_file=x"], 2, "names the models: leave out --model_name"),
        (["--model_config_file=nowhere"], 2, "--model_config_file=nowhere: it cannot be read: No such file"),
        (["--model_config_file=CONFIG"], 2, "CONFIG: line 1, column 1: Message type"),
        (["--model_base_path=GOOD", "--model_config_file_poll_wait_seconds=1"], 2, "is for --model_config_file"),
        (["--model_base_path=nowhere"], 2, "--model_base_path=nowhere: no such directory; --wait waits"),
        (["--model_base_path=EMPTY"], 2, "EMPTY holds no version (a directory with a number for a name, "),
        (["--model_base_path=VERSION"], 2, "VERSION is a version itself; give the directory above it"),
        (["--model_base_path=GOOD", "--metrics_port=8500"], 2, "--port and --metrics_port are both 8500: each needs"),
        (["--model_base_path=GOOD", "--metrics_sample=1"], 2, "--metrics_sample is for --metrics_port"),
        (["--model_base_path=GOOD", "--rest_api_max_bytes=9"], 2, "--rest_api_max_bytes is for --rest_api_port"),
        (["--model_base_path=GOOD", "--port=99999"], 2, "--port=99999"),
        (["--model_base_path=GOOD", "--model_name="], 2, "--model_name is empty"),
        (["--model_base_path=GOOD", "extra"], 2, "unexpected argument 'extra'"),
    ],
)
def test_mistakes_are_one_line(
    job_in_process: Any, publish: Any, tmp_path: Path, flags: list[str], code: int, message: str
) -> None:
    publish(tmp_path, 1)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "CONFIG").write_text("model")
    words = {"EMPTY": tmp_path / "EMPTY", "CONFIG": tmp_path / "CONFIG", "VERSION": tmp_path / "1", "GOOD": tmp_path}

    def fill(text: str) -> str:
        return re.sub("|".join(words), lambda found: str(words[found[0]]), text)

    done = job_in_process("export.jobs.serve", *map(fill, flags))
    assert done.returncode == code and done.stdout == ""
    assert fill(message) in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_an_address_that_is_taken_or_unknown(run_job: Any, publish: Any, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags, message in (
            ([f"--port={port}"], f"cannot listen on 127.0.0.1:{port}, --port: Address already in"),
            (["--port=0", "--host=no.invalid"], "cannot listen on no.invalid:0, --port: "),
        ):
            done = run_job("export.jobs.serve", f"--model_base_path={tmp_path}", *flags)
            assert done.returncode == 2 and done.stdout == ""
            assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
