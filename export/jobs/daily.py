"""Learns one day's log: converts it, goes on training from yesterday's run, and publishes what the gate lets through.

    stem-daily --log=logs/2026-11-20.parquet --config=my.py --schema=my.yaml --state=DIR \\
        --convert_args="--split=time --split_column=time_ms"
    stem-daily --watch=logs --config=... --schema=... --state=DIR
    stem-daily --state=DIR --history

Each step is an ordinary job in a process of its own: stem-convert --extend, stem-train --from, stem-publish. A day that
is done is not done again; a day that was interrupted goes on with the same command. Exit codes: 0 published, 3 the gate
refused (what was served is served on), 2 a mistake in what was given, 1 a job failed.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import absl.flags

from export.daily import cycle, state, table, watch
from export.daily.state import Day, State
from export.gate import REFUSED_CODE
from export.jobs import publish
from pipelines.jobs import convert
from stem_tf import configs
from stem_util import cli, stores
from stem_util.errors import UserError

flags = cli.Flags()

_STATE = flags.DEFINE(cli.PATH, "state", None, "Directory of the days: what was done, data and runs.", required=True)
_LOG = flags.DEFINE_string("log", None, "The day's log, as stem-convert takes it.")
_DAY = flags.DEFINE_string(
    "day", None, "The day, 2026-11-20, or an hour 2026-11-20T14 (default: the one in the last part of --log)."
)
_SCHEMA = flags.DEFINE(cli.PATH, "schema", None, "Schema of the logs.")
_CONFIG = flags.DEFINE(cli.PATH, "config", None, "Experiment, as stem-train takes it.")
_OVERRIDES = flags.DEFINE_multi_string(configs.OVERRIDE, [], "KEY=VALUE; --config.KEY=VALUE is short for it.")
_SERVED = flags.DEFINE(
    cli.PLACE, "served", None, "Directory or URI of the versions that servers read (default: STATE/served)."
)
_RULES = flags.DEFINE(cli.PATH, "rules", None, "The gate's rules (default: those of stem-publish --print_rules).")
_FORGET = flags.DEFINE_string(
    "forget", "", "Values not seen for so long lose their ids: 30d, or a number of days' logs."
)
_GO_ON_FROM = flags.DEFINE_enum(
    "go_on_from",
    cycle.BASES[0],
    list(cycle.BASES),
    "What a day goes on from: the last published day; the last day, even if the gate refused it; or nothing (a fresh "
    "model on this log alone).",
)
_KEEP = flags.DEFINE_integer(
    "keep", 7, "Days whose data and runs are kept; those that the next day needs always are.", lower_bound=1
)
_ARGUMENTS = {
    job: flags.DEFINE_string(f"{job}_args", "", f'Further arguments of stem-{job}, such as "{example}".')
    for job, example in (
        ("convert", "--split=time --split_column=time_ms --on_bad_rows=drop"),
        ("train", "--skip_unused_keys"),
        ("publish", "--tables=int8 --name=ranker"),
    )
}
_WATCH = flags.DEFINE(cli.PATH, "watch", None, "Folder in which logs arrive, one file or folder per day.")
_SETTLE = flags.DEFINE_float(
    "settle_seconds", 60.0, "With --watch: a log is complete when it has not changed for so long.", lower_bound=0.0
)
_POLL = flags.DEFINE_float("poll_seconds", 10.0, "With --watch: time between looks at the folder.", lower_bound=0.01)
_DRAIN = flags.DEFINE_boolean("drain", False, "With --watch: end when no complete log is left, instead of waiting.")
_HISTORY = flags.DEFINE_boolean("history", False, "Print the days as a table, and end.")


def main(argv: Sequence[str]) -> None:
    del argv
    days = State(_STATE.value)
    if _HISTORY.value:
        if not days.path.is_dir():
            raise UserError(f"--state={_STATE.value}: there is no such directory")
        print(table.text(days.days()))
        return
    options = _options(days)
    if _WATCH.value:
        if _LOG.value or _DAY.value:
            raise UserError("--watch finds logs and days itself: leave out --log and --day")
        folder = Path(_WATCH.value).absolute()
        if not folder.is_dir():
            raise UserError(f"--watch={_WATCH.value}: there is no such directory")
        with days.locked():
            watch.follow(
                days,
                folder,
                options,
                settle_seconds=_SETTLE.value,
                poll_seconds=_POLL.value,
                drain=_DRAIN.value,
                say=_say,
            )
        return
    if not _LOG.value:
        raise UserError("--log is required")
    name = state.check_day(_DAY.value) if _DAY.value else state.day_of(_LOG.value)
    with days.locked():
        day = cycle.run(days, name, _LOG.value, options)
    _say(day)
    if day.decision == state.REFUSED:
        sys.exit(REFUSED_CODE)


def _options(days: State) -> cycle.Options:
    for flag in (_SCHEMA, _CONFIG):
        if not flag.value:
            raise UserError(f"--{flag.name} is required")
    words = {job: _words(job, flag.value) for job, flag in _ARGUMENTS.items()}
    for job, its in (("convert", convert.flags), ("publish", publish.flags)):
        _check(job, its, words[job])
    split = str(publish.flags.values["split"].value)
    convert.flags.reset()
    publish.flags.reset()
    return cycle.Options(
        schema=_SCHEMA.value,
        config=_CONFIG.value,
        overrides=tuple(_OVERRIDES.value),
        served=stores.absolute(_SERVED.value) if _SERVED.value else str(days.path / "served"),
        rules=_RULES.value or "",
        forget=_FORGET.value,
        keep=_KEEP.value,
        go_on_from=_GO_ON_FROM.value,
        split=split,
        **{job: tuple(of_job) for job, of_job in words.items()},
    )


def _check(job: str, its: cli.Flags, words: list[str]) -> None:
    """Refuses a mistake in the arguments of a job now, and not when the job is started.

    Raises:
      UserError: no such flag, or not such a value.
    """
    try:
        rest = its.parse([f"stem-{job}", *words], list)[1:]
    except absl.flags.Error as error:
        raise UserError(f"--{job}_args: {error}") from None
    if rest:
        raise UserError(f"--{job}_args: unexpected argument {rest[0]!r}")


def _words(job: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--{job}_args={text!r}: {error}") from None


def _say(day: Day) -> None:
    print(day.said(), flush=True)


def run() -> None:
    """Console script ``stem-daily``."""
    cli.run(main, flags, rewritten=configs.override_flags)


if __name__ == "__main__":
    run()
