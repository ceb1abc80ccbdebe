"""Each file of a data directory or a run damaged in several ways: one sentence, or the same numbers as without.

In process, on copies of one small run, with the functions that the jobs call.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines import manifest as manifests
from stem_tf import configs, trained
from stem_tf.evaluation import predictions, scoring
from stem_tf.training.trainer import Trainer
from stem_tf.workdir import Workdir
from stem_util.errors import JobError, UserError


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tiny_settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with converted data, and a run on them, to be copied."""
    directory = tmp_path_factory.mktemp("whole")
    shutil.copytree(tiny_data, directory / "data")
    values = tiny_settings | {"data.dir": "data", "train.epochs": 1}
    with contextlib.chdir(directory):
        config, manifest, workdir = configs.checked(values), manifests.load("data"), Workdir("run")
        with workdir.locked():
            workdir.prepare(config, manifest)
            Trainer(config, manifest, workdir, say=lambda line: None).run()
    return directory


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(whole, tmp_path / "copy", symlinks=True)
    with contextlib.chdir(tmp_path / "copy"):
        yield tmp_path / "copy"


def _evaluate() -> None:
    """What stem-evaluate does, but for its trivial answers and its table."""
    workdir = Workdir("run")
    config = workdir.config()
    manifest = workdir.data(config, None, "test")
    with manifests.in_use(manifest.data_dir):
        manifest.check_raw("test")
        found = trained.load(workdir, config, manifest, "best")
        predicted = scoring.predict(found.model, manifest, "test", config.data, desc="")
        predictions.write(Path("scores.parquet"), manifest, "test", predicted)


def _resume() -> None:
    """Trains the run for another epoch."""
    workdir = Workdir("run")
    config = configs.checked(configs.flat(workdir.config()) | {"train.epochs": 2})
    manifest = manifests.load("data")
    with manifests.in_use("data"), workdir.locked():
        workdir.prepare(config, manifest)
        Trainer(config, manifest, workdir, say=lambda line: None).run()


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    _replace(path, bytes(content))


def _replace(path: Path, content: bytes) -> None:
    path.unlink()  # vocabularies of a run are links to those of the data
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": lambda path: _replace(path, b""),
    "cut": _cut,
    "flipped": _flip,
    "garbage": lambda path: _replace(path, b"\xff\x00garbage\n" * 9),
    "null": lambda path: _replace(path, b"null\n"),
    "list": lambda path: _replace(path, b"[]\n"),
}
READ = {
    "data/manifest.json": (_evaluate, _resume),
    "data/schema.yaml": (_evaluate, _resume),
    "data/vocabulary/user.parquet": (_evaluate, _resume),
    "data/blocks/validation-00000-of-00001.tfrecord": (_resume,),
    "data/blocks/test-00000-of-00001.tfrecord": (_evaluate,),
    "data/raw/test/part-00000.parquet": (_evaluate,),
    "run/manifest.json": (_evaluate, _resume),
    "run/schema.yaml": (_evaluate, _resume),
    "run/vocabulary/item.parquet": (_evaluate, _resume),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("name", "job"), [(name, job) for name, jobs in READ.items() for job in jobs])
def test_a_damaged_file_is_named(copy: Path, name: str, job: Callable[[], None], damage: str) -> None:
    metrics = (copy / "run" / "metrics.jsonl").read_bytes()
    DAMAGE[damage](copy / name)
    with pytest.raises((UserError, JobError)) as caught:
        job()
    assert name.rpartition("/")[2] in str(caught.value) and "\n" not in str(caught.value)
    # Nothing is learned or scored of data that are not what they were.
    assert not (copy / "scores.parquet").exists()
    assert (copy / "run" / "metrics.jsonl").read_bytes() == metrics or "validation" in name
    assert not list(copy.rglob("*.tmp*"))


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "flipped"])
def test_a_damaged_config_is_named(copy: Path, damage: str) -> None:
    DAMAGE[damage](copy / "run" / "config.json")
    with pytest.raises(UserError, match=r"config.json") as caught:
        _resume()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "garbage", "list"])
def test_metrics_that_are_damaged_are_left_out(copy: Path, damage: str) -> None:
    DAMAGE[damage](copy / "run" / "metrics.jsonl")
    _resume()
    assert [record["epoch"] for record in Workdir("run").read_metrics() if record["kind"] == "validation"] == [2]
