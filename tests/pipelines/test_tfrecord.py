"""TFRecord files without TensorFlow: framing, checksums, damage."""

import hashlib
import pickle
from pathlib import Path

import pytest

from pipelines.tfrecord import CorruptRecord, Example, Writer, masked_crc32c, scan


def _write(path: Path, payloads: list[bytes]) -> Writer:
    with Writer(str(path)) as writer:
        for payload in payloads:
            writer.write(payload)
    return writer


def test_round_trip_counts_and_digest(tmp_path: Path) -> None:
    payloads = [b"", b"one", bytes(3_000_000)]
    writer = _write(tmp_path / "a", payloads)
    data = (tmp_path / "a").read_bytes()
    assert [payload for _, payload in scan(str(tmp_path / "a"))] == payloads
    assert [offset for offset, _ in scan(str(tmp_path / "a"))] == [0, 16, 35]
    assert (writer.records, writer.bytes) == (3, len(data))
    assert writer.sha256 == hashlib.sha256(data).hexdigest()


def test_checksum_is_masked_crc32c() -> None:
    # CRC-32C of "123456789" is e3069283; rotated right by 15 bits and shifted by a282ead8.
    assert masked_crc32c(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    _write(tmp_path / "a", [b"x"])
    with pytest.raises(FileExistsError):
        Writer(str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("damage", "offset", "why"),
    [
        (lambda data: data[:-1], 19, "ends inside a record of 4 bytes"),
        (lambda data: data[:25], 19, "ends inside a record's header"),
        (lambda data: data[:33] + b"!" + data[34:], 19, "data fails its checksum"),
        (lambda data: b"\x09" + data[1:], 0, "length fails its checksum"),
    ],
)
def test_damage_names_file_and_offset(tmp_path: Path, damage: object, offset: int, why: str) -> None:
    path = tmp_path / "a"
    _write(path, [b"one", b"more"])
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(CorruptRecord, match=why) as caught:
        list(scan(str(path)))
    assert (caught.value.path, caught.value.offset) == (str(path), offset)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_example_has_the_wire_format_of_tf_example() -> None:
    example = Example()
    example.features.feature["x"].int64_list.value.append(4)
    # features { feature { key: "x" value { int64_list { value: 4 } } } }
    assert example.SerializeToString(deterministic=True) == b"\n\x0c\n\n\n\x01x\x12\x05\x1a\x03\n\x01\x04"
