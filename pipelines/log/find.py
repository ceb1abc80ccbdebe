"""Finds the files of a log, on this machine and in stores (see `stem_util.stores`)."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator

from stem_util import stores
from stem_util.errors import UserError

_PARQUET_SUFFIXES = (".parquet", ".pq")
PARQUET_MAGIC = b"PAR1"
_CSV_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")


def find_files(patterns: str) -> list[str]:
    """The log's files, sorted, each once.

    Args:
      patterns: comma-separated files, globs and directories, or URIs of them. A glob stands for the files that it
        matches or, if it matches none, for directories. Directories are searched, through links too, for files that
        end in .parquet, .pq, .csv, .tsv or .txt (the text ones also with .gz), and for Parquet files of any name.
        Names that begin with a dot or an underscore are left out.

    Raises:
      UserError: a pattern matches no file.
      JobError: a store does not answer.
    """
    found: set[str] = set()
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        pattern = os.path.expanduser(pattern)
        if stores.is_uri(pattern):
            found.update(_find_stored(stores.check(pattern)))
            continue
        if os.path.isdir(pattern):
            matches = list(_walk(pattern))
            if not matches:
                raise _no_log(pattern)
        elif os.path.exists(pattern):
            matches = [pattern]
        else:
            paths = glob.glob(pattern, recursive=True)
            matches = [path for path in paths if os.path.isfile(path)]
            if not matches:
                directories = [path for path in paths if not os.path.basename(path).startswith((".", "_"))]
                matches = [path for directory in directories for path in _walk(directory)]
            if not matches:
                raise _missing(pattern)
        found.update(map(os.path.normpath, matches))
    if not found:
        raise UserError("the log is empty: name at least one file, glob or directory")
    return sorted(found)


def _find_stored(pattern: str) -> list[str]:
    """The files of a pattern that is a URI."""
    if glob.has_magic(pattern.split("/")[2]):
        raise UserError(f"{pattern}: the name of the bucket or host should not be a pattern")
    base, wanted = pattern, ""
    while glob.has_magic(base):
        base, _, name = base.rpartition("/")
        wanted = f"{name}/{wanted}" if wanted else name
    found = _matching(base, wanted) if wanted else []
    if found:
        return found
    # No pattern, or one that may be a name.
    below = stores.listing(pattern)
    if not below:
        with contextlib.suppress(FileNotFoundError):
            stores.stamp(pattern)
            return [pattern]
        raise _missing(pattern)
    found = [uri for path in below if _is_visible(path) and _is_log(uri := f"{pattern}/{path}")]
    if not found:
        raise _no_log(pattern)
    return found


def _matching(base: str, pattern: str) -> list[str]:
    """The files below a URI whose path from there fits a pattern; if there are none, those in directories that do."""
    below = stores.listing(base)
    found = [f"{base}/{path}" for path in below if stores.matches(path, pattern)]
    if found:
        return found
    inside = [path for path in below if any(map(_is_visible, _below_directories(path, pattern)))]
    return [uri for path in inside if _is_log(uri := f"{base}/{path}")]


def _below_directories(path: str, pattern: str) -> Iterator[str]:
    """The rest of a path from each of its directories that fits a pattern, with the directory's own name."""
    names = path.split("/")
    for end in range(1, len(names)):
        if stores.matches("/".join(names[:end]), pattern):
            yield "/".join(names[end - 1 :])


def _is_visible(path: str) -> bool:
    return not any(name.startswith((".", "_")) for name in path.split("/"))


def _no_log(directory: str) -> UserError:
    return UserError(f"{directory}: the directory holds no Parquet files, nor any ending in .csv, .tsv or .txt")


def _missing(pattern: str) -> UserError:
    return UserError(f"{pattern}: {'no file matches it' if glob.has_magic(pattern) else 'no such file or directory'}")


def _walk(directory: str) -> Iterator[str]:
    """Yields the files below a directory, each once, by a path without links if there is one."""
    seen: set[str] = set()
    waiting = [directory]  # links are searched last
    while waiting:
        place = waiting.pop(0)
        if os.path.realpath(place) in seen:
            continue
        if not os.path.isdir(place):
            if _is_log(place):
                seen.add(os.path.realpath(place))
                yield place
            continue
        for parent, directories, names in os.walk(place):
            seen.add(os.path.realpath(parent))
            visible = [name for name in sorted(directories + names) if not name.startswith((".", "_"))]
            paths = {name: os.path.join(parent, name) for name in visible}
            waiting += filter(os.path.islink, paths.values())
            fresh = {n for n, path in paths.items() if not os.path.islink(path) and os.path.realpath(path) not in seen}
            directories[:] = [name for name in directories if name in fresh]
            for path in (paths[name] for name in names if name in fresh):
                if _is_log(path):
                    seen.add(os.path.realpath(path))
                    yield path


def _is_log(path: str) -> bool:
    return path.lower().endswith(_PARQUET_SUFFIXES + _CSV_SUFFIXES) or is_parquet(path)


def is_parquet(path: str) -> bool:
    """Whether a file is read as Parquet: it begins like one or has such a name. Every other file is CSV."""
    if stores.is_uri(path) or os.path.isfile(path):
        with stores.open_file(path) as file:
            if file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC:
                return True
    return path.lower().endswith(_PARQUET_SUFFIXES)
