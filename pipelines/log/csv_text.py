"""Feeds CSV files to Arrow's reader in a form that it reads correctly, and checks what it does not notice.

By itself, Arrow loses the LF of a CR LF at the border of two blocks, fails on malformed rows that are not UTF-8, and
reads everything after an unclosed quote as one value.
"""

from __future__ import annotations

import codecs
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stem_util import stores
from stem_util.errors import UserError

_PACKED = {
    b"\x1f\x8b": ("gzip", ".gz"),
    b"BZh": ("bz2", ".bz2"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst"),
    b"\x04\x22\x4d\x18": ("lz4", ".lz4"),
}
_NO_TEXT = {
    b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"\xfd7zXZ": "packed with xz",
    b"7z\xbc\xaf": "a 7z archive",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"PAR1": "a packed Parquet file",
    b"ARROW1": "an Arrow file",
    b"FEA1": "a Feather file",
    b"ORC": "an ORC file",
    b"Obj\x01": "an Avro file",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "an SQLite database",
}
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_HEAD_BYTES = 1 << 16
_LINES = 1000  # a quoted value with more lines is taken for an unclosed quote
_WINDOW = 4096  # quotes that are examined at a time
_NEWLINE, _SPACE, _QUOTE = b'\n "'


def open_bytes(path: str) -> pa.NativeFile:
    """Opens a file, and decompresses it if its name says that it is compressed.

    Raises:
      UserError: the file is compressed, but its name does not say so.
    """
    with stores.open_file(path) as file:
        head = file.read(8)
    for magic, (kind, suffix) in _PACKED.items():
        if head.startswith(magic):
            if not path.lower().endswith(suffix):
                raise UserError(f"{path}: is packed with {kind}: name it {os.path.basename(path)}{suffix}")
            return _stream(path, kind)
    return _stream(path, None)


def _stream(path: str, compression: str | None) -> pa.NativeFile:
    if not stores.is_uri(path):
        return pa.input_stream(path, compression=compression)
    stored = stores.open_file(path)
    return stored if compression is None else pa.CompressedInputStream(stored, compression)


def check(path: str, header: bool) -> None:
    """Refuses a file that is no text, or whose header is not UTF-8.

    Raises:
      UserError: says what the file is instead, and what to do.
    """
    with open_bytes(path) as file:
        head = file.read(_HEAD_BYTES)
    for magic, what in _NO_TEXT.items():
        if head.startswith(magic):
            raise UserError(f"{path}: is {what}, not CSV: write the log as Parquet or as CSV")
    line = re.split(rb"[\r\n]", head.removeprefix(codecs.BOM_UTF8), maxsplit=1)[0]
    halves = [line[i::2] for i in (0, 1)]
    if head.startswith(_UTF16) or any(half and not any(half) for half in halves):
        raise UserError(f"{path}: is UTF-16, not UTF-8: convert it, as with {_iconv('UTF-16', path)}")
    if b"\0" in line:
        raise UserError(f"{path}: is no text (byte {line.index(0)} is 0): a log is CSV or Parquet")
    try:
        line.decode()
    except UnicodeDecodeError as error:
        if not header or error.end == len(head):  # cut off
            return
        if re.search(rb"[\0-\x08\x0e-\x1f]", line):
            raise UserError(f"{path}: is no text, as its beginning shows ({line[:20]!r})") from None
        raise UserError(
            f"{path}: the header is not UTF-8 ({_around(line, error.start)!r}): {utf8_advice(path)}"
        ) from None


def _around(line: bytes, place: int) -> bytes:
    return line[max(place - 10, 0) : place + 10]


def _iconv(encoding: str, path: str) -> str:
    return f"iconv -f {encoding} -t UTF-8 {path} > utf8.csv"


def utf8_advice(path: str) -> str:
    """What to do with a file that is not UTF-8."""
    return f"convert it from the encoding it was written in, as with {_iconv('WINDOWS-1252', path)}"


class Text:
    """The bytes of a CSV file, for `pyarrow.csv` to read; blocks end where lines do.

    Attributes:
      marked: whether bytes were read that are not UTF-8. They appear as characters of private use (see `unmarked`).
      quoted: whether a quote was read.
      lines: number of lines read if the first block has a quote; -1 if the first quote came later, 0 if none came.
    """

    closed = False

    def __init__(self, path: str) -> None:
        self.marked = self.quoted = False
        self.lines = 0
        self._file, self._rest, self._blocks = open_bytes(path), b"", 0

    def read(self, size: int) -> pa.Buffer:
        block = self._file.read_buffer(size - len(self._rest))
        ended = not block.size
        if self._rest:
            block = pa.py_buffer(self._rest + block.to_pybytes())
        end = block.size if ended else _end(block)
        if self._file.seekable():
            self._file.seek(self._file.tell() - (block.size - end))
        else:
            self._rest = block.slice(end).to_pybytes()
        block = block.slice(0, end)
        codes = np.frombuffer(block, np.uint8)
        if not self.quoted and (codes == _QUOTE).any():
            self.quoted, self.lines = True, -1 if self._blocks else 0
        if self.quoted and self.lines >= 0:
            self.lines += np.count_nonzero(codes == _NEWLINE) + bool(end and codes[-1] != _NEWLINE)
        self._blocks += 1
        if codes.max(initial=0) >= 128 and not _is_utf8(block):
            self.marked = True
            block = pa.py_buffer(block.to_pybytes().decode(errors=_MARK).encode())
        return block

    def close(self) -> None:
        self._file.close()
        self.closed = True


def unclosed(path: str, delimiter: str) -> UserError | None:
    """The error for the first quote of a file that swallows lines, or None.

    Such a quote never closes, closes in the middle of a value, or closes implausibly far away.
    """
    text, quotes = Text(path), _Quotes(delimiter)
    found: tuple[int, int | None] | None = None
    while found is None and (block := text.read(1 << 22)).size:
        found = quotes.read(block.to_pybytes())
    text.close()
    if found is None and quotes.opened >= 0:
        found = quotes.opened, None
    if found is None:
        return None
    opened, closed = found
    where = "never closes" if closed is None else f"closes in line {_line(path, closed):,}"
    return UserError(
        f"{path}, line {_line(path, opened):,}: a quote opens here and {where}, so that all lines between are one "
        'value: close it, write a quote inside a quoted value twice (""), or read quotes like other characters with '
        "--nocsv_quotes"
    )


def _line(path: str, place: int) -> int:
    """The number of the line, from 1, that holds the byte at ``place``."""
    lines = 1
    with open_bytes(path) as file:
        while place > 0 and (block := file.read(min(place, 1 << 20))):
            place -= len(block)
            lines += block.count(b"\n")
    return lines


def _end(block: pa.Buffer) -> int:
    """Where the last line of a block ends; if none does, a place not after a CR or a quote, nor inside a character."""
    for size in (1 << 16, block.size):
        tail = block.slice(max(block.size - size, 0)).to_pybytes()
        if b"\n" in tail:
            return block.size - len(tail) + tail.rindex(b"\n") + 1
    end = len(tail)
    for _ in range(3):
        if end and tail[end - 1] & 0xC0 == 0x80:
            end -= 1
    end -= 1 if end and tail[end - 1] >= 0xC0 else 0
    return len(tail[:end].rstrip(b'\r"')) or len(tail)


def _is_utf8(block: pa.Buffer) -> bool:
    offsets = pa.array([0, block.size], pa.int32()).buffers()[1]
    try:
        pa.BinaryArray.from_buffers(pa.binary(), 1, [None, offsets, block]).cast(pa.string())
    except pa.ArrowInvalid:
        return False
    return True


_MARK = "stem-mark"
_MARKS = 0x10FF00  # U+10FF80 ... U+10FFFF: private characters, which texts do not have
_MARKED = re.compile(b"\xf4\x8f([\xbe\xbf])([\x80-\xbf])")


def _marked(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(chr(_MARKS + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(_MARK, _marked)


def unmarked(array: pa.Array) -> pa.Array:
    """Binary values with the bytes of the file in place of the private characters."""
    wrong = pc.fill_null(pc.match_substring(array, b"\xf4\x8f"), False)
    if not pc.any(wrong).as_py():
        return array

    def byte(match: re.Match[bytes]) -> bytes:
        return bytes([(match[1][0] - 0xBC) * 64 + match[2][0] - 0x80])

    mended = [_MARKED.sub(byte, value) for value in array.filter(wrong).to_pylist()]
    return pc.replace_with_mask(array, wrong, pa.array(mended, array.type))


def trimmed(array: pa.Array, nulls: tuple[str, ...]) -> pa.Array:
    """Strips spaces and the quotes inside them from binary values; a value that is then one of ``nulls`` is null."""
    data = array.buffers()[2]
    if data is None or b" " not in data.to_pybytes():
        return array
    # The first and the last byte of each value; an empty value gets bytes of its neighbours.
    codes, ends = np.frombuffer(data, np.uint8), np.frombuffer(array.buffers()[1], np.int32)
    ends = ends[array.offset : array.offset + len(array) + 1]
    if not ((codes.take(ends[:-1], mode="clip") == _SPACE) | (codes.take(ends[1:] - 1, mode="clip") == _SPACE)).any():
        return array
    values = pc.ascii_trim(array.view(pa.string()), characters=" ").view(pa.binary())
    # Arrow recognises a quote only right after the delimiter.
    quoted = pc.and_(pc.starts_with(array, b" "), pc.match_substring_regex(values, b'^".*"$'))
    if pc.any(quoted).as_py():
        plain = [value[1:-1].replace(b'""', b'"') for value in values.filter(quoted).to_pylist()]
        values = pc.replace_with_mask(values, quoted, pa.array(plain, values.type))
    null = pc.is_in(values, pa.array([text.encode() for text in nulls], pa.binary()))
    return pc.if_else(null, pa.scalar(None, pa.binary()), values)


class _Quotes:
    """Follows the quotes of a file as Arrow reads them: one at the start of a value opens, the next single one closes.

    Other quotes are ordinary characters. Quotes are examined together, as if they opened and closed in turn; where that
    fails, the examination starts again after that quote.

    Attributes:
      opened: the place in the file of the open quote, or -1.
    """

    def __init__(self, delimiter: str) -> None:
        self.opened = -1
        self._edges = np.zeros(256, bool)
        self._edges[[ord(delimiter), *b"\r\n"]] = True
        self._start = 0  # place of the block in the file
        self._held = 0  # lines before the block that ended inside the open quote

    def read(self, block: bytes) -> tuple[int, int] | None:
        """Reads the next block; returns where a quote that swallows lines opens and closes, or None."""
        found = self._scan(block) if b'"' in block else None
        if self.opened >= self._start:
            self._held = 0
        if self.opened >= 0:
            self._held += block.count(b"\n", max(self.opened - self._start, 0))
        self._start += len(block)
        return found

    def _scan(self, block: bytes) -> tuple[int, int] | None:
        codes = np.frombuffer(block, np.uint8)
        quotes = np.flatnonzero(codes == _QUOTE)
        before, after = _beside(codes, quotes)
        starts, ends = self._edges[before], self._edges[after]
        again, twice = before == _QUOTE, after == _QUOTE  # "" inside a value closes and opens
        firsts = np.flatnonzero(starts)
        at = 0
        while at < len(quotes):
            end = min(at + _WINDOW, len(quotes))
            while end < len(quotes) and twice[end - 1]:
                end += 1
            opening = (np.arange(end - at) + (self.opened >= 0)) % 2 == 0
            good = np.where(opening, starts[at:end] | again[at:end], ends[at:end] | twice[at:end])
            wrong = at + (len(good) if good.all() else int(good.argmin()))
            opening = opening[: wrong - at]
            opened = quotes[at:wrong][opening & starts[at:wrong]]
            if self.opened >= 0:
                opened = np.append(self.opened - self._start, opened)
            closed = quotes[at:wrong][~opening & ~twice[at:wrong]]
            for place in np.flatnonzero(closed - opened[: len(closed)] > _LINES):
                held = self._held if opened[place] < 0 else 0
                if held + block.count(b"\n", max(opened[place], 0), closed[place]) > _LINES:
                    return self._start + int(opened[place]), self._start + int(closed[place])
            self.opened = self._start + int(opened[-1]) if len(opened) > len(closed) else -1
            at = end
            if wrong < end:
                if self.opened >= 0:  # it closes in the middle of a value
                    first = self.opened - self._start
                    if first < 0 or block.find(b"\n", first, quotes[wrong]) >= 0:
                        return self.opened, self._start + int(quotes[wrong])
                    self.opened = -1
                following = np.searchsorted(firsts, wrong, "right")
                at = int(firsts[following]) if following < len(firsts) else len(quotes)
        return None


def _beside(codes: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes before and after those at ascending ``places``; line ends at the ends of the block."""
    before = codes[places - 1]
    after = codes[np.minimum(places + 1, len(codes) - 1)]
    if len(places) and places[0] == 0:
        before[0] = _NEWLINE
    if len(places) and places[-1] == len(codes) - 1:
        after[-1] = _NEWLINE
    return before, after
