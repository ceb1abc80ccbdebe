"""The training that is to be submitted: its command line, and the tasks of its cluster."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from stem_util import stores
from stem_util.errors import UserError

_KEY = "config.train.strategy"
_IN_ONE_PROCESS = ("none", "mirrored")


@dataclass(frozen=True)
class Training:
    """A training on one machine or on a cluster.

    Attributes:
      command: the words of the stem-train command, with its strategy.
      strategy: ``config.train.strategy``, "none" where the command does not say.
      tasks: the number of tasks of each kind in the order of the cluster; one worker for a training in one process.
    """

    command: tuple[str, ...]
    strategy: str
    tasks: dict[str, int]

    @property
    def is_cluster(self) -> bool:
        """Whether the processes need a TF_CONFIG."""
        return self.strategy not in _IN_ONE_PROCESS

    @property
    def size(self) -> int:
        """The number of processes."""
        return sum(self.tasks.values())

    def given(self, flag: str) -> str | None:
        """The value of a flag of the command; None where it is not given."""
        return _given(self.command, flag)


def training(words: Sequence[str], workers: int, ps: int) -> Training:
    """A training from its command line and the size of its cluster.

    Args:
      words: the command line.
      workers: number of workers; 0 for a training in one process.
      ps: number of parameter servers.

    Raises:
      UserError: the words are no stem-train command, or contradict the cluster.
    """
    if not words or PurePosixPath(words[0]).name != "stem-train":
        raise UserError(
            "what to submit comes after --, as in: stem-submit --output=DIR -- stem-train --config=small ..."
        )
    if any(not word.isprintable() for word in words):
        raise UserError("a word of the stem-train command has a line break or another control character")
    if _given(words, "workdir") is None:
        raise UserError("the stem-train command has no --workdir: each attempt should go on where the one before ended")
    if ps and not workers:
        raise UserError(f"--ps={ps} serves workers, and there are none: give --workers=N too")
    workdir = _given(words, "workdir") or ""
    if workers and stores.is_uri(workdir):
        raise UserError(
            f"--workdir={workdir}: the processes of a cluster share their work directory through a file system; only "
            "the data may be in a bucket"
        )
    tasks = {"chief": 1, "worker": workers, "ps": ps} if ps else {"worker": max(1, workers)}
    needed = "parameter_server" if ps else "multi_worker" if workers else None
    given = _given(words, _KEY)
    if needed is None:
        if given not in (None, *_IN_ONE_PROCESS):
            more = " and --ps=N" if given == "parameter_server" else ""
            raise UserError(f"--{_KEY}={given} trains on a cluster: give --workers=N{more}")
        return Training(tuple(words), given or "none", tasks)
    if given not in (None, needed):
        raise UserError(
            f"--workers={workers} --ps={ps} is a cluster for --{_KEY}={needed}, but the command has {given}"
        )
    return Training((*words, *([] if given else [f"--{_KEY}={needed}"])), needed, tasks)


def _given(words: Sequence[str], flag: str) -> str | None:
    """The last value of a flag, written ``--flag=value`` or ``--flag value``."""
    found = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name in (f"-{flag}", f"--{flag}"):
            found = value if equals else following
    return found


def shell(words: Sequence[str]) -> str:
    """The command line as a POSIX shell reads it, a flag per line."""
    return " \\\n  ".join(map(shlex.quote, words))
