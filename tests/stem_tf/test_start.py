"""A run that goes on from another one: rows move by value, optimizers go on, and a kill changes no bit."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from pipelines import manifest as manifests
from pipelines import vocabulary
from pipelines.batches.dataset import read_batches
from pipelines.manifest import Constants, Manifest, Vocabulary
from pipelines.schema import Feature, Schema
from stem_tf import configs, models, trained
from stem_tf.layers.embedding import Field, PackedTable
from stem_tf.models.ranking_model import RankingModel
from stem_tf.training import remap, start
from stem_tf.training.checkpoints import Checkpoints, RunState
from stem_tf.training.trainer import Trainer
from stem_tf.workdir import Workdir
from stem_util import files
from stem_util.errors import UserError

READING: dict[str, Any] = {"batch_size": 64, "input_format": "blocks", "device": None}


def batches(data: str | Path, count: int) -> tf.data.Dataset:
    manifest = manifests.load(str(data))
    return read_batches(manifest, "train", training=True, seed=0, epoch=0, start_step=0, **READING).take(count)


def built(settings: dict[str, Any]) -> tuple[RankingModel, Any, Manifest]:
    config = configs.checked(settings)
    manifest = configs.data(config)
    return models.build(config, manifest), config, manifest


def saved(directory: Path, settings: dict[str, Any], steps: int = 1) -> RankingModel:
    """A run that stopped after some steps of its first epoch, as a work directory; the model that it has then."""
    model, config, manifest = built(settings)
    workdir = Workdir(directory)
    with workdir.locked():
        workdir.prepare(config, manifest)
        for batch in batches(settings["data.dir"], steps):
            model.train_step(batch)  # takes less time than compiling it
        Checkpoints(workdir.checkpoints, model, RunState(step=steps)).save()
    return model


def started(settings: dict[str, Any]) -> tuple[RankingModel, RunState]:
    model, config, manifest = built(settings)
    state = RunState()
    start.start(model, state, config, manifest, warn=lambda line: None)
    return model, state


def weights(model: RankingModel) -> list[np.ndarray]:
    return [weight.numpy() for part in model.weight_parts.values() for weight in part.weights]


def ids(data: str | Path) -> dict[str, dict[Any, int]]:
    """The id of each value, by feature."""
    manifest = manifests.load(str(data))
    return {
        name: {
            value: i for i, value in enumerate(vocabulary.load(manifest.vocabulary_path(name))["value"].to_pylist(), 2)
        }
        for name in manifest.vocabularies
    }


def of(names: str, boundaries: tuple[float, ...], sizes: dict[str, int]) -> Manifest:
    """A manifest of two features with vocabularies and a bucketised one."""
    features = [Feature(name, "categorical", "user", name, "string") for name in names.split()]
    features.append(Feature("age", "numeric", "user", "age", "float32", boundaries=boundaries))
    vocabularies = {name: Vocabulary(size, size) for name, size in sizes.items()}
    made = Manifest("", "made", 0, (), {}, {}, vocabularies, {"age": Constants(boundaries=boundaries)})
    made.__dict__["schema"] = Schema("made", tuple(features), ())
    return made


def test_rows_move_by_value_as_worked_out_by_hand() -> None:
    before = {"user": ["ann", "bob", "cat"], "item": ["x", "y"]}
    after = {"user": ["ann", "dan", "cat", "eve"], "item": ["y", "x"]}  # bob's id goes to dan; items change places
    old = of("user item", (18.0, 30.0), {"user": 3, "item": 2})
    new = of("user item", (18.0, 40.0), {"user": 4, "item": 2})

    def values(texts: dict[str, list[str]]) -> Callable[[str], pa.ChunkedArray]:
        return lambda name: pa.chunked_array([pa.array([text.encode() for text in texts[name]])])

    rows = remap.remap(old, values(before), new, values(after))
    assert rows["user"].origin.tolist() == [0, 1, 2, -1, 4, -1]
    assert rows["item"].origin.tolist() == [0, 1, 3, 2]
    assert rows["age"].origin.tolist() == [0, 1, 2, -1, -1]  # below 18; 18 to 40 and above were not there
    assert rows["user"].counts() == {"kept": 2, "new": 1, "reset": 1, "gone": 1}
    assert rows["item"].counts() == {"kept": 2, "new": 0, "reset": 0, "gone": 0}

    some = dataclasses.replace(old, vocabularies={"user": Vocabulary(3, 3), "item": Vocabulary(2, 2)})
    some.__dict__["schema"] = old.schema
    freed = remap.remap(some, values(before | {"item": ["x", ""]}), some, values(before | {"item": ["", "z"]}))["item"]
    assert freed.origin.tolist() == [0, 1, -2, -1]  # x was forgotten
    assert freed.counts() == {"kept": 0, "new": 0, "reset": 1, "gone": 1}

    fields = [Field("user", rows=6), Field("item", rows=4), Field("age", rows=5)]
    table = PackedTable(fields, 1, ["a", "b"])
    table.table.assign(-tf.ones([15, 2]))
    learned = np.stack([np.arange(14.0), 100 + np.arange(14.0)], axis=1).astype(np.float32)  # user 5, item 4, age 5
    remap.move(table.table, tf.constant(learned), table, rows)
    assert table.table[:, 0].numpy().tolist() == [0, 1, 2, -1, 4, -1, 5, 6, 8, 7, 9, 10, 11, -1, -1]
    remap.fill_with_means(table, rows)
    assert table.table[:, 0].numpy().tolist() == [0, 1, 2, 3, 4, 3, 5, 6, 8, 7, 9, 10, 11, 11, 11]
    assert table.table[3].numpy().tolist() == [3, 103]


def test_the_state_of_every_model(zoo_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = zoo_settings | {"loss.weighting": "uncertainty", "optimizer.tables": "lazy"}
    model = saved(tmp_path, settings)
    other, _ = started(settings | {"start.run": str(tmp_path), "data.batch_size": 32, "train.epochs": 5})
    for one, two in zip(everything(model), everything(other), strict=True):
        np.testing.assert_array_equal(one, two)


def everything(model: RankingModel) -> list[np.ndarray]:
    """All on which the next step depends."""
    parts = (model.network_optimizer, model.weighting, *model.table_optimizers)
    return [*weights(model), model.global_step.numpy(), *(v.numpy() for part in parts for v in part.variables)]


OPTIMIZERS = [
    ("deferred", "float32"), ("deferred", "bfloat16"), ("deferred", "rowwise"),
    ("lazy", "float32"), ("lazy", "rowwise"), ("dense", "float32"), ("adagrad", "float32"),
]  # fmt: skip


@pytest.mark.parametrize(("tables", "slots"), OPTIMIZERS)
def test_rows_and_slots_of_other_data(
    tables: str, slots: str, tiny_settings: dict[str, Any], convert_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    settings = tiny_settings | {"optimizer.tables": tables, "optimizer.slots": slots, "optimizer.l2": 1e-3}
    model = saved(tmp_path, settings)
    data = convert_tiny(1)
    other, state = started(settings | {"data.dir": str(data), "start.run": str(tmp_path)})
    fresh = built(settings | {"data.dir": str(data)})[0]
    (group,), (before,) = other.embeddings.groups, model.embeddings.groups
    then, now, moved = ids(settings["data.dir"]), ids(data), 0
    for name, places in now.items():
        for value, place in places.items():
            row = group.offsets[name] + place
            pairs = zip(
                (group.table, *other.table_optimizers[0].slots),
                (before.table, *model.table_optimizers[0].slots),
                (fresh.embeddings.groups[0].table, *fresh.table_optimizers[0].slots),
                strict=True,
            )
            for number, (variable, learned, initial) in enumerate(pairs):
                expected = (
                    initial[row] if value not in then[name] else learned[before.offsets[name] + then[name][value]]
                )
                if value not in then[name] and number == 3:
                    expected = tf.constant(1)  # a new row of deferred decay has not missed the steps so far
                np.testing.assert_array_equal(variable[row].numpy(), expected.numpy())
            moved += then[name].get(value, place) != place
    assert moved > 50  # the order of the ids is another one
    assert int(other.global_step) == state.first_step == 1
    np.testing.assert_array_equal(other.network_optimizer.m, model.network_optimizer.m)
    np.testing.assert_array_equal(other.embeddings.groups[0].numeric_kernel, before.numeric_kernel)


def test_a_schedule_restarts_after_missed_steps_are_made_up_for(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    cosine = {"optimizer.schedule": "cosine", "optimizer.decay_steps": 6}
    settings = tiny_settings | cosine | {"optimizer.l2": 0.1, "optimizer.clip_norm": 0.05}
    model = saved(tmp_path, settings, 2)
    on, _ = started(settings | {"start.run": str(tmp_path)})
    assert float(on.network_optimizer.schedule(2)) == pytest.approx(0.02 * 0.5 * (1 + np.cos(np.pi * 2 / 6)))
    changes = {"start.schedule": "restart", "optimizer.clip_norm": 0.0, "optimizer.l2": 0.0}
    restarted, state = started(settings | {"start.run": str(tmp_path)} | changes)
    assert float(restarted.network_optimizer.schedule(2)) == pytest.approx(0.02)
    assert int(restarted.schedule_step) == 0 and state.first_step == 2
    stored = model.embeddings.groups[0].table.numpy()
    np.testing.assert_array_equal(on.embeddings.groups[0].table, stored)
    model.catch_up()
    assert not np.array_equal(model.embeddings.groups[0].table, stored)
    np.testing.assert_allclose(restarted.embeddings.groups[0].table, model.embeddings.groups[0].table, rtol=1e-6)
    assert {*restarted.table_optimizers[0].slots[2].numpy()} == {2}


@pytest.mark.parametrize("tables", ["deferred", "lazy", "dense", "adagrad"])
def test_two_days_are_as_one_run_over_both(
    tables: str, tiny_settings: dict[str, Any], convert_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    settings = tiny_settings | {"optimizer.tables": tables, "optimizer.clip_norm": 0.5, "model.dropout": 0.2}
    both = saved(tmp_path, settings, 2)
    # Tuesday's log has Monday's values under other ids.
    data = convert_tiny(1)
    config = configs.checked(settings | {"data.dir": str(data), "start.run": str(tmp_path)})
    constants = manifests.load(settings["data.dir"]).numerics
    manifest = dataclasses.replace(manifests.load(str(data)), numerics=constants)
    tuesday = models.build(config, manifest)
    start.start(tuesday, RunState(), config, manifest, warn=lambda line: None)

    then, now = ids(settings["data.dir"]), ids(data)
    places = {name: [0, 1, *(then[name][value] for value in values)] for name, values in now.items()}  # in order of id

    def as_on_monday(batch: dict[str, Any]) -> dict[str, Any]:
        features = {name: tf.gather(places[name], x) if name in places else x for name, x in batch["features"].items()}
        return batch | {"features": features}

    for batch in batches(data, 2):
        tuesday.train_step(batch)
        both.train_step(as_on_monday(batch))
    for model in (both, tuesday):
        model.catch_up()
    for one, two in zip(both.network.weights, tuesday.network.weights, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-5)
    one, two = both.embeddings.groups[0], tuesday.embeddings.groups[0]
    for name, of_name in places.items():
        rows = two.table[two.offsets[name] :][: len(of_name)]
        np.testing.assert_allclose(
            rows, tf.gather(one.table, np.array(of_name) + one.offsets[name]), rtol=1e-3, atol=1e-5
        )


def test_a_start_is_durable_before_the_first_step(
    tiny_settings: dict[str, Any], convert_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    saved(tmp_path / "before", tiny_settings)
    changes = {"data.dir": str(convert_tiny(1)), "start.run": str(tmp_path / "before"), "optimizer.l2": 1e-5}
    config = configs.checked(tiny_settings | changes)
    workdir = Workdir(tmp_path / "killed")
    said: list[str] = []

    def killed_before_the_first_step() -> Trainer:
        with workdir.locked():
            workdir.prepare(config, configs.data(config))
            return Trainer(config, configs.data(config), workdir, said.append, lambda line: None)

    begun = killed_before_the_first_step()
    assert (
        said[0].startswith("goes on from the last state of ")
        and said[2].split() == "rows of kept new reset gone".split()
    )
    shutil.rmtree(tmp_path / "before")
    resumed = killed_before_the_first_step()
    assert resumed.resumed_from is not None and resumed.state == begun.state and begun.state.first_step == 1
    for one, two in zip(everything(begun.model), everything(resumed.model), strict=True):
        np.testing.assert_array_equal(one, two)
    with pytest.raises(UserError, match=r"another config \(start.run: .*before -> \)"), workdir.locked():
        other = configs.checked(tiny_settings | {"data.dir": str(convert_tiny(1)), "optimizer.l2": 1e-5})
        workdir.prepare(other, configs.data(other))


def test_best_weights_start_with_fresh_moments(
    train: Callable[..., Trainer], tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    single = {"model.name": "single_task", "train.best": "own", "optimizer.tables": "lazy"}
    settings = configs.applying(tiny_settings | single, "single_task")
    before = train(tmp_path, settings)
    served = trained.load(before.workdir, before.config, before.manifest, "best").model
    model, state = started(settings | {"start.run": str(tmp_path), "start.checkpoint": "best"})
    for one, two in zip(weights(served), weights(model), strict=True):
        np.testing.assert_array_equal(one, two)
    assert int(model.global_step) == 0 and state.ancestor["kind"] == "best"
    assert not model.network_optimizer.m.numpy().any()


def test_new_rows_of_two_replicas_start_from_the_mean(
    tiny_settings: dict[str, Any], convert_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    saved(tmp_path, tiny_settings)
    settings = tiny_settings | {"data.dir": str(convert_tiny(1)), "start.run": str(tmp_path), "start.new_rows": "mean"}
    one, _ = started(settings)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice())
    with strategy.scope():
        two, config, manifest = built(settings)
    start.start(two, RunState(), config, manifest, warn=lambda line: None)
    for variable in two.embeddings.groups[0].table, two.table_optimizers[0].slots[0]:
        first, second = (copy.numpy() for copy in variable.values)
        np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(two.embeddings.groups[0].table.values[0], one.embeddings.groups[0].table, atol=1e-9)


REFUSED = [
    ({"model.dim": 8}, r"is another model \(config.model.dim is 4 there, and 8 here\)"),
    ({"model.name": "mmoe"}, "is another model .config.model.name is stem_net there, and mmoe here"),
    ({"optimizer.tables": "lazy"}, "with other optimizers .config.optimizer.tables is deferred there, and lazy here"),
    ({"data.tasks": "click"}, "of another schema .the task 'watched' is only there"),
    ({"start.checkpoint": "best"}, "has no best weights: no epoch was finished"),
    ({"start.run": "/nowhere"}, "--from=/nowhere: there is no such directory"),
]


@pytest.mark.parametrize(("changes", "why"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit_is_named(
    changes: dict[str, Any], why: str, tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.getbasetemp() / "refused"
    if not run.exists():
        saved(run, tiny_settings, 1)
    settings = tiny_settings | {"start.run": str(run)} | changes
    with pytest.raises(UserError, match=why):
        started(configs.applying(settings, str(settings.get("model.name", "stem_net"))))


def test_refusals_of_the_job(
    tiny_settings: dict[str, Any],
    chain_data: Path,
    tmp_path: Path,
    job_in_process: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    run, data = tmp_path / "run", tiny_settings["data.dir"]
    saved(run, tiny_settings, 1)
    flat = {key: value for key, value in tiny_settings.items() if key != "data.dir"}
    keys = [f"--config.{key}={value}" for key, value in flat.items()]

    def refused(*arguments: str, data: Any = data) -> str:
        job = job_in_process("stem_tf.jobs.train", "--config=small", f"--config.data.dir={data}", *keys, *arguments)
        assert job.returncode in (1, 2) and job.stderr.count("\n") == 1, job.stderr
        return job.stderr

    new = f"--workdir={tmp_path / 'new'}"
    for place in (run, "s3://bucket/run"):
        assert "is the --workdir itself" in refused(f"--from={place}", f"--workdir={place}/")
    assert "the task 'cart' is only here" in refused(f"--from={run}", new, data=chain_data)
    assert "holds converted data: give the directory of a run" in refused(f"--from={data}", new)
    assert "start.new_rows=mean would do nothing without config.start.run" in refused(
        "--config.start.new_rows=mean", new
    )
    with open(run / ".lock", "rb") as lock:
        assert files.try_lock(lock.fileno())
        assert "is being trained by another job" in refused(f"--from={run}", new)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"x")
    assert "a SavedModel that stem-export did not write" in refused(f"--from={tmp_path / 'saved'}", new)
    assert not (tmp_path / "new").exists() or not (tmp_path / "new" / "config.json").exists()
    (name,) = (run / "checkpoints").glob("*.data-*")
    name.write_bytes(name.read_bytes()[:1000])
    assert "damaged" in refused(f"--from={run}", new)
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint" in refused(f"--from={run}", new)
    (run / "vocabulary" / "user.parquet").unlink()
    assert "vocabulary/user.parquet" in refused(f"--from={run}", new)
