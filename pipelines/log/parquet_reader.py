"""Reads Parquet files of a log."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.log.find import PARQUET_MAGIC
from pipelines.log.parts import Chunk, Unit, unreadable
from stem_util import stores
from stem_util.errors import UserError


def open_parquet(path: str) -> pq.ParquetFile:
    with stores.open_file(path) as start:
        magic = start.read(len(PARQUET_MAGIC))
    if magic != PARQUET_MAGIC:
        begins = magic.decode(errors="replace")
        raise UserError(f"{path}: is named like Parquet, but begins with {begins!r}: give CSV files another name")
    # What is read of a store is read in few large requests; a local file is mapped.
    stored = stores.is_uri(path)
    source, how = stores.open_file(path) if stored else path, {"pre_buffer" if stored else "memory_map": True}
    try:
        file = pq.ParquetFile(source, **how)
        if any(map(_is_hint, file.schema_arrow.types)):
            return pq.ParquetFile(source, metadata=_without_hints(file.metadata), **how)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, "Parquet", error) from None
    return file


def _is_hint(kind: pa.DataType) -> bool:
    """Whether the type contains one that only Arrow has, and that Arrow's reader cannot always restore."""
    if pa.types.is_fixed_size_list(kind) or pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return True
    inner = (kind.field(i).type for i in range(kind.num_fields))
    return _is_hint(kind.value_type) if pa.types.is_dictionary(kind) else any(map(_is_hint, inner))


def _without_hints(metadata: pq.FileMetaData) -> pq.FileMetaData:
    """The footer without the writer's Arrow types, so that columns get the types of Parquet itself.

    A fixed-size list becomes a list: Arrow's reader refuses fixed-size lists with nulls.
    """
    footer = io.BytesIO()
    metadata.write_metadata_file(footer)
    return pq.read_metadata(io.BytesIO(footer.getvalue().replace(b"ARROW:schema", b"arrow.schema")))


def units_of(path: str, file: int, metadata: pq.FileMetaData, index: int, unit_rows: int) -> list[Unit]:
    """Units of consecutive row groups with about ``unit_rows`` rows each."""
    units: list[Unit] = []
    groups: list[int] = []
    first = rows = 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        if not size:
            continue
        if groups and rows + size > unit_rows:
            units.append(Unit(index + len(units), file, path, tuple(groups), first, rows))
            groups, first, rows = [], first + rows, 0
        groups.append(group)
        rows += size
    if groups:
        units.append(Unit(index + len(units), file, path, tuple(groups), first, rows))
    return units


def read(unit: Unit, names: list[str], chunk_rows: int) -> Iterator[Chunk]:
    """Reads columns of a unit as a stream."""
    row = unit.first_row
    with open_parquet(unit.path) as file:
        batches = file.iter_batches(chunk_rows, row_groups=unit.row_groups, columns=names, use_threads=False)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise unreadable(unit.path, "Parquet", error) from None
            if batch is None:
                return
            rows = np.arange(row, row + batch.num_rows)
            row += batch.num_rows
            yield Chunk(unit.path, rows, {name: batch.column(name) for name in names}, 0)
