"""The manifest of converted data: what was converted, how it was split, what was fitted, and where the records lie."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipelines import integrity, schema_yaml
from pipelines import ranking as rankings
from pipelines.schema import Ranking, Schema
from pipelines.yaml_reader import hint
from stem_util import copies, files, owned, stores
from stem_util.errors import UserError
from stem_util.version import __version__

FORMAT = 2
READABLE = (1, FORMAT)
"""Formats that `load` reads. Format 1 has checksums of the shards only."""
FILENAME = "manifest.json"
RESTORE = "restore it, or convert the log again (stem-convert --overwrite)"
"""The fix for a file of a data directory that is missing or has changed."""
_AGAIN = "convert again with stem-convert --overwrite"
SPLITS = ("train", "validation", "test")
LAYOUTS = ("blocks", "rows")
"""How records lie in files."""
INPUT_FORMATS = (*LAYOUTS, "parquet")
"""What batches are read from: records, or the log itself."""


@dataclass(frozen=True)
class Shard:
    """One TFRecord file; ``path`` is relative to the data directory, absolute from `Manifest.shards`."""

    path: str
    rows: int
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """One file of the log (an absolute path), in row_id order; ``rows`` counts bad rows too.

    Attributes:
      mtime_ns: when it was last written. A file with the same size and time counts as unchanged.
      crc32c: CRC-32C of its content, in hex; "" in format 1, and for a file of a store.
    """

    path: str
    rows: int
    bytes: int
    mtime_ns: int = 0
    crc32c: str = ""

    @property
    def identity(self) -> str:
        """What makes it known again: size and checksum, or without a checksum path, size and time."""
        return f"{self.bytes}:{self.crc32c}" if self.crc32c else f"{self.bytes}:{self.path}:{self.mtime_ns}"


@dataclass(frozen=True)
class TaskCounts:
    """The labels of one task in one split.

    Attributes:
      rows: the number of rows inside the task's sample space.
      rate: the mean label over these rows, weighted if the task has row weights; None when there are no rows.
      weight: the sum of the row weights, or None if the task has none.
    """

    rows: int
    rate: float | None
    weight: float | None = None


@dataclass(frozen=True)
class Split:
    """What one split holds.

    Attributes:
      rows: the number of written rows.
      tasks: counts by task.
      rare_share: for each categorical or multivalent feature, the share of values with id 1 (rare, unseen, missing;
        with a hash only missing).
      shards: by layout, in reading order; empty if the log was converted without records.
    """

    rows: int
    tasks: dict[str, TaskCounts]
    rare_share: dict[str, float]
    shards: dict[str, list[Shard]]


@dataclass(frozen=True)
class Constants:
    """Fitted constants of a numeric feature.

    Attributes:
      mean: mean over train, after log1p if the transform has it.
      std: population standard deviation of the same values; 1 if it is below 1e-12.
      mean_after: mean over train after the whole transform; missing values become this.
      boundaries: ascending bucket boundaries if the feature is bucketised, else ().
    """

    mean: float = 0.0
    std: float = 1.0
    mean_after: float = 0.0
    boundaries: tuple[float, ...] = ()


@dataclass(frozen=True)
class LabelScale:
    """Mean and population standard deviation of a standardised label over train, with the task's row weights.

    Attributes:
      mean: 0 if train has no label.
      std: 1 if it is below 1e-12.
    """

    mean: float
    std: float


@dataclass(frozen=True)
class Vocabulary:
    """Sizes of a feature's vocabulary.

    Attributes:
      size: the number of ids without the two reserved ones.
      distinct: the number of values before the minimum count, of all conversions that this one goes on from.
      free: how many of these ids no value has, because theirs was forgotten.
    """

    size: int
    distinct: int
    free: int = 0


@dataclass(frozen=True)
class Growth:
    """How a conversion changed a feature's vocabulary; ``history/changed/<feature>.parquet`` names the changed ids.

    Attributes:
      new: the number of values that got an id.
      evicted: the number of values that lost theirs.
      reassigned: the number of new values whose id another value had before.
      rare: the number of values without an id whose counts are kept.
    """

    new: int
    evicted: int
    reassigned: int
    rare: int


@dataclass(frozen=True)
class Ancestor:
    """The data that a conversion went on from.

    Attributes:
      directory: their directory (an absolute path), or its URI.
      sha256: of their manifest.
      generation: 1 if they went on from no others, else 1 more than those.
      learned: `Source.identity` of the files that train rows came from, of these data and of those before.
    """

    directory: str
    sha256: str
    generation: int
    learned: tuple[str, ...]


@dataclass(frozen=True)
class Times:
    """The times of a log's rows.

    Attributes:
      column: of the log.
      type: of its values, as `times.kind_of_name` reads it.
      calendar: whether ``first`` and ``last`` are microseconds since 1970, and not other numbers.
      first: time of the first row.
      last: time of the last row.
    """

    column: str
    type: str
    calendar: bool
    first: int
    last: int


@dataclass(frozen=True)
class Hashed:
    """Sizes of a feature whose ids are hashes, as `pipelines.hashed_ids` computes them.

    Attributes:
      buckets, hashes: as in the schema.
      function: ``splitmix64`` (integers) or ``farmhash64`` (text).
      distinct: the number of distinct values in train, estimated to about 2 % from 4,096 on.
    """

    buckets: int
    hashes: int
    function: str
    distinct: int


@dataclass(frozen=True)
class Dropped:
    """The number of rows that --on_bad_rows=drop skipped for one column ('' for the whole row) and reason."""

    column: str
    reason: str
    rows: int

    def __str__(self) -> str:
        column = f"column '{self.column}': " if self.column else ""
        return f"dropped {self.rows:,} rows: {column}{self.reason}"


@dataclass(frozen=True)
class Manifest:
    """Everything later stages need to know about converted data.

    Attributes:
      data_dir: the data directory (not stored).
      name: the name of the data set, from the schema.
      seed: seed of the split and the shuffle.
      sources: the log's files.
      split: how rows were divided: the policy and its settings.
      splits: by name; always all three of `SPLITS`.
      vocabularies: by categorical or multivalent feature without a hash.
      numerics: by numeric feature.
      dropped: counts of skipped bad rows.
      label_scales: by task, for tasks whose label is standardised.
      hashed: by categorical or multivalent feature with a hash.
      history: by categorical or multivalent feature without a hash; empty in data of an earlier version, which cannot
        be extended.
      times: when rows happened, or None if the log has no time column.
      ancestor: the data that these extend, or None.
      files: the files of the data directory by path, without shards and manifest; empty in format 1.
      created_by: program and version.
      loaded: the file ``manifest.json`` at the time when it was read (not stored).
      chosen: the tasks that are used, or () for all of them (not stored); see :meth:`of_tasks`.
      ranking: what stands in for the schema's own ranking, or None (not stored); see :meth:`ranked_by`.
    """

    data_dir: str
    name: str
    seed: int
    sources: tuple[Source, ...]
    split: dict[str, Any]
    splits: dict[str, Split]
    vocabularies: dict[str, Vocabulary]
    numerics: dict[str, Constants]
    dropped: tuple[Dropped, ...] = ()
    label_scales: dict[str, LabelScale] = dataclasses.field(default_factory=dict)
    hashed: dict[str, Hashed] = dataclasses.field(default_factory=dict)
    history: dict[str, Growth] = dataclasses.field(default_factory=dict)
    times: Times | None = None
    ancestor: Ancestor | None = None
    files: dict[str, integrity.File] = dataclasses.field(default_factory=dict)
    created_by: str = f"stem-tf {__version__}"
    loaded: integrity.File | None = dataclasses.field(default=None, compare=False)
    chosen: tuple[str, ...] = ()
    ranking: Ranking | None = None

    def __repr__(self) -> str:
        rows = ", ".join(f"{self.rows(split):,} {split}" for split in SPLITS)
        return f"Manifest({self.data_dir!r}): {self.name}, {rows} rows"

    @property
    def generation(self) -> int:
        """1 for data that extend no others, else 1 more than that of their ancestor."""
        return 1 if self.ancestor is None else self.ancestor.generation + 1

    @functools.cached_property
    def watch(self) -> integrity.Watch:
        """Remembers how each file in use looked at its last check."""
        return integrity.Watch()

    def of_tasks(self, names: Collection[str]) -> Manifest:
        """The same data with some of their tasks only; without names, with all of them.

        Raises:
          UserError: the data have no such task.
        """
        if not names:
            return self
        known = self.record_schema.task_names
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{self.data_dir} has no task '{unknown[0]}'{hint(unknown[0], known)}")
        return dataclasses.replace(self, chosen=tuple(name for name in known if name in names))

    def ranked_by(self, given: str) -> Manifest:
        """The same data with another score to rank by: a file or a formula, see `pipelines.ranking.replaced`.

        Raises:
          UserError: a mistake in it.
        """
        return dataclasses.replace(self, ranking=rankings.replaced(self.schema, given).ranking)

    @functools.cached_property
    def schema(self) -> Schema:
        """The schema of the data, with the chosen tasks. It has no ranking where that needs another task.

        Raises:
          UserError: see :attr:`record_schema`.
        """
        schema = self._of_chosen_tasks()
        if self.ranking is not None:
            return dataclasses.replace(schema, ranking=self.ranking)
        return rankings.for_tasks(schema)

    def _of_chosen_tasks(self) -> Schema:
        whole = self.record_schema
        if not self.chosen:
            return whole
        # The label of a row outside a space is NaN in the records: the task that defines the space is not needed.
        tasks = (
            dataclasses.replace(task, space=None)
            if task.space and task.space.task not in (None, *self.chosen)
            else task
            for task in whole.tasks
            if task.name in self.chosen
        )
        return dataclasses.replace(whole, tasks=tuple(tasks))

    @functools.cached_property
    def record_schema(self) -> Schema:
        """The schema in the data directory: that of the records, with all tasks.

        Raises:
          UserError: it is missing, or is not the one that the data were converted with.
        """
        self._check_files("schema.yaml".__eq__)
        schema = schema_yaml.load(os.path.join(self.data_dir, "schema.yaml"))
        if self.loaded is not None and not self.files:  # format 1: there is only this to compare
            features = {feature.name for feature in schema.features if feature.kind != "dense"}
            tasks = {name for split in self.splits.values() for name in split.tasks}
            differing = (features ^ {*self.vocabularies, *self.numerics}) | (set(schema.task_names) ^ tasks)
            if differing:
                raise UserError(
                    f"{self.data_dir}/schema.yaml is not the schema that the data were converted with (they differ in "
                    f"{', '.join(sorted(differing))}): {RESTORE}"
                )
        return schema

    def check(self, shards: Iterable[Shard] = ()) -> None:
        """Makes sure that the files of the data directory are the ones that were converted. Costs one stat per file.

        Args:
          shards: shards (with absolute paths) to check as well as manifest, schema and vocabularies.

        Raises:
          UserError: a file is missing or has changed.
        """
        if self.loaded is not None:
            path = os.path.join(self.data_dir, FILENAME)
            self.watch.check_file(path, self.loaded, "the data were replaced while they were in use; start again")
        self._check_files(lambda path: not path.startswith(("raw/", "history/")))
        for shard in shards:
            same = functools.partial(_has_sha256, shard.path, shard.sha256)
            self.watch.check(shard.path, shard.bytes, same, read=False, way_out=RESTORE)

    def check_raw(self, split: str) -> None:
        """Makes sure that the files with raw rows of validation or test are the ones that the conversion wrote."""
        self._check_files(lambda path: path.startswith(f"raw/{split}/"))

    def check_history(self) -> None:
        """Makes sure that what a conversion needs to extend these data is what the conversion wrote."""
        self._check_files(lambda path: path.startswith(("schema.yaml", "vocabulary/", "history/")))

    def check_copies(self, directory: str) -> None:
        """Makes sure that a run's copies of schema and vocabularies equal those of the conversion."""
        self._check_files(lambda path: path.startswith(("schema.yaml", "vocabulary/")), directory)

    def _check_files(self, chosen: Callable[[str], bool], directory: str = "") -> None:
        for path, file in self.files.items():
            if chosen(path):
                way_out = f"copy it from {os.path.join(self.data_dir, path)}" if directory else RESTORE
                self.watch.check_file(os.path.join(directory or self.data_dir, path), file, way_out)

    def num_ids(self, feature: str) -> int:
        """The number of ids of a feature: padding (0), rare or missing (1), then its vocabulary or its buckets."""
        if feature in self.hashed:
            return self.hashed[feature].buckets + 2
        if feature in self.vocabularies:
            return self.vocabularies[feature].size + 2
        return len(self.numerics[feature].boundaries) + 3

    def constants(self, feature: str) -> Constants:
        """The fitted constants of a numeric feature."""
        return self.numerics[feature]

    def rows(self, split: str) -> int:
        return self.splits[split].rows

    def task_rows(self, split: str, task: str) -> int:
        """The number of rows of ``split`` inside the task's sample space."""
        return self.splits[split].tasks[task].rows

    def task_rate(self, split: str, task: str) -> float:
        """The mean label over the rows inside the task's sample space; NaN when there are none."""
        rate = self.splits[split].tasks[task].rate
        return float("nan") if rate is None else rate

    def shards(self, split: str, layout: str) -> list[Shard]:
        """The split's files with absolute paths.

        Raises:
          UserError: the data was converted without this layout.
        """
        shards = self.splits[split].shards
        if not shards:
            raise UserError(
                f"{self.data_dir} was converted without records (--layouts=none): read the log itself with "
                f"--input_format=parquet, or convert it with --layouts={layout}"
            )
        if layout not in shards:
            have = ", ".join(shards)
            raise UserError(f"{self.data_dir} was converted without the layout '{layout}' (it has: {have})")
        return [dataclasses.replace(s, path=os.path.join(self.data_dir, s.path)) for s in shards[layout]]

    def vocabulary_path(self, feature: str) -> str:
        """The Parquet file of a feature's vocabulary: columns value and count; row i is id i + 2."""
        return vocabulary_path(self.data_dir, feature)


