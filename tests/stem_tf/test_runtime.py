"""What readying TensorFlow for a run leaves alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines import manifest as manifests
from stem_tf import configs, models, runtime


def test_a_deterministic_run_leaves_the_random_numbers_of_the_process_alone(
    tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    # For good in a process: not in this one.
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: called.append("determinism"))
    monkeypatch.setattr(tf.config.threading, "set_inter_op_parallelism_threads", called.append)
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    runtime.set_up(configs.checked(tiny_settings | {"train.deterministic": True}))
    assert called == ["determinism", 1]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]


def test_building_a_model_leaves_random_numbers_alone(tiny_settings: dict[str, Any], tiny_data: Path) -> None:
    config, manifest = configs.checked(tiny_settings), manifests.load(str(tiny_data))
    before = random.getstate()
    first, second = (models.build(config, manifest, training=False) for _ in range(2))
    assert random.getstate() == before
    for one, other in zip(first.weights, second.weights, strict=True):
        np.testing.assert_array_equal(one, other)
