"""Scores a log, or one user's candidates, without a service.

    stem-predict LOG --model=EXPORT_DIR --output=scores.parquet
    stem-predict --model=EXPORT_DIR --user='{"user_id": 1042, "hour": 2100}' --items=items.csv
    stem-predict --server=HOST:PORT --user='{"user_id": 1042}' --items='{"video_id": [7, 8]}'

LOG: comma-separated Parquet or CSV files, globs or directories, with the columns of the model's features. Their scores
are written as Parquet: row (its place in the log), the schema's group column, the columns named by --keep, outputs
such as ranking_score, and score_<task>. The other two forms print the items as a table, best first; the last one asks
a server. See docs/predict.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pipelines.jobs import csv_flags
from pipelines.manifest import Dropped
from stem_tf.runtime import quieten_tensorflow
from stem_util import cli
from stem_util.errors import UserError

flags = cli.Flags()

_MODEL = flags.DEFINE(
    cli.PLACE,
    "model",
    None,
    "The exported model: the directory or URI of a version, or of all versions to take the newest.",
)
_OUTPUT = flags.DEFINE(
    cli.PATH,
    "output",
    None,
    "The Parquet file for a log's scores. A file of earlier scores is replaced, any other file is not.",
)
_KEEP = flags.DEFINE_list("keep", [], "Columns of the log to write beside the scores, as in --keep=row_id,time_ms")
_ON_BAD_ROWS = flags.DEFINE_enum(
    "on_bad_rows", "fail", ["fail", "drop"], "Stop at a row that conversion would refuse, or skip and count such rows."
)
_USER = flags.DEFINE(
    cli.PATH, "user", None, "Features of the user and the context: a JSON object, or a file that holds one."
)
_ITEMS = flags.DEFINE(
    cli.PATH,
    "items",
    None,
    "The candidates: a Parquet, CSV or JSON file, a JSON object of lists, or a JSON list of objects.",
)
_BY = flags.DEFINE_string(
    "by", None, "The task that ranks the items, or ranking_score, the default of a model that has it; else the first."
)
_SERVER = flags.DEFINE_string("server", None, "host:port of a server to ask instead of --model.")
_MODEL_NAME = flags.DEFINE_string("model_name", "ranker", "The name of the server's model.")
_CSV = csv_flags.CsvFlags(flags)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 2:
        raise UserError(f"unexpected argument '{argv[2]}'; several files are written with commas between them")
    if len(argv) == 2 and (_USER.value is not None or _ITEMS.value is not None):
        raise UserError(f"--user and --items score candidates; leave out the log '{argv[1]}'")
    quieten_tensorflow()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # errors come as exceptions
    if len(argv) == 2:
        _score_log(argv[1])
    else:
        _rank()


def _score_log(log: str) -> None:
    if _SERVER.value is not None:
        raise UserError("a log is scored by --model=EXPORT_DIR; --server is for --user and --items")
    if not _MODEL.value:
        raise UserError("--model is required: the directory that stem-export wrote")
    if not _OUTPUT.value:
        raise UserError("--output is required: the Parquet file to write")
    output = Path(_OUTPUT.value)
    if output.suffix not in (".parquet", ".pq"):
        raise UserError(f"--output={output}: scores are written as Parquet; name the file .parquet")
    from export import scoring, stored
    from export.published import Published

    model = Published(stored.fetched(_MODEL.value))
    done = scoring.score_log(
        model,
        log,
        output,
        keep=_KEEP.value,
        csv=_CSV.options(),
        drop_bad_rows=_ON_BAD_ROWS.value == "drop",
    )
    for (column, reason), rows in sorted(done.bad.items()):
        print(Dropped(column, reason, rows))
    print(f"{model.name}: {done.rows:,} rows in {done.seconds:.1f} s, {done.rows / done.seconds:,.0f} rows/s")
    print(f"written: {output} ({', '.join(done.columns)})")


def _rank() -> None:
    for flag, value in (("user", _USER.value), ("items", _ITEMS.value)):
        if value is None:
            raise UserError(
                f"--{flag} is required to score candidates (or name a log to score: "
                "stem-predict LOG --model=EXPORT_DIR --output=FILE)"
            )
    if bool(_MODEL.value) == bool(_SERVER.value):
        raise UserError("give --model=EXPORT_DIR or --server=HOST:PORT, one of the two")
    for flag in (_OUTPUT, _KEEP):
        if flag.present:
            raise UserError(f"--{flag.name} belongs to a log; scores of candidates are printed")
    from export import candidates, stored
    from export.published import Published

    csv = _CSV.options()
    if _MODEL.value:
        model = Published(stored.fetched(_MODEL.value))
        by = candidates.check_task(_BY.value, [*model.outputs, *model.tasks])
        items, scores = candidates.from_model(model, _USER.value, _ITEMS.value, csv)
    else:
        items, scores = candidates.from_server(_SERVER.value, _MODEL_NAME.value, _USER.value, _ITEMS.value, csv)
        by = candidates.check_task(_BY.value, list(scores))
    print(candidates.table(items, scores, by))


def run() -> None:
    """Console script ``stem-predict``."""
    cli.run(main, flags, "[LOG]")


if __name__ == "__main__":
    run()
