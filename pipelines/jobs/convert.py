"""Converts a log (CSV or Parquet) to TFRecord shards, vocabularies and fitted transforms, ready to train on.

    stem-convert LOG --schema=my.yaml --output=DIR --split=time --split_column=time_ms
    stem-convert --train=a/*.parquet --validation=b.parquet --test=c.parquet --schema=my.yaml --output=DIR
    stem-convert --train=a.csv --validation_share=0.1 --test=b.csv --schema=my.yaml --output=DIR
    stem-convert NEW_LOG --extend=DIR --schema=my.yaml --output=DIR2 --split=time --split_column=time_ms

LOG: comma-separated files, globs or directories, on this machine or in a store (s3://, gs://, hdfs://). The same log,
schema, flags and seed give the same bytes, whatever the number of processes. An interrupted conversion leaves nothing
at DIR.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from pipelines import hashed_ids, schema_yaml
from pipelines.convert import constant_labels, times
from pipelines.convert.conversion import convert
from pipelines.convert.options import FRACTIONS, RUNNERS, Options
from pipelines.jobs import csv_flags
from pipelines.log.parts import CsvOptions
from pipelines.manifest import LAYOUTS, SPLITS, Manifest
from stem_util import cli, stores
from stem_util.errors import UserError

flags = cli.Flags()

_LOG = flags.DEFINE_string("log", None, "The log (or give it as the argument).")
_SCHEMA = flags.DEFINE(cli.PATH, "schema", None, "Schema file, or the name of a shipped one.")
_OUTPUT = flags.DEFINE(cli.PLACE, "output", None, "Directory to create, or its URI, such as s3://bucket/data.")
_SPLIT = flags.DEFINE_enum(
    "split",
    None,
    ["time", "hash", "random", "leave_last"],
    "How rows are divided. time: by the time in --split_column; train gets the oldest rows, rows of equal time stay "
    "together in the earlier split. hash: by a hash of --split_column; rows of equal value stay together. random: "
    "row by row. leave_last: the last row of each group (each user) by the time in --split_column goes to test, the "
    "row before it to validation; groups of one or two rows go to train.",
)
_SPLIT_COLUMN = flags.DEFINE_string("split_column", None, "The column that time, hash and leave_last split by.")
_SPLIT_GROUP = flags.DEFINE_string(
    "split_group", None, "The column whose values are the groups of leave_last (default: the schema's group)."
)
_FRACTIONS = flags.DEFINE_list(
    "fractions", [*map(str, FRACTIONS)], "Shares of train, validation and test (default: 0.8,0.1,0.1)."
)
_VALIDATION_FROM = flags.DEFINE_string(
    "validation_from",
    None,
    "The first time of validation, instead of --fractions: a number if the column holds numbers, else a time such as "
    "2024-01-31, 2024-01-31T10:00 or 2024-01-31T10:00:00+01:00. Without an offset, it is in the column's time zone.",
)
_TEST_FROM = flags.DEFINE_string("test_from", None, "The first time of test, written like --validation_from.")
_GIVEN = {
    split: flags.DEFINE_string(split, None, f"Files of the {split} split, instead of LOG and --split.")
    for split in SPLITS
}
_VALIDATION_SHARE = flags.DEFINE_float(
    "validation_share",
    None,
    "With --train but without --validation: the share of train that becomes validation (0: none).",
    lower_bound=0.0,
)
_VALIDATION_BY = flags.DEFINE_enum(
    "validation_by",
    "random",
    ["random", "hash", "time"],
    "Which rows --validation_share takes: random rows, those chosen by a hash of --split_column, or the newest by the "
    "time in --split_column.",
)
_EXTEND = flags.DEFINE(
    cli.PLACE,
    "extend",
    None,
    "Converted data (a directory or URI) to go on from: values keep their ids and counts, new ones get ids behind; "
    "constants of numbers and labels are kept. The output has the rows of the new log alone.",
)
_FORGET = flags.DEFINE_string(
    "forget",
    None,
    "With --extend: a value loses its id, which new values may take, if no train row has had it for this long before "
    "the log's last row (30d, 12h), or in this many conversions, this one included (7).",
)
_REFIT = flags.DEFINE_boolean(
    "refit", False, "With --extend: fit means, quantiles and label scales on the new log, instead of keeping them."
)
_LATE = flags.DEFINE_boolean(
    "late", False, "With --extend: the log came late, and may end before the rows that the data have already."
)
_LAYOUTS = flags.DEFINE_list(
    "layouts",
    list(LAYOUTS),
    "Records to write: blocks (columns of many rows; fast to read), rows (one tf.Example per row, for other readers), "
    "or none (to train on the Parquet log itself). Both by default.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the split and the shuffle.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Worker processes (default: the number of cores).", lower_bound=1)
_RUNNER = flags.DEFINE_enum(
    "runner",
    "local",
    list(RUNNERS),
    "What runs the conversion: local (processes of this machine), or Apache Beam (the extra beam) on this machine "
    "(direct) or on a cluster. The output has the same bytes.",
)
_BEAM_ARGS = flags.DEFINE_string(
    "beam_args",
    "",
    'Apache Beam\'s pipeline options: "--direct_num_workers=4", "--flink_master=HOST:8081 --parallelism=64", ...',
)
_ON_BAD_ROWS = flags.DEFINE_enum(
    "on_bad_rows", "fail", ["fail", "drop"], "Stop at a bad row, or skip and count bad rows."
)
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace the converted data at --output.")
_BLOCK_ROWS = flags.DEFINE_integer("block_rows", 512, "Rows per block.", lower_bound=1)
_SHARD_ROWS = flags.DEFINE_integer("shard_rows", 250_000, "Rows per shard, roughly.", lower_bound=1)
_CSV = csv_flags.CsvFlags(flags)


def _options(argv: Sequence[str]) -> Options:
    """Returns the options that the flags set."""
    if len(argv) > 2:
        raise UserError(f"unexpected argument '{argv[2]}'; several files are written with commas between them")
    if len(argv) == 2 and _LOG.value:
        raise UserError(f"the log is given twice: '{argv[1]}' and --log={_LOG.value}")
    log = argv[1] if len(argv) == 2 else _LOG.value or ""
    given = {split: flag.value for split, flag in _GIVEN.items() if flag.value}
    for name, value in (("schema", _SCHEMA.value), ("output", _OUTPUT.value)):
        if not value:
            raise UserError(f"--{name} is required")
    if _EXTEND.value == "":  # a script's variable that is not set: ids would begin anew without a word
        raise UserError("--extend is empty: name the data to go on from, or leave it out")
    if _RUNNER.value != "local" and _PROCESSES.value:
        raise UserError(f"--processes belongs to --runner=local; of {_RUNNER.value}, --beam_args says how many")
    layouts = () if _LAYOUTS.value == ["none"] else tuple(dict.fromkeys(_LAYOUTS.value or [""]))
    return Options(
        schema=schema_yaml.load(_SCHEMA.value),
        output=_OUTPUT.value,
        log=log,
        given=given,
        split=_SPLIT.value,
        split_column=_SPLIT_COLUMN.value,
        split_group=_SPLIT_GROUP.value,
        validation_share=_VALIDATION_SHARE.value,
        validation_by=_VALIDATION_BY.value if _VALIDATION_BY.present else None,
        fractions=_fractions(_FRACTIONS.value) if _FRACTIONS.present else None,
        validation_from=_VALIDATION_FROM.value,
        test_from=_TEST_FROM.value,
        extend=_EXTEND.value or "",
        forget=_FORGET.value,
        refit=_REFIT.value,
        late=_LATE.value,
        layouts=layouts,
        seed=_SEED.value,
        runner=_RUNNER.value,
        beam_args=_BEAM_ARGS.value,
        processes=_PROCESSES.value or len(os.sched_getaffinity(0)),
        drop_bad_rows=_ON_BAD_ROWS.value == "drop",
        overwrite=_OVERWRITE.value,
        csv=_CSV.options(),
        block_rows=_BLOCK_ROWS.value,
        shard_rows=_SHARD_ROWS.value,
    )


def _fractions(texts: list[str]) -> tuple[float, float, float]:
    try:
        train, validation, test = (float(text) for text in texts)
    except ValueError:
        raise UserError(f"--fractions={','.join(texts)}: should be three numbers, as in 0.8,0.1,0.1") from None
    return train, validation, test


def report(done: Manifest, where: str, seconds: float, csv: CsvOptions, config: str = "CONFIG") -> None:
    """Prints what was written as tables on stdout, and warnings on stderr.

    Args:
      done: the manifest.
      where: the path or URI that the data were written to.
      seconds: how long it took.
      csv: how CSV files are written.
      config: the experiment to train.
    """
    rows = sum(done.rows(split) for split in SPLITS)
    tasks = done.schema.task_names
    width = max(map(len, ("task", *tasks)))
    print(f"{'task':{width}}" + "".join(f"  {split + ' rate':>16}  {'rows':>13}" for split in SPLITS))
    for task in tasks:
        rates = [f"{done.task_rate(s, task):.4f}" if done.task_rows(s, task) else "-" for s in SPLITS]
        cells = (f"  {rate:>16}  {done.task_rows(s, task):>13,}" for rate, s in zip(rates, SPLITS, strict=True))
        print(f"{task:{width}}" + "".join(cells))
    print(f"{'rows':{width}}" + "".join(f"  {'':>16}  {done.rows(split):>13,}" for split in SPLITS))
    if done.schema.row_weights:
        weighted = (f"{task.name} by {task.row_weight}" for task in done.schema.tasks if task.row_weight)
        print(f"rates are weighted: {', '.join(weighted)}")
    if done.vocabularies:
        width = max(map(len, ("feature", *done.vocabularies)))
        print(f"\n{'feature':{width}}  {'ids':>12}  {'distinct':>12}" + "".join(f"  {s + ' rare':>16}" for s in SPLITS))
        for name, sizes in done.vocabularies.items():
            shares = (f"  {done.splits[split].rare_share[name]:>16.2%}" for split in SPLITS)
            print(f"{name:{width}}  {done.num_ids(name):>12,}  {sizes.distinct:>12,}" + "".join(shares))
    if done.ancestor and done.history:
        heads = ("new ids", "reassigned", "evicted", "free", "rare, counted")
        print(f"\nextends {done.ancestor.directory}; this is generation {done.generation}")
        print(f"{'feature':{width}}" + "".join(f"  {head:>13}" for head in heads))
        for name, grown in done.history.items():
            counts = (grown.new, grown.reassigned, grown.evicted, done.vocabularies[name].free, grown.rare)
            print(f"{name:{width}}" + "".join(f"  {count:>13,}" for count in counts))
    if done.hashed:
        width = max(map(len, ("hashed feature", *done.hashed)))
        print(f"\n{'hashed feature':{width}}  {'buckets':>13}  {'hashes':>6}  {'distinct':>13}  {'alike':>7}")
        for name, by in ((f.name, f.hash) for f in done.schema.features if f.hash is not None):
            distinct = done.hashed[name].distinct
            share = hashed_ids.alike(distinct, by)
            print(f"{name:{width}}  {by.buckets:>13,}  {by.hashes:>6}  {distinct:>13,}  {share:>7.2%}")
        print("distinct: values in train, about; alike: the share that the model cannot tell from some other value")
    for dropped in done.dropped:
        print(dropped)
    print(f"\nwritten to {where}: {rows:,} rows in {seconds:.1f} s, {rows / seconds:,.0f} rows/s")
    source = "" if done.splits["train"].shards else " --input_format=parquet"
    going_on = " --from=RUN" if done.ancestor else ""
    print(f"next: stem-train --config={config}{going_on} --config.data.dir={where}{source}")
    for split in SPLITS[1:]:
        if not done.rows(split):
            needed = ": stem-train will refuse these data" if split == "validation" else ""
            print(f"warning: the {split} split has no rows{needed}", file=sys.stderr)
    if done.times and done.times.calendar and times.in_the_future(done.times.last):
        newest = times.shown(done.times.last, calendar=True)
        print(
            f"warning: the newest row is of {newest} ('{done.times.column}'), in the future: logs of the days until "
            "then extend these data with --late only",
            file=sys.stderr,
        )
    for warning in constant_labels.warnings(done, csv):
        print(f"warning: {warning}", file=sys.stderr)


def main(argv: Sequence[str]) -> None:
    started, options = time.monotonic(), _options(argv)
    done = convert(options)
    where = options.output if stores.is_uri(options.output) else done.data_dir
    report(done, where, time.monotonic() - started, options.csv)


def run() -> None:
    """Console script stem-convert."""
    cli.run(main, flags, "[LOG]", memory="a conversion with fewer --processes")


if __name__ == "__main__":
    run()
