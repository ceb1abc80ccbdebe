"""The ordinary jobs that a day consists of, each in a process of its own.

A job that runs out of memory or crashes takes nothing else with it, its memory is free afterwards, and what it does is
what the same command does by hand.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from stem_util import processes
from stem_util.errors import JobError, UserError

_PATIENCE_SECONDS = 60.0
"""How long a job that is told to stop may take to write a checkpoint."""
_ERROR = "error: "
_NEXT = "next: "
"""How lines begin that a job prints about what to do next, which `stem-daily` does."""


def run(name: str, module: str, arguments: Sequence[str], output: Path, accepted: Collection[int] = (0,)) -> int:
    """Runs a job, and prints what it prints, also to the end of a file.

    Args:
      name: what it is for, in messages.
      module: its module.
      arguments: its command line.
      output: the file.
      accepted: exit codes that are no failure.

    Returns:
      Its exit code.

    Raises:
      UserError: it ended with 2: what it was given has a mistake. The message is the job's.
      JobError: it ended otherwise.
    """
    command = [sys.executable, "-m", module, *arguments]
    said = ""
    with open(output, "a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(['python', *command[1:]])}\n")
        file.flush()
        # A session of its own: Ctrl-C reaches this process alone, which then tells the job.
        job = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            preexec_fn=functools.partial(processes.end_with, os.getpid()),
        )
        assert job.stdout is not None
        try:
            for text in job.stdout:
                file.write(text)
                file.flush()
                if text.startswith(_ERROR):
                    said = text.removeprefix(_ERROR).strip()
                elif not text.startswith(_NEXT):
                    print(f"  {text}", end="", flush=True)
            code = job.wait()
        except BaseException:
            _stop(job)
            raise
    if code in accepted:
        return code
    killed = signal.Signals(-code).name if code < 0 else ""
    why = f"killed by {killed}" if killed else said or f"exit code {code}, see {output}"
    if code == 2:
        raise UserError(f"{name}: {why}")
    raise JobError(f"{name}: {why}")


def _stop(job: subprocess.Popen[str]) -> None:
    """Tells a job to stop, which a training does after a checkpoint, and makes sure that it has ended."""
    with contextlib.suppress(ProcessLookupError):
        job.send_signal(signal.SIGTERM)
    try:
        job.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        job.kill()
        job.wait()
