"""Versions of a model: directories named by integers, each of which appears whole or not at all.

TensorFlow Serving takes a directory for a new version as soon as it sees its number, and unloads the one before: so a
version is built under a name that is no number, flushed to the disk and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipelines import files, owned
from pipelines import manifest as manifests

_LAST = ".last_version"
"""Holds the highest number so far: one that was deleted (a roll-back) is not used again for another model."""


def versions(directory: Path) -> list[int]:
    """The versions that are published under ``directory``, ascending."""
    names = [entry.name for entry in directory.iterdir() if entry.is_dir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def damage(version: Path) -> str:
    """What tells a version's directory from the one that was published, or ""; reads all of it.

    Compares with the manifest, where there is one: a directory that is still being copied is damaged, too.
    """
    if not (version / "saved_model.pb").is_file():
        return "saved_model.pb is missing"
    manifest = version / manifests.FILENAME
    if not manifest.exists():
        return ""
    try:
        for name, digest in json.loads(manifest.read_bytes())["files"].items():
            with open(version / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} is not the file of {manifest.name}: its SHA-256 differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(version)}, listed in {manifest.name}, is missing"
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        return f"{manifest.name} is not a manifest: {' '.join(str(error).split())}"
    return ""


@contextlib.contextmanager
def publishing(directory: Path) -> Iterator[tuple[int, Path]]:
    """Gives the next version and a directory to build it in; publishes it when the block ends without an error.

    Only one export at a time writes under ``directory``; what killed ones have left there is removed.

    Raises:
      UserError: ``directory`` is no directory or holds something else, or another export is writing to it.
    """
    directory = owned.claim(directory, owned.VERSIONS)
    with files.locked(directory / ".lock", directory):
        for leftover in directory.iterdir():
            if re.fullmatch(r"\.partial-\d+", leftover.name):
                shutil.rmtree(leftover)
        version = max([_last(directory), *versions(directory)]) + 1
        partial = directory / f".partial-{os.getpid()}"
        partial.mkdir()
        owned.mark(partial, owned.VERSION)
        try:
            yield version, partial
            files.sync_tree(partial)
            files.write_atomically(directory / _LAST, f"{version}\n".encode())
            os.rename(partial, directory / str(version))
            files.sync(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _last(directory: Path) -> int:
    """The highest number ever published; 0 where that is not known."""
    try:
        text = (directory / _LAST).read_text(encoding="ascii").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return 0
    return int(text) if text.isdigit() else 0
