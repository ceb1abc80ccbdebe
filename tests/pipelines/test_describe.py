"""Drafted schemas: what is guessed of each kind of column, and that the draft is a schema that fits its log."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipelines import schema_yaml
from pipelines.describe import draft, leakage, sample
from pipelines.log import source
from pipelines.log.find import find_files
from pipelines.log.parts import Log
from pipelines.schema import Label, Schema
from stem_util.errors import UserError

KUAIRAND = Path(__file__).parents[2] / "datasets" / "kuairand_sample" / "log.parquet"
ROWS = 2000


def _drafted(table: pa.Table, labels: Sequence[str] = ()) -> tuple[Schema, draft.Draft, str]:
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    result = draft.draft("a log", table, types, labels)
    text = draft.render(result, ["by a test"])
    read = schema_yaml.loads(text)
    read.validate_columns(dict(zip(table.column_names, table.schema.types, strict=True)))
    return read, result, text


def _log(**columns: Any) -> pa.Table:
    """A log with users, items and clicks, and more columns."""
    rng = np.random.default_rng(0)
    base = {
        "user_id": rng.integers(0, 300, ROWS),
        "videoId": [f"v{i}" for i in rng.integers(0, 300, ROWS)],
        "is_click": rng.integers(0, 2, ROWS),
    }
    return pa.table({**base, **columns})


def test_kuairand_has_its_features_tasks_and_keys() -> None:
    table = pq.read_table(KUAIRAND)
    read, result, text = _drafted(table)
    assert [feature.name for feature in read.features] == ["user_id", "video_id", "hourmin", "duration_ms"]
    assert [(feature.kind, feature.side) for feature in read.features] == [
        ("categorical", "user"),
        ("categorical", "item"),
        ("categorical", "context"),
        ("numeric", "item"),
    ]
    assert read.feature("duration_ms").transform == ("log1p", "standardise")
    assert read.task_names == ("click", "follow", "comment", "forward", "long_view", "profile_enter", "like")
    assert (read.group, read.item, read.time) == ("user_id", "video_id", "time_ms")
    assert result.times == ["time_ms", "date"]
    assert set(result.doubts) == {"play_time_ms", "comment_stay_time"}
    assert "# play_time_ms: {type: regression, label: {column: play_time_ms}}" in text
    assert "  # int64, 2 values; rate 0.6571\n  click: {label: {column: is_click}}\n" in text


@pytest.mark.parametrize(
    ("column", "task"),
    [("is_new", "new"), ("isNew", "isNew"), ("has bought", "has_bought"), ("did_", "did"), ("buy", "buy")],
)
def test_zeros_and_ones_under_the_name_of_an_outcome_are_tasks(column: str, task: str) -> None:
    read, _, _ = _drafted(_log(**{column: [0, 1] * (ROWS // 2)}))
    assert read.task_names == ("click", task)
    assert column not in [feature.column for feature in read.features]


def test_asked_for_labels_are_the_only_tasks_and_other_outcomes_are_no_features() -> None:
    read, result, text = _drafted(pq.read_table(KUAIRAND), ["long_view", "is_click"])
    assert read.task_names == ("long_view", "click")
    assert [feature.name for feature in read.features] == ["user_id", "video_id", "hourmin", "duration_ms"]
    assert result.doubts["is_follow"] == "another outcome? Uncomment it to predict it too; it is no feature"
    assert "# follow: {label: {column: is_follow}}" in text


rng = np.random.default_rng(1)
TAGS = [
    "|".join(rng.choice(["action", "drama", "war", "love"], rng.integers(1, 4), replace=False)) for _ in range(ROWS)
]
LISTS = [list(map(int, rng.integers(0, 50, n))) for n in np.where(np.arange(ROWS) < 10, 40, 3)]
COLUMNS = [
    # (column, values, the fields of its feature)
    ("genre", TAGS, {"kind": "multivalent", "side": "item", "dtype": "string", "separator": "|", "max_length": 3}),
    ("history", LISTS, {"kind": "multivalent", "side": "context", "dtype": "int64", "max_length": 3}),
    ("vector", rng.normal(size=(ROWS, 4)).tolist(), {"kind": "dense", "length": 4}),
    ("fixed", pa.array(rng.normal(size=(ROWS, 4)).tolist(), pa.list_(pa.float32(), 4)), {"kind": "dense", "length": 4}),
    ("weekend", rng.integers(0, 2, ROWS) > 0, {"kind": "categorical", "dtype": "int64"}),
    ("age", rng.integers(18, 80, ROWS), {"kind": "categorical", "side": "user", "dtype": "int64"}),
    ("price", rng.lognormal(3, 2, ROWS), {"kind": "numeric", "side": "item", "transform": ("log1p", "standardise")}),
    ("height", rng.normal(size=ROWS), {"kind": "numeric", "side": "context", "transform": ("standardise",)}),
    ("brand_id", rng.integers(0, 700, ROWS), {"kind": "categorical", "side": "item", "dtype": "int64"}),
    ("fingerprint", rng.integers(0, 2**62, 400).repeat(5), {"kind": "categorical", "dtype": "int64"}),
    ("seconds", rng.integers(0, 5000, ROWS), {"kind": "numeric", "transform": ("standardise",)}),
    ("city", rng.choice(["Rome, IT", "Paris, FR"], ROWS), {"kind": "categorical", "dtype": "string"}),
    ("kind", pa.array(rng.choice(["a", "b"], ROWS)).dictionary_encode(), {"kind": "categorical", "dtype": "string"}),
    ("device-type", rng.choice(["ios", "web"], ROWS), {"name": "device_type", "column": "device-type"}),
    ("2nd\nline: #", rng.choice(["x", "y"], ROWS), {"name": "c_2nd_line", "column": "2nd\nline: #"}),
]


@pytest.mark.parametrize(("column", "values", "fields"), COLUMNS)
def test_what_a_column_is_taken_for(column: str, values: Any, fields: dict[str, Any]) -> None:
    table = _log(**{column: values})
    # As describe does: dictionaries are decoded when rows are drawn.
    field = table.schema.field(column)
    if pa.types.is_dictionary(field.type):
        table = table.set_column(3, column, table.column(column).cast(field.type.value_type))
    feature = _drafted(table)[0].features[-1]
    assert feature.column == column
    assert {key: getattr(feature, key) for key in fields} == fields


@pytest.mark.parametrize(
    ("column", "values", "why"),
    [
        ("nothing", pa.nulls(ROWS, pa.int64()), "every value is missing"),
        ("version", [7] * ROWS, "constant (7)"),
        ("time_s", np.arange(1_650_000_000, 1_650_000_000 + ROWS), "a time (seconds since 1970); split the log by it"),
        ("at", pa.array(np.arange(ROWS), pa.timestamp("s")), "a time (timestamp[s]); split the log by it"),
        ("created", [f"2024-01-01 00:{i % 60:02}:00" for i in range(ROWS)], "a time (text); split the log by it"),
        ("request_id", rng.permutation(ROWS), "another value in every row: it names the row"),
        (
            "author_id",
            rng.integers(0, 9, ROWS).astype(float),
            "whole numbers written as floats under the name of an id",
        ),
        ("note", [f"{i} words and words and more words, all different" for i in range(ROWS)], "free text"),
        (
            "money",
            pa.array([None, Decimal(1)] * (ROWS // 2), pa.decimal128(20, 2)),
            "decimal128(20, 2) cannot be read as a",
        ),
        ("ragged", [[0.5] * (1 + i % 3) for i in range(ROWS)], "lists of floats of several lengths"),
        ("hollow", [[]] * ROWS, "every list is empty"),
        ("bytes", [b"\xff\xfe"] * ROWS, "binary cannot be read as a feature"),
    ],
)
def test_columns_that_are_left_out(column: str, values: Any, why: str) -> None:
    if column == "hollow":
        values = pa.array(values, pa.list_(pa.int64()))
    _, result, text = _drafted(_log(**{column: values}))
    assert result.left_out[column].startswith(why)
    assert f"#   {column}: {why}" in text


def test_a_column_that_gives_a_label_away_is_commented_out() -> None:
    table = _log()
    clicks = table["is_click"].to_numpy()
    noise = np.random.default_rng(2).normal(size=ROWS)
    table = table.append_column("position", pa.array(clicks * 9 + noise))
    table = table.append_column("hint", pa.array(["shown" if click else None for click in clicks]))
    read, result, text = _drafted(table)
    assert [feature.name for feature in read.features] == ["user_id", "videoId"]
    assert set(result.suspects) == {"position", "hint"}
    auc, task = result.suspects["position"]
    assert task == "is_click" and auc > 0.99
    assert "suspect: alone it predicts is_click with an AUC of 1.000" in text
    assert "  # hint: {kind: categorical" in text


def test_a_key_that_gives_a_label_away_stays_with_a_remark() -> None:
    table = _log()
    read, _, text = _drafted(table.set_column(2, "is_click", [(table["user_id"].to_numpy() % 2).tolist()]))
    assert read.feature("user_id").kind == "categorical"
    assert "  # suspect: alone it predicts is_click with an AUC of" in text


def test_an_auc_is_measured_on_other_rows_than_it_is_fitted_on() -> None:
    def alone(values: np.ndarray, labels: np.ndarray) -> float:
        return leakage.alone_auc(leakage.codings(pa.array(values, from_pandas=True)), labels)

    labels = np.random.default_rng(3).integers(0, 2, 4000).astype(float)
    # A different value in every row would be perfect on its own rows, and says nothing about others.
    assert alone(np.arange(4000), labels) == pytest.approx(0.5, abs=0.05)
    assert alone(labels * 3, labels) == 1.0
    # Half of the rows know the label, the other half share a value: (1 + 1 + 1 + 0.5) / 4 of the pairs in order.
    half = np.where(np.arange(4000) % 2, labels, 0.5)
    assert alone(half, labels) == pytest.approx(0.875, abs=0.01)
    missing = np.where(labels > 0, np.nan, 1.0)
    assert alone(missing, labels) == 1.0
    assert alone(half, np.zeros(4000)) == -1.0
    outside = np.where(np.arange(4000) < 3000, labels, np.nan)
    assert alone(half, outside) == pytest.approx(0.875, abs=0.01)


@pytest.mark.parametrize(
    ("values", "ask", "label"),
    [
        (["yes", "no"] * 1000, "state", Label("state", equals="yes")),
        (["a", "a", "b", None] * 500, "state", Label("state", equals="b", missing="outside")),
        ([1, 2] * 1000, "state", Label("state", equals=2)),
        ([True, False] * 1000, "state", Label("state")),
        ([0.5, 0.7] * 1000, "state", Label("state")),
        (["a", "b c", "d", "d"] * 500, "state=b c", Label("state", equals="b c")),
        ([1, 2, 3, 4] * 500, "state=3", Label("state", equals=3)),
    ],
)
def test_labels_that_are_asked_for(values: list[Any], ask: str, label: Label) -> None:
    read, _, _ = _drafted(_log(state=values), [ask])
    assert read.tasks[0].label == label
    assert read.tasks[0].type == ("regression" if 0.5 in values else "binary")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ["is_clik"],
            "--label=is_clik: 'is_clik' is not in the log; did you mean 'is_click'? Columns: user_id, videoId,",
        ),
        (
            ["state"],
            "--label=state: 3 different texts; say which one counts as 1, as in --label='state=on'. Values: 'on'",
        ),
        (
            ["state=of"],
            "--label=state=of: 'of' is no value of 'state'; did you mean 'off'? Values: 'on', 'off', 'idle'",
        ),
        (["lists"], "--label=lists: a column of list<item: int64> cannot be a label"),
    ],
)
def test_labels_that_cannot_be(labels: list[str], message: str) -> None:
    table = _log(state=["on", "off", "idle", "on"] * 500, lists=[[1]] * ROWS)
    with pytest.raises(UserError) as caught:
        _drafted(table, labels)
    assert str(caught.value).startswith(message)


def test_logs_that_cannot_be_drafted() -> None:
    with pytest.raises(UserError, match="the log holds no rows"):
        _drafted(_log().slice(0, 0))
    with pytest.raises(UserError, match="no column looks like a label .* name it: --label=COLUMN"):
        _drafted(_log().drop_columns(["is_click"]))
    with pytest.raises(UserError, match=r"no column is left to be a feature \(a: constant \(1\)\)"):
        _drafted(pa.table({"a": [1] * 100, "is_click": [0, 1] * 50}))


def _open(path: Path) -> Log:
    return source.open_log(find_files(str(path)))


def test_a_sample_is_uniform_over_the_log(tmp_path: Path) -> None:
    for part in range(3):
        pq.write_table(pa.table({"row": np.arange(200_000) + part * 200_000}), tmp_path / f"{part}.parquet")
    drawn = sample.draw(_open(tmp_path), 10_000)
    rows = drawn.table["row"].to_numpy()
    assert (len(rows), drawn.seen, drawn.complete) == (10_000, 600_000, False)
    assert (np.diff(rows) > 0).all()
    # Six bins of 1667 rows on average, standard deviation 37.
    assert np.abs(np.histogram(rows, 6, (0, 600_000))[0] - 10_000 / 6).max() < 200
    assert sample.draw(_open(tmp_path), 10_000).table.equals(drawn.table)


def test_csv_columns_get_types(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"i,f,t,zip,raw,none\n1,1.5,x,007,\xff,\n2,,y,1234,a,\n3\n")
    drawn = sample.draw(_open(tmp_path / "a.csv"), 10)
    assert [str(kind) for kind in drawn.table.schema.types] == [
        "int64",
        "double",
        "string",
        "string",
        "binary",
        "int64",
    ]
    assert (drawn.seen, drawn.malformed, drawn.complete) == (2, 1, True)


Job = Callable[..., subprocess.CompletedProcess[str]]


def test_the_job_writes_once_and_says_what_it_did(run_job: Job, tmp_path: Path) -> None:
    pyarrow.csv.write_csv(pq.read_table(KUAIRAND).slice(0, 5000), tmp_path / "log.csv")
    path = tmp_path / "draft.yaml"
    job = run_job("pipelines.jobs.describe", str(tmp_path / "log.csv"), "--label=is_click", f"--output={path}")
    assert (job.returncode, job.stdout) == (0, "")
    read = schema_yaml.load(path)
    assert (read.name, read.task_names) == ("log", ("click",))
    assert "read      5,000 rows, 15 columns\nfeatures  user_id, video_id, hourmin, duration_ms\n" in job.stderr
    assert f"--schema={path} --output=DIR --split=time --split_column=time_ms\n" in job.stderr
    again = run_job("pipelines.jobs.describe", str(tmp_path / "log.csv"), f"--output={path}")
    message = f"error: {path}: exists; choose another --output, or pass --overwrite\n"
    assert (again.returncode, again.stderr) == (2, message)
    assert run_job("pipelines.jobs.describe", str(tmp_path), f"--output={path}", "--overwrite").returncode == 0
    assert len(schema_yaml.load(path).tasks) > 1


def test_the_job_prints_yaml_to_stdout(run_job: Job) -> None:
    job = run_job("pipelines.jobs.describe", str(KUAIRAND))
    assert job.returncode == 0
    assert schema_yaml.loads(job.stdout).name == "log"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: which log? Give CSV or Parquet files, globs or directories\n"),
        (["nowhere.csv"], "error: nowhere.csv: no such file or directory\n"),
        ([str(KUAIRAND), "--csv_delimiter=::"], "error: --csv_delimiter=::: should be one ASCII character"),
    ],
)
def test_mistakes_of_the_command_line(job_in_process: Job, arguments: list[str], message: str) -> None:
    job = job_in_process("pipelines.jobs.describe", *arguments)
    assert job.returncode == 2
    assert job.stderr.startswith(message)


def test_many_values_make_a_note_of_hashed_ids() -> None:
    rng = np.random.default_rng(0)
    size, values = 100_000, 8_000_000
    table = pa.table({"user_id": rng.integers(0, values, size), "is_click": rng.integers(0, 2, size)})
    types = {"user_id": "int64", "is_click": "int64"}
    note = draft.draft("a log", table, types, rows=10**9).notes["user_id"]
    found = re.search(r"\nabout ([\d,]+) values or more in the log: .* hash: \{buckets: 1000000, hashes: 2\}", note)
    assert found is not None
    assert int(found[1].replace(",", "")) == pytest.approx(values, rel=0.15)
    # No more values than rows.
    assert "hash" not in draft.draft("a log", table, types, rows=4_000_000).notes["user_id"]
    assert "hash" not in draft.draft("a log", table, types).notes["user_id"]
