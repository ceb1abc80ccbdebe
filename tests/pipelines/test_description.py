"""What is drafted of a log, conversion takes with the command that is given: documented, odd and random logs."""

from __future__ import annotations

import csv
import datetime
import re
import shlex
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipelines import schema_yaml
from pipelines.convert.conversion import convert
from pipelines.convert.options import Options
from pipelines.describe import description
from pipelines.log import sniff
from pipelines.log.parts import CsvOptions
from pipelines.manifest import SPLITS, Manifest
from pipelines.schema import Label, Schema
from stem_util.errors import UserError

ROOT = Path(__file__).parents[2]
KUAIRAND = ROOT / "datasets" / "kuairand_sample" / "log.parquet"
CENSUS = ROOT / "datasets" / "census_income" / "test.parquet"
ROWS = 600


def _options(command: str) -> Options:
    """What stem-convert would do."""
    program, log, *words = shlex.split(command)
    assert program == "stem-convert"
    given = dict(word.removeprefix("--").split("=", 1) for word in words)
    lists = {name: tuple(next(csv.reader([given[name]]))) for name in ("csv_columns", "csv_nulls") if name in given}
    options = Options(
        schema=schema_yaml.load(given.pop("schema")),
        output=given.pop("output"),
        log=log,
        split=given.pop("split"),
        split_column=given.pop("split_column", None),
        drop_bad_rows=given.pop("on_bad_rows", "fail") == "drop",
        csv=CsvOptions(
            {"tab": "\t"}.get(given.get("csv_delimiter", ""), given.get("csv_delimiter")),
            lists.get("csv_columns", ()),
            lists.get("csv_nulls", ("",)),
        ),
        layouts=("rows",),
    )
    assert not given.keys() - {"csv_delimiter", "csv_columns", "csv_nulls"}
    return options


def _convert(
    path: Path, tmp_path: Path, labels: Sequence[str] = (), options: CsvOptions | None = None
) -> tuple[Schema, Manifest, description.Description]:
    """Describes a log and converts it as the draft and the command say, unchanged."""
    found = description.describe([str(path)], options or CsvOptions(), labels, 200_000)
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "my draft.yaml").write_text(found.text, encoding="utf-8")
    done = convert(_options(found.command(str(tmp_path / "my draft.yaml"), str(tmp_path / "data"))))
    return done.schema, done, found


def _rows(done: Manifest) -> int:
    return sum(done.rows(split) for split in SPLITS)


def _write(table: pa.Table, path: Path) -> Path:
    pq.write_table(table, path)
    return path


def _base(rows: int = ROWS, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "user_id": rng.integers(1, 60, rows),
        "item_id": rng.integers(1, 50, rows),
        "ts": 1_700_000_000 + np.arange(rows) * 60,
        "click": rng.integers(0, 2, rows),
    }


def _log(tmp_path: Path, **columns: Any) -> Path:
    return _write(pa.table({**_base(), **columns}), tmp_path / "log.parquet")


# The logs of the documentation.


@pytest.mark.parametrize("kind", ["parquet", "csv", "pandas"])
def test_kuairand(tmp_path: Path, kind: str) -> None:
    table, path = pq.read_table(KUAIRAND).slice(0, 3000), tmp_path / "log.csv"
    if kind == "parquet":
        path = _write(table, tmp_path / "log.parquet")
    elif kind == "csv":
        pyarrow.csv.write_csv(table, path)
    else:
        table.to_pandas().to_csv(path)
    drafted, done, found = _convert(path, tmp_path)
    assert [feature.name for feature in drafted.features] == ["user_id", "video_id", "hourmin", "duration_ms"]
    assert (drafted.group, drafted.item, _rows(done)) == ("user_id", "video_id", 3000)
    assert found.arguments[1:] == ("--split=time", "--split_column=time_ms")


