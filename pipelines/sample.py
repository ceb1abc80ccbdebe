"""A uniform sample of a log's rows, in bounded memory, with the types that CSV lacks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import casts, source
from pipelines.progress import Progress

_MAX_UNITS = 64
_LEADING_ZERO = r"^\s*-?0[0-9]"


@dataclass(frozen=True)
class Sample:
    """Rows of a log.

    Attributes:
      table: the rows, in the log's order; columns of CSV logs are int64, double, string or, where bytes are not UTF-8,
        binary; dictionaries are decoded.
      seen: rows that were read to draw them.
      malformed: CSV rows with a wrong number of columns, not among them.
      complete: whether every row of the log is in the table.
    """

    table: pa.Table
    seen: int
    malformed: int
    complete: bool


def draw(log: source.Log, limit: int, seed: int = 0) -> Sample:
    """Draws up to ``limit`` rows, each with the same probability.

    A long log is read in part: 64 of its units (a CSV file; about a million rows of Parquet), evenly spread.

    Raises:
      UserError: a file is damaged.
    """
    count = min(len(log.units), _MAX_UNITS)
    units = [log.units[i * len(log.units) // count] for i in range(count)]
    rng = np.random.default_rng(seed)
    held: list[pa.Table] = []
    keys: list[np.ndarray] = []
    below, seen, malformed = 1.0, 0, 0
    total = None if log.text else sum(unit.rows for unit in units)
    with Progress(total, unit="rows", desc="sample") as progress:
        for unit in units:
            for chunk in source.read(log, unit, None, skip_malformed=True):
                # Every row has a random key; the rows with the smallest keys are the sample.
                drawn = rng.random(len(chunk.rows))
                keep = drawn < below
                columns = {name: casts.plain(array) for name, array in log.alike(chunk.columns).items()}
                held.append(pa.table(columns).filter(keep))
                keys.append(drawn[keep])
                if sum(map(len, keys)) > 2 * limit:
                    held, keys, below = _smallest(held, keys, limit)
                seen += len(drawn)
                malformed += chunk.malformed
                progress.update(len(drawn))
    held, keys, below = _smallest(held, keys, limit)
    table = held[0].combine_chunks()
    for name in log.types if log.text else log.directory_columns:
        typed = _typed(table.column(name).combine_chunks())
        table = table.set_column(table.column_names.index(name), name, typed)
    return Sample(table, seen, malformed, complete=len(table) == seen and count == len(log.units))


def _smallest(
    held: list[pa.Table], keys: list[np.ndarray], limit: int
) -> tuple[list[pa.Table], list[np.ndarray], float]:
    """The rows with the ``limit`` smallest keys, in their order, and the key that new rows have to beat."""
    table, key = pa.concat_tables(held), np.concatenate(keys)
    if len(key) <= limit:
        return [table], [key], 1.0
    bound = float(np.partition(key, limit)[limit])
    return [table.filter(key < bound)], [key[key < bound]], bound


def _typed(array: pa.Array) -> pa.Array:
    """The narrowest of int64, double and string that holds every value of a CSV column."""
    text, undecodable = casts.to_text(array)
    if undecodable.any():
        return array
    if pc.any(pc.match_substring_regex(text, _LEADING_ZERO + r"\d*\s*$")).as_py():
        return text  # 007 is a code, not a number
    for cast in (casts.to_int64, casts.to_float64):
        numbers, bad = cast(text) if len(text) else (text, np.zeros(0, bool))
        if not bad.any():
            return numbers
    return text
