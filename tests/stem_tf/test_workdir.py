import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import manifest as manifests
from stem_tf import configs
from stem_tf.workdir import Workdir
from stem_util.errors import UserError


@pytest.fixture
def prepared(tmp_path: Path, tiny_data: Path, tiny_settings: dict[str, Any]) -> Workdir:
    workdir = Workdir(tmp_path / "run")
    with workdir.locked():
        workdir.prepare(configs.checked(tiny_settings), manifests.load(str(tiny_data)))
    workdir.checkpoints.mkdir()
    (workdir.checkpoints / "ckpt-1.index").touch()
    return workdir


def test_holds_what_later_stages_need(prepared: Workdir, tiny_data: Path, tiny_settings: dict[str, Any]) -> None:
    assert configs.flat(prepared.config()) == configs.flat(configs.checked(tiny_settings))
    ours, theirs = manifests.load(str(prepared.path)), manifests.load(str(tiny_data))
    assert ours.schema == theirs.schema and ours.num_ids("user") == theirs.num_ids("user")
    for feature in ("user", "item", "tags"):
        assert Path(ours.vocabulary_path(feature)).read_bytes() == Path(theirs.vocabulary_path(feature)).read_bytes()


def test_another_config_is_refused_with_the_differing_keys(
    prepared: Workdir, tiny_data: Path, tiny_settings: dict[str, Any]
) -> None:
    manifest = manifests.load(str(tiny_data))
    with pytest.raises(UserError) as error:
        prepared.prepare(configs.checked(tiny_settings | {"model.dim": 8, "seed": 1}), manifest)
    assert "(model.dim: 4 -> 8; seed: 0 -> 1)" in str(error.value)
    assert "data.dir, train.calibration, train.checkpoint_every, train.log_every" in str(error.value)
    with pytest.raises(UserError, match=r"\(train.epochs: 2 -> 1\)"):
        prepared.prepare(configs.checked(tiny_settings | {"train.epochs": 1}), manifest)
    prepared.prepare(configs.checked(tiny_settings | {"train.epochs": 9, "train.log_every": 3}), manifest)
    assert prepared.config().train.epochs == 9


def test_other_data_is_refused_and_moved_data_is_not(
    prepared: Workdir,
    tmp_path: Path,
    tiny_data: Path,
    tiny_settings: dict[str, Any],
    convert_tiny: Callable[[int], Path],
) -> None:
    other = convert_tiny(1)
    with pytest.raises(UserError, match="is other data than .*run was trained on"):
        prepared.prepare(configs.checked(tiny_settings | {"data.dir": str(other)}), manifests.load(str(other)))
    moved = tmp_path / "moved"
    shutil.copytree(tiny_data, moved)
    prepared.prepare(configs.checked(tiny_settings | {"data.dir": str(moved)}), manifests.load(str(moved)))


def test_a_run_without_a_checkpoint_may_start_over_with_another_config(
    prepared: Workdir, tiny_data: Path, tiny_settings: dict[str, Any]
) -> None:
    (prepared.checkpoints / "ckpt-1.index").unlink()
    prepared.prepare(configs.checked(tiny_settings | {"model.dim": 8}), manifests.load(str(tiny_data)))
    assert prepared.config().model.dim == 8


def test_checkpoints_without_a_config_are_kept(
    prepared: Workdir, tiny_data: Path, tiny_settings: dict[str, Any]
) -> None:
    (prepared.path / "config.json").unlink()
    with pytest.raises(UserError, match="holds checkpoints, but its config.json is gone"):
        prepared.prepare(configs.checked(tiny_settings), manifests.load(str(tiny_data)))
    assert (prepared.checkpoints / "ckpt-1.index").exists()


def test_a_kill_before_config_json_leaves_nothing_that_counts(
    prepared: Workdir, tiny_data: Path, tiny_settings: dict[str, Any]
) -> None:
    (prepared.checkpoints / "ckpt-1.index").unlink()
    (prepared.path / "config.json").unlink()
    with pytest.raises(UserError, match="holds no run"):
        prepared.config()
    prepared.prepare(configs.checked(tiny_settings | {"seed": 5}), manifests.load(str(tiny_data)))
    assert prepared.config().seed == 5


