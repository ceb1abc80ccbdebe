import dataclasses
from pathlib import Path

import pytest

from pipelines import manifest as manifests
from pipelines.errors import UserError
from pipelines.manifest import Manifest, TaskCounts
from stem_tf.monitor import monitor

RESULTS = {"click": {"auc": 0.75, "logloss": 0.5}, "watched": {"mse": 0.25}}


@pytest.fixture
def manifest(tiny_data: Path) -> Manifest:
    return manifests.load(str(tiny_data))


def with_validation(manifest: Manifest, **tasks: TaskCounts) -> Manifest:
    validation = manifest.splits["validation"]
    changed = dataclasses.replace(validation, tasks=validation.tasks | tasks)
    return dataclasses.replace(manifest, splits=manifest.splits | {"validation": changed})


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
    with pytest.raises(UserError, match="no task has rows"):
        monitor("loss", with_validation(empty, click=TaskCounts(0, None)))


def test_unknown_and_unfit_tasks(manifest: Manifest) -> None:
    with pytest.raises(UserError, match=r"no task 'clik'; did you mean 'click'\? Tasks: click, watched"):
        monitor("auc:clik", manifest)
    with pytest.raises(UserError, match="auc:watched: the task has no rows of both classes"):
        monitor("auc:watched", manifest)
