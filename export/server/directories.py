"""Version directories on disk."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def version_directories(base_path: Path) -> dict[int, Path]:
    """The versions under ``base_path``, whole or not, by number.

    Raises:
      OSError: ``base_path`` cannot be listed.
    """
    found: dict[int, Path] = {}
    for name in sorted(os.listdir(base_path)):
        # As TensorFlow Serving reads them: decimal, within int64. Names like `.3.partial` are not versions.
        if name.isascii() and name.isdecimal() and int(name) < 1 << 63 and (base_path / name).is_dir():
            found[int(name)] = base_path / name
    return found


def fingerprint(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a version's files: has anything changed?"""
    seen = []
    for directory, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.stat(os.path.join(directory, name))
                seen.append((os.path.join(directory, name), status.st_size, status.st_mtime_ns))
    return tuple(sorted(seen))
