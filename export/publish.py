"""Publishes versions of a model: directories named by integers, each of which appears whole or not at all.

TensorFlow Serving loads a directory as a new version as soon as it sees its number, and unloads the one before. So a
version is built under a name that is not a number, flushed to the disk and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines import manifest as manifests
from stem_util import files, owned
from stem_util.errors import JobError

_LARGEST_FILE = 16 << 20
_LAST = ".last_version"
"""File with the highest number so far. The number of a version that was deleted (a roll-back) is not used again."""
GRAPH = "saved_model.pb"
"""The file without which a directory is no version."""
VERDICT = "verdict.json"
"""File of the gate's verdict, in a version that passed it."""
ASIDE = "aside"
"""Directory of versions that were taken out of service (`export.catalogue`); servers pass over it, since it is no
number."""


def versions(directory: Path) -> list[int]:
    """The versions that are published under ``directory``, ascending."""
    names = [entry.name for entry in directory.iterdir() if entry.is_dir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def vocabularies(tree: Mapping[str, Any]) -> dict[str, str]:
    """The file of each feature's vocabulary, by a version's manifest; features with equal ones share one."""
    names = {digest: name for name, digest in tree["files"].items()}
    return {feature: names[entry["sha256"]] for feature, entry in tree["vocabularies"].items()}


def newest(directory: Path) -> Path | None:
    """The newest version under ``directory``; None where there is none."""
    numbers = versions(directory)
    return directory / str(numbers[-1]) if numbers else None


def version_at(path: Path) -> Path | None:
    """``path`` if it is a version itself, else the newest one under it; None where there is none."""
    return path if (path / GRAPH).exists() else newest(path)


def damage(version: Path) -> str:
    """Reads a version's directory; returns how it differs from the one that was published, or "".

    Files are compared with the manifest, if there is one, so a directory that is still being copied counts as damaged.
    Anything but regular files is refused: a pipe would never end, and TensorFlow would open it.
    """
    try:
        for directory, _, names in os.walk(version, onerror=_raise):
            for name in names:
                if not stat.S_ISREG(os.stat(os.path.join(directory, name)).st_mode):
                    return f"{_shown(os.path.relpath(os.path.join(directory, name), version))} is not a file"
        if not (version / GRAPH).is_file():
            return f"{GRAPH} is missing"
        for name, digest in _files(version).items():
            if files.leads_outside(name):
                return f"{manifests.FILENAME} is not a manifest: {_shown(name)} is not below the version's directory"
            try:
                file = _open(version / name)
            except FileNotFoundError:
                return f"{_shown(name)}, listed in {manifests.FILENAME}, is missing"
            with file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{_shown(name)} is not the file of {manifests.FILENAME}: its SHA-256 differs"
    except OSError as error:
        name = "" if error.filename is None else os.path.relpath(error.filename, version)
        return f"{_shown(name) if name not in ('', '.') else 'the directory'} cannot be read: {error.strerror}"
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        return f"{manifests.FILENAME} is not a manifest: {_shown(' '.join(str(error).split()))}"
    return ""


def size(version: Path) -> int:
    """Of a version's files, in bytes."""
    return sum(path.lstat().st_size for path in version.rglob("*") if path.is_file())


def model_of(version: Path) -> str:
    """The model's name in a version's manifest; "" if there is none, or none that can be printed."""
    try:
        return model_in(_manifest(version))
    except (OSError, ValueError, RecursionError):
        return ""


def model_in(tree: Any) -> str:
    """The model's name in a manifest; "" if there is none, or none that can be printed."""
    name = tree.get("model") if isinstance(tree, dict) else None
    return name if isinstance(name, str) and name.isprintable() and len(name) <= 256 else ""


def _files(version: Path) -> dict[str, str]:
    """The SHA-256 of a version's files by name; {} if there is no manifest."""
    return dict(_manifest(version)["files"]) if (version / manifests.FILENAME).exists() else {}


def _manifest(version: Path) -> Any:
    return json.loads(read_small(version / manifests.FILENAME))


def read_small(path: Path) -> bytes:
    """Reads a file that should be small.

    Raises:
      OSError: it is missing, or no file.
      ValueError: it is not small.
    """
    with _open(path) as file:
        text = file.read(_LARGEST_FILE + 1)
    if len(text) > _LARGEST_FILE:
        raise ValueError(f"it has more than {_LARGEST_FILE:,} bytes")
    return text


def _open(path: Path) -> io.BufferedReader:
    """Opens a regular file. Anything else is an error: open() of a pipe would wait for a writer."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file", os.fspath(path))
    return open(descriptor, "rb")


def _raise(error: OSError) -> None:
    raise error


def _shown(text: str) -> str:
    """Text from outside, cut and escaped to fit into a message of one line."""
    return text if text.isprintable() and len(text) <= 200 else f"{text[:200]!a}"


@contextlib.contextmanager
def publishing(directory: Path, newest: int | None = None) -> Iterator[tuple[int, Path]]:
    """Yields the next version and a directory to build it in; publishes it when the block ends without an error.

    Only one export at a time writes under ``directory``. It removes what killed ones left there.

    Args:
      directory: of the versions.
      newest: the number that has to be the newest one when this version is published; 0 for none.

    Raises:
      UserError: ``directory`` is no directory or holds something else, or another export is writing to it.
      JobError: another version is the newest one now.
    """
    directory = owned.claim(directory, owned.VERSIONS)
    with files.locked(directory / ".lock", directory):
        for leftover in directory.iterdir():
            if re.fullmatch(r"\.partial-\d+", leftover.name):
                shutil.rmtree(leftover)
        version = max([_last(directory), *versions(directory), *versions(directory / ASIDE)]) + 1
        partial = directory / f".partial-{os.getpid()}"
        partial.mkdir()
        owned.mark(partial, owned.VERSION)
        try:
            yield version, partial
            files.sync_tree(partial)
            with moving(directory):
                check_newest(directory, max(versions(directory), default=0), newest)
                files.write_atomically(directory / _LAST, f"{version}\n".encode())
                os.rename(partial, directory / str(version))
                files.sync(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_newest(place: str | os.PathLike[str], now: int, newest: int | None) -> None:
    """Raises JobError where the newest version is not the one that it has to be, if there is one."""
    if newest not in (None, now):
        raise JobError(
            f"{place}: version {now} is served now, not {newest} any more, so nothing was published: run this job again"
        )


def moving(directory: Path) -> contextlib.AbstractContextManager[None]:
    """Held while versions are moved: a moment, unlike an export, for which a roll-back need not wait."""
    return files.locked(directory / ".moving", directory, wait=True)


def use_numbers_after(number: int, directory: Path) -> None:
    """Makes an empty directory one for versions, of which the first will have the next number.

    Raises:
      UserError: ``directory`` is no directory or holds something else.
    """
    files.write_atomically(owned.claim(directory, owned.VERSIONS) / _LAST, f"{number}\n".encode())


def _last(directory: Path) -> int:
    """The highest number ever published; 0 if that is not known."""
    try:
        text = (directory / _LAST).read_text(encoding="ascii").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return 0
    return int(text) if text.isdigit() else 0
