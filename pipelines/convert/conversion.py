"""The conversion job: settles the split, runs the stages in worker processes, and writes the manifest."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import integrity, manifest, schema_yaml
from pipelines.convert import stages, staging
from pipelines.convert.cleaning import Cleaner
from pipelines.convert.numeric_fit import Moments
from pipelines.convert.split import (
    LAST_KEY,
    GivenSplit,
    HashSplit,
    LastRows,
    LastSplit,
    RandomSplit,
    SplitPolicy,
    TimeSplit,
    kth_smallest,
    last_directory,
    parse_time,
    time_kind,
)
from pipelines.convert.stages import Encoded, Job
from pipelines.log import sniff, source
from pipelines.log.source import CsvOptions, Log
from pipelines.manifest import LAYOUTS, SPLITS, Constants, Dropped, LabelScale, Manifest, Split, TaskCounts, Vocabulary
from pipelines.schema import Schema
from stem_util import owned
from stem_util.errors import FULL_DISK, JobError, UserError
from stem_util.progress import Progress
from stem_util.workers import Pool


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


def convert(options: Options) -> Manifest:
    """Converts a log; returns the manifest of the finished data.

    Raises:
      UserError: a mistake in the options, the schema or the log.
      JobError: the disk is full, or a worker process died.
    """
    log, given = _open(options)
    source_name = log.files[0] if len(log.files) == 1 else f"the log ({log.files[0]}, ...)"
    used = [*Cleaner(options.schema, GivenSplit(()), drop=False).columns]
    used += filter(None, (options.split_column, options.split_group))
    sniff.explain(log, used)
    options.schema.validate_columns(
        log.types, source_name, text=log.text, directories=log.directory_columns, problems=log.problems
    )
    if "row_id" in used:
        raise UserError(
            f"{log.files[0]}: the column name 'row_id' is taken by the place of a row in the log; rename it"
        )
    if log.text and not options.layouts:
        raise UserError(f"{log.files[0]}: training cannot read CSV; a conversion without records needs a Parquet log")
    inside = [path for path in log.files if _is_inside(path, options.output)]
    if inside:
        raise UserError(f"{inside[0]}: a file of the log lies in the output directory {options.output}")
    try:
        with (
            manifest.replacing(options.output, options.overwrite),
            staging.staged(options.output, kind=owned.DATA, overwrite=options.overwrite) as directory,
        ):
            _Conversion(options, log, given, directory).run()
    except OSError as error:
        if error.errno in FULL_DISK:
            why = os.strerror(error.errno)
            raise JobError(f"no space left for {options.output} ({why}); nothing was kept") from error
        raise
    finally:
        stages.forget_vocabularies()
    return manifest.load(options.output)


def _open(options: Options) -> tuple[Log, tuple[int, ...]]:
    """The log, and the split of each of its files when splits are given."""
    if not options.given:
        return source.open_log(source.find_files(options.log), options.csv), ()
    split_of: dict[str, int] = {}
    for number, name in enumerate(SPLITS):
        for path in source.find_files(options.given[name]) if name in options.given else ():
            if path in split_of:
                raise UserError(f"{path}: given for both --{SPLITS[split_of[path]]} and --{name}")
            split_of[path] = number
    return source.open_log(list(split_of), options.csv), tuple(split_of.values())


def _is_inside(path: str, directory: str) -> bool:
    directory = os.path.realpath(directory)
    return os.path.commonpath([os.path.realpath(path), directory]) == directory


class _Conversion:
    """The steps of one conversion, into a staging directory."""

    def __init__(self, options: Options, log: Log, given: tuple[int, ...], directory: str) -> None:
        self._options, self._log, self._given, self._directory = options, log, given, directory
        self._stamps = [integrity.stamp(path) for path in log.files]
        self._schema = options.schema
        self._scratch = os.path.join(directory, "scratch")
        # One unit cannot occupy two processes, and starting one takes a second.
        self._processes = min(options.processes, max(len(log.units), 1))

    def run(self) -> None:
        for name in ("scratch", "vocabulary", *self._options.layouts, "raw/validation", "raw/test"):
            os.makedirs(os.path.join(self._directory, name))
        with Pool(self._processes) as pool:
            policy, unit_rows = self._scan(pool)
            job = self._job(policy, unit_rows)
            fits, constants = self._fit(pool, job, sum(unit_rows))
            vocabularies = self._vocabularies(pool, job)
            encoded = self._encode(pool, job, fits)
            shards = self._shards(pool, job, fits)
            sources = self._sources(pool, unit_rows)
        self._number_raw_parts(job)
        shutil.rmtree(self._scratch)
        with open(os.path.join(self._directory, "schema.yaml"), "w", encoding="utf-8") as file:
            file.write(schema_yaml.dumps(self._schema))
            file.flush()
            os.fsync(file.fileno())
        bad = sum((fit.bad for fit in fits), Counter())
        others = [path for path in owned.entries(self._directory) if not path.startswith(LAYOUTS)]
        manifest.save(
            Manifest(
                data_dir=self._directory,
                name=self._schema.name,
                seed=self._options.seed,
                sources=sources,
                split=self._describe(policy),
                splits={name: self._summary(i, fits, encoded, shards[name]) for i, name in enumerate(SPLITS)},
                vocabularies=vocabularies,
                numerics=constants,
                label_scales={task: self._scale(task, fits) for task in fits[0].scales},
                dropped=tuple(Dropped(column, reason, rows) for (column, reason), rows in sorted(bad.items())),
                files={path: integrity.recorded(os.path.join(self._directory, path)) for path in others},
            )
        )

    def _sources(self, pool: Pool, unit_rows: list[int]) -> tuple[manifest.Source, ...]:
        """The files of the log, which should be what they were when the conversion began to read them."""
        tasks = [] if self._log.text else [(path, (path,)) for path in self._log.files]
        checksums = list(pool.run(integrity.crc32c, tasks)) or [""] * len(self._log.files)
        sources = []
        for path, rows, before, checksum in zip(
            self._log.files, self._file_rows(unit_rows), self._stamps, checksums, strict=True
        ):
            if integrity.stamp(path) != before:
                raise UserError(f"{path} changed while it was converted: convert it again when nobody writes to it")
            sources.append(manifest.Source(os.path.abspath(path), rows, before.bytes, before.mtime_ns, checksum))
        return tuple(sources)

    def _named(self, index: int) -> str:
        unit = self._log.units[index]
        return f"{unit.path} (from row {unit.first_row:,})" if unit.first_row else unit.path

    def _scan(self, pool: Pool) -> tuple[SplitPolicy, list[int]]:
        """Settles the split, and counts each unit's rows; reads the log only where it must."""
        options = self._options
        if self._given and not options.validation_share:
            policy: SplitPolicy = GivenSplit(self._given)
        elif self._given:
            share = options.validation_share or 0.0
            rest, unit_rows = self._divide(pool, options.validation_by, (1 - share, share, 0.0))
            return GivenSplit(self._given, rest), unit_rows
        elif options.split == "leave_last":
            return self._scan_last(pool)
        elif options.validation_from is not None or options.test_from is not None:
            column = self._split_column()
            policy = _given_times(column, *self._time_kind(column), options.validation_from, options.test_from)
        else:
            return self._divide(pool, str(options.split), options.fractions)
        return policy, self._count(pool, policy, gather=False)

    def _split_column(self, flag: str = "split_column") -> str:
        column = getattr(self._options, flag)
        self._log.require(column, f"--{flag}={column}")
        return column

    def _divide(
        self, pool: Pool, by: str, fractions: tuple[float, float, float]
    ) -> tuple[HashSplit | RandomSplit | TimeSplit, list[int]]:
        """The policy that divides rows, of train files where splits are given, and each unit's rows."""
        if by == "time":
            return self._scan_times(pool, self._split_column(), fractions)
        seed = self._options.seed
        policy = HashSplit(self._split_column(), fractions, seed) if by == "hash" else RandomSplit(fractions, seed)
        return policy, self._count(pool, policy, gather=False)

    def _scan_times(
        self, pool: Pool, column: str, fractions: tuple[float, float, float]
    ) -> tuple[TimeSplit, list[int]]:
        """Reads all times, and finds those that divide them by the fractions."""
        kind, _ = self._time_kind(column)
        # The limits are not known yet, and not needed to read times.
        unit_rows = self._count(pool, TimeSplit(column, kind, 0, 0), gather=True)
        paths = [path for path in map(self._scan_path, self._train_units()) if os.path.getsize(path)]

        def pieces() -> Iterator[np.ndarray]:
            for path in paths:
                times = np.memmap(path, np.uint64, "r")
                for start in range(0, len(times), source.CHUNK_ROWS):
                    yield times[start : start + source.CHUNK_ROWS]

        total = sum(os.path.getsize(path) // 8 for path in paths)
        train, validation, _ = fractions
        ranks = [round(total * train), min(round(total * (train + validation)), total)]
        if not ranks[0]:
            dropped = (
                f" (others are dropped: '{column}' is missing or no {kind})" if self._options.drop_bad_rows else ""
            )
            raise UserError(f"the log has {total:,} rows with a time, too few for a split by shares of them{dropped}")
        limits = kth_smallest(pieces, ranks)
        for path in paths:
            os.unlink(path)
        return TimeSplit(column, kind, limits[0], limits[1]), unit_rows

    def _scan_last(self, pool: Pool) -> tuple[LastSplit, list[int]]:
        """Finds the last rows of every group: holds 72 bytes a group, and about 500 while they are sorted."""
        column = self._split_column()
        group = self._schema.group if self._options.split_group is None else self._split_column("split_group")
        if group is None:
            raise UserError(
                "--split=leave_last: the schema names no group; say whose last rows with --split_group=COLUMN"
            )
        directory = last_directory(self._directory)
        policy = LastSplit(column, self._time_kind(column)[0], group, directory)
        unit_rows = self._count(pool, policy, gather=True)
        starts = np.cumsum([0, *self._file_rows(unit_rows)])
        last = LastRows()
        for unit in self._log.units:
            rows = np.load(self._scan_path(unit.index))
            rows["row"] += starts[unit.file]
            last.merge(rows)
            os.unlink(self._scan_path(unit.index))
        held_out = last.held_out()
        if not len(held_out[0]):
            raise UserError(f"--split=leave_last: no value of column '{group}' has 3 rows, so nothing can be held out")
        policy.save(*held_out)
        return policy, unit_rows

    def _time_kind(self, column: str) -> tuple[pa.DataType, Any]:
        """The type in which a column's values are ordered, and one of them."""
        for unit in self._log.units:
            for chunk in source.read(self._log, unit, [column], skip_malformed=self._options.drop_bad_rows):
                values = self._log.alike(chunk.columns)[column].drop_null()
                if len(values):
                    return time_kind(values, column), values[0].as_py()
        raise UserError(f"--split_column={column}: the column holds no value")

    def _scan_path(self, unit: int) -> str:
        return os.path.join(self._scratch, f"scan-{unit}")

    def _train_units(self) -> list[int]:
        """Units that a split by time is settled from: all, or those of given train files."""
        return [unit.index for unit in self._log.units if not self._given or self._given[unit.file] == 0]

    def _count(self, pool: Pool, policy: SplitPolicy, *, gather: bool) -> list[int]:
        """Rows of each unit; has `stages.scan` leave what the policy is settled from when asked to."""
        if not gather and not self._log.text:
            return [unit.rows for unit in self._log.units]  # Parquet files know
        cleaner = Cleaner(self._schema, policy, self._options.drop_bad_rows)
        settling = set(self._train_units()) if gather else set()
        tasks = [
            (
                self._named(unit.index),
                (self._log, unit, cleaner, unit.index in settling, self._scan_path(unit.index)),
            )
            for unit in self._log.units
        ]
        counts = []
        with Progress(None, unit="rows", desc="scan") as progress:
            for rows in pool.run(stages.scan, tasks):
                counts.append(rows)
                progress.update(rows)
        return counts

    def _file_rows(self, unit_rows: list[int]) -> list[int]:
        rows = [0] * len(self._log.files)
        for unit, count in zip(self._log.units, unit_rows, strict=True):
            rows[unit.file] += count
        return rows

    def _job(self, policy: SplitPolicy, unit_rows: list[int]) -> Job:
        starts = np.cumsum([0, *self._file_rows(unit_rows)])[:-1]
        return Job(
            log=self._log,
            cleaner=Cleaner(self._schema, policy, self._options.drop_bad_rows),
            file_starts=tuple(starts.tolist()),
            seed=self._options.seed,
            layouts=self._options.layouts,
            block_rows=self._options.block_rows,
            directory=self._directory,
            scratch=self._scratch,
        )

    def _fit(self, pool: Pool, job: Job, rows: int) -> tuple[list[stages.Fit], dict[str, Constants]]:
        fits = []
        numerics: dict[str, Any] = {}
        tasks = [(self._named(unit.index), (job, unit)) for unit in self._log.units]
        with Progress(rows, unit="rows", desc="pass 1 of 2") as progress:
            for fit in pool.run(stages.fit, tasks):
                for name, numeric in fit.numerics.items():
                    if name in numerics:
                        numerics[name].merge(numeric)
                    else:
                        numerics[name] = numeric
                fit.numerics = {}  # samples are large
                fits.append(fit)
                progress.update(int(fit.rows.sum()) + fit.bad.total())
        train = sum(int(fit.rows[0]) for fit in fits)
        if not train:
            bad = sum((fit.bad for fit in fits), Counter())
            why = "".join(f"; {Dropped(column, reason, count)}" for (column, reason), count in bad.most_common())
            raise UserError(f"the train split has no rows (the log has {rows:,}{why})")
        return fits, {name: numeric.constants() for name, numeric in numerics.items()}

    def _vocabularies(self, pool: Pool, job: Job) -> dict[str, Vocabulary]:
        names = job.counted_features()
        sizes = pool.run(stages.build_vocabulary, [(f"the vocabulary of {name}", (job, name)) for name in names])
        return {name: Vocabulary(*size) for name, size in zip(names, sizes, strict=True)}

    def _encode(self, pool: Pool, job: Job, fits: list[stages.Fit]) -> list[Encoded]:
        tasks = [
            (self._named(unit.index), (job, unit, fit.segments, bool(fit.rows[1:].any())))
            for unit, fit in zip(self._log.units, fits, strict=True)
        ]
        results = []
        with Progress(int(sum(fit.rows.sum() for fit in fits)), unit="rows", desc="pass 2 of 2") as progress:
            for fit, encoded in zip(fits, pool.run(stages.encode, tasks), strict=True):
                results.append(encoded)
                progress.update(int(fit.rows.sum()))
        return results

    def _shards(self, pool: Pool, job: Job, fits: list[stages.Fit]) -> dict[str, dict[str, list[manifest.Shard]]]:
        if not self._options.layouts:
            return {split: {} for split in SPLITS}
        plans = [
            plan
            for i, split in enumerate(SPLITS)
            for plan in stages.plan_shards(split, [int(fit.rows[i]) for fit in fits], self._options.shard_rows)
        ]
        shards: dict[str, dict[str, list[manifest.Shard]]] = {
            split: {layout: [] for layout in self._options.layouts} for split in SPLITS
        }
        total = int(sum(fit.rows.sum() for fit in fits))
        tasks = [(f"shard {plan.index} of {plan.split}", (job, plan)) for plan in plans]
        with Progress(total, unit="rows", desc="write") as progress:
            for plan, written in zip(plans, pool.run(stages.write_shard, tasks), strict=True):
                for layout, shard in written.items():
                    shards[plan.split][layout].append(shard)
                progress.update(next(iter(written.values())).rows)
        return shards

    def _number_raw_parts(self, job: Job) -> None:
        """Units without rows of a split left no part: numbers the others without gaps."""
        for split in SPLITS[1:]:
            paths = [job.raw_path(split, f"unit-{unit.index}") for unit in self._log.units]
            for number, path in enumerate(filter(os.path.exists, paths)):
                os.rename(path, job.raw_path(split, number))

    def _describe(self, policy: SplitPolicy) -> dict[str, Any]:
        """The split policy as the manifest keeps it."""
        if isinstance(policy, GivenSplit):
            files = list(zip(self._log.files, policy.file_splits, strict=True))
            by_split = {
                name: [os.path.abspath(path) for path, split in files if split == i] for i, name in enumerate(SPLITS)
            }
            return {"by": "given files", **by_split, **({"rest": self._describe(policy.rest)} if policy.rest else {})}
        if isinstance(policy, RandomSplit):
            return {"by": "random", "fractions": list(policy.fractions)}
        if isinstance(policy, HashSplit):
            return {"by": "hash", "column": policy.column, "fractions": list(policy.fractions)}
        if isinstance(policy, LastSplit):
            return {"by": "leave last", "column": policy.column, "group": policy.group, "type": str(policy.kind)}
        share = self._options.validation_share
        fractions = list(self._options.fractions) if share is None else [1 - share, share, 0.0]
        by_value = self._options.validation_from is not None or self._options.test_from is not None
        return {"by": "time", "column": policy.column, "fractions": None if by_value else fractions} | policy.describe()

    def _scale(self, task: str, fits: list[stages.Fit]) -> LabelScale:
        moments = sum((fit.scales[task] for fit in fits), Moments())
        return LabelScale(moments.mean, moments.std)

    def _summary(
        self, split: int, fits: list[stages.Fit], encoded: list[Encoded], shards: dict[str, list[manifest.Shard]]
    ) -> Split:
        tasks, rare = {}, {}
        for task in self._schema.tasks:
            inside = sum(int(fit.inside[task.name][split]) for fit in fits)
            weight = sum(float(fit.weights[task.name][split]) for fit in fits)
            labels = sum(float(fit.label_sums[task.name][split]) for fit in fits)
            rate = labels / weight if inside else None
            tasks[task.name] = TaskCounts(inside, rate, weight if task.row_weight else None)
        for name in encoded[0].values:
            values = sum(int(e.values[name][split]) for e in encoded)
            rare[name] = sum(int(e.rare[name][split]) for e in encoded) / values if values else 0.0
        return Split(sum(int(fit.rows[split]) for fit in fits), tasks, rare, shards)


def _given_times(
    column: str, kind: pa.DataType, example: Any, validation_from: str | None, test_from: str | None
) -> TimeSplit:
    """The split at given times; without one of them the split that it would begin has no rows."""

    def last_before(text: str, flag: str) -> int:
        return max(parse_time(text, kind, flag, example) - 1, 0)

    test = last_before(test_from, "test_from") if test_from is not None else LAST_KEY
    validation = last_before(validation_from, "validation_from") if validation_from is not None else test
    if validation > test:
        raise UserError(f"--validation_from={validation_from} should not be later than --test_from={test_from}")
    return TimeSplit(column, kind, validation, test)
