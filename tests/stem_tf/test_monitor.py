import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipelines import manifest as manifests
from pipelines.manifest import Manifest, TaskCounts
from stem_tf import configs
from stem_tf.training import learning
from stem_tf.training.monitor import Monitor, of_tasks
from stem_tf.training.monitor import monitor as monitor_of
from stem_util.errors import UserError


def monitor(name: str, manifest: Manifest, **settings: Any) -> Monitor:
    return monitor_of(configs.checked({"train.monitor": name} | settings), manifest)


RESULTS = {"click": {"auc": 0.75, "logloss": 0.5}, "watched": {"mse": 0.25}}


@pytest.fixture
def manifest(tiny_data: Path) -> Manifest:
    return manifests.load(str(tiny_data))


def with_counts(manifest: Manifest, split: str, **tasks: TaskCounts) -> Manifest:
    changed = dataclasses.replace(manifest.splits[split], tasks=manifest.splits[split].tasks | tasks)
    return dataclasses.replace(manifest, splits=manifest.splits | {split: changed})


def with_validation(manifest: Manifest, **tasks: TaskCounts) -> Manifest:
    return with_counts(manifest, "validation", **tasks)


def test_scores_by_hand(manifest: Manifest) -> None:
    assert monitor("auc", manifest).value(RESULTS) == 0.75
    assert monitor("auc:click", manifest).value(RESULTS) == 0.75
    assert monitor("loss", manifest).value(RESULTS) == 0.5 + 0.5 * 0.25  # `watched` weighs half
    assert monitor("loss:watched", manifest).value(RESULTS) == 0.25


def test_an_auc_should_rise_and_a_loss_fall(manifest: Manifest) -> None:
    auc, loss = monitor("auc", manifest), monitor("loss", manifest)
    assert auc.better(0.7, None) and auc.better(0.8, 0.7) and not auc.better(0.7, 0.7) and not auc.better(0.6, 0.7)
    assert loss.better(0.7, None) and loss.better(0.6, 0.7) and not loss.better(0.7, 0.7)


def test_one_class_in_validation_leaves_the_loss(manifest: Manifest) -> None:
    one_class = with_validation(manifest, click=TaskCounts(150, 1.0))
    fallback = monitor("auc", one_class)
    assert fallback.kind == "loss"
    assert "without both classes in validation, so without an AUC: click" in fallback.warning
    assert "the loss decides" in fallback.warning
    with pytest.raises(UserError, match="auc:click: the task has no rows of both classes in the validation split"):
        monitor("auc:click", one_class)


def test_tasks_without_rows_do_not_count(manifest: Manifest) -> None:
    empty = with_validation(manifest, watched=TaskCounts(0, None))
    assert monitor("loss", empty).value(RESULTS) == 0.5
    with pytest.raises(UserError, match="no task that is trained has rows"):
        monitor("loss", with_validation(empty, click=TaskCounts(0, None)))


def test_unknown_and_unfit_tasks(manifest: Manifest) -> None:
    with pytest.raises(UserError, match=r"no task 'x'\. Tasks: click, watched"):
        monitor("auc:x", manifest)
    with pytest.raises(UserError, match=r"no task 'clik'; did you mean 'click'\? Tasks: click, watched"):
        monitor("auc:clik", manifest)
    with pytest.raises(UserError, match="auc:watched: the task has no rows of both classes"):
        monitor("auc:watched", manifest)


def test_the_loss_is_the_one_that_training_minimises(manifest: Manifest) -> None:
    weights = {"loss.weights": {"click": 3.0, "watched": 4.0}}
    assert monitor("loss", manifest, **weights).value(RESULTS) == 3.0 * 0.5 + 4.0 * 0.5 * 0.25


@pytest.mark.parametrize(
    ("rows", "settings", "why"),
    [
        (TaskCounts(0, None), {}, "it has no rows in train"),
        (TaskCounts(9, 1.0), {}, "its labels in train are all 1"),
        (TaskCounts(9, 0.5), {"loss.weights": {"click": 0.0}}, "its weight is 0"),
    ],
)
def test_a_task_that_is_not_trained_has_no_vote(
    manifest: Manifest, rows: TaskCounts, settings: dict[str, Any], why: str
) -> None:
    changed = with_counts(manifest, "train", click=rows)
    config = configs.checked(settings)
    assert learning.untrained(config, changed) == {"click": why}
    (warning,) = learning.warnings(config, changed, 10)
    assert warning.startswith(f"the task 'click' is not trained: {why}. It does not count for stopping ")
    assert monitor("loss", changed, **settings).value(RESULTS) == 0.5 * 0.25
    assert monitor("auc", changed, **settings).kind == "loss"  # of the regression: no other task has an AUC
    assert of_tasks(config, changed)["click"].weights == {"watched": 0.5}
    with pytest.raises(UserError, match=f"monitor=auc:click: the task is not trained: {why}"):
        monitor("auc:click", changed, **settings)


def test_a_task_of_weight_0_learns_through_those_that_follow_it_in_esmm(chain_data: Path) -> None:
    manifest = manifests.load(str(chain_data))
    settings: dict[str, Any] = {"loss.weights": {"cart": 0.0, "buy": 1.0, "click": 0.0}}
    config = configs.checked(settings | {"model.name": "esmm", "model.follows": {"cart": "click", "buy": "cart"}})
    assert learning.untrained(config, manifest) == {}
    assert set(learning.untrained(configs.checked(settings), manifest)) == {"cart", "click"}


def test_a_run_without_anything_to_learn_is_refused(manifest: Manifest) -> None:
    with pytest.raises(UserError, match=r"config.loss.weights=0.0 times the schema's weights is 0 for every task"):
        monitor("auc", manifest, **{"loss.weights": 0.0})
    nothing = with_counts(manifest, "train", click=TaskCounts(0, None), watched=TaskCounts(0, None))
    with pytest.raises(UserError, match=r"no task of .* can be learned \(click, it has no rows in train; watched, it"):
        monitor("auc", nothing)


def test_epochs_after_the_end_of_a_cosine_are_told(manifest: Manifest) -> None:
    settings = {"optimizer.schedule": "cosine", "optimizer.decay_steps": 30, "optimizer.warmup_steps": 10}

    def warned(epochs: int, **more: Any) -> list[str]:
        return learning.warnings(configs.checked(settings | {"train.epochs": epochs} | more), manifest, 20)

    assert warned(2) == []
    (warning,) = warned(3)
    assert warning.startswith("the learning rate is 0 from step 40 on ") and "epoch 2 of 3: training ends" in warning
    assert warned(3, **{"optimizer.final_fraction": 0.1}) == []
