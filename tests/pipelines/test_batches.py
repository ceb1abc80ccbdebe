from __future__ import annotations

import collections
import dataclasses
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines import schema_yaml
from pipelines.batches.damage import diagnose, naming_corrupt_records
from pipelines.batches.dataset import count_batches, read_batches
from pipelines.manifest import Manifest, Shard, Split
from pipelines.schema import Feature, Label, Schema, Task
from pipelines.tfrecord import CorruptRecord, scan
from stem_util.errors import UserError

SCHEMA = Schema(
    name="test",
    features=(
        Feature("user", "categorical", "user", "user", "int64"),
        Feature("tags", "multivalent", "item", "tags", "int64", max_length=4),
        Feature("age", "numeric", "user", "age", "float32"),
        Feature("image", "dense", "item", "image", "float32", length=3),
    ),
    tasks=(Task("click", Label("click")), Task("completion", Label("completion"), type="regression")),
    group="user",
    item="video",
)
TRAIN_ROWS, TEST_ROWS, SHARDS = 2000, 130, 4
LAYOUTS = ("blocks", "rows")


def expected_row(i: int) -> dict[str, Any]:
    """Row i of the log; every value follows from i."""
    return {
        "user": i % 90 + 1,
        "tags": [(i + j) % 7 + 2 for j in range(i % 5)],  # 0 to 4 values
        "age": np.nan if i % 10 == 3 else i / 2,
        "image": [i, i + 0.5, -i],
        "click": float(i % 3 == 0),
        "completion": np.nan if i % 4 == 0 else i % 11 / 10,
        "group": i * 1_000_003 - 2**40,
        "item": 2**62 - i,
    }


def row_example(i: int) -> dict[str, tf.train.Feature]:
    row = expected_row(i)

    def ints(values: Iterable[int]) -> tf.train.Feature:
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

    def floats(values: Iterable[float]) -> tf.train.Feature:
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))

    return {
        "feature:user": ints([row["user"]]),
        "feature:tags": ints(row["tags"]),
        "feature:age": floats([row["age"]]),
        "feature:image": floats(row["image"]),
        "label:click": floats([row["click"]]),
        "label:completion": floats([row["completion"]]),
        "key:group": ints([row["group"]]),
        "key:item": ints([row["item"]]),
        "key:row_id": ints([i]),
    }


def block_example(ids: Iterable[int]) -> dict[str, tf.train.Feature]:
    ids = list(ids)
    rows = [expected_row(i) for i in ids]

    def column(values: Iterable[Any], dtype: str) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[np.asarray(list(values), dtype).tobytes()]))

    return {
        "feature:user": column((r["user"] for r in rows), "<i4"),
        "feature:tags": column((tag for r in rows for tag in r["tags"]), "<i4"),
        "length:tags": column((len(r["tags"]) for r in rows), "<i4"),
        "feature:age": column((r["age"] for r in rows), "<f4"),
        "feature:image": column((r["image"] for r in rows), "<f4"),
        "label:click": column((r["click"] for r in rows), "<f4"),
        "label:completion": column((r["completion"] for r in rows), "<f4"),
        "key:group": column((r["group"] for r in rows), "<i8"),
        "key:item": column((r["item"] for r in rows), "<i8"),
        "key:row_id": column(ids, "<i8"),
    }


def write_shards(directory: str, split: str, ids: list[int], count: int, block: int = 16) -> dict[str, list[Shard]]:
    """Both layouts of the rows ``ids``, spread evenly over ``count`` shards; the last block of a shard is short."""
    shards: dict[str, list[Shard]] = {layout: [] for layout in LAYOUTS}
    for number, part in enumerate(np.array_split(ids, count)):
        for layout in LAYOUTS:
            if layout == "rows":
                examples = [row_example(int(i)) for i in part]
            else:
                examples = [block_example(map(int, part[i : i + block])) for i in range(0, len(part), block)]
            path = os.path.join(directory, layout, f"{split}-{number:05}-of-{count:05}.tfrecord")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with tf.io.TFRecordWriter(path) as writer:
                for example in examples:
                    message = tf.train.Example(features=tf.train.Features(feature=example))
                    writer.write(message.SerializeToString())
            relative = os.path.relpath(path, directory)
            shards[layout].append(Shard(relative, len(part), len(examples), os.path.getsize(path), ""))
    return shards