def test_the_music_log_of_own_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.search(r"^```python\n(.*?)^```$", (ROOT / "docs" / "own_log.md").read_text(), re.MULTILINE | re.DOTALL)
    assert code is not None
    exec(compile(code[1], "make_log.py", "exec"), {})
    drafted, done, found = _convert(Path("music"), tmp_path)
    kinds = {feature.name: (feature.kind, feature.side) for feature in drafted.features}
    assert kinds == {
        "listener": ("categorical", "user"),
        "song": ("categorical", "item"),
        "genres": ("multivalent", "item"),
        "age": ("categorical", "user"),
        "hour": ("categorical", "context"),
        "seconds": ("numeric", "item"),
    }
    assert "item, as song decides it" in found.text
    assert drafted.task_names == ("outcome_finished", "outcome_skipped", "liked", "stars_at_least_4")
    assert (drafted.group, drafted.item, _rows(done)) == ("listener", "song", 20_000)
    assert "# listened: {type: regression, label: {column: listened}}" in found.text


def test_census_and_the_way_uci_writes_it(tmp_path: Path) -> None:
    table = pq.read_table(CENSUS).slice(0, 3000)
    labels = ["income_50k=50000+.", "marital_stat=Never married"]
    path = _write(table, tmp_path / "log.parquet")
    drafted, _, _ = _convert(path, tmp_path, labels)
    assert drafted.task_names == ("income_50k", "marital_stat")
    assert "instance_weight" not in [feature.column for feature in drafted.features]
    found = description.describe([str(path)], CsvOptions(), (), 200_000)
    assert schema_yaml.loads(found.text).task_names == ("income_50k",)
    # As UCI has it: without a header, and with a space behind each comma.
    rows = table.to_pandas().itertuples(index=False)
    (tmp_path / "census.data").write_text("".join(", ".join(map(str, row)) + "\n" for row in rows))
    with pytest.raises(
        UserError, match=r"the first line looks like data, .* name its 42 columns, as in --csv_columns="
    ):
        description.describe([str(tmp_path / "census.data")], CsvOptions(), (), 200_000)
    options = CsvOptions(columns=tuple(table.column_names))
    drafted, done, found = _convert(tmp_path / "census.data", tmp_path / "again", labels, options)
    assert drafted.task_names == ("income_50k", "marital_stat")
    assert _rows(done) == 3000 and found.arguments[-1].startswith("--csv_columns=age,class_worker,")


def _movielens(rows: int = 2000) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "userId": rng.integers(1, 100, rows),
            "movieId": rng.integers(1, 400, rows),
            "rating": rng.integers(1, 11, rows) / 2,
            "timestamp": rng.integers(789_652_004, 1_537_000_000, rows),
        }
    )


@pytest.mark.parametrize(
    ("separator", "argument"), [(",", None), (";", "--csv_delimiter=;"), ("\t", "--csv_delimiter=tab")]
)
def test_movielens(tmp_path: Path, separator: str, argument: str | None) -> None:
    _movielens().to_csv(tmp_path / "ratings.csv", sep=separator, index=False)
    drafted, done, found = _convert(tmp_path / "ratings.csv", tmp_path)
    assert [feature.name for feature in drafted.features] == ["userId", "movieId"]
    assert (drafted.group, drafted.item) == ("userId", "movieId")
    assert drafted.tasks[0].label == Label("rating", at_least=4)
    assert "  # rating: {type: regression, label: {column: rating}}" in found.text
    assert "--split_column=timestamp" in found.arguments and _rows(done) == 2000
    assert argument is None or found.arguments[-1] == argument


def test_movielens_with_two_colons_says_how_to_rewrite_it(tmp_path: Path) -> None:
    lines = ["::".join(map(str, row)) for row in _movielens(50).itertuples(index=False)]
    (tmp_path / "ratings.dat").write_text("\n".join(lines))
    with pytest.raises(
        UserError, match=r"separated by '::', .*: sed 's/::/\\t/g' .*ratings.dat > .*ratings.tsv; .*=a,b,c,d"
    ):
        description.describe([str(tmp_path / "ratings.dat")], CsvOptions(), (), 1000)
    (tmp_path / "ratings.tsv").write_text("\n".join(line.replace("::", "\t") for line in lines))
    options = CsvOptions(columns=("user", "movie", "rating", "time"))
    assert _convert(tmp_path / "ratings.tsv", tmp_path, (), options)[0].item == "movie"