def vocabulary_path(data_dir: str, feature: str) -> str:
    """Where a feature's vocabulary lies under a data directory."""
    return os.path.join(data_dir, "vocabulary", f"{feature}.parquet")


def history_path(data_dir: str, what: str, feature: str) -> str:
    """Where a feature's history lies: what is ``seen``, ``rare`` or ``changed``; see `pipelines.convert.growth`."""
    return os.path.join(data_dir, "history", what, f"{feature}.parquet")


@contextlib.contextmanager
def in_use(data_dir: str) -> Iterator[None]:
    """Keeps conversions from replacing converted data while a job reads them, until the process ends, however it ends.

    Raises:
      UserError: a conversion is replacing them.
    """
    why = f"{data_dir} is being replaced by a conversion: wait for it"
    with integrity.locked(os.path.join(data_dir, FILENAME), exclusive=False, why=why):
        yield


@contextlib.contextmanager
def replacing(data_dir: str, overwrite: bool) -> Iterator[None]:
    """Keeps jobs from reading converted data that a conversion is about to ``overwrite``, if there are any.

    Raises:
      UserError: a job is reading them.
    """
    path = os.path.join(data_dir, FILENAME)
    why = f"{data_dir} is being read by another job (a training, an evaluation): wait for it or choose another output"
    with (
        integrity.locked(path, exclusive=True, why=why)
        if overwrite and os.path.isfile(path)
        else contextlib.nullcontext()
    ):
        yield


