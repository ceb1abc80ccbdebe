"""Reading logs: which files, do they agree, and rows with their places."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipelines.log import source
from pipelines.log.find import find_files
from pipelines.log.parts import Chunk, CsvOptions, Log
from stem_util.errors import UserError


def _read(
    path: Path, csv: CsvOptions | None = None, *, columns: list[str] | None = None, skip: bool = False
) -> list[Chunk]:
    log = source.open_log([str(path)], csv)
    return [chunk for unit in log.units for chunk in source.read(log, unit, columns, skip_malformed=skip)]


def _rows(chunks: list[Chunk], column: str) -> list[tuple[int, object]]:
    return [(int(r), v) for c in chunks for r, v in zip(c.rows, c.columns[column].to_pylist(), strict=True)]


def test_find_files(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "day=1/c.csv", "_SUCCESS", ".hidden.csv", "_tmp/d.csv", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [str(tmp_path / name) for name in ("a.parquet", "b.parquet", "day=1/c.csv")]
    assert find_files(str(tmp_path)) == names
    assert find_files(f"{tmp_path}/*.parquet,{tmp_path}/a.parquet") == names[:2]
    (tmp_path / "empty").mkdir()
    for pattern, why in [
        ("nowhere.csv", "nowhere.csv: no such file or directory"),
        (f"{tmp_path}/*.orc", "no file matches it"),
        (f"{tmp_path}/empty", "the directory holds no Parquet files, nor any ending in .csv"),
        (" ,", "the log is empty"),
    ]:
        with pytest.raises(UserError, match=why):
            find_files(pattern)


def test_parquet_units_follow_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_UNIT_ROWS", 5)
    monkeypatch.setattr(source, "CHUNK_ROWS", 2)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": np.arange(11)}), path, row_group_size=2)
    log = source.open_log([str(path)])
    assert [(unit.first_row, unit.rows, unit.row_groups) for unit in log.units] == [
        (0, 4, (0, 1)),
        (4, 4, (2, 3)),
        (8, 3, (4, 5)),
    ]
    assert _rows(_read(path), "x") == [(i, i) for i in range(11)]
    assert max(len(chunk.rows) for chunk in _read(path)) == 2


def test_csv_values_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "CHUNK_ROWS", 2)
    path = tmp_path / "a.csv"
    path.write_text('x,y\n1,"new\nline"\n2,"say ""hi"", tab\t"\n\n3,\n4,日本\n')
    chunks = _read(path)
    assert _rows(chunks, "y") == [(0, b"new\nline"), (1, b'say "hi", tab\t'), (2, None), (3, "日本".encode())]
    assert _rows(_read(path, columns=["x"]), "x") == [(0, b"1"), (1, b"2"), (2, b"3"), (3, b"4")]


def test_csv_options(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("1\tNA\n\t2,3\n")
    options = CsvOptions(columns=("x", "y"), nulls=("NA",))
    assert _rows(_read(path, options), "y") == [(0, None), (1, b"2,3")]
    assert _rows(_read(path, options), "x") == [(0, b"1"), (1, b"")]
    path = tmp_path / "b.csv"
    path.write_text("x|y\n1|2\n")
    assert _rows(_read(path, CsvOptions(delimiter="|")), "y") == [(0, b"2")]


@pytest.mark.parametrize("header", [True, False])
def test_malformed_csv_rows_keep_their_numbers(tmp_path: Path, header: bool) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x,y\n" * header + "0,a\n1\n2,c\n3,d,e\n4\n5,f\n6\n")
    options = CsvOptions(columns=() if header else ("x", "y"))
    with pytest.raises(UserError, match="a.csv, row 1: 1 values, but the file has 2 columns .--on_bad_rows=drop"):
        _read(path, options)
    chunks = _read(path, options, skip=True)
    assert _rows(chunks, "x") == [(0, b"0"), (2, b"2"), (5, b"5")]
    assert sum(chunk.malformed for chunk in chunks) == 4
    log = source.open_log([str(path)], options)
    assert source.count_rows(log, log.units[0], skip_malformed=True) == 7


def test_empty_files(tmp_path: Path) -> None:
    for name in ("a.csv", "a.parquet"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=f"{name}: the file is empty .0 bytes."):
            source.open_log([str(tmp_path / name)])
    (tmp_path / "b.csv").write_text("x,y\n")
    assert _rows(_read(tmp_path / "b.csv"), "x") == []
    pq.write_table(pa.table({"x": pa.array([], pa.int64())}), tmp_path / "b.parquet")
    assert _rows(_read(tmp_path / "b.parquet"), "x") == []


def test_files_that_disagree(tmp_path: Path) -> None:
    def write(name: str, **columns: list) -> str:
        pq.write_table(pa.table(columns), tmp_path / name)
        return str(tmp_path / name)

    first = write("a.parquet", user=[1], click=[0])
    assert len(source.open_log([first, write("b.parquet", click=[0], extra=["x"], user=[1])]).units) == 2
    for second, column, why in [
        (write("c.parquet", user=[1], clicks=[0]), "click", "c.parquet: the column 'click', which .*a.parquet has, is "
         "missing; did you mean 'clicks'"),
        (write("d.parquet", user=["x"], click=[0]), "user", "d.parquet: the column 'user' is string, but int64 in "
         ".*a.parquet: cast one"),
    ]:  # fmt: skip
        log = source.open_log([first, second])  # nobody has asked for the column yet
        assert column not in log.types
        assert len(list(log.types)) == 1
        with pytest.raises(UserError, match=f"--keep: .*{why}"):
            log.require(column, "--keep")
    with pytest.raises(UserError, match="--keep: not in the log; did you mean 'click'. Columns: user, click"):
        source.open_log([first]).require("clik", "--keep")
    (tmp_path / "e.csv").write_text("user,click\n1,0\n")
    with pytest.raises(UserError, match="e.csv: a log is either CSV or Parquet; .*a.parquet is Parquet"):
        source.open_log([first, str(tmp_path / "e.csv")])
    (tmp_path / "f.csv").write_text("user,user,x\n1,0,2\n")
    log = source.open_log([str(tmp_path / "f.csv")])
    assert list(log.types) == ["x"]
    assert log.problems["user"].endswith("f.csv: the column 'user' is there more than once")
    assert _rows(_read(tmp_path / "f.csv"), "x") == [(0, b"2")]


def test_parts_of_several_types_have_one(tmp_path: Path) -> None:
    parts = [
        {"x": pa.array([1], pa.int32()), "y": pa.nulls(1), "z": pa.array(["a"]).dictionary_encode()},
        {"x": pa.array([2.5], pa.float32()), "y": pa.array([True]), "z": pa.array(["b"], pa.large_string())},
        {"x": pa.nulls(1), "y": pa.array([7], pa.uint8()), "z": pa.array(["c"], pa.string_view())},
    ]
    for number, columns in enumerate(parts):
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    log = source.open_log(find_files(str(tmp_path)))
    assert dict(log.types) == {"x": pa.float64(), "y": pa.int64(), "z": pa.large_string()}
    chunks = [log.alike(c.columns) for unit in log.units for c in source.read(log, unit, None, skip_malformed=False)]
    joined = pa.concat_tables(pa.table(columns) for columns in chunks)
    assert joined.to_pydict() == {"x": [1.0, 2.5, None], "y": [None, 1, 7], "z": ["a", "b", "c"]}


def test_files_without_rows_have_no_say(tmp_path: Path) -> None:
    for name, columns in [("a", {}), ("b", {"x": pa.array([], pa.string())}), ("c", {"x": [1]})]:
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    log = source.open_log(find_files(str(tmp_path)))
    assert dict(log.types) == {"x": pa.int64()}
    assert [(unit.file, unit.rows) for unit in log.units] == [(2, 1)]


def test_types_that_only_arrow_knows(tmp_path: Path) -> None:
    vectors = pa.array([[1, 2], None, [3, None]], pa.list_(pa.float32(), 2))
    views = pa.array(["x", None, "y"], pa.string_view())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"v": vectors, "s": views, "n": pa.StructArray.from_arrays([views], ["s"])}), path)
    (chunk,) = _read(path)
    assert chunk.columns["v"].to_pylist() == [[1, 2], None, [3, None]]
    assert chunk.columns["s"].to_pylist() == ["x", None, "y"]
    assert chunk.columns["n"].to_pylist() == [{"s": "x"}, {"s": None}, {"s": "y"}]
    assert source.open_log([str(path)]).types["v"] == pa.list_(pa.float32())


def test_parquet_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    for name in ("part-00000", "log.parq", "log.csv"):
        pq.write_table(pa.table({"x": [1]}), tmp_path / name)
    (tmp_path / "README").write_text("not a part")
    assert [Path(path).name for path in find_files(str(tmp_path))] == ["log.csv", "log.parq", "part-00000"]
    log = source.open_log(find_files(str(tmp_path)))
    assert not log.text
    assert len(log.units) == 3
    (tmp_path / "text.parquet").write_text("x,y\n1,2\n")
    with pytest.raises(UserError, match="text.parquet: is named like Parquet, but begins with 'x,y"):
        source.open_log([str(tmp_path / "text.parquet")])


def test_links_are_followed_once(tmp_path: Path) -> None:
    log, other = tmp_path / "log", tmp_path / "other"
    for name in ("log/day=1/a.csv", "log/day=2/b.csv", "other/c.csv", "other/deep/d.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n1\n")
    (log / "day=3").symlink_to(other)
    (log / "again").symlink_to(other)
    (log / "latest").symlink_to(log / "day=2")
    (log / "latest.csv").symlink_to(log / "day=2" / "b.csv")
    (log / "day=1" / "up").symlink_to(log)
    (other / "deep" / "round").symlink_to(tmp_path)
    (log / "link.csv").symlink_to(tmp_path / "e.csv")
    (tmp_path / "e.csv").write_text("x\n1\n")
    found = [os.path.relpath(path, log) for path in find_files(str(log))]
    assert len(found) == len({os.path.realpath(log / name) for name in found}) == 5
    assert {"day=1/a.csv", "day=2/b.csv", "link.csv"} < set(found)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_directories_are_columns(tmp_path: Path, suffix: str) -> None:
    for number, name in enumerate(
        ["date=2024-01-01/h=07", "date=2024-01-02/h=08/", "date=a%2Fb%20c/h=__HIVE_DEFAULT_PARTITION__"]
    ):
        path = tmp_path / "log" / name / f"part.{suffix}"
        path.parent.mkdir(parents=True)
        table = pa.table({"x": [f"{number}"], "own": ["1"]})
        pyarrow.csv.write_csv(table, path) if suffix == "csv" else pq.write_table(table, path)
    log = source.open_log(find_files(str(tmp_path / "log")))
    assert list(log.types) == ["x", "own", "date", "h"]
    assert log.directory_columns == ["date", "h"]
    names = ["h", "x", "date"]
    found = [c.columns for unit in log.units for c in source.read(log, unit, names, skip_malformed=False)]
    rows = [row for columns in found if len(columns["x"]) for row in pa.table(columns).to_pylist()]
    assert [list(row) for row in rows] == [names] * 3
    assert [(row["date"], row["h"]) for row in rows] == [
        (b"2024-01-01", b"07"),
        (b"2024-01-02", b"08"),
        (b"a/b c", None),
    ]
    (only,) = [c.columns for c in source.read(log, log.units[0], ["date"], skip_malformed=False) if len(c.rows)]
    assert only["date"].to_pylist() == [b"2024-01-01"]


def test_a_files_own_column_counts_before_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "own=9" / "x=2" / "part.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"own": [1]}), path)
    (chunk,) = _read(path, columns=["own", "x"])
    assert chunk.columns["own"].to_pylist() == [1]
    assert chunk.columns["x"].to_pylist() == [b"2"]
    pq.write_table(pa.table({"own": [1]}), tmp_path / "a.parquet")  # and no directory says x
    log = source.open_log([str(tmp_path / "a.parquet"), str(path)])
    assert list(log.types) == ["own"]
    assert "a.parquet: the column 'x', which" in log.problems["x"]


def test_odd_names_of_directories(tmp_path: Path) -> None:
    def log_of(*names: str, **columns: list[int]) -> Log:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for number, name in enumerate(names):
            (root / name).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"x": [1]} | (columns if number == 0 else {})), root / name / "part.parquet")
        return source.open_log(find_files(str(root)))

    def days(log: Log) -> list[bytes | None]:
        return [names["day"] for names in log.directories]

    assert days(log_of("day=", "day=2026-11-20%2F")) == [None, b"2026-11-20/"]
    assert days(log_of("day=%FE", "day=%FF", "day=%ZZ", "day=ü=1")) == [b"\xfe", b"\xff", b"%ZZ", "ü=1".encode()]
    assert list(log_of("=3", "plain").types) == ["x"]
    twice = log_of("day=1/day=2")
    assert "the column 'day' is there more than once" in twice.problems["day"] and list(twice.types) == ["x"]
    depths = log_of("day=1/hour=2", "day=1")
    assert "the column 'hour', which" in depths.problems["hour"] and days(depths) == [b"1", b"1"]
    mixed = log_of("day=1", "day=2", day=[1])
    assert "'day' is binary in the name of its directory, but int64 in" in mixed.problems["day"]
    assert {"Day", "day"} == log_of("Day=1", "day=1").problems.keys()


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": np.random.default_rng(0).integers(0, 2**60, 10_000)}), path)
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(UserError, match="a.parquet: cannot be read as Parquet"):
        source.open_log([str(path)])
    path.write_bytes(data[:4] + b"\xff" * 40 + data[44:])  # the header of the first page
    with pytest.raises(UserError, match="a.parquet: cannot be read as Parquet"):
        _read(path)
