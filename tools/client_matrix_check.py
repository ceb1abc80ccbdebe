"""Ranks once with the installed stem-tf-client. client_matrix.sh runs it in environments that hold nothing else.

The server in this process needs grpcio only: the bytes of TensorFlow Serving's messages are written out here.
"""

import asyncio
import importlib.metadata
import platform
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent import futures

import grpc
import numpy as np

from stem_client import AsyncRankingClient, FeatureError, RankingClient


def field(number: int, payload: bytes | int) -> bytes:
    """One field of a message: an integer below 128, or bytes."""
    if isinstance(payload, int):
        return bytes([number << 3, payload])
    length = len(payload)
    return bytes([number << 3 | 2, *([length] if length < 128 else [length & 127 | 128, length >> 7])]) + payload


def tensor_info(dtype: int, rank: int) -> bytes:
    minus_one = b"\x08" + b"\xff" * 9 + b"\x01"
    return field(2, dtype) + field(3, b"".join(field(2, minus_one) for _ in range(rank)))


def entry(key: str, value: bytes) -> bytes:
    return field(1, key.encode()) + field(2, value)


def signature(name: str) -> bytes:
    rank = 2 if name == "rank" else 1
    inputs = [("user_id", tensor_info(9, 1)), ("title", tensor_info(7, rank)), ("seconds", tensor_info(1, rank))]
    inputs_and_outputs = [field(1, entry(*given)) for given in inputs] + [
        field(2, entry("click", tensor_info(1, rank)))
    ]
    return field(1, entry(name, b"".join(inputs_and_outputs)))


SPEC = field(1, b"ranker") + field(2, field(1, 7))
SIGNATURES = signature("rank") + signature("serving_default")
METADATA = field(1, SPEC) + field(2, entry("signature_def", field(2, SIGNATURES)))
SHAPE = field(2, field(2, field(1, 1)) + field(2, field(1, 3)))
SCORES = field(1, 1) + SHAPE + field(5, struct.pack("<3f", 0.5, 0.25, 0.125))
ANSWER = field(1, entry("click", SCORES)) + field(2, SPEC)
USER_ID = field(2, entry("user_id", field(1, 9) + field(2, field(2, field(1, 1))) + field(4, struct.pack("<q", 42))))


def handler(answer: Callable[[bytes], bytes]) -> grpc.RpcMethodHandler:
    return grpc.unary_unary_rpc_method_handler(lambda request, context: answer(request))


def main() -> None:
    requests = []

    def predict(request: bytes) -> bytes:
        requests.append(request)
        return ANSWER

    methods = {"Predict": handler(predict), "GetModelMetadata": handler(lambda request: METADATA)}
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("tensorflow.serving.PredictionService", methods),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    items = {"title": ["a", "é", None], "seconds": np.arange(3)}
    with RankingClient(f"127.0.0.1:{port}", timeout=20) as client:
        scores = client.rank({"user_id": 42}, items)
        assert scores["click"].tolist() == [0.5, 0.25, 0.125] and scores["click"].dtype == np.float32
        assert USER_ID in requests[0] and client.metadata().version == 7
        try:
            client.rank({"user_id": 42.5}, items)
            raise AssertionError("42.5 was taken for an int64")
        except FeatureError:
            pass
    target = f"127.0.0.1:{port}"
    with RankingClient([target, target], timeout=20, hedge_after=10, chunk_rows=3) as client:
        assert client.top({"user_id": 42}, items, "click", k=2).indices.tolist() == [0, 1]

    async def wait() -> None:
        async with AsyncRankingClient([target, target], timeout=20, hedge_after=10) as waiting:
            given = waiting.rank({"user_id": 42}, items), waiting.rank({"user_id": 42}, items)
            for answer in await asyncio.gather(*given):
                assert answer["click"].tolist() == [0.5, 0.25, 0.125]

    asyncio.run(wait())
    server.stop(None).wait()
    code = "import time; start = time.perf_counter(); import stem_client; print(time.perf_counter() - start)"
    seconds = min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5))
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("protobuf", "grpcio", "numpy")]
    print(f"python {platform.python_version()}, {', '.join(versions)}: ok, imported in {seconds:.2f} s", flush=True)


if __name__ == "__main__":
    main()
