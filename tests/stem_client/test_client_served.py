"""The client against stem-serve, a process of its own, which runs a SavedModel of every kind of feature."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf

from stem_client import AsyncRankingClient, FeatureError, RankingClient, RankingError

ROOT = Path(__file__).resolve().parents[2]
Given = dict[str, Any]


class Arithmetic(tf.Module):
    """click = (user_id + video_id) % 97 / 97; like = seconds + topics that are not empty + bytes of title."""

    def __init__(self, feature_types: Given, bonus: float) -> None:
        super().__init__()
        self.feature_types, self.bonus = feature_types, tf.Variable(bonus)

    def signature(self, name: str) -> Any:
        lead = [None, None] if name == "rank" else [None]
        specs = {}
        for feature, (dtype, shape, per_item) in self.feature_types.items():
            sizes = (lead if per_item else [None]) + [None if size < 0 else size for size in shape]
            specs[feature] = tf.TensorSpec(sizes, dtype, name=feature)

        def scores(**features: tf.Tensor) -> dict[str, tf.Tensor]:
            user_id = features["user_id"][:, None] if name == "rank" else features["user_id"]
            topics = tf.reduce_sum(tf.cast(features["topics"] != tf.int64.min, tf.float32), axis=-1)
            length = tf.cast(tf.strings.length(features["title"]), tf.float32)
            return {
                "click": tf.cast((user_id + features["video_id"]) % 97, tf.float32) / 97,
                "like": features["seconds"] + topics + length + self.bonus,
            }

        return tf.function(scores, input_signature=None).get_concrete_function(**specs)

    def publish(self, base: Path, version: int) -> None:
        names = ("rank", "serving_default")
        hidden = base / f".{version}"
        tf.saved_model.save(self, str(hidden), signatures={name: self.signature(name) for name in names})
        hidden.rename(base / str(version))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, feature_types: Given) -> Path:
    base = tmp_path_factory.mktemp("published")
    Arithmetic(feature_types, 0.0).publish(base, 1)
    return base


@pytest.fixture(scope="module")
def served(base: Path) -> Iterator[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "export.jobs.serve", f"--model_base_path={base}", "--port=0", "--poll_seconds=0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving ranker version 1 on "), line
    yield line.split()[-1]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


@pytest.fixture
def real(served: str) -> Iterator[RankingClient]:
    with RankingClient(served, timeout=30) as client:
        yield client


def expected(user: Given, items: Given, bonus: float = 0) -> dict[str, np.ndarray]:
    topics = [len(topics) for topics in items["topics"]]
    title = [len(title.encode()) for title in items["title"]]
    return {
        "click": np.array([(user["user_id"] + video) % 97 for video in items["video_id"]], np.float32) / np.float32(97),
        "like": np.array(items["seconds"], np.float32) + np.array(topics) + np.array(title) + bonus,
    }


def test_metadata(real: RankingClient) -> None:
    model = real.metadata()
    assert (model.model, model.version) == ("ranker", 1)
    kinds = {feature.name: (feature.dtype, feature.kind, feature.per_item) for feature in model.rank_features()}
    assert kinds == {
        "user_id": ("int64", "value", False),
        "interests": ("string", "list", False),
        "taste": ("float32", "vector", False),
        "hour": ("int64", "value", False),
        "video_id": ("int64", "value", True),
        "title": ("string", "value", True),
        "topics": ("int64", "list", True),
        "seconds": ("float32", "value", True),
        "image": ("float32", "vector", True),
    }


def test_rank_and_score_agree(real: RankingClient, user: Given, items: Given) -> None:
    ranked = real.rank(user, items)
    rows = [user | dict(zip(items, row, strict=True)) for row in zip(*items.values(), strict=True)]
    scored = real.score(rows)
    for task, scores in expected(user, items).items():
        np.testing.assert_array_equal(ranked[task], scores)
        np.testing.assert_array_equal(scored[task], scores)


def test_a_thousand_items(real: RankingClient, user: Given) -> None:
    count = 1000
    items = {
        "video_id": np.arange(count),
        "title": [f"video {number}" for number in range(count)],
        "topics": [list(range(number % 4)) for number in range(count)],
        "seconds": np.linspace(0, 60, count),
        "image": np.zeros((count, 2)),
    }
    np.testing.assert_allclose(real.rank(user, items)["like"], expected(user, items)["like"], rtol=1e-6)


def test_chunks_the_best_and_asyncio(real: RankingClient, served: str, user: Given, items: Given) -> None:
    count = 25
    many = {name: [values[place % 3] for place in range(count)] for name, values in items.items()}
    wanted = expected(user, many)
    with RankingClient([served, served], timeout=30, chunk_rows=10, hedge_after=5) as client:
        np.testing.assert_array_equal(client.rank(user, many)["like"], wanted["like"])
        top = client.top(user, many, {"like": 1.0}, k=4)
    assert top.indices.tolist() == np.argsort(-wanted["like"], kind="stable")[:4].tolist()

    async def ask() -> None:
        async with AsyncRankingClient(served, timeout=30) as client:
            for scores in await asyncio.gather(*(client.rank(user, items) for _ in range(20))):
                np.testing.assert_array_equal(scores["like"], expected(user, items)["like"])

    asyncio.run(ask())


def test_the_servers_refusals(real: RankingClient, served: str, user: Given, items: Given) -> None:
    with pytest.raises(RankingError) as caught:
        real.rank(user, items, version=99)
    assert caught.value.code == grpc.StatusCode.NOT_FOUND
    assert caught.value.details == "Servable not found for request: Specific(ranker, 99)"
    with RankingClient(served, model="nope", timeout=30) as other, pytest.raises(RankingError, match="NOT_FOUND"):
        other.rank(user, items)
    with pytest.raises(FeatureError, match="items: 'title' is missing"):
        real.rank(user, {name: values for name, values in items.items() if name != "title"})


def test_a_new_version_is_used_without_a_failure(
    real: RankingClient, base: Path, feature_types: Given, user: Given, items: Given
) -> None:
    Arithmetic(feature_types, 100.0).publish(base, 2)
    end = time.monotonic() + 60
    while real.rank(user, items)["like"][0] < 100:
        assert time.monotonic() < end
        time.sleep(0.05)
    np.testing.assert_array_equal(real.rank(user, items)["like"], expected(user, items, bonus=100)["like"])
    assert real.metadata().version == 2
