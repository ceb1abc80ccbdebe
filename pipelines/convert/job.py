"""What workers know of a conversion: the log, how its rows are cleaned, and where scratch files and output are.

A worker's task may be done twice, even at the same time: it reads files that stay until its step is over, and leaves
each file that it writes whole, with the same bytes (`Job.written`).
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

from pipelines.convert.cleaner import Cleaner
from pipelines.log.parts import Log
from stem_util import files

HASH = "hash"
"""Column of scratch files: the hash by which train rows are shuffled."""
SPLIT = "split"
"""Column of scratch files: 0 train, 1 validation, 2 test."""


@dataclass(frozen=True)
class Job:
    """What workers know of a conversion.

    Attributes:
      log: the input.
      cleaner: schema, split policy and policy for bad rows.
      file_starts: row_id of each file's first row.
      seed: seed of the shuffle.
      layouts: which of blocks and rows to write, if any.
      block_rows: rows per block.
      directory: where the output is built.
      scratch: directory of the scratch files.
    """

    log: Log
    cleaner: Cleaner
    file_starts: tuple[int, ...]
    seed: int
    layouts: tuple[str, ...]
    block_rows: int
    directory: str
    scratch: str

    def counted_features(self) -> list[str]:
        """Names of the features that have a vocabulary."""
        return [f.name for f in self.cleaner.schema.features if f.has_vocabulary]

    def written(self, path: str) -> AbstractContextManager[str]:
        """Gives a path in the scratch directory to write to, which becomes ``path`` once it is complete."""
        return files.moved_into_place(path, self.scratch)

    def counts_path(self, feature: str, unit: int) -> str:
        return os.path.join(self.scratch, f"counts-{self.counted_features().index(feature)}-{unit}.arrow")

    def segment_path(self, unit: int, number: int) -> str:
        return os.path.join(self.scratch, f"clean-{unit}-{number}.arrow")

    def rows_path(self, split: str, unit: int) -> str:
        return os.path.join(self.scratch, f"{split}-{unit}.arrow")

    def raw_path(self, split: str, part: int | str) -> str:
        number = f"{part:05d}" if isinstance(part, int) else part
        return os.path.join(self.directory, "raw", split, f"part-{number}.parquet")
