"""From columns of the log to rows: types, missing values, labels, and what is wrong with bad rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.convert.cleaner import Cleaner
from pipelines.convert.rows import Rows
from pipelines.convert.split import HashSplit, RandomSplit, TimeSplit
from pipelines.log.parts import Chunk
from pipelines.schema import Feature, Label, Schema, Space, Task, Threshold
from stem_util.errors import UserError

_TASK = Task("click", Label("click"))
_EVERYTHING_TRAIN = RandomSplit((1.0, 0.0, 0.0), 0)


def _feature(kind: str, dtype: str = "int64", **settings: Any) -> Feature:
    return Feature("f", kind, "user", "x", dtype, **settings)  # type: ignore[arg-type]


def _clean(
    feature: Feature | None, columns: dict[str, pa.Array], *, task: Task = _TASK, drop: bool = False, **settings: Any
) -> tuple[Rows, dict[tuple[str, str], int]]:
    count = len(next(iter(columns.values())))
    columns = {"click": pa.array([0] * count)} | columns
    split = settings.pop("split", _EVERYTHING_TRAIN)
    schema = Schema("s", (feature,) if feature else (), (task,), **settings)
    chunk = Chunk("log.parquet", np.arange(count) + 1000, columns, 0)
    rows, bad = Cleaner(schema, split, drop).clean(chunk, chunk.rows + 50_000, 0)
    return rows, dict(bad)


def _ids(feature: Feature, array: pa.Array) -> list:
    return _clean(feature, {"x": array})[0].ids["f"].to_pylist()


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([1, None, -(2**63)], pa.int64()), [1, None, None]),
        (pa.array([1, 255], pa.uint8()), [1, 255]),
        (pa.array([True, False, None]), [1, 0, None]),
        (pa.array([2**63 - 1], pa.uint64()), [2**63 - 1]),
        (pa.array([b"7", b" -8 ", None], pa.binary()), [7, -8, None]),
        (pa.array([5, None, 5]).dictionary_encode(), [5, None, 5]),
    ],
)
def test_integers_of_any_width_are_int64(array: pa.Array, expected: list) -> None:
    assert _ids(_feature("categorical"), array) == expected


@pytest.mark.parametrize(
    "array",
    [
        pa.array(["a", "", None, "ü"]),
        pa.array(["a", "", None, "ü"], pa.large_string()),
        pa.array(["a", "", None, "ü"]).dictionary_encode(),
        pa.array([b"a", b"", None, "ü".encode()], pa.binary()),
    ],
)
def test_strings_of_any_type(array: pa.Array) -> None:
    assert _ids(_feature("categorical", "string"), array) == ["a", None, None, "ü"]


@pytest.mark.parametrize(
    ("feature", "array", "why"),
    [
        (_feature("categorical"), pa.array([1, 2**63], pa.uint64()), "feature 'f' is 9223372036854775808, .* int64"),
        (_feature("categorical"), pa.array([b"1", b"1.5"]), "feature 'f' is '1.5', which is not an int64"),
        (
            _feature("categorical", "string"),
            pa.array([b"a", b"\xff\xfe"]),
            r"is b'\\xff\\xfe', which is not UTF-8",
        ),
        (_feature("categorical", missing="error"), pa.array([1, None]), "feature 'f' is null, .* missing: error"),
        (
            _feature("categorical", "string", missing="error"),
            pa.array(["a", ""]),
            "feature 'f' is '', .* missing: error",
        ),
        (_feature("multivalent", max_length=2), pa.array([[1], [2**63]], pa.list_(pa.uint64())), "not an int64"),
        (_feature("multivalent", max_length=2, missing="error"), pa.array([[1], [2, None]]), "missing: error"),
        (_feature("numeric", "float32"), pa.array([b"1e3", b"abc"]), "feature 'f' is 'abc', which is not a number"),
        (_feature("numeric", "float32"), pa.array([1.0, np.inf]), "feature 'f' is inf, which is not finite"),
        (_feature("numeric", "float32"), pa.array([1.0, 1e39]), "not finite in float32"),
        (
            _feature("numeric", "float32", transform=("log1p",)),
            pa.array([-0.5, -1.0]),
            "is -1.0; log1p needs",
        ),
        (
            _feature("numeric", "float32", missing="error"),
            pa.array([1.0, np.nan]),
            "feature 'f' is nan, .*: error",
        ),
        (
            _feature("dense", "float32", length=2),
            pa.array([[1.0, 2.0], [1.0]]),
            r"is \[1.0\], .* not have 2 elem",
        ),
        (_feature("dense", "float32", length=1), pa.array([[1.0], [np.inf]]), "not finite"),
    ],
)
def test_bad_values_name_file_row_value_and_rule(feature: Feature, array: pa.Array, why: str) -> None:
    with pytest.raises(UserError, match=f"^log.parquet, row 1,001: .*{why}.* .--on_bad_rows=drop counts and skips"):
        _clean(feature, {"x": array})
    rows, bad = _clean(feature, {"x": array}, drop=True)
    assert rows.row_ids.tolist() == [51_000]
    assert list(bad.values()) == [1]
    assert next(iter(bad))[0] == "x"


@pytest.mark.parametrize(
    ("array", "separator"),
    [
        (pa.array([[3, None, 4, 5], [], None, [-(2**63), 6]]), None),
        (pa.array([[3, None, 4, 5], [], None, [6]], pa.large_list(pa.int16())), None),
        (pa.array(["3|| 4|5", "", None, "6"]), "|"),
        (pa.array([b"3|| 4|5", b"", None, b"6"]), "|"),
    ],
)
def test_multivalent_drops_missing_values_and_keeps_the_first(array: pa.Array, separator: str | None) -> None:
    feature = _feature("multivalent", max_length=2, separator=separator)
    lists = _clean(feature, {"x": array})[0].lists["f"]
    assert lists.values.to_pylist() == [3, 4, 6]
    assert lists.lengths.tolist() == [2, 0, 0, 1]


def test_multivalent_rows_survive_dropping() -> None:
    feature = _feature("multivalent", max_length=3)
    columns = {"x": pa.array([[1, 2], [3], [4, 5, 6]]), "click": pa.array([0, 7, 1])}
    rows, _ = _clean(feature, columns, drop=True)
    assert rows.lists["f"].values.to_pylist() == [1, 2, 4, 5, 6]
    assert rows.lists["f"].lengths.tolist() == [2, 3]


def test_numeric_missing_is_nan() -> None:
    for array in (pa.array([1.5, None, np.nan]), pa.array([b"1.5", None, b"nan"])):
        values = _clean(_feature("numeric", "float32"), {"x": array})[0].numerics["f"]
        np.testing.assert_array_equal(values, np.array([1.5, np.nan, np.nan], np.float32))


def test_dense_missing_is_zero() -> None:
    arrays = [pa.array([[1.0, None], None]), pa.array([[1.0, np.nan], None], pa.list_(pa.float32(), 2))]
    for array in arrays:
        vectors = _clean(_feature("dense", "float32", length=2), {"x": array})[0].vectors["f"]
        np.testing.assert_array_equal(vectors, np.array([[1, 0], [0, 0]], np.float32))


def _labels(task: Task, **columns: Any) -> list[float | None]:
    arrays = {name: pa.array(values) for name, values in columns.items()}
    labels = _clean(None, arrays, task=task)[0].labels["t"]
    return [None if np.isnan(label) else float(label) for label in labels]


def test_labels() -> None:
    assert _labels(Task("t", Label("y")), y=[0, 1]) == [0, 1]
    assert _labels(Task("t", Label("y")), y=[True, False]) == [1, 0]
    assert _labels(Task("t", Label("y")), y=[b"1", b"0"]) == [1, 0]
    assert _labels(Task("t", Label("y", missing="outside")), y=[1, None]) == [1, None]
    assert _labels(Task("t", Label("y", missing="outside")), y=[1.0, np.nan]) == [1, None]
    assert _labels(Task("t", Label("y", equals="a.")), y=["a.", "b", ""]) == [1, 0, 0]
    assert _labels(Task("t", Label("y", equals="")), y=["a", ""]) == [0, 1]
    assert _labels(Task("t", Label("y", equals=3)), y=[b"3", b"4"]) == [1, 0]
    ratio = Label("y", divide_by="d", clip=(0.0, 1.0), missing="outside")
    assert _labels(Task("t", ratio, "regression"), y=[1, 9, 5, None, -1], d=[2, 3, 0, 1, 4]) == [0.5, 1, None, None, 0]


def test_labels_that_a_condition_makes() -> None:
    rating = {"y": [1, 3, 4, 4.5, 5]}
    assert _labels(Task("t", Label("y", at_least=4)), **rating) == [0, 0, 1, 1, 1]
    assert _labels(Task("t", Label("y", at_most=3)), **rating) == [1, 1, 0, 0, 0]
    assert _labels(Task("t", Label("y", at_least=3, at_most=4)), **rating) == [0, 1, 1, 0, 0]
    assert _labels(Task("t", Label("y", one_of=(1, 4.5))), **rating) == [1, 0, 0, 1, 0]
    assert _labels(Task("t", Label("y", equals=4)), **rating) == [0, 0, 1, 0, 0]
    assert _labels(Task("t", Label("y", one_of=("a", ""))), y=["a", "b", "", "ab"]) == [1, 0, 1, 0]
    csv = [b"4", b" 4.5", b"4.0", b"-1"]
    assert _labels(Task("t", Label("y", at_least=4)), y=csv) == [1, 1, 1, 0]
    assert _labels(Task("t", Label("y", one_of=(4, 5))), y=csv) == [1, 0, 1, 0]
    outside = Task("t", Label("y", at_least=4, missing="outside"))
    assert _labels(outside, y=[4.0, None, np.nan]) == [1, None, None]
    assert _labels(Task("t", Label("y", one_of=(4,), missing="outside")), y=[4.0, None, np.nan]) == [1, None, None]


def test_a_threshold_may_be_another_column() -> None:
    half = Task("t", Label("y", at_least=Threshold("d", 0.5), missing="outside"))
    assert _labels(half, y=[5, 4, 0, None, 3], d=[10, 10, 0, 1, None]) == [1, 0, 1, None, None]
    between = Task("t", Label("y", at_least=Threshold("low"), at_most=Threshold("high")))
    assert _labels(between, y=[1, 2, 3, 4], low=[2, 2, 2, 2], high=[3, 3, 3, 3]) == [0, 1, 1, 0]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.dictionary(pa.int8(), pa.float32())])
def test_thresholds_are_numbers_as_the_column_holds_them(kind: pa.DataType) -> None:
    """0.7 of a float32 column is less than 0.7 in float64."""
    stored = pa.array(np.array([0.6, 0.7, 0.8], "f2" if kind == pa.float16() else "f4"))
    stored = stored.dictionary_encode() if pa.types.is_dictionary(kind) else stored
    for label, expected in (
        (Label("y", at_least=0.7), [0, 1, 1]),
        (Label("y", at_most=0.7), [1, 1, 0]),
        (Label("y", one_of=(0.7,)), [0, 1, 0]),
    ):
        assert _clean(None, {"y": stored}, task=Task("t", label))[0].labels["t"].tolist() == expected


@pytest.mark.parametrize("encode", [lambda y: y, lambda y: [str(v).encode() for v in y]])
def test_large_numbers_equal_only_themselves(encode: Any) -> None:
    large = 2**53 + 1
    assert _labels(Task("t", Label("y", equals=large)), y=encode([large, large - 1, 5])) == [1, 0, 0]


def test_several_tasks_of_one_column() -> None:
    tasks = (
        Task("good", Label("y", at_least=4)),
        Task("fair", Label("y", at_least=3)),
        Task("low", Label("y", at_most=2)),
    )
    chunk = Chunk("log.parquet", np.arange(4), {"y": pa.array([2, 3, 4, 5])}, 0)
    labels = Cleaner(Schema("s", (), tasks), _EVERYTHING_TRAIN, False).clean(chunk, chunk.rows, 0)[0].labels
    assert {name: values.tolist() for name, values in labels.items()} == {
        "good": [0, 0, 1, 1],
        "fair": [0, 1, 1, 1],
        "low": [1, 0, 0, 0],
    }


@pytest.mark.parametrize(
    ("task", "columns", "why"),
    [
        (Task("t", Label("y", at_least=4)), {"y": [4, None]}, "label 'y' is null; task 't' needs a value"),
        (Task("t", Label("y", at_least=4)), {"y": [4, np.inf]}, "label 'y' is inf, which is not finite"),
        (Task("t", Label("y", at_most=4)), {"y": [b"4", b"four"]}, "label 'y' is 'four', which is not a number"),
        (Task("t", Label("y", one_of=(4,))), {"y": [b"4", b"four"]}, "label 'y' is 'four', which is not a number"),
        (Task("t", Label("y", at_least=Threshold("d"))), {"y": [4, 4], "d": [1, None]}, "threshold 'd' is null; task"),
        (
            Task("t", Label("y", at_least=Threshold("d"))),
            {"y": [4, 4], "d": [1, -np.inf]},
            "threshold 'd' is -inf, which",
        ),
        (Task("t", Label("y")), {"y": [0, 7]}, "label 'y' is 7; a binary label is 0 or 1"),
        (Task("t", Label("y")), {"y": [0, None]}, "label 'y' is null; task 't' needs a value .missing: outside"),
        (Task("t", Label("y")), {"y": [b"0", b"yes"]}, "label 'y' is 'yes', which is not a number"),
        (Task("t", Label("y", equals="a")), {"y": [b"a", b"\xff"]}, r"label 'y' is b'\\xff', which is not UTF-8"),
        (Task("t", Label("y", equals="a")), {"y": ["a", None]}, "label 'y' is null"),
        (Task("t", Label("y"), "regression"), {"y": [0.5, np.inf]}, "label 'y' is inf, which is not finite"),
        (Task("t", Label("y", divide_by="d"), "regression"), {"y": [1, 1], "d": [1, 0]}, "denominator 'd' is 0"),
        (Task("t", Label("y", divide_by="d"), "regression"), {"y": [1, 1], "d": [1, None]}, "denominator 'd' is null"),
    ],
)
def test_bad_labels(task: Task, columns: dict[str, list], why: str) -> None:
    arrays = {name: pa.array(values) for name, values in columns.items()}
    with pytest.raises(UserError, match=f"^log.parquet, row 1,001: {why}"):
        _clean(None, arrays, task=task)
    assert len(_clean(None, arrays, task=task, drop=True)[0].row_ids) == 1


def test_the_earliest_bad_row_is_named_and_each_counts_once() -> None:
    columns = {"x": pa.array([b"1", b"2", b"z", b"z"]), "click": pa.array([0, 7, 7, 0])}
    with pytest.raises(UserError, match="row 1,001: label 'click' is 7"):
        _clean(_feature("categorical"), columns)
    rows, bad = _clean(_feature("categorical"), columns, drop=True)
    assert rows.row_ids.tolist() == [51_000]
    assert bad == {("x", "not an int64"): 2, ("click", "binary label not 0 or 1"): 1}


def test_keys() -> None:
    columns = {"x": pa.array([b"1", b"2"]), "u": pa.array(["a", "b"])}
    rows, _ = _clean(_feature("categorical"), columns, group="x", item="u")
    assert rows.keys["group"].to_pylist() == [1, 2]  # text, but the feature says int64
    assert rows.keys["item"].to_pylist() == ["a", "b"]
    for value in (None, ""):
        with pytest.raises(UserError, match="row 1,001: the key column 'u' is .*; every row needs a value"):
            _clean(None, {"u": pa.array(["a", value])}, group="u")


def test_split_columns_need_values() -> None:
    time = TimeSplit("t", pa.int64(), 2**63 + 5, 2**63 + 6)
    assert _clean(None, {"t": pa.array([5, 6, 7])}, split=time)[0].split.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="row 1,001: the time column 't' is null; every row needs a time"):
        _clean(None, {"t": pa.array([5, None])}, split=time)
    with pytest.raises(UserError, match="row 1,001: column 't' is 'soon', which is not of the column's type int64"):
        _clean(None, {"t": pa.array([b"5", b"soon"])}, split=time)
    with pytest.raises(UserError, match="row 1,001: the key column 't' is null"):
        _clean(None, {"t": pa.array([5, None])}, split=HashSplit("t", (0.8, 0.1, 0.1), 0))


def _spaces(columns: Mapping[str, list], *tasks: Task) -> dict[str, list]:
    """By task, the labels; None outside its space."""
    arrays = {name: pa.array(values) for name, values in columns.items()}
    schema = Schema("s", (), tasks)
    chunk = Chunk("log.parquet", np.arange(len(next(iter(arrays.values())))), arrays, 0)
    rows, _ = Cleaner(schema, _EVERYTHING_TRAIN, False).clean(chunk, chunk.rows, 0)
    return {name: [None if np.isnan(v) else v for v in labels] for name, labels in rows.labels.items()}


def _weighted(columns: Mapping[str, list], *tasks: Task, drop: bool = False) -> Rows:
    arrays = {name: pa.array(values) for name, values in columns.items()}
    chunk = Chunk("log.parquet", np.arange(len(next(iter(arrays.values())))), arrays, 0)
    return Cleaner(Schema("s", (), tasks), _EVERYTHING_TRAIN, drop).clean(chunk, chunk.rows, 0)[0]


def test_row_weights() -> None:
    click, buy = Task("click", Label("c"), row_weight="w"), Task("buy", Label("b"), space=Space(task="click"))
    rows = _weighted({"c": [1, 1, 0, 1], "b": [1, 0, None, 1], "w": [2, 0.5, 0, 0]}, click, buy)
    assert rows.weights == {"w": pytest.approx([2, 0.5, 0, 0])}
    # A row of weight 0 is outside its task's space, and not outside that of a task which asks for the label alone.
    np.testing.assert_array_equal(rows.labels["click"], np.array([1, 1, np.nan, np.nan], np.float32))
    np.testing.assert_array_equal(rows.labels["buy"], np.array([1, 0, np.nan, 1], np.float32))
    assert _weighted({"c": [b"1", b"0"], "w": [b" 2.5", b"1e1"]}, click).weights["w"].tolist() == [2.5, 10]
    assert _weighted({"c": [1, 0], "w": [True, False]}, click).weights["w"].tolist() == [1, 0]
    # What no label counts with is not looked at.
    outside = Task("t", Label("c", missing="outside"), row_weight="w")
    assert _weighted({"c": [1, None, None, None], "w": [3, None, -1, np.inf]}, outside).weights["w"].tolist() == [
        3,
        0,
        0,
        0,
    ]
    either = _weighted(
        {"c": [1, None, None], "b": [None, 0, None], "w": [3.0, 4.0, None]},
        outside,
        Task("u", Label("b", missing="outside"), row_weight="w"),
    )
    assert either.weights["w"].tolist() == [3, 4, 0]


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (None, "weight 'w' is null; a row of task 't' needs a weight of 0 or more .0 leaves it out."),
        (np.nan, "weight 'w' is nan; a row of task 't' needs a weight of 0 or more"),
        (-0.5, "weight 'w' is -0.5; a row of task 't' needs a weight of 0 or more"),
        (np.inf, "weight 'w' is inf, which is not finite in float32"),
        (1e39, "weight 'w' is 1e.39, which is not finite in float32"),
        (b"much", "weight 'w' is 'much', which is not a number"),
    ],
)
def test_bad_weights(weight: Any, why: str) -> None:
    columns: dict[str, list] = {"c": [1, 0], "w": [b"1", weight] if isinstance(weight, bytes) else [1.0, weight]}
    task = Task("t", Label("c"), row_weight="w")
    with pytest.raises(UserError, match=f"row 1: {why}"):
        _weighted(columns, task)
    assert _weighted(columns, task, drop=True).row_ids.tolist() == [0]


CLICK = Task("click", Label("c", missing="outside"))


def test_a_space_is_where_another_label_is_1() -> None:
    buy = Task("buy", Label("b"), space=Space(task="click"))
    pay = Task("pay", Label("p"), "regression", space=Space(task="buy"))
    # A null label outside the space is no error; rows outside click's own space are outside buy's.
    columns: dict[str, list] = {"c": [1, 0, None, 1], "b": [1, None, 1, 0], "p": [2.5, 1.0, None, None]}
    expected = {"pay": [2.5, None, None, None], "click": [1, 0, None, 1], "buy": [1, None, None, 0]}
    got = _spaces(columns, pay, CLICK, buy)
    assert got == expected and list(got) == ["pay", "click", "buy"]


# As people, pyarrow and pandas write them; the last are integers beside a missing one.
_CSV_MASKS = [[b"1", b"0", b""], [b"true", b"false", b""], [b"True", b" FALSE ", None], [b"1.0", b"0.0", b"nan"]]


@pytest.mark.parametrize("mask", [[True, False, None], [1, 0, None], [1.0, 0.0, float("nan")], *_CSV_MASKS])
def test_a_space_is_a_column(mask: list) -> None:
    task = Task("t", Label("y"), space=Space(column="m"))
    assert _spaces({"y": [0, 1, None], "m": mask}, task) == {"t": [0, None, None]}


@pytest.mark.parametrize(
    ("mask", "shown"),
    [
        ([1, 2], "2"),
        ([0.0, 0.5], "0.5"),
        ([1.0, np.inf], "inf"),
        ([b"true", b"yes"], "'yes'"),
        ([b"1", b"\xff"], "b'.*'"),
    ],
)
def test_what_a_space_cannot_hold(mask: list, shown: str) -> None:
    task = Task("t", Label("y"), space=Space(column="m"))
    message = f"row 1: the space of task 't', column 'm', is {shown}; 1 and true are inside, 0, false and null outside"
    with pytest.raises(UserError, match=message):
        _spaces({"y": [0, 1], "m": mask}, task)
    rows, bad = _clean(None, {"y": pa.array([0, 1]), "m": pa.array(mask)}, task=task, drop=True)
    assert (len(rows.row_ids), bad) == (1, {("m", "space not 0 or 1"): 1})


def test_a_label_is_missing_inside_its_space() -> None:
    task = Task("t", Label("y"), space=Space(column="m"))
    with pytest.raises(UserError, match="label 'y' is null; task 't' needs a value"):
        _spaces({"y": [None, 1], "m": [1, 0]}, task)


@pytest.mark.parametrize(
    ("label", "kind", "outside"),
    [
        (Label("y"), "binary", -1),
        (Label("y"), "binary", b"n/a"),
        (Label("y", equals=1), "binary", b"n/a"),
        (Label("y", equals="1"), "binary", b"\xff"),
        (Label("y"), "regression", np.inf),
        (Label("y", divide_by="d"), "regression", 1),
    ],
)
def test_outside_its_space_a_label_may_be_anything(label: Label, kind: str, outside: Any) -> None:
    """Logs put -1 or n/a where there was nothing to observe; rows with it still serve the other tasks."""
    inside = b"1" if isinstance(outside, bytes) else 1
    columns = {"m": [1, 0, None], "y": [inside, outside, outside], "d": [1, 0, None]}
    task = Task("t", label, kind, space=Space(column="m"))  # type: ignore[arg-type]
    assert _spaces(columns, task) == {"t": [1, None, None]}
    with pytest.raises(UserError, match="row 1: "):
        _spaces({**columns, "m": [1, 1, 1]}, task)


def test_sigmoid_labels_are_shares() -> None:
    task = Task("t", Label("y"), "regression", output="sigmoid")
    assert _labels(task, y=[0.0, 0.25, 1.0]) == [0.0, 0.25, 1.0]
    ratio = Label("y", divide_by="d", missing="outside")
    clipped = Task("t", Label("y", clip=(0.0, 1.0)), "regression", output="sigmoid")
    assert _labels(clipped, y=[-3.0, 0.5, 7.0]) == [0, 0.5, 1]
    masked = Task("t", Label("y"), "regression", output="sigmoid", space=Space(column="m"))
    assert _labels(masked, y=[0.5, 7.0], m=[1, 0]) == [0.5, None]
    advice = (
        r"; task 't' has output: sigmoid, whose labels lie in \[0, 1\]: write clip: \[0, 1\] in its label, or output"
    )
    for value in (1.5, -0.25):
        with pytest.raises(UserError, match=f"row 1,001: label 'y' is {value}{advice}: linear"):
            _labels(task, y=[0.5, value])
    # The value that is refused is the ratio, not what the log holds; 3 / 0 is outside the space.
    with pytest.raises(UserError, match=f"row 1,002: label 'y' / 'd' is 1.5{advice}"):
        _labels(Task("t", ratio, "regression", output="sigmoid"), y=[1, 3, 3], d=[2, 0, 2])
