"""TFRecord files and tf.Example messages without TensorFlow.

TensorFlow would cost every process of a conversion half a gigabyte, cannot read from an offset, and does not say where
a damaged record lies.

A record is: length (uint64), masked CRC-32C of the length (uint32), payload, masked CRC-32C of the payload (uint32),
all little-endian.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import google_crc32c
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from stem_util.errors import JobError

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_BUFFER_BYTES = 1 << 20


class CorruptRecord(JobError):
    """A record that is truncated or fails its checksum.

    Attributes:
      path: the file.
      offset: where the record starts, in bytes.
      why: what is wrong with the record.
      end: where the next record starts; None when the record's length cannot be trusted.
    """

    def __init__(self, path: str, offset: int, why: str, end: int | None = None) -> None:
        super().__init__(f"{path}, offset {offset:,}: {why}")
        self.path, self.offset, self.why, self.end = path, offset, why, end

    def __reduce__(self) -> tuple[type[CorruptRecord], tuple[str, int, str, int | None]]:
        return (CorruptRecord, (self.path, self.offset, self.why, self.end))


def masked_crc32c(data: bytes) -> int:
    """The checksum of TFRecord: CRC-32C, rotated right by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.lru_cache(maxsize=4096)
def _header(length: int) -> bytes:
    return _HEADER.pack(length, masked_crc32c(struct.pack("<Q", length)))


class Writer:
    """Writes one TFRecord file; on leaving the context the file is flushed to the disk (fsync).

    Attributes:
      records: records written.
      bytes: size of the file.
      sha256: hex digest of the file, complete once the context is left.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self._digest = hashlib.sha256()
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self.records = 0
        self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, payload: bytes) -> None:
        """Appends one record."""
        self._pending += (_header(len(payload)), payload, _FOOTER.pack(masked_crc32c(payload)))
        self._pending_bytes += _HEADER.size + len(payload) + _FOOTER.size
        self.records += 1
        if self._pending_bytes >= _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        data = memoryview(b"".join(self._pending))
        self._digest.update(data)
        self.bytes += len(data)
        while data:  # a raw file may write less than it is given
            data = data[self._file.write(data) :]
        self._pending, self._pending_bytes = [], 0


def scan(path: str, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, payload) of every record of a TFRecord file from offset ``start``, checking both checksums.

    Raises:
      CorruptRecord: at the first record that is truncated or fails a checksum.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(start)
        offset = start
        while offset < size:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise CorruptRecord(path, offset, "the file ends inside a record's header")
            length, crc = _HEADER.unpack(header)
            if crc != masked_crc32c(header[:8]):
                raise CorruptRecord(path, offset, "the record's length fails its checksum")
            end = offset + _HEADER.size + length + _FOOTER.size
            if end > size:
                raise CorruptRecord(path, offset, f"the file ends inside a record of {length:,} bytes")
            payload = file.read(length)
            if _FOOTER.unpack(file.read(_FOOTER.size))[0] != masked_crc32c(payload):
                raise CorruptRecord(path, offset, "the record's data fails its checksum", end)
            yield offset, payload
            offset = end


def offsets(path: str, every: int) -> list[int]:
    """Where every ``every``-th record of a TFRecord file starts, in bytes; reads the headers alone.

    Raises:
      CorruptRecord: at the first header that fails its checksum, or record that the file ends in.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found, offset, number = [], 0, 0
            while offset < size:
                header = data[offset : offset + _HEADER.size]
                length = int.from_bytes(header[:8], "little")
                end = offset + _HEADER.size + length + _FOOTER.size
                if end > size or header != _header(length):
                    next(scan(path, offset))  # says what is wrong
                if number % every == 0:
                    found.append(offset)
                offset, number = end, number + 1
            return found


def _example_class() -> Any:
    """Builds tensorflow.Example in a pool of its own: TensorFlow registers the same name in the default one."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="pipelines/example.proto", package="tensorflow", syntax="proto3")

    def add(parent: Any, name: str, number: int, kind: Any, repeated: bool = False, message: str | None = None) -> Any:
        label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
        return parent.field.add(name=name, number=number, type=kind, label=label, type_name=message)

    types = {"BytesList": field.TYPE_BYTES, "FloatList": field.TYPE_FLOAT, "Int64List": field.TYPE_INT64}
    for name, kind in types.items():
        add(file.message_type.add(name=name), "value", 1, kind, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("bytes", "float", "int64"), start=1):
        message = f".tensorflow.{name.capitalize()}List"
        add(feature, f"{name}_list", number, field.TYPE_MESSAGE, message=message).oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, field.TYPE_STRING)
    add(entry, "value", 2, field.TYPE_MESSAGE, message=".tensorflow.Feature")
    add(features, "feature", 1, field.TYPE_MESSAGE, repeated=True, message=".tensorflow.Features.FeatureEntry")
    add(file.message_type.add(name="Example"), "features", 1, field.TYPE_MESSAGE, message=".tensorflow.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


Example: Any = _example_class()
"""The tf.Example message: ``Example.FromString(payload).features.feature["label:click"].float_list.value``."""
