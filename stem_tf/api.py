"""The jobs as functions, for notebooks and programs: describe, convert, train. docs/python.md has examples.

A DataFrame or a pyarrow Table may be given as a log; it is written to a temporary Parquet file and read like any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any, Literal

import ml_collections
import pandas as pd
import pyarrow as pa

from pipelines import schema_yaml
from pipelines.convert import conversion
from pipelines.convert.options import Options
from pipelines.describe import description
from pipelines.describe.description import Description
from pipelines.log.parts import CsvOptions
from pipelines.manifest import LAYOUTS, Manifest
from pipelines.schema import Schema
from stem_tf import cluster as clusters
from stem_tf import configs
from stem_tf.in_memory import Log, files_of
from stem_tf.peers import Interrupted
from stem_tf.run import Run
from stem_tf.runtime import quieten_tensorflow
from stem_tf.training import preconditions
from stem_util import stores
from stem_util.errors import UserError

__all__ = ["Run", "convert", "describe", "train"]

Paths = str | os.PathLike[str]


def describe(
    log: Log, *, labels: str | Sequence[str] = (), sample_rows: int = 200_000, csv: CsvOptions | None = None
) -> Description:
    """Drafts a schema from a log, as the job stem-describe does.

    Args:
      log: a DataFrame, a pyarrow Table, or the paths of Parquet or CSV files, globs and directories.
      labels: columns to predict, as ``"column"``, ``"column=value"`` or ``"column>=number"``; guessed if not given.
      sample_rows: rows to draw from the log.
      csv: how CSV files are written.

    Returns:
      A `Description`: ``text`` is the draft, YAML with comments; ``summary`` says what was found.

    Raises:
      UserError: a mistake in the arguments or the log, or nothing to predict or to learn from.
    """
    labels = [labels] if isinstance(labels, str) else labels
    with files_of(log) as paths:
        found = description.describe(paths.split(","), csv or CsvOptions(), labels, sample_rows)
    if not isinstance(log, pd.DataFrame | pa.Table):
        return found
    arguments = ("LOG", *found.arguments[1:])  # the table's own file is gone
    return dataclasses.replace(found, text=found.text.replace(paths, "a table"), arguments=arguments)


def convert(
    log: Log | Mapping[str, Log],
    schema: Schema | Description | str | os.PathLike[str],
    output: Paths,
    *,
    split: Literal["time", "hash", "random", "leave_last"] | None = None,
    split_column: str | None = None,
    split_group: str | None = None,
    fractions: tuple[float, float, float] | None = None,
    validation_from: str | float | date | None = None,
    test_from: str | float | date | None = None,
    validation_share: float | None = None,
    validation_by: Literal["random", "hash", "time"] | None = None,
    extend: Paths | Manifest | None = None,
    forget: str | int | None = None,
    refit: bool = False,
    late: bool = False,
    layouts: Sequence[str] = LAYOUTS,
    seed: int = 0,
    processes: int = 1,
    drop_bad_rows: bool = False,
    overwrite: bool = False,
    csv: CsvOptions | None = None,
) -> Manifest:
    """Converts a log to data that models train on, as the job stem-convert does.

    The same log, schema, arguments and seed give the same bytes, whatever the number of processes.

    Args:
      log: a DataFrame, a pyarrow Table, or the paths of Parquet or CSV files, globs and directories; or, without
        ``split``, one of these for each split: ``{"train": ..., "validation": ..., "test": ...}``.
      schema: a `Schema`, a draft that `describe` returned, a schema file, or the name of a shipped one.
      output: directory to create.
      split: how rows are divided: by time, by a hash of a column, at random, or the last rows of each group.
      split_column: the column of a split by time, hash or leave_last.
      split_group: whose last rows leave_last takes; the schema's group if not given.
      fractions: shares of train, validation and test; .8, .1 and .1 if not given.
      validation_from: first time of validation, instead of ``fractions``: a date or time, or a number as in the column.
      test_from: first time of test, likewise.
      validation_share: the share of given train rows that becomes validation.
      validation_by: how these rows are chosen: at random, by a hash of ``split_column``, or the newest by it.
      extend: converted data to go on from: values keep their ids and counts, new ones get ids behind, and constants of
        numbers and labels are kept.
      forget: after how long unseen values lose their ids: ``"30d"``, ``"12h"`` or a number of conversions.
      refit: fit constants on the new log, instead of keeping those of ``extend``.
      late: the log came late, and may end before the rows of ``extend``.
      layouts: which records to write, ``blocks`` and ``rows``; empty to train on a Parquet log itself.
      seed: seed of split and shuffle.
      processes: worker processes. A script that asks for more than one needs ``if __name__ == "__main__":``.
      drop_bad_rows: skip and count bad rows, instead of refusing the log.
      overwrite: replace converted data at ``output``.
      csv: how CSV files are written.

    Returns:
      The manifest of the data: ``data_dir``, ``rows(split)``, ``task_rate(split, task)`` and so on.

    Raises:
      UserError: a mistake in the arguments (named by the job's flags), the schema or the log.
      JobError: the disk is full, or a worker process died.
    """
    if isinstance(schema, Description):
        schema = schema_yaml.loads(schema.text, "the draft")
    elif not isinstance(schema, Schema):
        schema = schema_yaml.load(os.path.expanduser(schema))
    logs = log.values() if isinstance(log, Mapping) else [log]
    if not layouts and any(isinstance(part, pd.DataFrame | pa.Table) for part in logs):
        raise UserError("without records, training reads the files of the log: write the table as Parquet first")
    with contextlib.ExitStack() as stack:
        by_split, whole = {}, ""
        if isinstance(log, Mapping):
            by_split = {name: stack.enter_context(files_of(part)) for name, part in log.items()}
        else:
            whole = stack.enter_context(files_of(log))
        options = Options(
            schema=schema,
            output=os.path.expanduser(output),
            log=whole,
            given=by_split,
            split=split,
            split_column=split_column,
            split_group=split_group,
            validation_share=validation_share,
            validation_by=validation_by,
            fractions=fractions,
            validation_from=None if validation_from is None else str(validation_from),
            test_from=None if test_from is None else str(test_from),
            extend=_place(extend),
            forget=None if forget is None else str(forget),
            refit=refit,
            late=late,
            layouts=tuple(layouts),
            seed=seed,
            processes=processes,
            drop_bad_rows=drop_bad_rows,
            overwrite=overwrite,
            csv=csv or CsvOptions(),
        )
        return conversion.convert(options)


def _place(data: Paths | Manifest | None) -> str:
    if data is None:
        return ""
    return data.data_dir if isinstance(data, Manifest) else os.path.expanduser(data)


def train(
    config: str | os.PathLike[str] | Mapping[str, Any] | ml_collections.ConfigDict,
    data: Paths | Manifest | None = None,
    workdir: Paths | None = None,
    *,
    start_from: Paths | Run | None = None,
    overrides: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = print,
) -> Run:
    """Trains a model on converted data, as the job stem-train does; called again, it continues the run.

    An interrupt (Ctrl-C, or the notebook's stop button) ends it after a checkpoint.

    Args:
      config: the name of a shipped experiment, the path of a Python file with ``get_config()``, or a config.
      data: the directory that `convert` wrote, or what it returned; ``config.data.dir`` if not given.
      workdir: directory of the run; ``runs/<config.experiment>`` if not given.
      start_from: a run or an exported model, or its directory: go on from it, on ``data`` with the same schema.
        ``overrides`` of ``start.checkpoint``, ``start.new_rows`` and ``start.schedule`` say how.
      overrides: values of config keys, ``{"model.name": "ple", "train.epochs": 3}``.
      say: prints a line about each epoch; None prints nothing.

    Returns:
      The run, with the weights of its best epoch.

    Raises:
      UserError: a mistake in the config, other data than the run's, or a run that is in use.
      JobError: training failed, as with a loss that is not finite.
      KeyboardInterrupt: it was interrupted.
    """
    quieten_tensorflow()  # checking a config imports the models
    changes = dict(overrides or {})
    if data is not None:
        changes["data.dir"] = stores.absolute(_place(data))
    if start_from is not None:
        place = start_from.workdir.place if isinstance(start_from, Run) else os.path.expanduser(start_from)
        changes["start.run"] = stores.absolute(os.fspath(place))
    experiment = configs.load(config, changes)
    if not experiment.data.dir:
        raise UserError("which data? Give the directory that stem_tf.convert wrote, or config.data.dir")
    stopped = ""
    cluster = clusters.read(experiment.train.strategy)
    if cluster is not None and cluster.has_servers and not cluster.is_chief:
        raise UserError(f"{cluster.task} is started with stem-train: only the chief may call stem_tf.train")
    with preconditions.prepared(experiment, workdir, cluster) as (manifest, run, peers):
        from stem_tf.training import outcome
        from stem_tf.training.trainer import Trainer

        trainer = Trainer(experiment, manifest, run, say or (lambda line: None), peers=peers)
        try:
            trainer.run()
        except Interrupted as interrupted:
            stopped = f"{interrupted}: stopped at step {trainer.global_step:,}"
        else:
            if peers.is_chief:
                outcome.write(trainer)
    if stopped:
        raise KeyboardInterrupt(f"{stopped}, checkpoint written to {run.checkpoints}; the same call goes on from there")
    return Run(run.place)
