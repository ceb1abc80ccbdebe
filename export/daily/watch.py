"""Logs that arrive in a folder: which are complete, their order, and what happens to those that cannot be learned."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from export.daily import cycle
from export.daily.cycle import BadLog, Options
from export.daily.state import DONE, Day, State, day_of
from stem_util import files
from stem_util.errors import JobError, UserError

ASIDE = "set_aside"
"""Folder for logs that cannot be learned, each with the reason beside it."""
_COMPLETE = "_SUCCESS"
"""File that says that nothing more is written to a folder, as Spark and Hadoop leave it."""
_BEING_WRITTEN = (".tmp", ".part", ".partial", ".inprogress")
_PATTERN = re.compile(r"[][*?,]")
_TRIES = 2
"""How often a log is tried for which a job failed."""


def follow(
    state: State,
    folder: Path,
    options: Options,
    *,
    settle_seconds: float,
    poll_seconds: float,
    drain: bool,
    say: Callable[[Day], None],
) -> None:
    """Learns the logs in a folder, in the order of their days, and those that arrive later.

    A log that the conversion refuses is set aside. Nothing is set aside before a first day is done: until then the
    flags may be at fault.

    Args:
      state: locked by the caller.
      folder: holds one file or folder per day, whose name has the day; they stay where they are.
      options: what all days have in common.
      settle_seconds: a log is complete when it has not changed for so long.
      poll_seconds: how long to wait before the folder is looked at again.
      drain: whether to end when the next log is not complete, or there is none.
      say: called with each day that is done.

    Raises:
      UserError: something else than a log is at fault.
      JobError: a job failed `_TRIES` times for one log, which is then set aside.
    """
    while True:
        waiting = _waiting(state, folder)
        # A later day must not overtake one that is still being written: it would then be too late for that.
        if waiting and _settled(waiting[0], settle_seconds):
            _learn(state, folder, waiting[0], options, say)
        elif drain:
            return
        else:
            time.sleep(poll_seconds)


def _waiting(state: State, folder: Path) -> list[Path]:
    """The logs that have not been learned, in the order of their days; names without a day come last."""
    found = []
    for path in folder.iterdir():
        if path.name.startswith((".", "_")) or path.name.endswith(_BEING_WRITTEN) or path.name == ASIDE:
            continue
        name = _day(path)
        day = state.day(name) if name else None
        if day is None or day.decision not in DONE or day.record["log"] != os.path.abspath(path):
            found.append((not name, name, path))
    return [path for *_, path in sorted(found)]


def _day(path: Path) -> str:
    with contextlib.suppress(UserError):
        return day_of(path.name)
    return ""


def _settled(path: Path, seconds: float) -> bool:
    """Whether a log is complete: no file of it was written in the last ``seconds``."""
    try:
        if (path / _COMPLETE).exists():
            return True
        times = [path.stat().st_mtime, *(inside.stat().st_mtime for inside in path.rglob("*"))]
    except FileNotFoundError:  # renamed meanwhile
        return False
    return abs(time.time() - max(times)) >= seconds


def _learn(state: State, folder: Path, path: Path, options: Options, say: Callable[[Day], None]) -> None:
    name = _day(path)
    if not name or _PATTERN.search(path.name):
        why = "a log has to have a single date such as 2026-11-20 in its name, and none of the characters [ ] * ? ,"
        _set_aside(folder, path, why)
        return
    for tries in range(1, _TRIES + 1):
        try:
            say(cycle.run(state, name, str(path), options))
            return
        except BadLog as error:
            if not state.done():
                raise
            _set_aside(folder, path, str(error))
            return
        except JobError as error:
            if tries == _TRIES:
                _set_aside(folder, path, str(error))
                raise JobError(f"{error}; that was try {tries}, and {path} is in {folder / ASIDE} now") from error


def _set_aside(folder: Path, path: Path, why: str) -> None:
    aside = files.make_directory(folder / ASIDE)
    number, target = 1, aside / path.name
    while target.exists():
        number, target = number + 1, aside / f"{path.name}.{number}"
    files.write_atomically(aside / f"{target.name}.reason.txt", f"{why}\n".encode())
    path.rename(target)
    files.sync(folder)
    print(f"{path.name} is set aside: {why}", flush=True)
