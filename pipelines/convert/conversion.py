"""A conversion: the order of its steps.

1. `scan` decides the split and counts rows.
2. `fit` reads and cleans all rows, hashes values, counts vocabularies and fits numeric transforms. With ``extend``,
   counts are added to those of the data that are extended (`growth`), and constants are theirs.
3. `encode` turns values into ids, and keeps raw rows of validation and test.
4. `shards` writes the records.

Worker processes run the steps, one unit of the log, feature or shard at a time, without TensorFlow. Their memory is
bounded by the sizes of segments and shards, and grows with vocabularies only. They are processes of this machine, or
workers of Apache Beam (`beam.py`).
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import os
from collections import Counter
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import numpy as np

from pipelines import hashed_ids, integrity, manifest, schema_yaml
from pipelines.convert import extending, staging, times
from pipelines.convert.cleaner import Cleaner, Clock
from pipelines.convert.encode import Encoded, encode, forget_vocabularies
from pipelines.convert.fit import Fit, build_vocabulary, fit
from pipelines.convert.growth import Forget, Step
from pipelines.convert.job import Job
from pipelines.convert.numeric_fit import Moments
from pipelines.convert.options import Options
from pipelines.convert.scan import Scan
from pipelines.convert.shards import plan_shards, write_shard
from pipelines.convert.split import GivenSplit, SplitPolicy
from pipelines.hashed_ids import Distinct
from pipelines.log import sniff, source
from pipelines.log.find import find_files
from pipelines.log.parts import Log
from pipelines.manifest import (
    LAYOUTS,
    SPLITS,
    Constants,
    Dropped,
    Growth,
    Hashed,
    LabelScale,
    Manifest,
    Split,
    TaskCounts,
    Times,
    Vocabulary,
)
from stem_util import copies, files, owned, stores
from stem_util.errors import FULL_DISK, JobError, UserError
from stem_util.progress import Progress
from stem_util.workers import Pool, Workers


def convert(options: Options) -> Manifest:
    """Converts a log; returns the manifest of the finished data, of the local copy where ``output`` is a URI.

    Raises:
      UserError: the options, the schema or the log have a mistake.
      JobError: the disk is full, a worker process died, or a store does not answer.
    """
    options.check()
    if options.runner != "local":
        _beam().check(options.runner, options.beam_args)
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
            f"{log.files[0]}: the column name 'row_id' is reserved for the place of a row in the log; rename the column"
        )
    if log.text and not options.layouts:
        raise UserError(f"{log.files[0]}: training cannot read CSV; a conversion without records needs a Parquet log")
    inside = [path for path in log.files if _is_inside(path, options.output)]
    if inside:
        raise UserError(f"{inside[0]}: a file of the log lies in the output directory {options.output}")
    try:
        with (
            _extended(options) as extended,
            copies.output(options.output, owned.DATA, overwrite=options.overwrite) as output,
            manifest.replacing(output, options.overwrite),
            staging.staged(output, kind=owned.DATA, overwrite=options.overwrite) as directory,
        ):
            if extended:
                extending.check_new(extended, options.extend, log, given)
            _Conversion(options, log, given, directory, extended).run()
    except OSError as error:
        if error.errno in FULL_DISK:
            why = os.strerror(error.errno)
            raise JobError(f"no space left for {options.output} ({why}); nothing was kept") from error
        raise
    finally:
        forget_vocabularies()
    return manifest.load(output)


def _extended(options: Options) -> AbstractContextManager[Manifest | None]:
    """The data that the conversion goes on from, if there are any."""
    if not options.extend:
        return contextlib.nullcontext()
    return extending.extended(options.extend, options.output, options.schema)


def _beam() -> ModuleType:
    """The module of `pipelines.convert` that needs Apache Beam, which is an extra."""
    logging.disable(logging.WARNING)  # Beam lists the libraries of Google that are not there
    try:
        from pipelines.convert import beam
    except ModuleNotFoundError as error:
        if error.name != "apache_beam":
            raise
        raise UserError("Apache Beam is not installed, and --runner needs it: pip install 'stem-tf[beam]'") from None
    finally:
        logging.disable(logging.NOTSET)
    return beam


def _open(options: Options) -> tuple[Log, tuple[int, ...]]:
    """The log, and the split of each file if splits are given."""
    if not options.given:
        return source.open_log(_files(options.log, options), options.csv), ()
    split_of: dict[str, int] = {}
    for number, name in enumerate(SPLITS):
        for path in _files(options.given[name], options) if name in options.given else ():
            if path in split_of:
                raise UserError(f"{path}: given for both --{SPLITS[split_of[path]]} and --{name}")
            split_of[path] = number
    return source.open_log(list(split_of), options.csv), tuple(split_of.values())


def _files(patterns: str, options: Options) -> list[str]:
    found = find_files(patterns)
    if options.runner == "local":
        return found
    # Workers of Beam have directories of their own.
    return [stores.absolute(path) for path in found]


def _is_inside(path: str, directory: str) -> bool:
    if stores.is_uri(path):
        return False
    directory = os.path.realpath(directory)
    return os.path.commonpath([os.path.realpath(path), directory]) == directory


class _Conversion:
    """The steps of one conversion, into a staging directory."""

    def __init__(
        self, options: Options, log: Log, given: tuple[int, ...], directory: str, extended: Manifest | None
    ) -> None:
        self._options, self._log, self._given, self._directory = options, log, given, directory
        self._extended = extended
        self._stamps = [integrity.stamp(path) for path in log.files]
        self._schema = options.schema
        self._scratch = os.path.join(directory, "scratch")

    def run(self) -> None:
        kept = [f"history/{what}" for what in ("seen", "rare", *(["changed"] if self._extended else []))]
        for name in ("scratch", "vocabulary", *kept, *self._options.layouts, "raw/validation", "raw/test"):
            os.makedirs(os.path.join(self._directory, name))
        scan = Scan(self._options, self._log, self._given, self._directory, self._scratch)
        with self._workers() as pool:
            policy, unit_rows = scan.run(pool)
            job = self._job(policy, scan.clock, unit_rows)
            fits, constants = self._fit(pool, job, sum(unit_rows))
            happened, step = self._step(job, fits)
            vocabularies, history = self._vocabularies(pool, job, step)
            encoded = self._encode(pool, job, fits)
            shards = self._shards(pool, job, fits)
            sources = self._sources(pool, unit_rows)
        files.remove_tree(self._scratch)  # from now on, nobody writes to the output but this process
        self._number_raw_parts(job)
        files.write_atomically(os.path.join(self._directory, "schema.yaml"), schema_yaml.dumps(self._schema).encode())
        bad = sum((fit.bad for fit in fits), Counter())
        others = [path for path in owned.entries(self._directory) if not path.startswith(LAYOUTS)]
        manifest.save(
            Manifest(
                data_dir=self._directory,
                name=self._schema.name,
                seed=self._options.seed,
                sources=sources,
                split=policy.describe(self._log.files),
                splits={name: self._summary(i, fits, encoded, shards[name]) for i, name in enumerate(SPLITS)},
                vocabularies=vocabularies,
                history=history,
                numerics=constants,
                hashed=self._hashed(fits),
                label_scales=self._scales(fits),
                times=happened,
                ancestor=extending.recorded(self._extended, self._options.extend) if self._extended else None,
                dropped=tuple(Dropped(column, reason, rows) for (column, reason), rows in sorted(bad.items())),
                files={path: integrity.recorded(os.path.join(self._directory, path)) for path in others},
            )
        )

    def _workers(self) -> AbstractContextManager[Workers]:
        if self._options.runner == "local":
            # There is no use for more processes than units, and starting one takes a second.
            return Pool(min(self._options.processes, max(len(self._log.units), 1)))
        pool: AbstractContextManager[Workers] = _beam().BeamPool(
            self._options.runner, self._options.beam_args, self._scratch
        )
        return pool

    def _sources(self, pool: Workers, unit_rows: list[int]) -> tuple[manifest.Source, ...]:
        """The files of the log, after checking that they have not changed since the conversion began."""
        # A file of a store is known by its size and time: its content costs a download.
        read_again = [path for path in self._log.files if not stores.is_uri(path)]
        found = pool.run(integrity.crc32c, [(path, (path,)) for path in read_again])
        checksums = dict(zip(read_again, found, strict=True))
        sources = []
        for path, rows, before in zip(self._log.files, self._log.file_rows(unit_rows), self._stamps, strict=True):
            if integrity.stamp(path) != before:
                raise UserError(f"{path} changed while it was converted: convert it again when nobody writes to it")
            sources.append(
                manifest.Source(stores.absolute(path), rows, before.bytes, before.mtime_ns, checksums.get(path, ""))
            )
        return tuple(sources)

    def _job(self, policy: SplitPolicy, clock: Clock | None, unit_rows: list[int]) -> Job:
        starts = np.cumsum([0, *self._log.file_rows(unit_rows)])[:-1]
        return Job(
            log=self._log,
            cleaner=Cleaner(self._schema, policy, self._options.drop_bad_rows, clock),
            file_starts=tuple(starts.tolist()),
            seed=self._options.seed,
            layouts=self._options.layouts,
            block_rows=self._options.block_rows,
            directory=self._directory,
            scratch=self._scratch,
        )

    def _fit(self, pool: Workers, job: Job, rows: int) -> tuple[list[Fit], dict[str, Constants]]:
        fits = []
        numerics: dict[str, Any] = {}
        tasks = [(self._log.unit_name(unit), (job, unit)) for unit in self._log.units]
        with Progress(rows, unit="rows", desc="pass 1 of 2") as progress:
            for found in pool.run(fit, tasks):
                for name, numeric in found.numerics.items():
                    if name in numerics:
                        numerics[name].merge(numeric)
                    else:
                        numerics[name] = numeric
                found.numerics = {}  # frees the samples, which are large
                fits.append(found)
                progress.update(int(found.rows.sum()) + found.bad.total())
        train = sum(int(fit.rows[0]) for fit in fits)
        if not train:
            bad = sum((fit.bad for fit in fits), Counter())
            why = "".join(f"; {Dropped(column, reason, count)}" for (column, reason), count in bad.most_common())
            raise UserError(f"the train split has no rows (the log has {rows:,}{why})")
        if self._extended and not self._options.refit:
            return fits, self._extended.numerics
        return fits, {name: numeric.constants() for name, numeric in numerics.items()}

    def _step(self, job: Job, fits: list[Fit]) -> tuple[Times | None, Step]:
        """When the rows happened, and what becomes of the values that are known."""
        happened, units = None, 0
        if (clock := job.cleaner.clock) is not None:
            newest, row = max(fit.last for fit in fits if fit.last is not None)
            units = times.units_per_second(clock.kind, newest)
            ends = np.array([min(fit.first for fit in fits if fit.first is not None), newest])
            happened = Times(clock.column, str(clock.kind), units > 0, *times.microseconds(ends, units).tolist())
            if self._extended and happened.calendar and times.in_the_future(happened.last):
                file = bisect.bisect_right(job.file_starts, row) - 1
                raise UserError(
                    f"{self._log.files[file]}, row {row - job.file_starts[file]:,}: its time ('{clock.column}'), "
                    f"{times.shown(happened.last, happened.calendar)}, lies in the future: every log until then would "
                    "be older than these data. Mend the row, or leave it out"
                )
        forget = None if self._options.forget is None else Forget.parse(self._options.forget)
        return happened, extending.step(self._extended, happened, units, forget, late=self._options.late)

    def _vocabularies(self, pool: Workers, job: Job, step: Step) -> tuple[dict[str, Vocabulary], dict[str, Growth]]:
        names = job.counted_features()
        built = pool.run(build_vocabulary, [(f"the vocabulary of {name}", (job, name, step)) for name in names])
        vocabularies, history = {}, {}
        for name, sizes in zip(names, built, strict=True):
            vocabularies[name], history[name] = sizes
            for unit in self._log.units:
                os.unlink(job.counts_path(name, unit.index))
        return vocabularies, history

    def _hashed(self, fits: list[Fit]) -> dict[str, Hashed]:
        found = {}
        for feature in self._schema.features:
            if feature.hash is not None:
                distinct = Distinct()
                for fit in fits:
                    distinct.merge(fit.distinct[feature.name])
                function = hashed_ids.FUNCTIONS[feature.dtype]
                found[feature.name] = Hashed(feature.hash.buckets, feature.hash.hashes, function, distinct.count)
        return found

    def _encode(self, pool: Workers, job: Job, fits: list[Fit]) -> list[Encoded]:
        tasks = [
            (self._log.unit_name(unit), (job, unit, fit.segments, bool(fit.rows[1:].any())))
            for unit, fit in zip(self._log.units, fits, strict=True)
        ]
        results = []
        with Progress(int(sum(fit.rows.sum() for fit in fits)), unit="rows", desc="pass 2 of 2") as progress:
            for unit, fit, encoded in zip(self._log.units, fits, pool.run(encode, tasks), strict=True):
                results.append(encoded)
                for number in range(fit.segments):
                    os.unlink(job.segment_path(unit.index, number))
                progress.update(int(fit.rows.sum()))
        return results

    def _shards(self, pool: Workers, job: Job, fits: list[Fit]) -> dict[str, dict[str, list[manifest.Shard]]]:
        if not self._options.layouts:
            return {split: {} for split in SPLITS}
        plans = [
            plan
            for i, split in enumerate(SPLITS)
            for plan in plan_shards(split, [int(fit.rows[i]) for fit in fits], self._options.shard_rows)
        ]
        shards: dict[str, dict[str, list[manifest.Shard]]] = {
            split: {layout: [] for layout in self._options.layouts} for split in SPLITS
        }
        total = int(sum(fit.rows.sum() for fit in fits))
        tasks = [(f"shard {plan.index} of {plan.split}", (job, plan)) for plan in plans]
        with Progress(total, unit="rows", desc="write") as progress:
            for plan, written in zip(plans, pool.run(write_shard, tasks), strict=True):
                for layout, shard in written.items():
                    shards[plan.split][layout].append(shard)
                progress.update(next(iter(written.values())).rows)
        return shards

    def _number_raw_parts(self, job: Job) -> None:
        """Renames the raw parts that units left to consecutive numbers; units without rows of the split left none."""
        for split in SPLITS[1:]:
            paths = [job.raw_path(split, f"unit-{unit.index}") for unit in self._log.units]
            for number, path in enumerate(filter(os.path.exists, paths)):
                os.rename(path, job.raw_path(split, number))

    def _scales(self, fits: list[Fit]) -> dict[str, LabelScale]:
        if self._extended and not self._options.refit:
            return self._extended.label_scales
        moments = {task: sum((fit.scales[task] for fit in fits), Moments()) for task in fits[0].scales}
        return {task: LabelScale(found.mean, found.std) for task, found in moments.items()}

    def _summary(
        self, split: int, fits: list[Fit], encoded: list[Encoded], shards: dict[str, list[manifest.Shard]]
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
