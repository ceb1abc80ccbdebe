"""Finds damaged records to name them, or leaves them out of repaired copies."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from pipelines import records
from pipelines.batches import log_dataset
from pipelines.batches.parsing import parse_rows
from pipelines.manifest import Manifest, Shard
from pipelines.tfrecord import CorruptRecord, Example, Writer, scan
from stem_util.errors import UserError

_CHECKED_RECORDS = 64
"""Records that are parsed together; only if that fails, one by one."""


def readable(manifest: Manifest, split: str, layout: str, on_corrupt: str) -> list[Shard]:
    """The split's shards that hold rows; with ``skip``, damaged ones are replaced by repaired copies."""
    shards = _checked(manifest, split, layout, on_corrupt)
    if on_corrupt == "skip":
        shards = [_repaired(shard, os.stat(shard.path).st_mtime_ns) for shard in shards]
    return [shard for shard in shards if shard.rows]


def _checked(manifest: Manifest, split: str, layout: str, on_corrupt: str) -> list[Shard]:
    """The split's shards, after checking that they exist and, with ``fail``, have the manifest's sizes."""
    shards = manifest.shards(split, layout)
    for shard in shards:
        try:
            size = os.path.getsize(shard.path)
        except FileNotFoundError:
            raise UserError(f"{shard.path} is missing; restore it, or convert the log again") from None
        if size != shard.bytes and on_corrupt == "fail":
            for _ in scan(shard.path):  # names the record if the file is cut inside one
                pass
            raise CorruptRecord(shard.path, size, f"the file ends here; the manifest says {shard.bytes:,} bytes")
    return shards


@functools.cache
def _repaired(shard: Shard, mtime_ns: int) -> Shard:
    """``shard`` itself if it is whole, else a temporary copy with its good records only.

    ``mtime_ns`` is part of the cache key, so that only a file that has changed is read again.
    """
    del mtime_ns
    try:
        count = tf.data.TFRecordDataset(shard.path).reduce(np.int64(0), lambda n, _: n + 1)  # much faster than scan
        if int(count) == shard.records:
            return shard
    except tf.errors.DataLossError:
        pass
    rows, first, start = 0, None, 0
    descriptor, path = tempfile.mkstemp(suffix=".tfrecord", dir=_scratch())
    os.close(descriptor)
    os.unlink(path)  # Writer creates it
    with Writer(path) as writer:
        while True:
            try:
                for _, payload in scan(shard.path, start):
                    writer.write(payload)
                    row_ids = Example.FromString(payload).features.feature["key:row_id"]
                    rows += len(row_ids.int64_list.value) or len(b"".join(row_ids.bytes_list.value)) // 8
            except CorruptRecord as error:
                first = first or error
                if error.end is not None:
                    start = error.end
                    continue
            break
    where = f"offset {first.offset:,} ({first.why})" if first else f"its end ({os.path.getsize(shard.path):,} bytes)"
    lost = shard.records - writer.records
    logging.warning(
        "%s: skipped %s records (%s rows) from %s", shard.path, f"{lost:,}", f"{shard.rows - rows:,}", where
    )
    return Shard(path, rows, writer.records, writer.bytes, writer.sha256)


@functools.lru_cache(maxsize=1)
def _scratch() -> str:
    """A directory for repaired shards, removed when the process ends."""
    path = tempfile.mkdtemp(prefix="stem-repaired-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def diagnose(manifest: Manifest, split: str, layout: str = "blocks") -> CorruptRecord | None:
    """Reads every record of a split and returns the first that is damaged or does not parse, or None.

    Raises:
      UserError: a shard is missing.
    """

    def parse(payloads: list[bytes]) -> None:
        if layout == "blocks":
            records.parse(manifest.record_schema, payloads)
        else:
            parse_rows(manifest.record_schema, tf.constant(payloads, tf.string))

    try:
        for shard in _checked(manifest, split, layout, "fail"):
            pending: list[tuple[int, bytes]] = []
            try:
                for record in scan(shard.path):
                    pending.append(record)
                    if len(pending) == _CHECKED_RECORDS:
                        _check_parses(shard.path, pending, parse)
                        pending = []
            finally:
                _check_parses(shard.path, pending, parse)
    except CorruptRecord as error:
        return error
    return None


def _check_parses(path: str, found: list[tuple[int, bytes]], parse: Callable[[list[bytes]], None]) -> None:
    """Raises CorruptRecord for the first record (offset, payload) in ``found`` that ``parse`` refuses."""

    def refusal(payloads: list[bytes]) -> str:
        try:
            parse(payloads)
        except tf.errors.InvalidArgumentError as error:
            return error.message
        except records.BadBlock as error:
            return str(error)
        return ""

    if not refusal([payload for _, payload in found]):
        return
    for offset, payload in found:
        if why := refusal([payload]):
            raise CorruptRecord(path, offset, f"the record does not parse: {why}")


@contextlib.contextmanager
def naming_corrupt_records(manifest: Manifest, split: str, input_format: str = "blocks") -> Iterator[None]:
    """Replaces TensorFlow's errors about a split's records or log, which name no file, by errors that do.

    Raises:
      CorruptRecord: names the shard and the offset of the first bad record.
      UserError: a shard is missing, or a file of the log is missing or has changed.
      JobError: a process that reads the log was killed.
    """
    try:
        yield
    except tf.errors.OpError as error:
        if input_format == "parquet":
            found = log_dataset.failure(manifest, split)
        else:
            found = _damage(manifest, split, input_format, error)
        if found is None:
            raise
        raise found from error


def _damage(manifest: Manifest, split: str, layout: str, error: tf.errors.OpError) -> Exception | None:
    """The damaged record behind an error, if there is one."""
    if isinstance(error, tf.errors.InvalidArgumentError):
        words = ("arse example", "ParseExample", "Ragged", records.BadBlock.__name__)
        related = any(word in str(error) for word in words)
    elif isinstance(error, tf.errors.UnknownError):  # raised in Python
        related = any(word.__name__ in str(error) for word in (CorruptRecord, FileNotFoundError))
    else:
        related = isinstance(error, tf.errors.DataLossError | tf.errors.NotFoundError)
    return diagnose(manifest, split, layout) if related else None
