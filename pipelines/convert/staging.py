"""Output directories that appear whole or not at all.

An output is built in a hidden directory beside its place, flushed to the disk and renamed. A lock keeps two jobs from
writing the same output. The next job removes what a killed one left behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from stem_util import files, owned
from stem_util.errors import Stopped, UserError
from stem_util.owned import Kind


@contextlib.contextmanager
def staged(output: str, *, kind: Kind, overwrite: bool) -> Iterator[str]:
    """Yields a directory to fill, and moves it to ``output`` when the block ends without an error.

    Args:
      output: the directory to create; missing parents are created. If it is a link, its target is created.
      kind: what the directory holds. An existing directory of another kind is never replaced.
      overwrite: replace a finished output.

    Raises:
      UserError: the output exists and must not be replaced, or another job is writing it.
    """
    real = Path(os.path.realpath(output))
    files.make_directory(real.parent)
    with files.locked(files.hidden(real, "lock"), output):
        _tidy_up(real, kind)
        _check_output(output, kind, overwrite)
        partial = files.hidden(real, f"partial-{os.getpid()}")
        partial.mkdir()
        kept = "nothing was kept"
        try:
            owned.mark(partial, kind)
            yield str(partial)
            owned.mark(partial, kind, owned.entries(partial))
            files.sync_tree(partial)
            replaced = files.hidden(real, f"replaced-{os.getpid()}")
            if real.exists():
                real.rename(replaced)
            partial.rename(real)
            kept = f"{output} is complete"
            files.sync(real.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        except (KeyboardInterrupt, Stopped) as stop:
            stop.add_note(kept)
            raise
        finally:
            with contextlib.suppress(OSError):  # published
                files.remove_tree(partial)


def _tidy_up(output: Path, kind: Kind) -> None:
    """Removes what killed jobs left beside ``output``, and restores an output that one was about to replace."""
    replaced, partial = (files.hidden(output, f"{what}-").name for what in ("replaced", "partial"))
    for name in sorted(os.listdir(output.parent)):
        path = output.with_name(name)
        if not name.startswith((replaced, partial)) or not path.is_dir():
            continue
        if owned.kind_of(path) != kind and not owned.is_empty(path):  # empty: killed before it was marked
            continue
        if name.startswith(replaced) and not output.exists():  # killed between the two renames
            path.rename(output)
        else:
            files.remove_tree(path)


def _check_output(output: str, kind: Kind, overwrite: bool) -> None:
    if not owned.check(output, kind):
        return
    if not overwrite:
        raise UserError(f"{output} exists already; --overwrite replaces it")
    added = owned.added(output)
    if added:
        more = f" and {len(added) - 1:,} more" if len(added) > 1 else ""
        raise UserError(
            f"{output} also holds files that do not belong to it ({added[0]}{more}): move them away, or choose another "
            "output"
        )
