"""What Arrow's CSV reader does not notice, or cannot read."""

import bz2
import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from pipelines.log import csv_reader, csv_text, source
from pipelines.log.parts import CsvOptions
from stem_util.errors import UserError


def _read(path: Path, csv: CsvOptions | None = None, *, skip: bool = False) -> dict[str, list[bytes]]:
    log = source.open_log([str(path)], csv)
    parts = [pa.table(c.columns) for c in source.read(log, log.units[0], None, skip_malformed=skip)]
    return pa.concat_tables(parts).to_pydict()


def _by_hand(text: bytes, limit: int) -> tuple[int, int | None] | None:
    """A byte after another: at a value's beginning a quote opens; behind a closing one all is literal."""
    place, opened, fresh = 0, -1, True
    while place < len(text):
        byte = text[place : place + 1]
        if opened >= 0 and byte == b'"':
            if text[place + 1 : place + 2] == b'"':
                place += 1
            else:
                lines = text.count(b"\n", opened, place)
                if lines and (lines > limit or text[place + 1 : place + 2] not in (b"", b",", b"\n", b"\r")):
                    return opened, place
                opened, fresh = -1, False
        elif opened < 0:
            if byte == b'"' and fresh:
                opened = place
            fresh = byte in b",\r\n"
        place += 1
    return None if opened < 0 else (opened, None)


def test_quotes_that_swallow_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_text, "_WINDOW", 3)
    random = np.random.default_rng(0)
    found = 0
    for trial in range(3000):
        monkeypatch.setattr(csv_text, "_LINES", limit := 1 + trial % 3)
        letters = b'a,\n"' if trial % 2 else b'aa,\n\r""""'
        text = bytes(random.choice(list(letters), random.integers(1, 40)).tolist())
        quotes, start = csv_text._Quotes(","), 0
        answer: tuple[int, int | None] | None = None
        while start < len(text) and answer is None:
            cut = text.find(b"\n", start + int(random.integers(0, 12))) + 1 or len(text)
            answer = quotes.read(text[start:cut])
            start = cut
        if answer is None and quotes.opened >= 0:
            answer = quotes.opened, None
        assert answer == _by_hand(text, limit), text
        found += answer is not None
    assert 300 < found < 2700


@pytest.mark.parametrize("drop", [False, True])
def test_an_unclosed_quote_is_refused_by_its_line(tmp_path: Path, drop: bool) -> None:
    path = tmp_path / "a.csv"
    lines = [f"{i},b{i},c" for i in range(300)]
    for number, line, why in [
        (100, '100,"b100,c', "line 102: a quote opens here and never closes"),
        (100, '"100,b100,c', "line 102: a quote opens here and never closes"),
        (299, '299,"b', "line 301: a quote opens here and never closes"),
    ]:
        path.write_text("\n".join(["x,y,z", *lines[:number], line, *lines[number + 1 :]]))
        with pytest.raises(UserError, match=f"a.csv, {why}"):
            _read(path, skip=drop)
    path.write_text("x,y,z\n" + "\n".join([*lines[:10], '10,"b10,c', *lines[11:50], '50,"b50",c', *lines[51:]]))
    with pytest.raises(UserError, match="line 12: a quote opens here and closes in line 52.*--nocsv_quotes"):
        _read(path, skip=drop)
    assert _read(path, CsvOptions(quotes=False))["y"][10] == b'"b10'


def test_values_of_several_lines_and_odd_quotes_are_values(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'x,y\r\n"one\r\ntwo","say ""hi"""\r\n\r\n5" wide,"a"b\r\n"",""\r\n')
    assert _read(path) == {"x": [b"one\r\ntwo", b'5" wide', None], "y": [b'say "hi"', b"ab", None]}


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_do_not_part_line_ends_or_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    rows = [(f"é{i}\r\n日本", "z" * (i % 7)) for i in range(400)]
    text = "x,y\r\n" + "".join(f'"{x}",{y}\r\n' for x, y in rows)
    path = tmp_path / ("a.csv.gz" if packed else "a.csv")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    for size in (64, 65, 66, 67, 1000):
        monkeypatch.setattr(csv_reader, "_BLOCK_BYTES", size)
        table = _read(path)
        assert table["x"] == [x.encode() for x, _ in rows]
        assert table["y"] == [y.encode() or None for _, y in rows]


def test_text_without_line_ends_comes_in_whole_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(data := '日本\ré""ü'.encode() * 40)
    for size in (7, 8, 9, 10, 11):
        text, parts = csv_text.Text(str(path)), []
        while (block := text.read(size)).size:
            parts.append(block.to_pybytes())
        assert b"".join(parts) == data
        assert not text.marked
        assert not any(part.endswith(b"\r") for part in parts)


