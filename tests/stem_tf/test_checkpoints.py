"""Checkpoints are whole after a kill at any moment, under any path, and for whoever is reading them."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from stem_tf.training.checkpoints import Checkpoints, RunState, hold, is_behind, latest, restore_weights
from stem_util.errors import JobError


def filled(value: float) -> tf.Tensor:
    return tf.fill([50, 20], tf.constant(value, tf.float32))


class Model(tf.Module):
    """What checkpoints need of a model, without one."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.network = tf.Module()
        self.network.weight = tf.Variable(filled(value))
        self.first_bad_step = tf.Variable(-1)
        self.weight_parts = {"network": self.network}
        self.table_optimizers: list[Any] = []

    def catch_up(self) -> None:
        pass

    def end_training(self) -> None:
        pass

    @property
    def value(self) -> float:
        return float(self.network.weight[0, 0])


def checkpoints(directory: Path, value: float = 0.0, **more: Any) -> tuple[Checkpoints, Any, RunState]:
    model, state = Model(value), RunState(step=int(value))
    return Checkpoints(directory, model, state, **more), model, state


def save(directory: Path, *values: float) -> None:
    """A job that saves ``values``, one after another."""
    kept, model, state = checkpoints(directory)
    for value in values:
        model.network.weight.assign(filled(value))
        state.step = int(value)
        kept.save()


def restored(directory: Path) -> float | None:
    """What a new job would go on from."""
    kept, model, state = checkpoints(directory)
    if kept.restore() is None:
        return None
    assert state.step == model.value and np.all(model.network.weight == model.value)
    return float(model.value)


NAMES = ["lr[0.1]", "*", "a?", "back\\slash", "two\nlines", "日本 語 %20 #", "\udcff\udcfe", "x" * 255, "~"]


@pytest.mark.parametrize("name", NAMES)
def test_any_path(tmp_path: Path, name: str) -> None:
    other = tmp_path / "ab"  # what patterns among the names match
    save(other, 1, 2)
    before = sorted(os.listdir(other))
    save(tmp_path / name, 3, 4, 5)
    assert len(os.listdir(tmp_path / name)) == 4
    assert restored(tmp_path / name) == 5
    save(tmp_path / name, 6)
    path = latest(tmp_path / name)
    assert path == str(tmp_path / name / "ckpt-4")
    with hold(path) as held:
        model = Model()
        assert not is_behind(held) and restore_weights(model, held).step == 6
        assert model.value == 6
    assert sorted(os.listdir(other)) == before and restored(other) == 2


def test_nothing_counts_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        done.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(old: Any, new: Any) -> None:
        done.append(("rename", str(old)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    kept, _, _ = checkpoints(tmp_path, keep=1)
    kept.save()
    monkeypatch.undo()
    beside = f"{tmp_path}/.stem-tf-writing"
    data, index = f"{beside}/ckpt-2.data-00000-of-00001", f"{beside}/ckpt-2.index"
    assert sorted(done[:3]) == [("fsync", beside), ("fsync", data), ("fsync", index)] and done[2] == ("fsync", beside)
    assert done[3:] == [("rename", data), ("fsync", str(tmp_path)), ("rename", index), ("fsync", str(tmp_path))]
    assert sorted(os.listdir(tmp_path)) == ["ckpt-2.data-00000-of-00001", "ckpt-2.index"]


def killed_at(call: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], None]) -> bool:
    """Runs ``work`` in a process that dies at its n-th change of a directory; whether it came so far."""
    calls = 0

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > call:  # nothing is tidied up by the dead
                raise KeyboardInterrupt
            return function(*arguments, **named)

        return change

    with monkeypatch.context() as patched:
        for name in ("mkdir", "replace", "rename", "unlink", "rmdir", "fsync"):
            patched.setattr(os, name, dying(getattr(os, name)))
        try:
            work()
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.parametrize("first", [True, False])
def test_a_kill_at_any_moment_leaves_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    seen = set()
    for call in range(100):
        directory = tmp_path / str(call)
        if not first:
            save(directory, 1, 2)
        alive = not killed_at(call, monkeypatch, functools.partial(save, directory, 3))
        seen.add(found := restored(directory))
        save(directory, 4, 5)  # the next job goes on and tidies up
        assert restored(directory) == 5 and len(os.listdir(directory)) == 4
        if alive:
            break
    assert seen == {None if first else 2, 3} and found == 3 and call > 8


