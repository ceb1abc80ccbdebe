"""Requests that ask for too much, say nothing, or never end: refused in words, and nobody else is held up."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import predict_pb2

from export.server import service, tensors
from export.server.service import Server
from export.server.status import StatusError

PREDICT = "/tensorflow.serving.PredictionService/Predict"


def refusal(running: Any, request: Any, timeout: float = 20) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        running.prediction.Predict(request, timeout=timeout)
    return caught.value.code(), caught.value.details()


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def impatient(start_server: Any, publish: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server that waits half a second for a body, and takes messages of 1 MiB."""
    base = tmp_path_factory.mktemp("impatient")
    publish(base, 1)
    running = start_server(base, read_seconds=0.5, max_message_bytes=1 << 20)
    running.versions.poll()
    return running


def test_one_value_of_a_large_shape_is_refused_before_it_is_filled_up(served: Any, request_for: Any) -> None:
    request = request_for("types", text=["a"], number=np.ones(1, np.float32), flag=[True])
    for name in request.inputs:
        request.inputs[name].tensor_shape.dim[0].size = 1 << 20
    before = resident()
    code, text = refusal(served, request)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "has shape [1048576]: the request has 1048576 rows, and this server takes 100000 (--max_rows)" in text
    for sizes in ([1, 1 << 23], [1, 1 << 12, 1 << 12], [1 << 16, 1 << 16, 1 << 16, 1 << 16]):
        for name in request.inputs:
            del request.inputs[name].tensor_shape.dim[:]
            for size in sizes:
                request.inputs[name].tensor_shape.dim.add(size=size)
        code, text = refusal(served, request)
        assert code == grpc.StatusCode.INVALID_ARGUMENT and "send several requests" in text
    assert resident() - before < 64 << 20


@pytest.mark.parametrize("sizes", [[0, 1 << 62], [0, 1 << 40, 1 << 40], [1 << 62, 0]])
def test_no_elements_in_a_large_shape(served: Any, request_for: Any, sizes: list[int]) -> None:
    request = request_for(user=[1], item=[1])
    del request.inputs["user"].tensor_shape.dim[:]
    for size in sizes:
        request.inputs["user"].tensor_shape.dim.add(size=size)
    code, _ = refusal(served, request)
    assert code == grpc.StatusCode.INVALID_ARGUMENT


def test_strings_that_end_in_nul_keep_it_where_they_fill_up() -> None:
    request = predict_pb2.PredictRequest()
    text = request.inputs["text"]
    text.dtype, text.string_val[:] = types_pb2.DT_STRING, [b"a", b"b\x00\x00"]
    text.tensor_shape.dim.add(size=4)
    assert tensors.decode(text).tolist() == [b"a", b"b\x00\x00", b"b\x00\x00", b"b\x00\x00"]


def test_garbage_in_examples_is_quoted_readably(served: Any, request_for: Any) -> None:
    for garbage in (b"\xff\xfe\x80garbage", b"garbage"):
        code, text = refusal(served, request_for("examples", examples=np.array([garbage], object)))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert "Could not parse example input" in text and "garbage" in text


def test_texts_are_cut_in_bytes(served: Any, request_for: Any) -> None:
    request = request_for(user=[1], item=[1], outputs=("🦊" * 3000,))
    code, text = refusal(served, request)
    assert code == grpc.StatusCode.INVALID_ARGUMENT and text.endswith("🦊...TRUNCATED")
    assert len(text.encode()) <= 1024 + len("...TRUNCATED")
    assert StatusError(grpc.StatusCode.INTERNAL, "half of a pair: \ud83e").text == "half of a pair: \\ud83e"


def test_a_million_input_names_are_refused_unparsed(served: Any, request_for: Any) -> None:
    entry = b"\x12\x04\x0a\x02%02d"
    payload = request_for(user=[1], item=[1]).SerializeToString() + b"".join(entry % (n % 100) for n in range(10**6))
    start = time.process_time()
    with pytest.raises(grpc.RpcError) as caught:
        served.channel.unary_unary(PREDICT)(payload, timeout=20)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "the request has more than 10000 inputs and outputs"
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "payload", [b"\x12", b"\xff" * 50_000, b"\x12\xff\xff\xff\xff\x0f" * 9000, b"\x08\x01" * 20_000]
)
def test_bytes_that_are_no_request(served: Any, payload: bytes) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        served.channel.unary_unary(PREDICT)(payload, timeout=20)
    assert caught.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT)
    assert "internal error" not in caught.value.details()


