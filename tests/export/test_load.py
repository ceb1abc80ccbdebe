"""stem-load: what is sent, when, what is measured of it, and what is claimed."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2

from export.loading import generator, steps
from export.loading.generator import Caller, Measurement
from export.loading.histogram import Histogram
from export.loading.requests import Request
from export.loading.steps import Capacity, Plan
from stem_client import protocol
from stem_util.errors import UserError

Job = Callable[..., subprocess.CompletedProcess[str]]
RENAMED = """
name: renamed
features:
  user: {kind: categorical, side: user, column: u, dtype: int64}
  item: {kind: categorical, side: item, column: i, dtype: int64}
tasks:
  click: {label: {column: clicked}}
"""
PEM = Path(__file__).parents[1] / "stem_client"


class Server:
    """Answers Predict with nothing, and metadata of a model of user and item; keeps what it was sent.

    Attributes:
      stall: how long the next call stands still, and all behind it.
      code: of the answers.
    """

    def __init__(self, certificate: tuple[bytes, bytes] | None = None) -> None:
        self.stall, self.code = 0.0, grpc.StatusCode.OK
        self.requests: list[predict_pb2.PredictRequest] = []
        self.headers: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._server = grpc.server(futures.ThreadPoolExecutor(32))
        handlers = {
            "Predict": grpc.unary_unary_rpc_method_handler(self._predict),
            "GetModelMetadata": grpc.unary_unary_rpc_method_handler(self._metadata),
        }
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("tensorflow.serving.PredictionService", handlers)]
        )
        if certificate is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            ours = grpc.ssl_server_credentials([certificate], certificate[1], require_client_auth=True)
            port = self._server.add_secure_port("127.0.0.1:0", ours)
        self.target = f"{'127.0.0.1' if certificate is None else 'localhost'}:{port}"
        self._server.start()

    def _predict(self, data: bytes, context: Any) -> bytes:
        with self._lock:
            pause, self.stall = self.stall, 0.0
            time.sleep(pause)
        self.requests.append(predict_pb2.PredictRequest.FromString(data))
        self.headers.append(dict(context.invocation_metadata()))
        if self.code is not grpc.StatusCode.OK:
            context.abort(self.code, "as told")
        return b""

    def _metadata(self, data: bytes, context: Any) -> bytes:
        self.headers.append(dict(context.invocation_metadata()))
        answer, definitions = protocol.GetModelMetadataResponse(), protocol.SignatureDefMap()
        answer.model_spec.name, answer.model_spec.version.value = "ranker", 3
        for signature, item in (("serving_default", (-1,)), ("rank", (-1, -1))):
            inputs = definitions.signature_def[signature].inputs
            for name, sizes in {"user": (-1,), "item": item}.items():
                inputs[name].dtype = protocol.DT_INT64
                for size in sizes:
                    inputs[name].tensor_shape.dim.add(size=size)
        answer.metadata["signature_def"].value = definitions.SerializeToString()
        return answer.SerializeToString()

    def stop(self) -> None:
        self._server.stop(0).wait()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.stop()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.csv"
    path.write_text("user,item\n" + "\n".join(f"{row},{row + 100}" for row in range(5)) + "\nx,1\n")
    return path


def under_load(server: Server, how: Callable[[Caller, asyncio.Event], Any], deadline: float = 5.0) -> Measurement:
    async def run() -> Measurement:
        async with Caller(server.target, [Request(b"", 1)], deadline=deadline, connections=2) as caller:
            await caller.try_out(20)
            server.requests.clear()
            return await how(caller, asyncio.Event())

    return asyncio.run(run())


def opened(rate: float, seconds: float, most_waiting: int = 1000) -> Callable[[Caller, asyncio.Event], Any]:
    random = np.random.default_rng(0)
    return lambda caller, stop: generator.open_loop(
        caller, generator.arrivals(rate, "uniform", random), seconds, most_waiting, stop
    )


def test_quantiles_are_right_to_one_percent_in_bounded_memory() -> None:
    random, histogram = np.random.default_rng(0), Histogram()
    values = random.lognormal(-4, 1.5, 20_000)
    for value in values:
        histogram.add(float(value))
    for share in (0.5, 0.9, 0.99, 0.999):
        assert histogram.quantile(share) == pytest.approx(np.quantile(values, share, method="inverted_cdf"), rel=0.01)
    assert histogram.quantile(1.0) == histogram.longest == values.max()
    histogram.add(0.0)
    histogram.add(1e9)
    assert len(histogram) == 20_002 and math.isnan(Histogram().quantile(0.5))


def test_arrivals() -> None:
    def first(kind: str, seed: int) -> list[float]:
        return list(islice(generator.arrivals(100, kind, np.random.default_rng(seed)), 3000))

    assert first("uniform", 0)[:3] == [0, 0.01, 0.02]
    poisson = first("poisson", 0)
    assert poisson == sorted(poisson) == first("poisson", 0) != first("poisson", 1)
    gaps = np.diff(poisson)
    assert gaps.mean() == pytest.approx(0.01, rel=0.1) and gaps.std() == pytest.approx(0.01, rel=0.1)


def test_a_pause_of_the_server_counts_for_every_call_that_was_due(server: Server) -> None:
    """The open loop sees what users would; the closed loop asks once and waits."""

    def paused(how: Callable[[Caller, asyncio.Event], Any]) -> Callable[[Caller, asyncio.Event], Any]:
        def start(caller: Caller, stop: asyncio.Event) -> Any:
            server.stall = 0.5
            return how(caller, stop)

        return start

    measured = under_load(server, paused(opened(100, 1.0)))
    assert measured.calls == measured.good == 100 and measured.codes == {"OK": 100}
    assert measured.latency.quantile(0.7) > 0.1  # 40 calls were due in the first 400 ms
    assert len(measured.late) == 100
    closed = under_load(server, paused(lambda caller, stop: generator.closed(caller, 1, 1.0, stop)))
    assert closed.latency.quantile(1 - 1.5 / closed.calls) < 0.4 <= closed.latency.longest


def test_failed_calls_take_their_deadline_in_quantiles(server: Server) -> None:
    def refuse(caller: Caller, stop: asyncio.Event) -> Any:
        server.code = grpc.StatusCode.RESOURCE_EXHAUSTED
        return opened(50, 0.4)(caller, stop)

    measured = under_load(server, refuse, deadline=2.0)
    assert measured.codes == {"RESOURCE_EXHAUSTED": 20} and measured.good == 0
    assert measured.latency.quantile(0.01) == pytest.approx(2.0, rel=0.01)
    assert measured.details == {"RESOURCE_EXHAUSTED": "as told"}


def test_as_many_calls_wait_as_may_and_the_others_fail(server: Server) -> None:
    def stall(caller: Caller, stop: asyncio.Event) -> Any:
        server.stall = 1.0
        return opened(100, 0.5, most_waiting=5)(caller, stop)

    measured = under_load(server, stall)
    assert measured.codes == {"OK": 5, generator.NOT_SENT: 45} and len(server.requests) == 5


class Pretended:
    """Measurements of a server that answers up to ``capacity`` calls a second in time."""

    def __init__(self, capacity: float, late: float = 0.0, stopped: bool = False) -> None:
        self.capacity, self.late, self.stopped, self.rates = capacity, late, stopped, list[float]()

    async def __call__(self, rate: float) -> Measurement:
        self.rates.append(rate)
        measured = Measurement(stopped=self.stopped)
        for _ in range(100):
            measured.add(Request(b"", 1), "OK", 0.01 if rate <= self.capacity else 0.2, 1.0)
            measured.late.add(self.late)
        return measured


def search(plan: Plan, server: Pretended) -> Capacity:
    return asyncio.run(steps.search(plan, 0.05, server))


def test_the_rate_is_raised_until_a_limit_breaks_and_then_halved_in() -> None:
    server = Pretended(270)
    assert search(Plan((100,), 2), server) == Capacity(250)
    assert server.rates == [100, 200, 400, 400, 300, 300, 250]


def test_a_hiccup_breaks_no_limit() -> None:
    class Once(Pretended):
        async def __call__(self, rate: float) -> Measurement:
            self.capacity = 0 if not self.rates else 150
            return await super().__call__(rate)

    assert search(Plan((100, 200)), Once(0)).rate == 150


def test_what_is_no_capacity_is_not_claimed() -> None:
    assert search(Plan((100,), 2), Pretended(50)).rate is None
    assert "interrupted" in search(Plan((100,), 2), Pretended(500, stopped=True)).why
    at_least = search(Plan((100, 200)), Pretended(500))
    assert at_least.rate == 200 and "highest rate" in at_least.why


def test_a_late_generator_claims_nothing_where_a_limit_breaks() -> None:
    outcome = search(Plan((100,), 2), Pretended(270, late=0.02))
    assert outcome.rate is None and "the generator sent calls 20" in outcome.why
    assert outcome.why.endswith("; 200 calls/s kept the limits")
    # Late, and in time all the same: latencies are from when calls were due.
    assert search(Plan((100, 200)), Pretended(270, late=0.02)).rate == 200


def test_goodput_below_99_percent_breaks_a_limit() -> None:
    measured = Measurement()
    for number in range(1000):
        measured.add(Request(b"", 1), "OK" if number > 10 else "UNAVAILABLE", 0.001, 0.04)
    assert steps.broken(measured, 0.05) == "98.9 % in time"


@pytest.mark.parametrize("text", ["", "x1", "x99", "xx", "1,2,2", "2,1", "0,1", "nan", "1,inf"])
def test_steps_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--steps="):
        steps.parse(text, 10 if text.startswith("x") else None)


@pytest.mark.parametrize("text", ["", "0", "-1", "5:0", "5:nan", "5,5", "1000000", "a", "5:inf"])
def test_candidates_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--candidates="):
        steps.sizes(text)


def load(run_job: Job, target: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return run_job("export.jobs.load", f"--target={target}", *flags)


def test_real_rows_reach_a_real_server(
    nasty_target: str, nasty_data: Path, nasty_export: Path, run_job: Job, tmp_path: Path
) -> None:
    flags = ["--model_name=nasty", "--seconds=1", f"--json={tmp_path / 'figures.json'}"]
    rows = [f"--rows={nasty_data}", "--candidates=5:2,20:1"]
    done = load(run_job, nasty_target, *flags, *rows, "--clients=2")
    assert done.returncode == 0, done.stderr
    assert "nasty version 1" in done.stdout and "not corrected for coordinated omission" in done.stdout
    assert "answers: OK" in done.stdout and "goodput: " in done.stdout
    (figures,) = json.loads((tmp_path / "figures.json").read_text())["measurements"]
    assert figures["good"] == figures["calls"] == figures["codes"]["OK"] > 2
    assert figures["latency_ms_by_size"].keys() == {"5", "20"}
    # A rate that any machine keeps: the search ends with a bound.
    calm = ["--steps=2,4", "--limit_p99_ms=20000", "--deadline_ms=20000", "--machine=2 cores"]
    done = load(run_job, nasty_target, *flags, *rows, "--signature=serving_default", *calm)
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "figures.json").read_text())["capacity_line"]
    assert line.startswith("at least 4 calls/s of 5:2,20:1 rows at p99 <= 20000 ms, 2 cores, serving_default of nasty")
    assert done.stdout.endswith(f"capacity: {line}\n")
    done = load(run_job, nasty_target, *flags, f"--model={nasty_export}", "--rate=20", "--arrivals=uniform")
    assert done.returncode == 0, done.stderr
    assert {row.split()[0] for row in done.stdout.splitlines()} >= {"all", "1", "50", "200", "answers:"}


def test_requests_are_of_one_user_and_rows_that_fit(server: Server, log: Path, run_job: Job) -> None:
    done = load(run_job, server.target, f"--rows={log}", "--candidates=3", "--rate=30", "--seconds=0.5", "--version=3")
    assert done.returncode == 0, done.stderr
    for request in server.requests:
        assert request.model_spec.version.value == 3 and request.model_spec.signature_name == "rank"
        user, item = (tf.make_ndarray(request.inputs[name]) for name in ("user", "item"))
        assert user.shape == (1,) and item.shape == (1, 3)
        assert set(user.tolist()) <= set(range(5)) and set(item[0].tolist()) <= set(range(100, 105))
    first = {request.SerializeToString(deterministic=True) for request in server.requests}
    assert len(first) > 5
    renamed = log.with_name("renamed.csv")
    renamed.write_text(log.read_text().replace("user,item", "u,i"))
    log.with_name("schema.yaml").write_text(RENAMED)
    server.requests.clear()
    flags = [f"--rows={renamed}", f"--schema={log.with_name('schema.yaml')}", "--version=3", "--seconds=0.5"]
    done = load(run_job, server.target, *flags, "--candidates=3", "--clients=1")
    assert done.returncode == 0, done.stderr
    again = {request.SerializeToString(deterministic=True) for request in server.requests}
    assert first <= again  # of the same seed


def test_certificates_and_tokens(log: Path, run_job: Job, tmp_path: Path) -> None:
    key, certificate = ((PEM / f"localhost.{kind}.pem").read_bytes() for kind in ("key", "certificate"))
    server = Server((key, certificate))
    (tmp_path / "token").write_text("# ours\n s3cret \n")
    flags = [f"--rows={log}", "--seconds=0.2", "--clients=1", f"--token_file={tmp_path / 'token'}"]
    ours = [
        f"--tls_{flag}={PEM}/localhost.{file}.pem" for flag, file in (("certificate", "certificate"), ("key", "key"))
    ]
    done = load(run_job, server.target, *flags, f"--tls_ca={PEM / 'localhost.certificate.pem'}", *ours)
    assert done.returncode == 0, done.stderr
    assert {headers["authorization"] for headers in server.headers} == {"Bearer s3cret"}
    done = load(run_job, server.target, *flags)
    server.stop()
    assert done.returncode == 1 and "does not answer: UNAVAILABLE" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr  # nothing of gRPC's own beside it


def test_ctrl_c_shows_what_was_measured(server: Server, log: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "export.jobs.load", f"--target={server.target}", f"--rows={log}", "--rate=50"]
    with subprocess.Popen(
        [*command, "--seconds=60", f"--json={figures}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        job.stdout.readline(), job.stdout.readline()  # measuring
        while len(server.requests) < 20:
            time.sleep(0.02)
        job.send_signal(signal.SIGINT)
        out, error = job.communicate(timeout=30)
    assert job.returncode == 130 and error == "error: interrupted\n"
    assert "answers: OK" in out
    assert json.loads(figures.read_text())["measurements"][0]["calls"] >= 12


def test_mistakes_are_said(server: Server, log: Path, job_in_process: Job, tmp_path: Path) -> None:
    def error(code: int, *flags: str) -> str:
        done = load(job_in_process, server.target, *flags)
        assert done.returncode == code and len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    rows = f"--rows={log}"
    assert "not both" in error(2, rows, "--rate=1", "--clients=1")
    assert "is more than --deadline_ms" in error(2, rows, "--steps=1,2", "--limit_p99_ms=2000")
    assert "--rows is required" in error(2)
    assert "belong together, and to --tls_ca" in error(2, rows, "--tls_key=x", "--tls_certificate=y")
    other = tmp_path / "other.csv"
    other.write_text("user,thing\n1,2\n")
    assert "--schema says which column" in error(2, f"--rows={other}")
    server.code = grpc.StatusCode.PERMISSION_DENIED
    assert "refuses: PERMISSION_DENIED: as told" in error(1, rows)