def make_manifest(directory: str, splits: dict[str, tuple[int, dict[str, list[Shard]]]]) -> Manifest:
    with open(os.path.join(directory, "schema.yaml"), "w", encoding="utf-8") as file:
        file.write(schema_yaml.dumps(SCHEMA))
    return Manifest(
        data_dir=directory,
        name="test",
        seed=0,
        sources=(),
        split={},
        splits={name: Split(rows, {}, {}, shards) for name, (rows, shards) in splits.items()},
        vocabularies={},
        numerics={},
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    directory = str(tmp_path_factory.mktemp("converted"))
    train, test = list(range(TRAIN_ROWS)), list(range(TRAIN_ROWS, TRAIN_ROWS + TEST_ROWS))
    splits: dict[str, tuple[int, dict[str, list[Shard]]]] = {
        "train": (TRAIN_ROWS, write_shards(directory, "train", train, SHARDS)),
        "validation": (0, {layout: [] for layout in LAYOUTS}),
        "test": (TEST_ROWS, write_shards(directory, "test", test, 1)),
    }
    return make_manifest(directory, splits)


@pytest.fixture
def damaged(pristine: Manifest, tmp_path: Any) -> Manifest:
    """A copy to damage."""
    directory = str(tmp_path / "copy")
    shutil.copytree(pristine.data_dir, directory)
    return dataclasses.replace(pristine, data_dir=directory, splits=deepcopy(pristine.splits))


def read(manifest: Manifest, split: str = "train", **options: Any) -> list[dict[str, Any]]:
    options = {"batch_size": 64, "training": split == "train"} | options
    return list(read_batches(manifest, split, **options).as_numpy_iterator())


def row_ids(batches: list[dict[str, Any]]) -> list[int]:
    return [int(i) for batch in batches for i in batch["row_id"]]


def assert_equal(got: Any, expected: Any) -> None:
    tf.nest.map_structure(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_value_of_every_row(pristine: Manifest, layout: str, split: str) -> None:
    batches = read(pristine, split, input_format=layout)
    assert all(batch["features"]["user"].dtype == np.int32 for batch in batches)
    seen = 0
    for batch in batches:
        for place, i in enumerate(batch["row_id"]):
            if i < 0:
                continue
            seen += 1
            row = expected_row(int(i))
            features = {name: values[place] for name, values in batch["features"].items()}
            assert features["user"] == row["user"]
            assert list(features["tags"]) == row["tags"] + [0] * (4 - len(row["tags"]))
            np.testing.assert_equal(features["age"], np.float32(row["age"]))
            np.testing.assert_array_equal(features["image"], np.float32(row["image"]))
            assert (batch["group"][place], batch["item"][place]) == (row["group"], row["item"])
            for task in ("click", "completion"):
                inside = not np.isnan(row[task])
                assert batch["weights"][task][place] == float(inside)
                assert batch["labels"][task][place] == (np.float32(row[task]) if inside else 0)
    assert seen == (TRAIN_ROWS // 64 * 64 if split == "train" else TEST_ROWS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_are_static(pristine: Manifest, layout: str) -> None:
    for training in (True, False):
        data = read_batches(pristine, "train", batch_size=48, input_format=layout, training=training)
        assert data.element_spec["features"] == {
            "user": tf.TensorSpec([48], tf.int32),
            "tags": tf.TensorSpec([48, 4], tf.int32),
            "age": tf.TensorSpec([48], tf.float32),
            "image": tf.TensorSpec([48, 3], tf.float32),
        }
        assert data.element_spec["weights"]["click"] == tf.TensorSpec([48], tf.float32)
        assert data.element_spec["row_id"] == tf.TensorSpec([48], tf.int64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_size", [50, 999, 2000])
def test_each_row_once_an_epoch(pristine: Manifest, layout: str, batch_size: int) -> None:
    batches = read(pristine, input_format=layout, batch_size=batch_size)
    ids = row_ids(batches)
    assert len(batches) == count_batches(pristine, "train", batch_size, training=True) == TRAIN_ROWS // batch_size
    assert len(ids) == len(set(ids)) == TRAIN_ROWS // batch_size * batch_size
    assert set(ids) <= set(range(TRAIN_ROWS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_are_mixed_anew_every_epoch(pristine: Manifest, layout: str) -> None:
    first, second = (read(pristine, input_format=layout, epoch=epoch) for epoch in (0, 1))
    shared = [len({*a["row_id"]} & {*b["row_id"]}) for a in first for b in second]
    assert max(shared) < 16  # of 64; 2 are expected
    blocks = [len({i // 16 for i in batch["row_id"]}) for batch in first]
    assert min(blocks) > 32  # a batch of 4 blocks' worth of rows draws on many of the 128
    # The order has nothing of the log's left.
    assert abs(np.corrcoef(row_ids(first), np.arange(len(first) * 64))[0, 1]) < 0.3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_seed_and_epoch_decide_the_batches(pristine: Manifest, layout: str) -> None:
    tf.random.set_seed(1)
    first = read(pristine, input_format=layout, seed=5, epoch=2)
    tf.random.set_seed(2)
    assert_equal(read(pristine, input_format=layout, seed=5, epoch=2), first)
    for seed, epoch in ((6, 2), (5, 3), (2, 5)):
        assert row_ids(read(pristine, input_format=layout, seed=seed, epoch=epoch)) != row_ids(first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumes_at_every_step(pristine: Manifest, layout: str) -> None:
    whole = read(pristine, input_format=layout, batch_size=200, epoch=1)
    for k in range(len(whole) + 1):
        assert_equal(read(pristine, input_format=layout, batch_size=200, epoch=1, start_step=k), whole[k:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count", [3, 7])
def test_readers_share_the_rows(pristine: Manifest, layout: str, training: bool, count: int) -> None:
    parts = []
    for index in range(count):
        ids = row_ids(
            read(
                pristine,
                input_format=layout,
                training=training,
                reader=(index, count),
                batch_size=1 + 15 * (not training),
            )
        )
        parts.append([i for i in ids if i >= 0])
    assert sorted(i for part in parts for i in part) == list(range(TRAIN_ROWS))
    assert min(map(len, parts)) > TRAIN_ROWS / count / 2
    if not training:
        assert all(part == sorted(part) for part in parts)


def test_layouts_hold_the_same_rows(pristine: Manifest) -> None:
    def rows(layout: str) -> collections.Counter[tuple[bytes, ...]]:
        batches = read(pristine, input_format=layout, batch_size=200)
        return collections.Counter(
            tuple(np.asarray(value[i]).tobytes() for value in tf.nest.flatten(batch))
            for batch in batches
            for i in range(200)
        )

    assert rows("blocks") == rows("rows")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_keeps_order_and_pads(pristine: Manifest, layout: str) -> None:
    batches = read(pristine, "test", input_format=layout)
    assert len(batches) == count_batches(pristine, "test", 64, training=False) == 3
    assert row_ids(batches) == list(range(TRAIN_ROWS, TRAIN_ROWS + TEST_ROWS)) + [-1] * 62
    padding = tf.nest.map_structure(lambda value: value[2:], batches[-1])
    assert (padding["features"]["user"] == 1).all()
    for value in (padding["features"][name] for name in ("tags", "age", "image")):
        assert (value == 0).all()
    assert all((padding[kind][task] == 0).all() for kind in ("labels", "weights") for task in ("click", "completion"))
    # One batch may hold more than all rows.
    assert row_ids(read(pristine, "test", input_format=layout, batch_size=200))[TEST_ROWS:] == [-1] * 70


def test_what_cannot_be_read_is_named(pristine: Manifest) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 2001}, "batch size 2,001 is larger than the 2,000 rows of the split 'train'"),
        ({"batch_size": 0}, "at least 1, but is 0"),
        ({"split": "validation"}, "'validation' .* has no rows"),
        ({"split": "tset"}, "did you mean 'test'"),
        ({"input_format": "block"}, "did you mean 'blocks'"),
        ({"on_corrupt": "ignore"}, "fail, skip"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            read(pristine, **options)
    for reader in ((2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="reader"):
            read(pristine, reader=reader)
    with pytest.raises(ValueError, match="start_step"):
        read(pristine, start_step=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def flip(path: str, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


def record_offsets(shard: Shard) -> list[int]:
    return [offset for offset, _ in scan(shard.path)]


def corrupt_payload(shard: Shard) -> int:
    offset = record_offsets(shard)[5]
    flip(shard.path, offset + 40)
    return offset


def corrupt_length(shard: Shard) -> int:
    offset = record_offsets(shard)[5]
    flip(shard.path, offset + 1)
    return offset


def cut_inside(shard: Shard) -> int:
    offset = record_offsets(shard)[5]
    os.truncate(shard.path, offset + 40)
    return offset


def cut_between(shard: Shard) -> int:
    offset = record_offsets(shard)[5]
    os.truncate(shard.path, offset)
    return offset


def empty(shard: Shard) -> int:
    os.truncate(shard.path, 0)
    return 0


Damage = Callable[[Shard], int]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damage", [corrupt_payload, corrupt_length, cut_inside, cut_between, empty])
def test_damage_is_named_by_shard_and_offset(damaged: Manifest, layout: str, damage: Damage) -> None:
    shard = damaged.shards("train", layout)[2]
    offset = damage(shard)
    with pytest.raises(CorruptRecord) as caught, naming_corrupt_records(damaged, "train", layout):
        read(damaged, input_format=layout)
    assert (caught.value.path, caught.value.offset) == (shard.path, offset)
    found = diagnose(damaged, "train", layout)
    assert found is not None
    assert (found.path, found.offset) == (shard.path, offset)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("damage", "lost_records"),
    [(corrupt_payload, 1), (corrupt_length, None), (cut_inside, None), (cut_between, None), (empty, 32)],
)
def test_skip_loses_what_is_damaged_and_counts_it(
    damaged: Manifest, layout: str, damage: Damage, lost_records: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    shard = damaged.shards("train", layout)[2]
    offset = damage(shard)
    if damage is empty:
        lost = shard.records
    else:
        lost = lost_records or shard.records - 5
    first = 1000 + 5 * (16 if layout == "blocks" else 1)
    if damage is empty:
        gone = set(range(1000, 1500))
    elif damage is corrupt_payload:
        gone = set(range(first, first + (16 if layout == "blocks" else 1)))
    else:
        gone = set(range(first, 1500))
    with caplog.at_level("WARNING"):
        batches = read(damaged, input_format=layout, training=False, on_corrupt="skip")
        training = read(damaged, input_format=layout, batch_size=1 if layout == "blocks" else 20, on_corrupt="skip")
    rest = set(range(TRAIN_ROWS)) - gone
    assert [i for i in row_ids(batches) if i >= 0] == sorted(rest)
    assert set(row_ids(training)) <= rest
    assert len(batches) == count_batches(damaged, "train", 64, training=False, input_format=layout, on_corrupt="skip")
    (message,) = [record.getMessage() for record in caplog.records]  # once, not once a call
    assert shard.path in message
    assert f"skipped {lost:,} records ({len(gone):,} rows) from" in message
    if damage is not cut_between:
        assert f"{offset:,}" in message


def test_skip_goes_on_after_several_damaged_records(damaged: Manifest) -> None:
    shard = damaged.shards("train", "rows")[0]
    for offset in np.array(record_offsets(shard))[[0, 7, 8, 499]]:
        flip(shard.path, offset + 30)
    ids = row_ids(read(damaged, input_format="rows", training=False, on_corrupt="skip", batch_size=4))
    assert ids == [i for i in range(TRAIN_ROWS) if i not in (0, 7, 8, 499)]


def test_skip_leaves_sound_data_alone(pristine: Manifest) -> None:
    assert_equal(read(pristine, on_corrupt="skip"), read(pristine))


def test_missing_shard(damaged: Manifest) -> None:
    path = damaged.shards("train", "blocks")[1].path
    data = read_batches(damaged, "train", batch_size=64, training=True)
    os.unlink(path)
    for policy in ("fail", "skip"):
        with pytest.raises(UserError, match=f"{path} is missing"):
            read(damaged, on_corrupt=policy)
    with pytest.raises(UserError, match=f"{path} is missing"), naming_corrupt_records(damaged, "train"):
        list(data)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_record_that_does_not_parse_is_named(damaged: Manifest, layout: str) -> None:
    shard = damaged.shards("train", layout)[3]
    records = list(scan(shard.path))
    example = tf.train.Example.FromString(records[9][1])
    if layout == "rows":
        del example.features.feature["label:click"]
    else:
        del example.features.feature["feature:age"].bytes_list.value[:]
        example.features.feature["feature:age"].bytes_list.value.append(struct.pack("<f", 1))
    with tf.io.TFRecordWriter(shard.path) as writer:
        for number, (_, payload) in enumerate(records):
            writer.write(example.SerializeToString() if number == 9 else payload)
    shards = damaged.splits["train"].shards[layout]
    shards[3] = dataclasses.replace(shards[3], bytes=os.path.getsize(shard.path))
    with pytest.raises(CorruptRecord, match="does not parse") as caught:
        with naming_corrupt_records(damaged, "train", layout):
            read(damaged, input_format=layout)
    assert (caught.value.path, caught.value.offset) == (shard.path, records[9][0])


def test_errors_of_something_else_pass_through(pristine: Manifest) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError), naming_corrupt_records(pristine, "train"):
        tf.reshape(tf.zeros([3]), [2])
    assert diagnose(pristine, "train") is None


@pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="needs a GPU")
def test_prefetch_to_gpu(pristine: Manifest) -> None:
    data = read_batches(pristine, "train", batch_size=64, training=True, device="/GPU:0")
    batches = list(data)
    assert all("GPU" in value.device for value in tf.nest.flatten(batches[0]))
    assert_equal(tf.nest.map_structure(lambda value: value.numpy(), batches), read(pristine))
