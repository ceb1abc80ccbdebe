"""A server with all that operators can ask for: REST beside gRPC, mutual TLS, tokens, access log, metrics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import http.client
import json
import re
import signal
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from export.server.configuration import Model
from export.server.models import Models
from export.server.observation import Observation
from export.server.operating import Operating
from export.server.options import Options
from export.server.rest import Backend, Rest
from export.server.servable import Servable
from export.server.service import Server
from export.server.status import StatusError
from export.server.versions import Versions
from export.server.web import Web
from stem_client import RankingClient
from stem_util.errors import UserError
from tests.export.server.test_serve_job import job, line_of

PEM = Path(__file__).parents[2] / "stem_client"
CERTIFICATE, KEY = PEM / "localhost.certificate.pem", PEM / "localhost.key.pem"
RequestFor = Callable[..., predict_pb2.PredictRequest]
Answer = tuple[int, Any]


@dataclasses.dataclass
class Operated:
    operating: Operating
    port: int
    log: Path
    said: list[str]

    def channel(self, certificate: bool = True) -> grpc.Channel:
        pair = (KEY.read_bytes(), CERTIFICATE.read_bytes()) if certificate else (None, None)
        credentials = grpc.ssl_channel_credentials(CERTIFICATE.read_bytes(), *pair)
        return grpc.secure_channel(f"localhost:{self.port}", credentials, [("grpc.use_local_subchannel_pool", 1)])

    def ask(self, path: str, body: Any = None, token: str | None = "secret", **headers: str) -> Answer:
        """GET, or POST of JSON or bytes, over REST."""
        context = ssl.create_default_context(cafile=str(CERTIFICATE))
        context.load_cert_chain(CERTIFICATE, KEY)
        connection = http.client.HTTPSConnection("localhost", self.operating.rest_port, timeout=20, context=context)
        with contextlib.closing(connection):
            data = body if body is None or isinstance(body, bytes) else json.dumps(body)
            sent = headers | ({} if token is None else {"Authorization": f"Bearer {token}"})
            connection.request("GET" if body is None else "POST", f"/v1/models/{path}", data, sent)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def logged(self, request_id: str) -> dict[str, Any]:
        """The line of the log with that request id, once it is there."""
        end = time.monotonic() + 10
        while True:
            for line in map(json.loads, self.log.read_text().splitlines()):
                if line["request_id"] == request_id:
                    return dict(line)
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture(scope="module")
def operated(publish: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    """Version 7 of the model, ``click = 10 * user + item``."""
    base = tmp_path_factory.mktemp("operated")
    (base / "models").mkdir()
    publish(base / "models", 7, 10.0)
    (base / "tokens").write_text("secret\n")
    options = Options(
        "127.0.0.1",
        metrics_port=0,
        rest_port=0,
        rest_seconds=10,
        access_log=str(base / "log"),
        tls_certificate=CERTIFICATE,
        tls_key=KEY,
        tls_client_ca=CERTIFICATE,
        token_file=base / "tokens",
    )
    said: list[str] = []
    models = Models(
        [Model("ranker", base / "models")],
        lambda model: Versions(
            model,
            Servable,
            poll_seconds=0.1,
            report=lambda model, line: said.append(line),
            on_serving=lambda servable, before, seconds: None,
        ),
        lambda model, line: said.append(line),
    )
    operating = Operating(options, models, said.append)
    models.start()
    models.wait(threading.Event(), until_ready=True)
    server = Server(
        models,
        threads=2,
        observe=operating.observe,
        observe_batch=operating.observe_batch,
        credentials=operating.credentials,
        interceptors=operating.interceptors,
    )
    operating.listen(server)
    port = server.listen("127.0.0.1", 0)
    server.serving()
    operating.ready = True
    yield Operated(operating, port, base / "log", said)
    operating.ready = False
    server.close()
    operating.close(1)
    models.stop(1)


RANK = {"signature_name": "rank", "instances": [{"user": 1, "item": [2, 3]}, {"user": 2, "item": [4, 2**62]}]}


def test_predict_by_row_and_by_column(operated: Operated) -> None:
    status, answer = operated.ask("ranker:predict", RANK)
    assert status == 200 and answer["predictions"][0] == {"click": [12, 13], "like": [13, 14]}
    assert np.float32(answer["predictions"][1]["click"]).tolist() == [24, float(2**62)]
    columns = {"inputs": {"user": [1], "item": [5]}}
    for path in ("ranker:predict", "ranker/versions/7:predict", "r%61nker:PREDICT"):
        assert operated.ask(path, columns) == (200, {"outputs": {"click": [15], "like": [16]}})
    assert operated.ask("ranker:predict", {"signature_name": "slow", "inputs": 3}) == (200, {"outputs": 3})


def test_examples_and_other_types(operated: Operated) -> None:
    def example(user: int) -> dict[str, str]:
        features = {
            name: tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
            for name, value in (("user", user), ("item", 2))
        }
        text = tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()
        return {"b64": base64.b64encode(text).decode()}

    body = {"signature_name": "examples", "instances": [example(1), example(3)]}
    status, answer = operated.ask("ranker:predict", body)
    assert status == 200 and [row["click"] for row in answer["predictions"]] == [12, 32]
    types = {"signature_name": "types", "inputs": {"text": ["é", ""], "number": [0.1, 2], "flag": [True, False]}}
    assert operated.ask("ranker:predict", types) == (
        200,
        {"outputs": {"text": ["é!", "!"], "number": [-0.1, -2], "flag": [False, True], "length": [2, 0]}},
    )
    # NaN and Infinity are numbers, as they are there.
    types["inputs"] = {"text": [""], "number": [float("inf")], "flag": [True]}
    assert operated.ask("ranker:predict", types)[1]["outputs"]["number"] == [float("-inf")]


def test_large_json_is_read_and_written_in_a_process_of_its_own(operated: Operated) -> None:
    worker = operated.operating._rest._worker  # type: ignore[union-attr]
    assert worker._process is None
    large = {"signature_name": "rank", "inputs": {"user": [1], "item": [list(range(20_000))]}}
    for _ in range(2):
        status, answer = operated.ask("ranker:predict", large)
        assert status == 200 and answer["outputs"]["like"][0][19_999] == 20_010
        assert worker._process is not None
        worker._process.kill()  # the kernel, for want of memory
        assert operated.ask("ranker:predict", large)[0] == 503
    deep = b"[" * 1_000_000
    assert operated.ask("ranker:predict", deep) == (
        400,
        {"error": "JSON Parse error: lists or objects are nested too deep"},
    )


def test_status_and_metadata(operated: Operated) -> None:
    status = {"version": "7", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    for path in ("ranker", "ranker/versions/7"):
        assert operated.ask(path) == (200, {"model_version_status": [status]})
    code, tree = operated.ask("ranker/metadata")
    assert code == 200 and tree["model_spec"] == {"name": "ranker", "signature_name": "", "version": "7"}
    signature = tree["metadata"]["signature_def"]["signature_def"]["rank"]
    assert signature["method_name"] == "tensorflow/serving/predict"
    assert signature["inputs"]["item"]["dtype"] == "DT_INT64"
    sizes = [dimension["size"] for dimension in signature["inputs"]["item"]["tensor_shape"]["dim"]]
    assert sizes == ["-1", "-1"]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("none:predict", RANK, 404, "Servable not found for request: Latest(none)"),
        ("ranker/versions/9:predict", RANK, 404, "Servable not found for request: Specific(ranker, 9)"),
        (f"ranker/versions/{2**63}:predict", RANK, 400, f"Failed to convert version: {2**63} to numeric."),
        ("ranker/labels/new:predict", RANK, 400, "Unrecognized servable version label: new"),
        ("ranker/versions/9", None, 404, "Could not find version 9 of model ranker"),
        ("none/metadata", None, 404, "Servable not found for request: Latest(none)"),
        ("ranker:classify", RANK, 501, "Classify answers one task only"),
        ("ranker:predict", None, 400, "Malformed request: GET /v1/models/ranker:predict"),
        ("ranker", RANK, 400, "Malformed request: POST /v1/models/ranker"),
        ("%ff:predict", RANK, 400, "Malformed request: %ff is not UTF-8"),
        ("ranker:predict", b"{", 400, "JSON Parse error"),
        ("ranker:predict", b"", 400, "The document is empty"),
        ("ranker:predict", {"inputs": {"user": [1, 2], "item": [1, 2, 3]}}, 400, "Incompatible shapes"),
        ("ranker:predict", RANK | {"signature_name": "x"}, 400, 'name: "x" not found in signature def'),
        ("ranker:predict", b" " * (5 << 20), 413, "the body is larger than 4194304 bytes"),
    ],
)
def test_errors_are_json_with_a_fitting_status(
    operated: Operated, path: str, body: Any, status: int, message: str
) -> None:
    code, answer = operated.ask(path, body)
    assert code == status and list(answer) == ["error"] and message in answer["error"]


def test_calls_need_a_certificate_and_a_token(operated: Operated, request_for: RequestFor) -> None:
    request = request_for(user=[1], item=[2])
    with operated.channel() as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        answer = stub.Predict(request, timeout=20, metadata=[("authorization", "Bearer secret")])
        assert answer.outputs["click"].float_val == [12]
        for metadata in ([], [("authorization", "Bearer other")], [("authorization", "secret")]):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Predict(request, timeout=20, metadata=metadata)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    tls = grpc.ssl_channel_credentials(CERTIFICATE.read_bytes(), KEY.read_bytes(), CERTIFICATE.read_bytes())
    both = grpc.composite_channel_credentials(tls, grpc.access_token_call_credentials("secret"))
    with RankingClient(f"localhost:{operated.port}", credentials=both) as client:
        assert client.metadata().version == 7
    with operated.channel(certificate=False) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Predict(request, timeout=2, metadata=[("authorization", "Bearer secret")])
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    with socket.create_connection(("127.0.0.1", operated.port)) as garbage:
        garbage.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)  # in place of TLS
    for token in (None, "other"):
        assert operated.ask("ranker:predict", RANK, token=token)[0] == 401
        assert operated.ask("ranker", token=token)[0] == 401
    with pytest.raises((ssl.SSLError, ConnectionError)):
        context = ssl.create_default_context(cafile=str(CERTIFICATE))
        connection = http.client.HTTPSConnection("localhost", operated.operating.rest_port, timeout=20, context=context)
        connection.request("GET", "/v1/models/ranker")
        connection.getresponse()


def test_a_request_id_goes_into_the_log_and_back(operated: Operated, request_for: RequestFor) -> None:
    ids = []
    with operated.channel() as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        token = ("authorization", "Bearer secret")
        for name, given in (("ranker", "abc-1"), ("none", "x" * 200)):
            request = request_for("rank", user=[1], item=[[2, 3]])
            request.model_spec.name = name
            call = stub.Predict.future(request, timeout=20, metadata=[token, ("x-request-id", given)])
            back = dict(call.trailing_metadata())["x-request-id"]
            ids.append(str(back))
    assert ids[0] == "abc-1" and re.fullmatch(r"[0-9a-f]{32}", ids[1])
    operated.ask("ranker:predict", RANK, **{"x-request-id": "abc-2"})
    fine, failed, rest = (operated.logged(each) for each in (*ids, "abc-2"))
    assert (fine["entrypoint"], fine["code"]) == ("GRPC", "OK")
    # Of a SavedModel without a manifest nobody knows which axes are rows.
    assert fine["rows"] == 1 and fine["signature"] == "rank" and fine["version"] == 7 and fine["ms"] > 0
    assert fine["peer"].startswith("ipv4:127.0.0.1:") and fine["request_bytes"] > 20 < fine["response_bytes"]
    assert (failed["model"], failed["code"], failed["version"]) == ("none", "NOT_FOUND", None)
    assert failed["error"] == "Servable not found for request: Latest(none)"
    assert (rest["entrypoint"], rest["rows"]) == ("REST", 1)


def test_metrics_know_both_ways_in(operated: Operated) -> None:
    operated.ask("ranker:predict", RANK)
    url = f"http://127.0.0.1:{operated.operating.metrics_port}/metrics"
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    assert ':tensorflow:serving:request_count{model_name="ranker",status="OK"}' in text
    assert 'entrypoint="REST",model_name="ranker"' in text and "stem_serve_batch_rows_count" in text
    assert 'stem_serve_rows_total{model="ranker",signature="rank",version="7"}' in text


async def _never(payload: bytes, deadline: float, seen: Observation) -> predict_pb2.PredictResponse:
    await asyncio.sleep(60)
    raise AssertionError


async def _full(payload: bytes, deadline: float, seen: Observation) -> predict_pb2.PredictResponse:
    raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")


@pytest.mark.parametrize(
    ("predict", "stopping", "held", "status", "message"),
    [
        (_never, False, 0, 504, "no answer in 0.2 s"),
        (_full, False, 0, 429, "full"),
        (_full, True, 0, 503, "the server is stopping"),
        (_full, False, 256 << 20, 429, "the bodies of other calls fill the memory"),
    ],
    ids=["late", "full", "stopping", "memory"],
)
def test_a_busy_server_says_so_over_http(
    served: Any, predict: Any, stopping: bool, held: int, status: int, message: str
) -> None:
    answers, seen = served.server.answers, list[Observation]()
    backend = Backend(served.models, predict, answers.get_model_status, answers.get_model_metadata, lambda: stopping)
    rest, web = Rest(backend, timeout_seconds=0.2, max_body_bytes=1000, observe=seen.append), Web()
    rest._held = held
    port = web.listen(rest.handler, "127.0.0.1", 0, connections=4)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/models/ranker:predict", b'{"inputs": {"user": [1], "item": [2]}}')
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())) == (status, {"error": message})
    web.close(1)
    assert [observation.text for observation in seen] == [message] and rest._held == held


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    models = Models([], lambda model: pytest.fail("loads"), lambda model, line: None)
    for options, message in [
        (Options("127.0.0.1", tls_certificate=CERTIFICATE), "TLS needs both"),
        (Options("127.0.0.1", tls_client_ca=CERTIFICATE), "TLS needs both"),
        (Options("127.0.0.1", token_file=tmp_path / "none"), "--token_file=.*none: No such file"),
        (Options("203.0.113.1", metrics_port=0), "cannot listen on 203.0.113.1:0, --metrics_port: "),
    ]:
        with pytest.raises(UserError, match=message):
            Operating(options, models, print)
    (tmp_path / "tokens").write_text("secret\n")
    said: list[str] = []
    for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0"):
        Operating(Options(host, token_file=tmp_path / "tokens"), models, said.append)
    assert said == ["tokens cross the network to 0.0.0.0 in clear text: give --tls_certificate and --tls_key"]


def test_the_job_has_flags_for_it(publish: Any, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    flags = (
        "--wait",
        "--model_name=ranker",
        "--poll_seconds=0.1",
        "--metrics_port=0",
        "--rest_api_port=0",
        f"--access_log={tmp_path}/log",
    )
    with job(f"--model_base_path={tmp_path}/models", *flags) as process:
        monitoring = re.fullmatch(r"metrics and health on (127\.0\.0\.1:\d+)", line_of(process))
        assert monitoring is not None

        def get(path: str, body: bytes | None = None, at: str = monitoring[1]) -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://{at}{path}", body, timeout=20) as response:
                    return response.status, response.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        assert get("/healthz")[0] == 200 and get("/readyz")[0] == 503, "before there is a model"
        assert line_of(process).startswith("waiting for a version of ranker")
        (tmp_path / "models/2").mkdir()
        end = time.monotonic() + 20
        while 'stem_serve_version_failures_total{model="ranker"} 1.0' not in get("/metrics")[1]:
            assert time.monotonic() < end
            time.sleep(0.05)
        publish(tmp_path / "models", 3)
        serving = re.fullmatch(r"serving ranker version 3 on \S+, REST on (127\.0\.0\.1:\d+)", line_of(process))
        assert serving is not None
        assert get("/readyz")[0] == 200
        body = json.dumps({"inputs": {"user": [1], "item": [2]}}).encode()
        assert json.loads(get("/v1/models/ranker:predict", body, serving[1])[1])["outputs"]["click"] == [3]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    assert json.loads((tmp_path / "log").read_text())["code"] == "OK"


def test_handshakes_that_fail_are_no_lines(publish: Any, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    with job(f"--model_base_path={tmp_path}", f"--tls_certificate={CERTIFICATE}", f"--tls_key={KEY}") as process:
        host, port = line_of(process).split()[-1].split(":")
        with socket.create_connection((host, int(port)), timeout=20) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while plain.recv(1000):
                pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        assert process.stderr is not None and process.stderr.read() == ""
