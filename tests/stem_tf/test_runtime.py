"""What readying TensorFlow for a run leaves alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from stem_tf import configs, runtime


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