def test_bytes_that_are_not_utf8_come_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"x,y\n1,caf\xe9\n2\xff\n3,\xf0\x9f\x98\x80\xf0\x9f\n\x80\x81,4\n5,d\xc3\xa9j\xc3\xa0\n")
    with pytest.raises(UserError, match="a.csv, row 1: 1 values, but the file has 2 columns"):
        _read(path)
    assert _read(path, skip=True) == {
        "x": [b"1", b"3", b"\x80\x81", b"5"],
        "y": [b"caf\xe9", b"\xf0\x9f\x98\x80\xf0\x9f", b"4", "déjà".encode()],
    }


def test_spaces_around_values_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('age, work , pay\n39, State gov, <=50K\n , ?,>50K \n 1," a, b ",\n')
    options = CsvOptions(nulls=("", "?"))
    assert _read(path, options) == {
        "age": [b"39", None, b"1"],
        "work": [b"State gov", None, b"a, b"],
        "pay": [b"<=50K", b">50K", None],
    }


def test_quotes_behind_spaces_are_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('"x", "y"\n"1", "say ""a"""\n"2",  "日本" \n"""3""", ""\n')
    assert _read(path) == {"x": [b"1", b"2", b'"3"'], "y": [b'say "a"', "日本".encode(), None]}


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path, text = tmp_path / "a.csv", "id,café\n1,2\n"
    for content, why in [
        (text.encode("latin-1"), r"the header is not UTF-8 \(b'id,caf\\xe9'\): convert it .*iconv -f WINDOWS-1252"),
        (text.encode("utf-16"), "is UTF-16, not UTF-8: convert it, as with iconv -f UTF-16 -t UTF-8"),
        (text.encode("utf-16-be"), "is UTF-16, not UTF-8"),
        (gzip.compress(text.encode()), "is packed with gzip: name it a.csv.gz"),
        (bz2.compress(text.encode()), "is packed with bz2: name it a.csv.bz2"),
        (b"PK\x03\x04 and so on", "is a zip archive or an Excel workbook, not CSV"),
        (b"\x80\x04\x95\x00\x00pickled", "is no text .byte 3 is 0."),
        (b"\x80\x04\x95\x01\x02pickled", "is no text, as its beginning shows"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"a.csv: {why}"):
            source.open_log([str(path)])
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert _read(path) == {"id": [b"1"], "café": [b"2"]}
    assert _read(path, CsvOptions(columns=("a", "b"))) == {"a": [b"id", b"1"], "b": ["café".encode(), b"2"]}
    (tmp_path / "plain.csv.gz").write_text(text)
    assert _read(tmp_path / "plain.csv.gz")["id"] == [b"1"]
    cut = gzip.compress(text.encode() * 1000)[:-30]
    (tmp_path / "cut.csv.gz").write_bytes(cut)
    with pytest.raises(UserError, match="cut.csv.gz: cannot be read as CSV"):
        _read(tmp_path / "cut.csv.gz")


def test_a_row_longer_than_a_block_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_reader, "_BLOCK_BYTES", 1 << 10)
    path = tmp_path / "a.csv"
    path.write_text("x,y\n1,2\n3," + "4" * 5000 + "\n")
    with pytest.raises(UserError, match="cannot be read as CSV .a row of more than"):
        _read(path)
    path.write_text('x,y\n1,2\n3,"4\n' + "5,6\n" * 5000)
    with pytest.raises(UserError, match="a.csv, line 3: a quote opens here and never closes"):
        _read(path)


def test_trimmed_slices_and_nulls() -> None:
    array = pa.array([b"x ", None, b"", b" ", b"\xff y "], pa.binary())
    assert csv_text.trimmed(array, ("",)).to_pylist() == [b"x", None, None, None, b"\xff y"]
    assert csv_text.trimmed(array.slice(1, 2), ()).to_pylist() == [None, b""]
    assert csv_text.trimmed(array.slice(4), ()).to_pylist() == [b"\xff y"]
    assert csv_text.trimmed(pa.array([], pa.binary()), ()).to_pylist() == []


def test_quotes_written_by_arrow_are_read(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    texts = ["".join(random.choice(list('ab,"\n'), 6)) for _ in range(500)]
    out = io.BytesIO()
    pyarrow.csv.write_csv(pa.table({"x": texts, "y": texts[::-1]}), out)
    (tmp_path / "a.csv").write_bytes(out.getvalue())
    assert _read(tmp_path / "a.csv")["x"] == [text.encode() for text in texts]
