"""What a recipe is, and how it becomes converted data.

A recipe is a module of this package with a ``RECIPE``; :mod:`pipelines.recipes.catalogue` lists them. Its ``prepare``
turns raw files into a log that the converter reads, and returns the options of the conversion.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.convert.conversion import convert
from pipelines.convert.options import Options
from pipelines.manifest import Manifest
from pipelines.recipes import statistics
from pipelines.recipes.statistics import Compared
from stem_util import files, owned
from stem_util.errors import UserError, naming_full_disk
from stem_util.progress import Progress


@dataclass(frozen=True)
class RawFile:
    """A file that a recipe reads.

    Attributes:
      name: as its authors call it, relative to ``--raw``.
      layout: what a line or a row holds, in words.
      instead: another name under which the same rows may lie.
    """

    name: str
    layout: str
    instead: str = ""

    def find(self, raw: Path, get: str) -> Path:
        """The file below ``raw``; ``get`` says how to get it.

        Raises:
          UserError: it is not there, or is empty.
        """
        for name in filter(None, (self.name, self.instead)):
            path = raw / name
            if path.is_file():
                if not path.stat().st_size:
                    raise UserError(f"{path} is empty: {get}")
                return path
        raise UserError(f"{raw / self.name} is missing: {get}")


@dataclass(frozen=True)
class Setting:
    """A flag of one recipe.

    Attributes:
      name: of the flag.
      default: its value unless given; decides the flag's type: int, float, str, or a tuple of floats.
      help: its line in ``--help``.
      low, high: limits of a number.
      choices: the values that a str may have.
    """

    name: str
    default: int | float | str | tuple[float, ...]
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepare:
    """What a recipe is given to prepare a log.

    Attributes:
      files: where each of the recipe's files lies, by `RawFile.name`.
      scratch: an empty directory for the log, removed after the conversion.
      settings: the recipe's settings by name.
      seed: seed of whatever the recipe draws, and of the conversion's split and shuffle.
    """

    files: Mapping[str, Path]
    scratch: Path
    settings: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Recipe:
    """How one data set is prepared.

    Attributes:
      name: what the command line calls it.
      title: one line.
      about: what the rows are, which columns become features and labels, how rows are split and whose protocol that is.
      source: where the files come from: a link, and the paper to cite.
      licence: the terms of the files.
      get: how to get the files, as the fix of an error: "download ... from ...". Nothing is downloaded.
      files: the files it reads; () for a log that is generated.
      prepare: writes the log and returns the options of its conversion; ``output`` is filled in here.
      published: statistics that a paper prints, as it prints them: see :mod:`pipelines.recipes.statistics`.
      published_in: which paper and table.
      config: the experiment to train on the data.
      settings: the recipe's own flags.
    """

    name: str
    title: str
    about: str
    source: str
    licence: str
    prepare: Callable[[Prepare], Options]
    config: str
    get: str = ""
    files: tuple[RawFile, ...] = ()
    published: Mapping[str, str] = field(default_factory=dict)
    published_in: str = ""
    settings: tuple[Setting, ...] = ()


@dataclass(frozen=True)
class Made:
    """What came of a recipe: the converted data's manifest, and its statistics beside the published ones."""

    manifest: Manifest
    statistics: list[Compared]


def make(
    recipe: Recipe,
    raw: str | None,
    output: str,
    settings: Mapping[str, Any],
    *,
    seed: int = 0,
    processes: int = 1,
    overwrite: bool = False,
) -> Made:
    """Prepares a data set.

    Args:
      recipe: the recipe.
      raw: directory of its raw files.
      output: directory to create.
      settings: a value for each of the recipe's settings.
      seed: seed of what is drawn: generated rows, split, shuffle.
      processes: worker processes of the conversion.
      overwrite: replace converted data at ``output``.

    Raises:
      UserError: a raw file is missing or damaged, a setting has a wrong value, or ``output`` may not be written.
    """
    if recipe.files and not raw:
        raise UserError(f"--raw is required: the directory with {', '.join(file.name for file in recipe.files)}")
    if raw and not recipe.files:
        raise UserError(f"--raw={raw}: the recipe {recipe.name} generates its rows and reads no files")
    found = {file.name: file.find(Path(raw or ""), recipe.get) for file in recipe.files}
    if owned.check(output, owned.DATA) and not overwrite:
        raise UserError(f"{output} exists already; --overwrite replaces it")
    with _scratch(output) as scratch, naming_full_disk(scratch):
        options = recipe.prepare(Prepare(found, scratch, settings, seed))
        manifest = convert(
            dataclasses.replace(
                options, output=output, layouts=("blocks",), seed=seed, processes=processes, overwrite=overwrite
            )
        )
        return Made(manifest, statistics.compare(manifest, recipe.published, options))


@contextlib.contextmanager
def _scratch(output: str) -> Iterator[Path]:
    """Yields a directory beside ``output`` for the prepared log; one that a killed job left is removed first."""
    if "," in output:
        raise UserError(
            f"--output={output}: the converter reads a comma in a path as the end of it; choose another name"
        )
    real = Path(os.path.realpath(output))
    files.make_directory(real.parent)
    scratch = files.hidden(real, "log")
    with files.locked(files.hidden(real, "recipe.lock"), output):
        if owned.check(scratch, owned.LOG):
            shutil.rmtree(scratch)
        try:
            yield owned.claim(scratch, owned.LOG)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def write(scratch: Path, tables: Iterable[pa.Table], rows: int | None = None, name: str = "log") -> Path:
    """Writes a prepared log as one Parquet file, each table as a row group; returns its path.

    Args:
      scratch: where to write it.
      tables: the rows in order, at least one table.
      rows: how many there are, if that is known.
      name: of the file.
    """
    path, stream = scratch / f"{name}.parquet", iter(tables)
    first = next(stream)
    with Progress(rows, unit="rows", desc="prepare") as progress, pq.ParquetWriter(path, first.schema) as writer:
        for table in itertools.chain([first], stream):
            writer.write_table(table)
            progress.update(len(table))
    return path
