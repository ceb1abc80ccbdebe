"""Both layouts, byte for byte against protobuf, and read back by TensorFlow's own parser."""

import math

import numpy as np
import pyarrow as pa
import pytest

from pipelines import records
from pipelines.schema import Feature, Label, Schema, Task
from pipelines.tfrecord import Example


def _batch(rows: int = 40) -> pa.RecordBatch:
    """Ids of every varint length, lists short and long, negative keys, NaN labels."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 60, rows)
    lengths[:3] = 0, 1, 59
    lists = [(2 ** rng.integers(0, 31, n)).tolist() for n in lengths]
    return pa.RecordBatch.from_pydict(
        {
            "feature:user": pa.array((2 ** rng.integers(0, 31, rows)).astype(np.int32)),
            "feature:tags": pa.array(lists, pa.list_(pa.int32())),
            "feature:age": pa.array(np.append(rng.normal(size=rows - 1), np.nan).astype(np.float32)),
            "feature:image": pa.array(rng.normal(size=(rows, 40)).tolist(), pa.list_(pa.float32(), 40)),
            "label:click": pa.array(rng.choice([0, 1, np.nan], rows).astype(np.float32)),
            "key:group": pa.array(rng.integers(-(2**63), 2**63 - 1, rows)),
            "key:row_id": pa.array(np.arange(rows)),
        }
    )


def _message(row: dict) -> bytes:
    example = Example()
    for key, value in row.items():
        values = value if isinstance(value, list) else [value]
        floats = key.startswith("label:") or key in ("feature:age", "feature:image")
        feature = example.features.feature[key]
        (feature.float_list if floats else feature.int64_list).SetInParent()
        (feature.float_list if floats else feature.int64_list).value.extend(values)
    return example.SerializeToString(deterministic=True)


@pytest.mark.parametrize("at_a_time", [1, 7, 2048])
def test_rows_are_what_protobuf_writes(monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    monkeypatch.setattr(records, "_ROWS_AT_A_TIME", at_a_time)
    batch = _batch()
    assert list(records.rows(batch)) == [_message(row) for row in batch.to_pylist()]


def test_blocks_hold_columns() -> None:
    batch = _batch(10)
    batch = batch.append_column("feature:user2", batch["feature:user"])  # protobuf's order of keys is not Python's
    messages = list(records.blocks(batch, 4))
    assert [count for count, _ in messages] == [4, 4, 2]
    for start, (count, payload) in zip((0, 4, 8), messages, strict=True):
        assert Example.FromString(payload).SerializeToString(deterministic=True) == payload
        features = Example.FromString(payload).features.feature
        rows = batch.slice(start, count).to_pydict()

        def column(key: str, kind: str, features: dict = features) -> np.ndarray:
            (value,) = features[key].bytes_list.value
            return np.frombuffer(value, kind)

        assert column("feature:user", "<i4").tolist() == rows["feature:user"]
        assert column("length:tags", "<i4").tolist() == [len(tags) for tags in rows["feature:tags"]]
        assert column("feature:tags", "<i4").tolist() == [tag for tags in rows["feature:tags"] for tag in tags]
        np.testing.assert_array_equal(column("feature:age", "<f4"), np.array(rows["feature:age"], np.float32))
        np.testing.assert_array_equal(column("feature:image", "<f4").reshape(count, 40), rows["feature:image"])
        np.testing.assert_array_equal(column("label:click", "<f4"), np.array(rows["label:click"], np.float32))
        assert column("key:group", "<i8").tolist() == rows["key:group"]
        assert column("key:row_id", "<i8").tolist() == rows["key:row_id"]
        assert len(features) == 9


def test_sliced_batches_are_written_from_their_start() -> None:
    batch = _batch()
    assert list(records.rows(batch.slice(5, 9))) == list(records.rows(batch))[5:14]
    sliced, whole = (Example.FromString(next(records.blocks(b, 9))[1]) for b in (batch.slice(5, 9), batch))
    assert sliced != whole
    copied = pa.RecordBatch.from_pylist(batch.slice(5, 9).to_pylist(), batch.schema)
    assert sliced == Example.FromString(next(records.blocks(copied, 9))[1])


def test_tensorflow_parses_both_layouts() -> None:
    import tensorflow as tf

    batch = _batch()
    rows = batch.to_pydict()
    spec = {
        "feature:user": tf.io.FixedLenFeature([], tf.int64),
        "feature:tags": tf.io.RaggedFeature(tf.int64),
        "feature:age": tf.io.FixedLenFeature([], tf.float32),
        "feature:image": tf.io.FixedLenFeature([40], tf.float32),
        "label:click": tf.io.FixedLenFeature([], tf.float32),
        "key:group": tf.io.FixedLenFeature([], tf.int64),
    }
    parsed = tf.io.parse_example(list(records.rows(batch)), spec)
    assert parsed["feature:user"].numpy().tolist() == rows["feature:user"]
    assert parsed["feature:tags"].to_list() == rows["feature:tags"]
    assert parsed["key:group"].numpy().tolist() == rows["key:group"]
    assert [None if math.isnan(x) else x for x in parsed["label:click"].numpy().tolist()] == [
        None if math.isnan(x) else x for x in rows["label:click"]
    ]
    np.testing.assert_array_equal(parsed["feature:image"].numpy(), np.array(rows["feature:image"], np.float32))
    keys = ["feature:user", "key:row_id"]
    parsed = tf.io.parse_example(
        [payload for _, payload in records.blocks(batch, 16)],
        {key: tf.io.FixedLenFeature([], tf.string) for key in keys},
    )
    users = [tf.io.decode_raw(block, tf.int32).numpy() for block in parsed["feature:user"]]
    assert np.concatenate(users).tolist() == rows["feature:user"]
    places = [tf.io.decode_raw(block, tf.int64).numpy() for block in parsed["key:row_id"]]
    assert np.concatenate(places).tolist() == rows["key:row_id"]


_SCHEMA = Schema(
    name="records",
    features=(
        Feature("user", "categorical", "user", "user", "int64"),
        Feature("tags", "multivalent", "item", "tags", "int64", max_length=59),
        Feature("age", "numeric", "user", "age", "float32"),
        Feature("image", "dense", "item", "image", "float32", length=40),
    ),
    tasks=(Task("click", Label("click")),),
    group="user",
)


def test_blocks_are_parsed_as_they_were_written() -> None:
    batch = _batch()
    messages = [message for _, message in records.blocks(batch, 7)]
    parsed = records.parse(_SCHEMA, messages)
    assert list(parsed) == [name for name, _ in records.shapes(_SCHEMA)]
    for name, values in parsed.items():
        expected = batch.column(name).to_pylist()
        if name == "feature:tags":
            expected = [row + [0] * (59 - len(row)) for row in expected]
        np.testing.assert_array_equal(values, np.array(expected, values.dtype))
    # Whatever the order of the columns, as protobuf may leave it.
    example = Example.FromString(messages[0])
    other = Example()
    for key in sorted(example.features.feature, reverse=True):
        other.features.feature[key].CopyFrom(example.features.feature[key])
    again = records.parse(_SCHEMA, [messages[0], other.SerializeToString(), messages[0]])
    np.testing.assert_array_equal(again["key:row_id"], [*range(7)] * 3)
    assert [len(values) for values in records.parse(_SCHEMA, []).values()] == [0] * 7


def test_blocks_of_another_form_are_refused() -> None:
    (message,) = [message for _, message in records.blocks(_batch(5), 5)]
    for end in range(len(message)):
        with pytest.raises(records.BadBlock):
            records.parse(_SCHEMA, [message[:end]])
    (row,) = records.rows(_batch(4).slice(3))
    with pytest.raises(records.BadBlock, match="no tf.Example with one bytes value per column|ends early"):
        records.parse(_SCHEMA, [row])
    for key, data, why in (
        ("feature:age", None, "a block lacks feature:age"),
        ("feature:age", b"1234", "differ in length: feature:age"),
        ("feature:age", b"123", "feature:age of a block ends early"),
        ("length:tags", np.array([0, 1, 59, -1, 1], np.int32).tobytes(), "differ in length: feature:tags"),
    ):
        example = Example.FromString(message)
        if data is None:
            del example.features.feature[key]
        else:
            example.features.feature[key].bytes_list.value[:] = [data]
        for messages in ([example.SerializeToString()], [message, example.SerializeToString()]):
            with pytest.raises(records.BadBlock, match=why):
                records.parse(_SCHEMA, messages)
    random = np.random.default_rng(0)
    for _ in range(300):  # anything else than a refusal or rows would be a mistake
        damaged = bytearray(message)
        damaged[random.integers(len(message))] ^= 1 << random.integers(8)
        try:
            assert len(records.parse(_SCHEMA, [bytes(damaged)])["key:row_id"]) == 5
        except records.BadBlock:
            pass
