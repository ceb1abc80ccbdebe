"""What a run shows in TensorBoard."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorflow as tf
from tensorboard.plugins.hparams import plugin_data_pb2

from pipelines.manifest import LabelScale
from stem_tf import configs
from stem_tf.training import logger
from stem_tf.workdir import Workdir


def scalars(directory: Path) -> dict[str, list[tuple[int, Any]]]:
    """By tag the (step, value) pairs in a TensorBoard run, in the order of writing."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for path in sorted(directory.glob("events*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars" or value.tag in found:
                    number = struct.unpack("<f", value.tensor.tensor_content)[0]
                    found.setdefault(value.tag, []).append((event.step, pytest.approx(number, rel=1e-6)))
    return found


@pytest.fixture
def model() -> Any:
    """Two tasks; the label of ``watched`` is standardised, with a standard deviation of 3."""
    scales = {"watched": LabelScale(mean=10.0, std=3.0)}
    return SimpleNamespace(network_optimizer=SimpleNamespace(schedule=lambda step: 0.5), scales=scales)


@pytest.fixture
def shown(tmp_path: Path, model: Any) -> Workdir:
    """The work directory of two epochs of 5 steps."""
    workdir = Workdir(tmp_path)
    log = logger.Logger(workdir, model, configs.checked({"experiment": "tiny", "model.expert_units": (8, 4)}), 5)
    for epoch, score in enumerate((0.7, 0.6)):
        log.train(epoch, 5 * epoch + 5, {"loss": 1.5, "loss/click": 0.5, "loss/watched": 1.0})
        log.validation(epoch, 5 * epoch + 5, {"score": score, "logloss/click": 0.4, "mse/watched": 18.0})
        log.best(5 * epoch + 5, 0.7)
    log.close()
    return workdir


def test_train_and_validation_losses_share_a_chart(shown: Workdir) -> None:
    assert scalars(shown.tensorboard / "train") == {
        "learning_rate": [(5, 0.5), (10, 0.5)],
        "loss": [(5, 1.5), (10, 1.5)],
        "loss/click": [(5, 0.5), (10, 0.5)],
        "loss/watched": [(5, 1.0), (10, 1.0)],
    }
    assert scalars(shown.tensorboard / "validation") == {
        "score": [(5, 0.7), (10, 0.6)],
        "best_score": [(5, 0.7), (10, 0.7)],
        "loss/click": [(5, 0.4), (10, 0.4)],
        "mse/watched": [(5, 18.0), (10, 18.0)],
        "loss/watched": [(5, 2.0), (10, 2.0)],  # 18 / 3^2
    }


def test_the_config_is_shown_as_hparams(shown: Workdir) -> None:
    (path,) = shown.tensorboard.glob("events*")
    values = [v for event in tf.compat.v1.train.summary_iterator(str(path)) for v in event.summary.value]
    (data,) = [v.metadata.plugin_data for v in values if v.metadata.plugin_data.plugin_name == "hparams"]
    hparams = plugin_data_pb2.HParamsPluginData.FromString(data.content).session_start_info.hparams
    assert hparams["experiment"].string_value == "tiny"
    assert hparams["model.expert_units"].string_value == "[8, 4]"
    assert hparams["seed"].number_value == configs.checked({}).seed
    assert hparams["train.deterministic"].WhichOneof("kind") == "bool_value"


def test_an_evaluation_leaves_a_read_only_run_alone(
    shown: Workdir, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    logger.show_evaluation(shown, model, "test", 1, 0, {"click": {"auc": 0.75}})
    assert not (shown.tensorboard / "evaluation").exists()


def test_an_evaluation_is_a_point_at_the_step_of_its_weights(shown: Workdir, model: Any) -> None:
    results = {
        "click": {"rows": 8.0, "rate": 0.5, "auc": 0.75, "logloss": 0.4},
        "watched": {"rows": 8.0, "mse": 18.0, "grouped_auc": float("nan")},
    }
    logger.show_evaluation(shown, model, "test", {"click": 1, "watched": 2}, 0, results)
    assert scalars(shown.tensorboard / "evaluation" / "test") == {
        "auc/click": [(5, 0.75)],
        "loss/click": [(5, 0.4)],
        "mse/watched": [(10, 18.0)],
        "loss/watched": [(10, 2.0)],
    }
    logger.show_evaluation(shown, model, "train", 1, 3, results)  # three steps into the second epoch
    assert scalars(shown.tensorboard / "evaluation" / "train")["mse/watched"] == [(8, 18.0)]
