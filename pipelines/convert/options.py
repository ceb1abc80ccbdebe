"""What a conversion is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.log.parts import CsvOptions
from pipelines.manifest import LAYOUTS
from pipelines.schema import Schema


@dataclass(frozen=True)
class Options:
    """A conversion to do; see the flags of the same names.

    Attributes:
      schema: of the log.
      output: directory to create.
      log: patterns of the log's files; "" with ``given``.
      given: patterns by split, instead of ``log`` and ``split``.
      split: time, hash, random or leave_last.
      split_group: column of the groups of leave_last; the schema's group when not given.
      validation_share: of the rows of given train files, or None; validation has no files then.
      validation_by: how they are chosen: time, hash or random.
      layouts: of the records to write; none where the log itself will be read.
    """

    schema: Schema
    output: str
    log: str = ""
    given: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    split_column: str | None = None
    split_group: str | None = None
    validation_share: float | None = None
    validation_by: str = "random"
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    validation_from: str | None = None
    test_from: str | None = None
    layouts: tuple[str, ...] = LAYOUTS
    seed: int = 0
    processes: int = 1
    drop_bad_rows: bool = False
    overwrite: bool = False
    csv: CsvOptions = field(default_factory=CsvOptions)
    block_rows: int = 512
    shard_rows: int = 250_000
