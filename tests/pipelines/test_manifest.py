"""The manifest: round trip, and what it says to readers of damaged or missing data."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from pipelines import manifest
from pipelines.manifest import Constants, Dropped, Manifest, Shard, Source, Split, TaskCounts, Vocabulary
from stem_util.errors import UserError


def _manifest(data_dir: Path) -> Manifest:
    shard = Shard("blocks/train-00000-of-00001.tfrecord", 3, 1, 99, "ab")
    train = Split(3, {"click": TaskCounts(2, 0.5)}, {"user": 0.25}, {"blocks": [shard]})
    empty = Split(0, {"click": TaskCounts(0, None)}, {"user": 0.0}, {"blocks": []})
    return Manifest(
        data_dir=str(data_dir),
        name="näme",
        seed=1,
        sources=(Source("log.csv", 4, 120),),
        split={"by": "random", "fractions": [0.8, 0.1, 0.1]},
        splits={"train": train, "validation": empty, "test": empty},
        vocabularies={"user": Vocabulary(5, 9)},
        numerics={"age": Constants(1.5, 2.0, 1.5, (18.0, 25.0)), "length": Constants(0.1, 1.0, 0.0)},
        dropped=(Dropped("click", "missing label", 1),),
    )


def test_round_trip(tmp_path: Path) -> None:
    saved = _manifest(tmp_path)
    manifest.save(saved)
    assert manifest.load(str(tmp_path)) == saved


def test_answers(tmp_path: Path) -> None:
    m = _manifest(tmp_path)
    assert m.num_ids("user") == 7  # padding, rare, 5 values
    assert m.num_ids("age") == 5  # padding, missing, 3 buckets
    assert m.constants("age").boundaries == (18.0, 25.0)
    assert (m.rows("train"), m.task_rows("train", "click"), m.task_rate("train", "click")) == (3, 2, 0.5)
    assert math.isnan(m.task_rate("test", "click"))
    assert m.shards("train", "blocks")[0].path == str(tmp_path / "blocks/train-00000-of-00001.tfrecord")
    assert m.vocabulary_path("user") == str(tmp_path / "vocabulary/user.parquet")
    with pytest.raises(UserError, match="without the layout 'rows' .it has: blocks."):
        m.shards("train", "rows")


def test_missing_damaged_and_foreign_manifests(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no manifest.json"):
        manifest.load(str(tmp_path))
    path = tmp_path / "manifest.json"
    manifest.save(_manifest(tmp_path))
    tree = json.loads(path.read_text())
    for text, why in [
        (path.read_text()[:-20], "damaged"),
        (json.dumps(tree | {"format": 99}), "format 99; this version reads format 2"),
        (json.dumps([]), "format None"),
        (json.dumps({key: value for key, value in tree.items() if key != "splits"}), "damaged"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=why):
            manifest.load(str(tmp_path))


def test_is_immutable(tmp_path: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        _manifest(tmp_path).seed = 2  # type: ignore[misc]