def silent(go_on: threading.Event) -> Iterator[bytes]:
    """A client that opens a call and sends no body."""
    go_on.wait(20)
    yield from ()


def test_calls_without_a_body_hold_up_nobody_and_end(impatient: Any, request_for: Any) -> None:
    go_on = threading.Event()
    open_call = impatient.channel.stream_unary(PREDICT)
    calls = [open_call.future(silent(go_on), timeout=20) for _ in range(100)]
    try:
        for _ in range(3):
            assert impatient.predict(request_for(user=[1], item=[2]))["click"].tolist() == [3]
            assert impatient.health_of("") == "SERVING" and impatient.states() == [(1, "AVAILABLE")]
        codes = {call.exception().code() for call in calls}
        assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED}
        assert calls[0].exception().details() == "no request came within 0.5 s"
    finally:
        go_on.set()
    with pytest.raises(grpc.RpcError) as caught:
        open_call(iter(()), timeout=20)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_open_reflection_streams_hold_up_nobody(impatient: Any) -> None:
    go_on = threading.Event()
    stub = reflection_pb2_grpc.ServerReflectionStub(impatient.channel)
    streams = [stub.ServerReflectionInfo(silent(go_on), timeout=20) for _ in range(20)]
    assert impatient.health_of("") == "SERVING"
    answer = next(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")])))
    assert answer.HasField("list_services_response")
    go_on.set()
    for stream in streams:
        assert list(stream) == []


def test_messages_over_the_limit_also_when_they_are_compressed(impatient: Any) -> None:
    call = impatient.channel.unary_unary(PREDICT)
    for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
        with pytest.raises(grpc.RpcError) as caught:
            call(bytes(8 << 20), compression=compression, timeout=20)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in caught.value.details()


def test_resets_from_one_connection_leave_the_others_alone(
    served: Any, request_for: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    request = request_for("rank", user=[1], item=[[1] * 200])
    wrong: list[Any] = []
    ended = threading.Event()

    def ask() -> None:
        with grpc.insecure_channel(f"127.0.0.1:{served.port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = channel.unary_unary(PREDICT)
            while not ended.is_set():
                try:
                    call(request.SerializeToString(), timeout=20)
                except grpc.RpcError as error:
                    wrong.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(1000):
        served.prediction.Predict.future(request, timeout=20).cancel()
    # Deadlines that pass before, while and after a call runs.
    for wait in range(100):
        with contextlib.suppress(grpc.RpcError):
            served.prediction.Predict(request, timeout=1e-5 * wait)
    ended.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert served.predict(request)["click"].shape == (1, 200)
    assert "Traceback" not in capfd.readouterr().err
    assert "ExecuteBatchError" not in caplog.text


def test_health_is_answered_while_a_large_request_is_read(served: Any, request_for: Any) -> None:
    request = request_for(user=[1], item=[1])
    request.inputs["item"].int64_val[:] = [7] * 3_000_000
    large = [served.prediction.Predict.future(request, timeout=20) for _ in range(4)]
    while not all(call.done() for call in large):
        assert served.health_of("") == "SERVING"
    assert all(call.result().outputs["click"].float_val == [17] for call in large)


def test_of_two_servers_that_open_a_port_at_once_one_has_it(served: Any) -> None:
    servers = [Server(served.models, threads=1) for _ in range(2)]
    try:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with futures.ThreadPoolExecutor() as pool:
            opened = [pool.submit(server.listen, "127.0.0.1", port) for server in servers]
        assert {type(call.exception()) for call in opened} == {type(None), OSError}
    finally:
        for server in servers:
            server.close()


def test_memory_of_large_calls_comes_back(served: Any, request_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_LARGE_SECONDS", 0.2)
    freed = threading.Event()
    monkeypatch.setattr(service, "free_memory", freed.set)
    request = request_for(user=[1], item=[1])
    for name in request.inputs:
        request.inputs[name].tensor_shape.dim[0].size = 50_000
    assert served.predict(request)["click"].shape == (50_000,)
    assert freed.wait(20)