def test_a_run_whose_checkpoints_are_gone_starts_over_beside_what_it_had(
    prepared: Workdir, tiny_data: Path, tiny_settings: dict[str, Any]
) -> None:
    config, manifest = configs.checked(tiny_settings), manifests.load(str(tiny_data))
    prepared.best.mkdir()
    (prepared.best / "ckpt-1.index").write_text("best")
    prepared.append_metrics({"kind": "validation", "epoch": 1, "step": 18})
    assert prepared.prepare(config, manifest) == ""
    (prepared.checkpoints / "ckpt-1.index").unlink()
    warning = prepared.prepare(config, manifest)
    before = prepared.path / "before-1"
    assert "has no checkpoint to go on from: training starts over" in warning and str(before) in warning
    assert (before / "best" / "ckpt-1.index").read_text() == "best" and (before / "metrics.jsonl").exists()
    assert prepared.prepare(config, manifest) == "" and prepared.read_metrics() == []
    prepared.checkpoints.mkdir()
    (prepared.checkpoints / "ckpt-1.data-00000-of-00001").touch()  # killed while it wrote the first one
    assert prepared.prepare(config, manifest) == ""
    prepared.checkpoints.mkdir()
    (prepared.checkpoints / "ckpt-2.data-00000-of-00001").touch()  # its index has been lost
    with pytest.raises(UserError, match="with another config"):
        prepared.prepare(configs.checked(tiny_settings | {"seed": 1}), manifest)


def test_lines_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    workdir = Workdir(tmp_path)
    workdir.sync_metrics()  # there are none yet
    workdir.append_metrics({"kind": "train", "epoch": 1, "step": 1})
    with open(workdir.metrics, "ab") as file:
        file.write(b'\xff\xfe\n3\n[]\nnull\n\n{"kind": "train", "epoch": "1", "step": 2}\n{"kind": "x"}\n\0\0')
    workdir.append_metrics({"kind": "train", "epoch": 1, "step": 3})  # on the line of the zeros
    assert [record["step"] for record in workdir.read_metrics()] == [1]


def test_one_job_at_a_time(prepared: Workdir) -> None:
    with prepared.locked():
        with pytest.raises(UserError, match=r"is in use by another job \(process \d+\)"):
            with Workdir(prepared.path).locked():
                pass
    with prepared.locked():
        pass


def test_wrong_places(tmp_path: Path, tiny_data: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="is a file[,;] "):
            with Workdir(path).locked():
                pass
    with pytest.raises(UserError, match="data holds converted data, not a run: choose another directory"):
        with Workdir(tiny_data).locked():
            pass


def test_damaged_or_foreign_config_json(prepared: Workdir) -> None:
    path = prepared.path / "config.json"
    path.write_text(json.dumps({"model.width": 3}))
    with pytest.raises(UserError, match=r"unknown keys \(model.width\)"):
        prepared.config()
    path.write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        prepared.config()


def test_metrics_are_rewound_to_a_checkpoint(tmp_path: Path) -> None:
    workdir = Workdir(tmp_path)
    for step in range(1, 7):
        workdir.append_metrics({"kind": "train", "epoch": (step + 1) // 2, "step": step})
        if step % 2 == 0:
            workdir.append_metrics({"kind": "validation", "epoch": step // 2, "step": step})
    with open(workdir.metrics, "a") as file:
        file.write('{"kind": "tra')  # cut off by a kill
    assert len(workdir.read_metrics()) == 9

    workdir.rewind_metrics(epoch=1, step=4)  # the second epoch's evaluation was not finished
    kept = [(record["kind"], record["step"]) for record in workdir.read_metrics()]
    assert kept == [("train", 1), ("train", 2), ("validation", 2), ("train", 3), ("train", 4)]
