"""Reading logs: which files, do they agree, and rows with their places."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import source
from pipelines.errors import UserError
from pipelines.source import Chunk, CsvOptions


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
    assert source.find_files(str(tmp_path)) == names
    assert source.find_files(f"{tmp_path}/*.parquet,{tmp_path}/a.parquet") == names[:2]
    (tmp_path / "empty").mkdir()
    for pattern, why in [
        ("nowhere.csv", "nowhere.csv: no such file or directory"),
        (f"{tmp_path}/*.orc", "no file matches it"),
        (f"{tmp_path}/empty", "the directory holds no files"),
        (" ,", "the log is empty"),
    ]:
        with pytest.raises(UserError, match=why):
            source.find_files(pattern)


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
    with pytest.raises(
        UserError, match="c.parquet: the column 'click', which .*a.parquet has, is missing; did you mean"
    ):
        source.open_log([first, write("c.parquet", user=[1], clicks=[0])])
    with pytest.raises(UserError, match="d.parquet: the column 'user' is string, but int64 in .*a.parquet"):
        source.open_log([first, write("d.parquet", user=["x"], click=[0])])
    (tmp_path / "e.csv").write_text("user,click\n1,0\n")
    with pytest.raises(UserError, match="e.csv: a log is either CSV or Parquet; .*a.parquet is Parquet"):
        source.open_log([first, str(tmp_path / "e.csv")])
    (tmp_path / "f.csv").write_text("user,user\n1,0\n")
    with pytest.raises(UserError, match="f.csv: the column 'user' is there more than once"):
        source.open_log([str(tmp_path / "f.csv")])


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