# Odd logs.

ODD_TYPES: dict[str, Callable[[np.random.Generator], pa.Array]] = {
    "flag": lambda r: pa.array(r.random(ROWS) < 0.5),
    "born": lambda r: pa.array([datetime.date(1990, 1, 1 + int(i)) for i in r.integers(28, size=ROWS)]),
    "zoned": lambda r: pa.array(r.integers(0, 2**40, ROWS), pa.timestamp("us", "Europe/Rome")),
    "wait": lambda r: pa.array(r.integers(0, 9, ROWS), pa.duration("s")),
    "clock": lambda r: pa.array(r.integers(0, 9, ROWS), pa.time64("us")),
    "coded": lambda r: pa.array([[None, "a", "b"][i] for i in r.integers(3, size=ROWS)]).dictionary_encode(),
    "day": lambda r: pa.array([datetime.date(2024, 1, 1 + i % 28) for i in range(ROWS)]).dictionary_encode(),
    "view": lambda r: pa.array(r.choice(["a", "b"], ROWS), pa.string_view()),
    "large": lambda r: pa.array(r.choice(["a", "b"], ROWS), pa.large_string()),
    "money": lambda r: pa.array([Decimal(int(i)) for i in r.integers(9, size=ROWS)], pa.decimal128(9, 2)),
    "nested": lambda r: pa.array([{"a": 1, "b": [2]}] * ROWS),
    "structs": lambda r: pa.array([[{"a": 1}]] * ROWS),
    "pairs": lambda r: pa.array([[("a", 1)]] * ROWS, pa.map_(pa.string(), pa.int64())),
    "grid": lambda r: pa.array([[[1], [2]]] * ROWS),
    "nothing": lambda r: pa.nulls(ROWS),
    "no_int": lambda r: pa.nulls(ROWS, pa.int64()),
    "half": lambda r: pa.array(r.random(ROWS).astype(np.float16)),
    "huge": lambda r: pa.array(r.integers(0, 2**64, ROWS, np.uint64)),
    "tiny": lambda r: pa.array(r.integers(-9, 9, ROWS), pa.int8()),
    "raw": lambda r: pa.array([bytes([255, i % 256]) for i in range(ROWS)]),
    "text_bytes": lambda r: pa.array([b"x", b"y"] * (ROWS // 2)),
    "ids": lambda r: pa.array([None if i % 7 == 0 else [None, i] * (i % 4) for i in range(ROWS)]),
    "words": lambda r: pa.array(
        [["a", "b"][: i % 3] for i in range(ROWS)], pa.list_(pa.dictionary(pa.int8(), pa.string()))
    ),
    "vector": lambda r: pa.array([None if i % 9 == 0 else [0.5, None] for i in range(ROWS)], pa.list_(pa.float32(), 2)),
    "ragged": lambda r: pa.array([[0.5] * (i % 3) for i in range(ROWS)]),
    "empty": lambda r: pa.array([[]] * ROWS, pa.large_list(pa.string())),
    "infinite": lambda r: pa.array(np.where(np.arange(ROWS) == 7, np.inf, r.random(ROWS))),
    "vast": lambda r: pa.array(np.where(np.arange(ROWS) == 7, 1e300, r.random(ROWS))),
    "negative": lambda r: pa.array(-r.random(ROWS) * 1e6),
    "one_or_none": lambda r: pa.array([1.5 if i % 2 else None for i in range(ROWS)]),
    "extreme": lambda r: pa.array(np.where(np.arange(ROWS) % 2, -(2**63), 2**63 - 1)),
    "is_late": lambda r: pa.array([1 if i % 2 else None for i in range(ROWS)]),
    "is_gone": lambda r: pa.array(["True", "False", None] * (ROWS // 3)),
    "buy_amount": lambda r: pa.array(np.where(np.arange(ROWS) == 7, np.inf, r.random(ROWS))),
}


@pytest.mark.parametrize("column", ODD_TYPES)
def test_columns_of_every_type(tmp_path: Path, column: str) -> None:
    path = _log(tmp_path, **{column: ODD_TYPES[column](np.random.default_rng(0))})
    drafted, done, found = _convert(path, tmp_path)
    assert _rows(done) == ROWS and "click" in drafted.task_names
    assert re.search(rf"\b{column}\b", found.text)  # as a feature, a task or a comment


NAMES = [
    "", "Unnamed: 0", "__index_level_0__", "row_id", "a: b", "#x", "yes", "null", "1", "1e3", "~", "-", "名前", "a\nb",
    "it's",
    '"q"', "{x}", "a,b", "a b", "a-b", "a_b", "A_B", "a_b_2", "True", "bell\x07", "line\u2028end", "&a", "*a", "%",
    "name", "features", "label", "x" * 300,
]  # fmt: skip


def test_columns_of_any_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = _log(tmp_path, **{name: rng.integers(0, 9, ROWS) for name in NAMES})
    drafted, _, found = _convert(path, tmp_path)
    columns = [feature.column for feature in drafted.features]
    assert columns == ["user_id", "item_id", *(name for name in NAMES[4:] if name != "label")]
    assert "#   '': without a name, as pandas writes an index" in found.text
    assert "#   __index_level_0__: the index of a pandas table" in found.text


def test_five_hundred_columns(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = [lambda: rng.integers(0, 9, 100), lambda: rng.normal(size=100), lambda: rng.choice(["a", "b"], 100)]
    wide = {f"c{i}": kinds[i % 3]() for i in range(500)}
    path = _write(
        pa.table({**{name: values[:100] for name, values in _base().items()}, **wide}), tmp_path / "l.parquet"
    )
    assert len(_convert(path, tmp_path)[0].features) == 502


def test_keys_and_times_with_missing_values_are_not_used_and_said_so(tmp_path: Path) -> None:
    base = _base()
    user = pa.array(base["user_id"], mask=np.arange(ROWS) == 5)
    drafted, done, found = _convert(
        _log(tmp_path, user_id=user, ts=pa.array(base["ts"], mask=np.arange(ROWS) % 7 == 5)), tmp_path
    )
    assert (drafted.group, drafted.item, _rows(done)) == (None, "item_id", ROWS)
    assert drafted.feature("user_id").kind == "categorical"
    assert "# group: user_id  # 0.17% missing, and a key needs a value in every row" in found.text
    assert found.arguments[1:] == ("--split=random",)
    assert any(line.startswith("no split  by ts: 14.17% missing") for line in found.summary)


def test_a_session_stands_in_for_an_unknown_user(tmp_path: Path) -> None:
    user = pa.array(_base()["user_id"], mask=np.arange(ROWS) == 5)
    path = _log(tmp_path, user_id=user, session_id=np.arange(ROWS) // 10)
    assert _convert(path, tmp_path)[0].group == "session_id"


def test_a_time_that_cannot_split_is_not_split_by(tmp_path: Path) -> None:
    drafted, done, found = _convert(_log(tmp_path, ts=[1_700_000_000] * (ROWS - 1) + [1_700_000_001]), tmp_path)
    assert found.arguments[1:] == ("--split=random",)
    assert all(done.rows(split) for split in SPLITS) and "ts" not in [feature.name for feature in drafted.features]


def test_the_time_of_the_event_goes_before_those_of_users_and_items(tmp_path: Path) -> None:
    base = _base()
    path = _log(tmp_path, released_at=1_500_000_000 + base["item_id"] * 1000, ts=1_700_000_000 + np.arange(ROWS) // 20)
    assert _convert(path, tmp_path)[2].arguments[2] == "--split_column=ts"


def test_stages_of_one_event_are_no_features(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    click = rng.random(ROWS) < 0.5
    path = _log(
        tmp_path,
        click=click.astype(int),
        bagged=(click & (rng.random(ROWS) < 0.4)).astype(int),
        seen=(click | (rng.random(ROWS) < 0.4)).astype(int),
        gain=np.where(click & (rng.random(ROWS) < 0.4), rng.random(ROWS), 0.0),
        buy=(click & (rng.random(ROWS) < 0.4)).astype(int),
    )
    drafted, _, found = _convert(path, tmp_path)
    assert [feature.name for feature in drafted.features] == ["user_id", "item_id"]
    assert "an outcome? It is only ever there where click is 1" in found.text
    assert "an outcome? It is always there where click is 1" in found.text
    assert "only ever 1 where click is; with a space" in found.text
    asked, _, _ = _convert(path, tmp_path / "asked", ["buy"])
    assert [feature.name for feature in asked.features] == ["user_id", "item_id"]


def test_events_are_tasks_of_their_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    event = rng.choice(["view", "addtocart", "transaction"], ROWS, p=[0.8, 0.15, 0.05])
    table = pa.table(
        {
            "timestamp": 1_433_221_332_117 + np.arange(ROWS),
            "visitorid": rng.integers(1, 300, ROWS),
            "event": event,
            "itemid": rng.integers(1, 90, ROWS),
        }
    )
    pyarrow.csv.write_csv(table, tmp_path / "events.csv")
    drafted, _, _ = _convert(tmp_path / "events.csv", tmp_path)
    assert drafted.task_names == ("event_addtocart", "event_transaction")
    assert (drafted.group, drafted.item) == ("visitorid", "itemid")
    assert [feature.kind for feature in drafted.features] == ["categorical"] * 2


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("artist", range(100_000, 100_000 + ROWS), "categorical"),
        ("pid", [i * 7 % 401 for i in range(ROWS)], "categorical"),
        ("home_city", [i * 7 % 401 for i in range(ROWS)], "categorical"),
        ("h", np.random.default_rng(0).integers(0, 2**32, ROWS), "categorical"),
        ("bid", [i * 7 % 401 for i in range(ROWS)], "numeric"),
        ("num_tags", [i * 7 % 401 for i in range(ROWS)], "numeric"),
        ("song_length", [i * 7 % 401 for i in range(ROWS)], "numeric"),
    ],
)
def test_ids_are_no_numbers(tmp_path: Path, name: str, values: Any, kind: str) -> None:
    drafted, _, _ = _convert(
        _log(tmp_path, **{name: np.asarray(values)[np.random.default_rng(1).integers(0, ROWS, ROWS)]}), tmp_path
    )
    assert drafted.feature(name).kind == kind


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (["[1, 2]", "[3]"], "lists written as text"),
        (["1,5", "2,25"], "numbers with a decimal comma"),
        (["train", "test"], "says which split a row is in"),
        (["18446744073709551615", "18446744073709551614"], None),
        (["007", "1"], None),
        (["1", "1.5", "nan"], None),
        (["1", "x"], None),
        ([" 5", "6 "], None),
        (["True", "False"], None),
        (["a|b", "b|c", "a", ""], None),
        ([f"{i % 7 + 1}0 {i % 5 + 1}0" for i in range(35)], None),
        (["inf", "1"], "holds values that are not finite"),
    ],
)
def test_texts_of_csv(tmp_path: Path, values: list[str], why: str | None) -> None:
    frame = pd.DataFrame({**_base(), "x": [values[i % len(values)] for i in range(ROWS)]})
    frame.to_csv(tmp_path / "log.csv", index=False)
    drafted, done, found = _convert(tmp_path / "log.csv", tmp_path)
    assert _rows(done) == ROWS
    assert ("x" in [feature.name for feature in drafted.features]) == (why is None)
    assert why is None or f"#   x: {why}" in found.text
    if values[0] == "10 10":
        assert (drafted.feature("x").separator, drafted.feature("x").dtype) == (" ", "int64")
    if values[0].startswith("184"):
        assert (drafted.feature("x").kind, drafted.feature("x").dtype) == ("categorical", "string")


def test_a_rare_value_beyond_the_sample_still_counts(tmp_path: Path) -> None:
    rows = 5000
    base = {name: np.resize(values, rows) for name, values in _base().items()} | {"ts": np.arange(rows) + 1_700_000_000}
    late = np.arange(rows) == rows - 3
    table = pa.table(
        {
            **base,
            "user_id": pa.array(base["user_id"], mask=late),
            "x": np.where(late, np.inf, np.arange(rows) * 0.5),
            "click": pa.array(base["click"], mask=late),
            "tags": np.where(late, "a|1", "1|2"),
            "day": np.where(late, "unknown", "2024-01-31"),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    frame = table.to_pandas().astype({"user_id": "Int64", "click": "Int64"})
    frame.loc[rows - 2, "x"] = None
    frame.to_csv(tmp_path / "log.csv", index=False)
    for number, name in enumerate(["log.parquet", "log.csv"]):
        found = description.describe([str(tmp_path / name)], CsvOptions(), (), 100)
        drafted = schema_yaml.loads(found.text)
        assert drafted.group is None and drafted.tasks[0].label.missing == "outside"
        assert [feature.name for feature in drafted.features] == ["user_id", "item_id", "tags"]
        assert drafted.feature("tags").dtype == "string" and drafted.feature("tags").separator == "|"
        (tmp_path / f"{number}.yaml").write_text(found.text)
        convert(_options(found.command(str(tmp_path / f"{number}.yaml"), str(tmp_path / str(number)))))


def test_parts_that_differ_and_directories(tmp_path: Path) -> None:
    for part, kind in enumerate([pa.int32(), pa.int64()] * 6):
        directory = tmp_path / "log" / f"date=2024-01-{part + 1:02}" / f"shop={part % 3}"
        directory.mkdir(parents=True)
        table = pa.table({**_base(99, part), "x": pa.array(np.arange(99), kind), f"only_{part}": [1] * 99})
        pq.write_table(table.drop_columns(["ts"]), directory / "part.parquet")
    drafted, done, found = _convert(tmp_path / "log", tmp_path)
    assert _rows(done) == 12 * 99 and found.arguments[2] == "--split_column=date"
    assert [feature.name for feature in drafted.features] == ["user_id", "item_id", "x", "shop"]
    assert "only_0: " in found.text


def test_malformed_rows_are_dropped_by_the_command_too(tmp_path: Path) -> None:
    pd.DataFrame(_base()).to_csv(tmp_path / "log.csv", index=False)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("1,2,3\n")
    _, done, found = _convert(tmp_path / "log.csv", tmp_path)
    assert "--on_bad_rows=drop" in found.arguments and _rows(done) == ROWS


def test_headerless_logs_and_names_given_twice(tmp_path: Path) -> None:
    frame = pd.DataFrame(_base())
    frame.to_csv(tmp_path / "log.csv", index=False, header=False)
    with pytest.raises(UserError, match=r"looks like data, not like names \(.*\): name its 4 columns"):
        description.describe([str(tmp_path / "log.csv")], CsvOptions(), (), 1000)
    assert _convert(tmp_path / "log.csv", tmp_path, (), CsvOptions(columns=tuple(frame.columns)))[0].group == "user_id"
    frame.to_csv(tmp_path / "named.csv", index=False)
    with pytest.raises(UserError, match="the first line holds the names of --csv_columns: leave the flag out"):
        description.describe([str(tmp_path / "named.csv")], CsvOptions(columns=tuple(frame.columns)), (), 1000)


@pytest.mark.parametrize(
    ("text", "delimiter", "is_data"),
    [
        ("user;item;click\n1;2,5;0\n", ";", False),
        ("user item click\n1 2 0\n3 4 1\n", " ", False),
        ("a|b\n1|2\n", "|", False),
        ("101,121,click\n3,4,0\n5,6,1\n", None, False),  # numbers as names, and a name that is none
        ("0,1,2\n5,6,7\n", None, False),  # as pandas names columns without names
        (",user,click\n0,5,1\n1,6,0\n", None, False),
        ("5,x,1\n6,y,0\n5,x,0\n", None, True),
        ("39, State-gov, 77516\n50, Self-emp, 83311\n", None, True),
        ("anna,film,yes\nanna,film,no\nben,film,yes\n", None, True),
        ("196\t242\t3\n186\t302\t3\n", "\t", True),
        ('"only one column\n"', None, False),
        ("", None, False),
    ],
)
def test_the_first_lines_of_csv(tmp_path: Path, text: str, delimiter: str | None, is_data: bool) -> None:
    (tmp_path / "log.csv").write_text(text)
    seen = sniff.look(str(tmp_path / "log.csv"), CsvOptions())
    assert (seen.csv.delimiter, seen.advice is not None) == (delimiter, is_data)


def test_logs_of_no_rows(tmp_path: Path) -> None:
    empty = pa.table(_base()).slice(0, 0)
    pyarrow.csv.write_csv(empty, tmp_path / "empty.csv")
    for path in (_write(empty, tmp_path / "empty.parquet"), tmp_path / "empty.csv"):
        with pytest.raises(UserError, match="the log holds no rows: there is nothing to describe"):
            description.describe([str(path)], CsvOptions(), (), 1000)


def test_a_log_without_a_label_says_what_could_be_one(tmp_path: Path) -> None:
    table = pa.table(
        {"user_id": [1, 2, 3, 4] * 9, "state": ["on", "off", "off", "off"] * 9, "click": [0] * 36, "b": [0, 1] * 18}
    )
    with pytest.raises(
        UserError, match=r"no column looks like a label .*With two values: b, 'state=on'. Constant: click$"
    ):
        description.describe([str(_write(table, tmp_path / "l.parquet"))], CsvOptions(), (), 1000)


@pytest.mark.parametrize("seed", range(12))
def test_random_logs(tmp_path: Path, seed: int) -> None:
    """Some columns of every kind, with missing values here and there."""
    rng = np.random.default_rng(seed)
    columns = {name: pa.array(values) for name, values in _base(seed=seed).items()}
    columns |= {name: ODD_TYPES[name](rng) for name in rng.choice(list(ODD_TYPES), 8, replace=False)}
    columns |= {
        "category_id": pa.array(rng.integers(0, 20, ROWS)),
        "rating": pa.array(rng.integers(1, 6, ROWS)),
        "like": pa.array(rng.integers(0, 2, ROWS)),
        "tags": pa.array(rng.choice(["a|b", "b", "a|c|d", ""], ROWS)),
        "price": pa.array(rng.lognormal(3, 2, ROWS)),
    }
    for name in rng.choice(list(columns), len(columns) // 3, replace=False):
        if columns[name].type not in (pa.string_view(), pa.list_(pa.float32(), 2)) and name not in ("day", "coded"):
            columns[name] = pa.array(
                [None if rng.random() < 0.1 else value for value in columns[name].to_pylist()], columns[name].type
            )
    names = rng.permutation(list(columns)).tolist()
    table = pa.table({name: columns[name] for name in names})
    _, done, _ = _convert(_write(table, tmp_path / "log.parquet"), tmp_path)
    assert _rows(done) == ROWS
    flat = [
        name
        for name in names
        if not pa.types.is_nested(table.schema.field(name).type) and name not in ("wait", "raw", "half")
    ]
    table.select(flat).to_pandas().to_csv(tmp_path / "log.csv", index=bool(seed % 2))
    (tmp_path / "csv").mkdir()
    _, done, _ = _convert(tmp_path / "log.csv", tmp_path / "csv")
    assert _rows(done) == ROWS
