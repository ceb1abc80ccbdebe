"""Generated requests against stem-serve as a process: whatever comes, it answers, and scores as before.

`STEM_FUZZ_EXAMPLES=6000 pytest tests/export/server/test_serve_fuzz.py -s` sends more of them, and says what came back.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import http.client
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tensorflow.core.framework import tensor_pb2, types_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_management_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from export import warmup

EXAMPLES = int(os.environ.get("STEM_FUZZ_EXAMPLES", "400"))
BATCH = 100  # examples between two looks at the server
TIMEOUT = 20.0
PREDICTION, MODEL = "/tensorflow.serving.PredictionService/", "/tensorflow.serving.ModelService/"
IDLE, SILENT_CALLS = 1000, 100
INNER = (2, 3)  # sizes of axes that are not rows or candidates: the lengths of lists and vectors
ROOT = Path(__file__).resolve().parents[3]
# A client's half of HTTP/2: the preface, an empty SETTINGS frame.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


class Target(NamedTuple):
    """A running server, and requests with the answers that it gave first."""

    process: subprocess.Popen[str]
    stderr: Path
    port: int
    rest_port: int
    metrics_port: int
    channel: grpc.Channel
    good: list[predict_pb2.PredictRequest]
    answers: list[predict_pb2.PredictResponse]

    def call(self, method: str, payload: bytes) -> tuple[str, str]:
        """The status of a call, and its text."""
        try:
            self.channel.unary_unary(method)(payload, timeout=TIMEOUT)
        except grpc.RpcError as error:
            return error.code().name, error.details()
        return "OK", ""

    def resident(self) -> int:
        """Bytes of memory that it holds."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def warm_up(self) -> None:
        """Requests of many sizes, for each of which TensorFlow keeps something, up to a limit."""
        for request in self.good:
            for rows, candidates in [(n, 2 * n) for n in range(1, 60, 4)] + [(1, 2000), (300, 300)]:
                self.call(PREDICTION + "Predict", resized(request, rows, candidates).SerializeToString())

    def check(self) -> None:
        """It lives, says so, and scores as it did; it has printed nothing."""
        assert self.process.poll() is None
        health = health_pb2_grpc.HealthStub(self.channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        stub = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        for request, answer in zip(self.good, self.answers, strict=True):
            again = stub.Predict(request, timeout=TIMEOUT)
            for task, scores in answer.outputs.items():
                np.testing.assert_allclose(again.outputs[task].float_val, scores.float_val, atol=1e-6)
        assert self.stderr.read_text() == ""


@pytest.fixture(scope="module")
def target(nasty_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    stderr = tmp_path_factory.mktemp("fuzzed") / "stderr"
    flags = ["--port=0", "--rest_api_port=0", "--metrics_port=0", f"--access_log={stderr.parent / 'access.log'}"]
    command = [sys.executable, "-m", "export.jobs.serve", f"--model_base_path={nasty_export}", *flags]
    with (
        stderr.open("w") as file,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            metrics, serving = process.stdout.readline(), process.stdout.readline()
            grpc_at, rest_at = serving.split(", REST on ")
            metrics_port, port, rest_port = (int(line.rsplit(":", 1)[1]) for line in (metrics, grpc_at, rest_at))
            (version,) = (path for path in nasty_export.iterdir() if path.name.isdigit())
            good = list(warmup.read(version / warmup.IN_A_VERSION))
            with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
                stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
                answers = [stub.Predict(request, timeout=TIMEOUT) for request in good]
                yield Target(process, stderr, port, rest_port, metrics_port, channel, good, answers)
        finally:
            process.terminate()
            try:
                assert process.wait(TIMEOUT) == 0
            finally:
                process.kill()
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def idle(target: Target) -> Iterator[None]:
    """Connections that say nothing, half of something or nonsense; channels; calls without a body."""
    first_words = [b"", b"", b"", PREFACE[:11], PREFACE, PREFACE + SETTINGS, PREFACE + bytes(range(256)), b"GET / HTTP"]
    ports = [target.port] * 16 + [target.rest_port, target.metrics_port]
    go_on = threading.Event()

    def silent() -> Iterator[bytes]:
        go_on.wait(600)
        yield from ()

    with contextlib.ExitStack() as stack:
        for number in range(IDLE):
            connection = socket.create_connection(("127.0.0.1", ports[number % len(ports)]), timeout=TIMEOUT)
            stack.enter_context(connection)
            with contextlib.suppress(OSError):
                connection.sendall(first_words[number % len(first_words)])
        for _ in range(20):
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{target.port}", options))
            grpc.channel_ready_future(channel).result(TIMEOUT)
        calls = [channel.stream_unary(PREDICTION + "Predict").future(silent(), timeout=60) for _ in range(SILENT_CALLS)]
        try:
            yield
            statuses = {(call.exception().code(), call.exception().details()) for call in calls}
            assert statuses == {(grpc.StatusCode.DEADLINE_EXCEEDED, "no request came within 10 s")}
        finally:
            go_on.set()


# What requests are made of.
ODD_NUMBERS = [-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 2**20, 2**31 - 1, 2**40, 2**62, 2**63 - 1]
ODD_BYTES = st.one_of(st.binary(max_size=40), st.sampled_from([b"", b"\0", b"\xff\xfe", "🦊".encode(), b"|" * 300]))
sizes = st.one_of(st.integers(0, 5), st.sampled_from([*ODD_NUMBERS, 50, 100_000, 100_001]))
int32s = st.one_of(st.integers(-3, 3), st.integers(-(2**31), 2**31 - 1))
int64s = st.one_of(st.integers(-3, 3), st.sampled_from(ODD_NUMBERS), st.integers(-(2**63), 2**63 - 1))
names = st.one_of(st.sampled_from(["", "nasty", "user", "click", "examples", "\0", "ü" * 600]), st.text(max_size=8))
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "float_val": st.floats(width=32),
    "double_val": st.floats(),
    "int_val": int32s,
    "string_val": ODD_BYTES,
    "int64_val": int64s,
    "bool_val": st.booleans(),
    "uint32_val": st.integers(0, 2**32 - 1),
    "uint64_val": st.integers(0, 2**64 - 1),
    "half_val": int32s,
    "scomplex_val": st.floats(width=32),
}


@st.composite
def tensors(draw: st.DrawFn, start: tensor_pb2.TensorProto | None = None) -> tensor_pb2.TensorProto:
    """A TensorProto, or ``start`` with some of it changed."""
    tensor = copy.deepcopy(start) if start is not None else tensor_pb2.TensorProto()
    parts = {"dtype", "shape", "values", "content"}
    for part in parts if start is None else draw(st.sets(st.sampled_from(sorted(parts)), min_size=1, max_size=2)):
        if part == "dtype":
            tensor.dtype = draw(st.one_of(st.sampled_from(types_pb2.DataType.values()), int32s))
        elif part == "shape":
            del tensor.tensor_shape.dim[:]
            for size in draw(st.one_of(st.lists(sizes, max_size=4), st.lists(sizes, min_size=30, max_size=40))):
                tensor.tensor_shape.dim.add(size=size, name=draw(st.sampled_from(["", "batch"])))
            tensor.tensor_shape.unknown_rank = draw(st.integers(0, 9)) == 9
        elif part == "values":
            field = draw(st.sampled_from(sorted(FIELDS)))
            tensor.ClearField(field)
            getattr(tensor, field).extend(draw(st.lists(FIELDS[field], max_size=12)))
        elif draw(st.booleans()):
            tensor.tensor_content = draw(st.binary(max_size=64))
    return tensor


def resized(good: predict_pb2.PredictRequest, rows: int, candidates: int) -> predict_pb2.PredictRequest:
    """A valid request of as many rows and candidates; values are zeros or those that were there."""
    request = copy.deepcopy(good)
    for tensor in request.inputs.values():
        tensor.tensor_content = b""
        for size, dim in zip((rows, candidates), tensor.tensor_shape.dim, strict=False):
            if dim.size not in INNER:
                dim.size = size
    return request


@st.composite
def stretched(draw: st.DrawFn, good: predict_pb2.PredictRequest) -> predict_pb2.PredictRequest:
    """A valid request of other sizes and values."""
    size = st.integers(0, draw(st.sampled_from([3, 20, 400])))
    request = resized(good, draw(size), draw(size))
    if request.model_spec.signature_name != "examples":
        for alias in sorted(request.inputs):
            tensor = request.inputs[alias]
            field = {types_pb2.DT_FLOAT: "float_val", types_pb2.DT_INT64: "int64_val"}.get(tensor.dtype, "string_val")
            tensor.ClearField(field)
            getattr(tensor, field).extend(draw(st.lists(FIELDS[field], max_size=8)))
    return request


@st.composite
def mutated(draw: st.DrawFn, good: predict_pb2.PredictRequest) -> predict_pb2.PredictRequest:
    """A valid request with something wrong."""
    request = copy.deepcopy(good)
    for what in draw(st.lists(st.sampled_from(["tensor", "new", "drop", "add", "filter", "spec"]), max_size=3)):
        alias = draw(st.sampled_from(sorted(request.inputs))) if request.inputs else ""
        if what == "tensor" and alias:
            request.inputs[alias].CopyFrom(draw(tensors(request.inputs[alias])))
        elif what == "new" and alias:
            request.inputs[alias].CopyFrom(draw(tensors()))
        elif what == "drop" and alias:
            del request.inputs[alias]
        elif what == "add":
            request.inputs[draw(names)].CopyFrom(draw(tensors()))
        elif what == "filter":
            request.output_filter.extend(draw(st.lists(names, max_size=3)))
        else:
            spec(draw, request.model_spec)
    return request


def spec(draw: st.DrawFn, model_spec: Any) -> None:
    """Changes a ModelSpec."""
    model_spec.name = draw(st.one_of(st.just("nasty"), names))
    if draw(st.booleans()):
        model_spec.version.value = draw(int64s)
    elif draw(st.booleans()):
        model_spec.version_label = draw(names)
    model_spec.signature_name = draw(st.one_of(st.sampled_from(["", "rank", "serving_default", "examples"]), names))


@st.composite
def other_methods(draw: st.DrawFn) -> tuple[str, bytes]:
    """What is no Predict."""
    method = draw(
        st.sampled_from(["GetModelMetadata", "GetModelStatus", "HandleReloadConfigRequest", "Classify", "No"])
    )
    if method == "GetModelMetadata":
        metadata = get_model_metadata_pb2.GetModelMetadataRequest()
        metadata.metadata_field.extend(draw(st.lists(st.one_of(st.just("signature_def"), names), max_size=2)))
        spec(draw, metadata.model_spec)
        return PREDICTION + method, metadata.SerializeToString()
    if method == "GetModelStatus":
        status = get_model_status_pb2.GetModelStatusRequest()
        spec(draw, status.model_spec)
        return MODEL + method, status.SerializeToString()
    if method == "HandleReloadConfigRequest":
        reload = model_management_pb2.ReloadConfigRequest()
        for _ in range(draw(st.integers(0, 2))):
            config = reload.config.model_config_list.config.add(base_path=draw(names), name=draw(names))
            config.version_labels[draw(names)] = draw(int64s)
            config.model_version_policy.specific.versions.extend(draw(st.lists(int64s, max_size=3)))
        return MODEL + method, reload.SerializeToString()
    return PREDICTION + method, draw(st.binary(max_size=60))


@st.composite
def cut(draw: st.DrawFn, payload: bytes) -> bytes:
    """Bytes with some of them changed, left out or put in."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(payload)))
        end = min(len(payload), start + draw(st.integers(0, 6)))
        payload = payload[:start] + draw(st.binary(max_size=6)) + payload[end:]
    return payload if draw(st.booleans()) else payload[: draw(st.integers(0, len(payload)))]


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), int64s, st.integers(-(2**80), 2**80), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=3)),
    max_leaves=8,
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """What is posted over REST."""
    inputs: Any = {"examples": [{"b64": draw(st.sampled_from(["", "AAAA", "CgA=", "?"]))}]}
    content = draw(st.one_of(st.just(inputs), json_values))
    tree = {draw(st.sampled_from(["inputs", "instances", "input"])): content}
    tree["signature_name"] = draw(st.one_of(st.sampled_from(["examples", "rank", "serving_default"]), json_values))
    text = json.dumps(tree).encode()
    return draw(st.one_of(st.just(text), cut(text), st.just(b"[" * draw(st.integers(1, 100_000)))))


def test_joined_and_cut_calls_score_as_alone(
    start_server: Any, nasty_export: Path, target: Target, request_for: Any
) -> None:
    """Calls of random sizes, many at a time, by a server that cuts and joins them after every few rows."""
    flat = {alias: tf.make_ndarray(tensor) for alias, tensor in target.good[2].inputs.items()}
    rank = {alias: tf.make_ndarray(tensor) for alias, tensor in target.good[5].inputs.items()}
    assert [target.good[n].model_spec.signature_name for n in (2, 5)] == ["serving_default", "rank"]
    items = {alias for alias, values in rank.items() if len(values) == 1 and values.shape[1:2] == (200,)}
    running = start_server(nasty_export, max_batch_rows=24, max_wait_seconds=60)
    running.versions.poll()

    def call(users: np.ndarray, candidates: np.ndarray) -> Any:
        signature = "rank" if candidates.ndim == 2 else "serving_default"
        inputs = {alias: values[candidates if alias in items else users] for alias, values in flat.items()}
        return running.prediction.Predict.future(request_for(signature, **inputs), timeout=60)

    users, size = 8, 200
    by_user = [call(np.array([user]), np.arange(size)[None]) for user in range(users)]
    alone = [tf.make_ndarray(answered.result().outputs["click"])[0] for answered in by_user]
    truth, random = np.array(alone), np.random.default_rng(0)
    calls: list[tuple[Any, np.ndarray]] = []
    for number in range(150):
        if number >= 64:  # fewer at a time than a connection may have streams, beyond which a call can be refused
            calls[number - 64][0].result()
        rows = int(random.integers(1, [2, 8, 70][number % 3]))
        user = random.integers(users, size=rows)
        shape = rows if number % 4 == 0 else (rows, int(random.integers(1, [100, 30, 4][number % 3])))
        candidates = random.integers(size, size=shape)
        of_user = user if candidates.ndim == 1 else user[:, None]
        calls.append((call(user, candidates), truth[of_user, candidates]))
    for answered, expected in calls:
        np.testing.assert_allclose(tf.make_ndarray(answered.result().outputs["click"]), expected, atol=1e-6)
    assert running.server.answers.held == 0


def test_generated_requests(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    small = [request for request in target.good if len(request.SerializeToString()) < 20_000]
    good = st.sampled_from(small)
    predict = [
        good.flatmap(stretched).map(lambda request: request.SerializeToString()),
        good.flatmap(mutated).map(lambda request: request.SerializeToString()),
        good.flatmap(lambda request: cut(request.SerializeToString())),
    ]
    payloads = st.one_of(
        *(st.tuples(st.just(PREDICTION + "Predict"), payload) for payload in predict),
        other_methods(),
        st.tuples(st.sampled_from(["/v1/models/nasty:predict", "/v1/models/nasty/versions/1:predict"]), bodies()),
    )
    seen: collections.Counter[str] = collections.Counter()
    web = http.client.HTTPConnection("127.0.0.1", target.rest_port, timeout=TIMEOUT)

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # the requests are short enough to be read as they are
        suppress_health_check=list(HealthCheck),
    )
    @given(payloads)
    def send(call: tuple[str, bytes]) -> None:
        path, payload = call
        if path.startswith("/v1/"):
            web.request("POST", path, payload)
            with web.getresponse() as answer:
                code, text = str(answer.status), answer.read().decode()
        else:
            code, text = target.call(path, payload)
        seen[code] += 1
        assert "internal error" not in text.lower()
        assert code != "INTERNAL" or text.startswith("the request is not a tensorflow.serving.")
        assert code not in ("500", "504", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN")
        if seen.total() % BATCH == 0:
            target.check()

    target.warm_up()
    target.check()
    before, descriptors, begun = target.resident(), target.descriptors(), time.monotonic()
    with idle(target):
        send()
        target.check()
    end = time.monotonic() + TIMEOUT
    while target.descriptors() > descriptors + 10 and time.monotonic() < end:
        time.sleep(0.1)
    assert target.descriptors() <= descriptors + 10
    target.check()
    after = target.resident()
    with capsys.disabled():
        if "STEM_FUZZ_EXAMPLES" in os.environ:
            print(f"\n{dict(seen)} in {time.monotonic() - begun:.0f} s, RSS {before >> 20} -> {after >> 20} MiB")
    assert seen["OK"] > EXAMPLES / 20 and seen["INVALID_ARGUMENT"] > EXAMPLES / 20
    assert after < 1.2 * before