def check_source(source: Source, watch: integrity.Watch) -> Source:
    """Makes sure that a file of the log is the one that was converted; returns it with its present time.

    Raises:
      UserError: it is missing or has changed.
    """

    def same() -> bool:
        touched = integrity.stamp(source.path).mtime_ns != source.mtime_ns
        if stores.is_uri(source.path):  # what is in a store is never written in place
            return not touched
        return not (touched and source.crc32c) or integrity.crc32c(source.path) == source.crc32c

    way_out = "restore it, or convert the log again"
    found = watch.check(source.path, source.bytes, same, read=True, way_out=way_out)
    return dataclasses.replace(source, mtime_ns=found.mtime_ns)


def _has_sha256(path: str, sha256: str) -> bool:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def save(manifest: Manifest) -> None:
    """Writes ``manifest.json`` into the manifest's data directory, flushed to the disk."""
    tree = {"format": FORMAT} | dataclasses.asdict(manifest)
    del tree["data_dir"], tree["loaded"], tree["chosen"]
    tree["sha256"] = _own_sha256(tree)
    files.write_json(os.path.join(manifest.data_dir, FILENAME), tree)


def checksum(data_dir: str | os.PathLike[str]) -> str:
    """SHA-256, in hexadecimal, of the manifest in a directory of data, or in a run that has a copy of it."""
    with open(os.path.join(data_dir, FILENAME), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_sha256(tree: dict[str, Any]) -> str:
    """SHA-256 of a manifest, computed without its checksum entry."""
    said = {key: value for key, value in tree.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def load(data_dir: str) -> Manifest:
    """Reads the manifest of a converted data directory; of a URI, that of its local copy, which is downloaded.

    Raises:
      UserError: there is no finished conversion, or its manifest is damaged or has an unknown format.
      JobError: a store does not answer.
    """
    data_dir = copies.local(data_dir, owned.DATA)
    path = os.path.join(data_dir, FILENAME)
    try:
        with open(path, "rb") as file:
            content = file.read()
        tree = json.loads(content)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{data_dir} holds no converted data (no {FILENAME}); write it with stem-convert") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {_AGAIN}") from None
    if not isinstance(tree, dict) or tree.get("format") not in READABLE:
        found = tree.get("format") if isinstance(tree, dict) else None
        raise UserError(f"{path} has format {found}; this version reads format {FORMAT}: convert again")
    if tree["format"] != 1 and tree.get("sha256") != _own_sha256(tree):
        raise UserError(f"{path} is damaged (its content does not match its checksum); {_AGAIN}")
    try:
        manifest = _from_tree(os.path.abspath(data_dir), tree)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {_AGAIN}") from None
    return dataclasses.replace(manifest, loaded=integrity.file_of(content))


def _from_tree(data_dir: str, tree: dict[str, Any]) -> Manifest:
    splits = {
        name: Split(
            rows=split["rows"],
            tasks={task: TaskCounts(**counts) for task, counts in split["tasks"].items()},
            rare_share=split["rare_share"],
            shards={layout: [Shard(**shard) for shard in shards] for layout, shards in split["shards"].items()},
        )
        for name, split in tree["splits"].items()
    }
    numerics = {
        name: Constants(**{**constants, "boundaries": tuple(constants["boundaries"])})
        for name, constants in tree["numerics"].items()
    }
    return Manifest(
        data_dir=data_dir,
        name=tree["name"],
        seed=tree["seed"],
        sources=tuple(Source(**source) for source in tree["sources"]),
        split=tree["split"],
        splits=splits,
        vocabularies={name: Vocabulary(**sizes) for name, sizes in tree["vocabularies"].items()},
        numerics=numerics,
        dropped=tuple(Dropped(**dropped) for dropped in tree["dropped"]),
        label_scales={task: LabelScale(**scale) for task, scale in tree.get("label_scales", {}).items()},
        hashed={name: Hashed(**sizes) for name, sizes in tree.get("hashed", {}).items()},
        history={name: Growth(**sizes) for name, sizes in tree.get("history", {}).items()},
        times=Times(**tree["times"]) if tree.get("times") else None,
        ancestor=_ancestor(tree["ancestor"]) if tree.get("ancestor") else None,
        files={path: integrity.File(**file) for path, file in tree.get("files", {}).items()},
        created_by=tree["created_by"],
    )


def _ancestor(tree: dict[str, Any]) -> Ancestor:
    return Ancestor(**{**tree, "learned": tuple(tree["learned"])})
