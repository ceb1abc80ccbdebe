"""Output directories that appear whole or not at all.

Work is done in a hidden directory beside the output, flushed to the disk and renamed. A lock keeps two jobs from the
same output; what dead jobs left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator

from pipelines.errors import Stopped, UserError


@contextlib.contextmanager
def staged(output: str, *, marker: str, overwrite: bool) -> Iterator[str]:
    """Gives a directory to fill, and puts it in the place of ``output`` when the block ends without an error.

    Args:
      output: the directory to create; missing parents are created.
      marker: a file that every finished output holds; an existing directory without it is never replaced.
      overwrite: replace a finished output.

    Raises:
      UserError: the output exists and is not to be replaced, or another job is writing it.
    """
    output = os.path.abspath(output)
    parent, name = os.path.split(output)
    os.makedirs(parent, exist_ok=True)
    with locked(os.path.join(parent, f".{name}.lock"), output):
        hidden = os.path.join(glob.escape(parent), glob.escape(f".{name}."))
        for old in glob.glob(f"{hidden}replaced-*"):
            if os.path.exists(output):
                shutil.rmtree(old)
            else:  # killed between the two renames below
                os.rename(old, output)
        for stale in glob.glob(f"{hidden}partial-*"):
            shutil.rmtree(stale)
        _check_output(output, marker, overwrite)
        partial = os.path.join(parent, f".{name}.partial-{os.getpid()}")
        os.mkdir(partial)
        kept = "nothing was kept"
        try:
            yield partial
            for directory, _, _ in os.walk(partial):
                sync(directory)
            replaced = os.path.join(parent, f".{name}.replaced-{os.getpid()}")
            if os.path.exists(output):
                os.rename(output, replaced)
            os.rename(partial, output)
            kept = f"{output} is written and whole"
            sync(parent)
            shutil.rmtree(replaced, ignore_errors=True)
        except (KeyboardInterrupt, Stopped) as stop:
            stop.add_note(kept)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def sync(path: str) -> None:
    """Flushes a finished file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_output(output: str, marker: str, overwrite: bool) -> None:
    if not os.path.lexists(output):
        return
    if not os.path.isdir(output):
        raise UserError(f"{output} exists and is not a directory")
    if not os.listdir(output):
        return
    if not os.path.exists(os.path.join(output, marker)):
        raise UserError(f"{output} exists and holds something else (no {marker}); choose another output")
    if not overwrite:
        raise UserError(f"{output} exists already; --overwrite replaces it")


@contextlib.contextmanager
def locked(path: str, output: str) -> Iterator[None]:
    """Holds an exclusive lock file, which goes away with the job (the lock itself even when the job is killed).

    Raises:
      UserError: another job holds it; ``output`` is what it is writing.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"another job is writing {output}; wait for it or choose another output") from None
        # The file may have been removed by its holder between our open and our lock: then nobody else sees our lock.
        if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        os.unlink(path)
        os.close(descriptor)
