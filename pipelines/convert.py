"""Converts a log (CSV or Parquet) to TFRecord shards, vocabularies and fitted transforms, ready to train on.

    stem-convert LOG --schema=my.yaml --output=DIR --split=time --split_column=time_ms
    stem-convert --train=a/*.parquet --validation=b.parquet --test=c.parquet --schema=my.yaml --output=DIR

LOG: comma-separated files, globs or directories. The same input, schema, flags and seed give the same bytes, whatever
the number of processes. An interrupted conversion leaves nothing at DIR.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from absl import flags

from pipelines import cli, csv_flags
from pipelines import schema as schemas
from pipelines.conversion import Options, convert
from pipelines.errors import UserError, did_you_mean
from pipelines.manifest import LAYOUTS, SPLITS, Manifest

_LOG = flags.DEFINE_string("log", None, "The log (or give it as the argument).")
_SCHEMA = flags.DEFINE_string("schema", None, "Schema file, or the name of a shipped one.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to create.")
_SPLIT = flags.DEFINE_enum(
    "split",
    None,
    ["time", "hash", "random"],
    "How rows are divided: by the time in --split_column (train is the oldest part; rows of equal time stay together, "
    "on the older side), by a hash of --split_column (rows of equal value stay together), or at random by row.",
)
_SPLIT_COLUMN = flags.DEFINE_string("split_column", None, "The column of a split by time or hash.")
_FRACTIONS = flags.DEFINE_list("fractions", ["0.8", "0.1", "0.1"], "Shares of train, validation and test.")
_VALIDATION_FROM = flags.DEFINE_string("validation_from", None, "First time of validation, instead of --fractions.")
_TEST_FROM = flags.DEFINE_string("test_from", None, "First time of test, instead of --fractions.")
_GIVEN = {
    split: flags.DEFINE_string(split, None, f"Files of the {split} split, instead of LOG and --split.")
    for split in SPLITS
}
_LAYOUTS = flags.DEFINE_list(
    "layouts",
    list(LAYOUTS),
    "Records to write: blocks (columns of many rows, fast to read), rows (a tf.Example a row, for anybody), or none "
    "(to train on the Parquet log itself).",
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of split and shuffle.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Worker processes; all cores by default.", lower_bound=1)
_ON_BAD_ROWS = flags.DEFINE_enum("on_bad_rows", "fail", ["fail", "drop"], "Stop at a bad row, or skip and count such.")
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace converted data at --output.")
flags.adopt_module_key_flags(csv_flags)
_BLOCK_ROWS = flags.DEFINE_integer("block_rows", 512, "Rows of a block.", lower_bound=1)
_SHARD_ROWS = flags.DEFINE_integer("shard_rows", 250_000, "Rows of a shard, about.", lower_bound=1)


def _options(argv: Sequence[str]) -> Options:
    """The flags, checked."""
    if len(argv) > 2:
        raise UserError(f"unexpected argument '{argv[2]}'; several files are written with commas between them")
    if len(argv) == 2 and _LOG.value:
        raise UserError(f"the log is given twice: '{argv[1]}' and --log={_LOG.value}")
    log = argv[1] if len(argv) == 2 else _LOG.value or ""
    given = {split: flag.value for split, flag in _GIVEN.items() if flag.value}
    for name, value in (("schema", _SCHEMA.value), ("output", _OUTPUT.value)):
        if not value:
            raise UserError(f"--{name} is required")
    if given and (log or _SPLIT.value):
        raise UserError(f"--{next(iter(given))} gives a split's files; leave out {'the log' if log else '--split'}")
    if given and "train" not in given:
        raise UserError("--train is required with --validation and --test")
    if not given and not log:
        raise UserError("the log is required: stem-convert LOG, or --train, --validation and --test")
    if not given and not _SPLIT.value:
        raise UserError("--split is required: time, hash or random (or give --train, --validation, --test and no LOG)")
    if _SPLIT.value in ("time", "hash") and not _SPLIT_COLUMN.value:
        raise UserError(f"--split={_SPLIT.value} needs --split_column")
    if _SPLIT.value not in ("time", "hash") and _SPLIT_COLUMN.value:
        raise UserError("--split_column belongs to --split=time and --split=hash")
    if _SPLIT.value != "time" and (_VALIDATION_FROM.value or _TEST_FROM.value):
        raise UserError("--validation_from and --test_from belong to --split=time")
    if (_VALIDATION_FROM.value or _TEST_FROM.value) and flags.FLAGS["fractions"].present:
        raise UserError("--fractions and --validation_from / --test_from exclude each other")
    layouts = () if _LAYOUTS.value == ["none"] else tuple(dict.fromkeys(_LAYOUTS.value or [""]))
    for layout in layouts:
        if layout not in LAYOUTS:
            hint = did_you_mean(layout, LAYOUTS)
            raise UserError(f"--layouts: '{layout}' should be one of {', '.join(LAYOUTS)}, or none alone{hint}")
    return Options(
        schema=schemas.load(_SCHEMA.value),
        output=_OUTPUT.value,
        log=log,
        given=given,
        split=_SPLIT.value,
        split_column=_SPLIT_COLUMN.value,
        fractions=_fractions(_FRACTIONS.value),
        validation_from=_VALIDATION_FROM.value,
        test_from=_TEST_FROM.value,
        layouts=layouts,
        seed=_SEED.value,
        processes=_PROCESSES.value or len(os.sched_getaffinity(0)),
        drop_bad_rows=_ON_BAD_ROWS.value == "drop",
        overwrite=_OVERWRITE.value,
        csv=csv_flags.options(),
        block_rows=_BLOCK_ROWS.value,
        shard_rows=_SHARD_ROWS.value,
    )


def _fractions(texts: list[str]) -> tuple[float, float, float]:
    given = ",".join(texts)
    try:
        train, validation, test = (float(text) for text in texts)
    except ValueError:
        raise UserError(f"--fractions={given}: should be three numbers, as in 0.8,0.1,0.1") from None
    if not (train > 0 and validation >= 0 and test >= 0 and abs(train + validation + test - 1) < 1e-9):
        raise UserError(f"--fractions={given}: should be shares that add up to 1, train above 0")
    return train, validation, test


def _report(done: Manifest, seconds: float) -> None:
    """What was written, as tables on stdout; warnings on stderr."""
    rows = sum(done.rows(split) for split in SPLITS)
    tasks = done.schema.task_names
    width = max(map(len, ("task", *tasks)))
    print(f"{'task':{width}}" + "".join(f"  {split + ' rate':>16}  {'rows':>13}" for split in SPLITS))
    for task in tasks:
        rates = [f"{done.task_rate(s, task):.4f}" if done.task_rows(s, task) else "-" for s in SPLITS]
        cells = (f"  {rate:>16}  {done.task_rows(s, task):>13,}" for rate, s in zip(rates, SPLITS, strict=True))
        print(f"{task:{width}}" + "".join(cells))
    print(f"{'rows':{width}}" + "".join(f"  {'':>16}  {done.rows(split):>13,}" for split in SPLITS))
    if done.vocabularies:
        width = max(map(len, ("feature", *done.vocabularies)))
        print(f"\n{'feature':{width}}  {'ids':>12}  {'distinct':>12}" + "".join(f"  {s + ' rare':>16}" for s in SPLITS))
        for name, sizes in done.vocabularies.items():
            shares = (f"  {done.splits[split].rare_share[name]:>16.2%}" for split in SPLITS)
            print(f"{name:{width}}  {done.num_ids(name):>12,}  {sizes.distinct:>12,}" + "".join(shares))
    for dropped in done.dropped:
        column = f"column '{dropped.column}': " if dropped.column else ""
        print(f"dropped {dropped.rows:,} rows: {column}{dropped.reason}")
    print(f"\nwritten to {done.data_dir}: {rows:,} rows in {seconds:.1f} s, {rows / seconds:,.0f} rows/s")
    source = "" if done.splits["train"].shards else " --input_format=parquet"
    print(f"next: stem-train --config=CONFIG --config.data.dir={done.data_dir}{source}")
    for split in SPLITS[1:]:
        if not done.rows(split):
            print(f"warning: the {split} split has no rows", file=sys.stderr)


def main(argv: Sequence[str]) -> None:
    started = time.monotonic()
    _report(convert(_options(argv)), time.monotonic() - started)


def run() -> None:
    """Console script stem-convert."""
    cli.run(main, "[LOG]", memory="a conversion with fewer --processes")


if __name__ == "__main__":
    run()