def damage_data(path: Path) -> None:
    os.truncate(f"{path}.data-00000-of-00001", 100)


def lose_data(path: Path) -> None:
    os.unlink(f"{path}.data-00000-of-00001")


def flip_data(path: Path) -> None:
    with open(f"{path}.data-00000-of-00001", "r+b") as file:
        file.seek(-200, os.SEEK_END)
        file.write(b"\xff" * 100)


def empty_index(path: Path) -> None:
    os.truncate(f"{path}.index", 0)


def cut_index(path: Path) -> None:
    os.truncate(f"{path}.index", os.path.getsize(f"{path}.index") // 2)


@pytest.mark.parametrize("damage", [damage_data, lose_data, flip_data, empty_index, cut_index])
def test_the_newest_whole_one_is_found(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save(tmp_path, 1, 2, 3)
    damage(tmp_path / "ckpt-3")
    kept, model, _ = checkpoints(tmp_path)
    assert kept.restore() == str(tmp_path / "ckpt-2") and model.value == 2
    assert kept.damaged == [str(tmp_path / "ckpt-3")]
    model.network.weight.assign(filled(4.0))
    kept.save()
    assert {path.stem for path in tmp_path.glob("*.index")} == {"ckpt-2", "ckpt-4"}

    for number in (2, 4):
        damage(tmp_path / f"ckpt-{number}")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(JobError, match="none of the checkpoints in .* is whole: .*ckpt-4: the checkpoint is damaged"):
        restored(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


def test_lost_indices_are_no_new_run(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for number in (1, 2):
        (tmp_path / f"ckpt-{number}.index").unlink()
    with pytest.raises(JobError, match="none of the checkpoints in .* is whole; train in another"):
        restored(tmp_path)


def test_those_of_the_version_before(tmp_path: Path) -> None:
    """Made by TensorFlow's manager, whose file of names is lost; what its killed writing left."""
    model = Model(7.0)
    from stem_tf.training.checkpoints import _Json

    old = tf.train.Checkpoint(model=model, state=_Json(RunState(step=7)))
    manager = tf.train.CheckpointManager(old, str(tmp_path), max_to_keep=2)
    for _ in range(3):
        manager.save()
    (tmp_path / "ckpt-4_temp").mkdir()
    for text in ("", "model_checkpoint_path: 3", "\xff"):
        (tmp_path / "checkpoint").write_text(text, encoding="latin1")
        assert restored(tmp_path) == 7
    save(tmp_path, 8)
    assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} == {"ckpt-3", "ckpt-4"}


def test_a_reader_keeps_what_a_training_job_deletes(tmp_path: Path) -> None:
    kept, model, _ = checkpoints(tmp_path, 1.0, keep=1, weights_only=True)
    with hold(kept.save()) as held:
        model.network.weight.assign(filled(2.0))
        kept.save()
        assert not os.path.exists(f"{held.path}.index")
        read = Model()
        restore_weights(read, held)
        assert read.value == 1
    with pytest.raises(FileNotFoundError), hold(held.path):
        pass


def test_a_name_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    kept, model, _ = checkpoints(tmp_path, 1.0)
    assert kept.save_as("epoch-1") == "epoch-1"
    shutil.copytree(tmp_path, tmp_path / "before")
    model.network.weight.assign(filled(2.0))
    assert [kept.save_as("epoch-1"), kept.save_as("epoch-12")] == ["epoch-1-2", "epoch-12"]
    for path in (tmp_path / "before").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert [kept.newest("epoch-1"), kept.newest("epoch-12")] == ["epoch-1-2", "epoch-12"]
    kept.keep_only({"epoch-1-2"})
    assert [path.stem for path in tmp_path.glob("*.index")] == ["epoch-1-2"]
