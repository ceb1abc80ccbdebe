"""The one rule by which every job decides whether it may write to a directory.

Every directory that a job makes has a marker, a file that says what the directory holds. A job writes to a directory
that is missing, empty, or marked as its own kind, and refuses every other one. (An evaluation's two files may lie among
other files, where they replace only an earlier evaluation's.) A job removes only what a marker, or the files of a
version before markers, shows to be of the kind that it writes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stem_util import files
from stem_util.errors import UserError

MARKER = ".stem-tf"
_NOTHING = (".lock", "lost+found")
"""Entries of a directory that still counts as empty, beside those whose names begin with the marker's."""


@dataclass(frozen=True)
class Kind:
    """What a directory may hold.

    Attributes:
      name: its name in markers and messages.
      looks: tells whether a directory without a marker holds this kind, written by a version that made no markers.
    """

    name: str
    looks: Callable[[Path], bool]


_OF_DATA = re.compile(
    r"manifest\.json|schema\.yaml|(blocks|rows)/\w+-\d+-of-\d+\.tfrecord|vocabulary/[^/]+\.parquet"
    r"|raw/\w+/part-\d+\.parquet"
)


def _looks_like_data(path: Path) -> bool:
    found = _json(path / "manifest.json").keys()
    return {"splits", "vocabularies", "format"} <= found and all(map(_OF_DATA.fullmatch, entries(path)))


def _looks_like_a_run(path: Path) -> bool:
    return {"experiment", "data.dir", "model.name"} <= _json(path / "config.json").keys()


def _looks_like_a_version(path: Path) -> bool:
    ours = {"format", "model", "version", "signatures"} <= _json(path / "manifest.json").keys()
    return ours and (path / "saved_model.pb").is_file()


def _looks_like_versions(path: Path) -> bool:
    numbers = [entry for entry in path.iterdir() if entry.name.isdigit()]
    return (path / ".last_version").is_file() or any(map(_looks_like_a_version, numbers))


def _is_evaluation(path: Path) -> bool:
    return {"split", "checkpoint", "tasks"} <= _json(path).keys()


def _looks_like_evaluations(path: Path) -> bool:
    found = [entry for entry in path.iterdir() if entry.name not in _NOTHING]
    reports = {entry.stem for entry in found if _is_evaluation(entry)}
    return bool(reports) and {entry.stem for entry in found if entry.suffix in (".json", ".parquet")} <= reports


def _looks_like_inspections(path: Path) -> bool:
    found = list(path.iterdir())
    return bool(found) and all(e.name.startswith("gates-") and e.suffix in (".json", ".png") for e in found)


DATA = Kind("converted data", _looks_like_data)
RUN = Kind("a run", _looks_like_a_run)
VERSIONS = Kind("exported versions", _looks_like_versions)
VERSION = Kind("an exported version", _looks_like_a_version)
EVALUATIONS = Kind("evaluations", _looks_like_evaluations)
INSPECTIONS = Kind("inspections", _looks_like_inspections)
COMPARISON = Kind("a comparison", lambda path: False)  # always marked
LOG = Kind("a log that stem-recipe prepares", lambda path: False)  # always marked
DEPLOYMENT = Kind("a deployment", lambda path: False)  # always marked
SUBMISSION = Kind("files of stem-submit", lambda path: False)  # always marked
DAYS = Kind("days of stem-daily", lambda path: False)  # always marked
_KINDS = (DATA, RUN, VERSIONS, VERSION, EVALUATIONS, INSPECTIONS, COMPARISON, LOG, DEPLOYMENT, SUBMISSION, DAYS)


def kind_of(directory: str | os.PathLike[str]) -> Kind | None:
    """What a directory holds, by its marker or, without one, by its files; None where no job of ours wrote it."""
    path = Path(directory)
    marked = _json(path / MARKER).get("holds")
    for kind in _KINDS:
        if kind.name == marked if marked is not None else kind.looks(path):
            return kind
    return None


def is_empty(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds nothing but locks, markers and ``lost+found``."""
    ours = (MARKER, f".{MARKER}.")  # the marker, and one that is being written
    return all(name in _NOTHING or name.startswith(ours) for name in os.listdir(directory))


def check(directory: str | os.PathLike[str], kind: Kind) -> bool:
    """Refuses a directory that a job may not write to; returns whether the directory holds ``kind`` already.

    Raises:
      UserError: the path is a file, or a directory that is neither empty nor of this kind.
    """
    if not os.path.exists(directory):
        return False
    if not os.path.isdir(directory):
        raise UserError(f"{directory} is a file; choose another path")
    found = kind_of(directory)
    if found == kind or is_empty(directory):
        return found == kind
    if found is not None:
        raise UserError(f"{directory} holds {found.name}, not {kind.name}: choose another directory")
    names = sorted(os.listdir(directory))
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise UserError(
        f"{directory} holds something else ({shown}), and nothing says that it is {kind.name}: choose another directory"
    )


def claim(directory: str | os.PathLike[str], kind: Kind) -> Path:
    """Creates and marks a directory of this kind, unless it exists already; returns its real path.

    Raises:
      UserError: the directory may not be written to, see `check`.
    """
    known = check(directory, kind)
    path = files.make_directory(directory)
    if not (known and (path / MARKER).exists()):
        mark(path, kind)
    return path


def claim_for_evaluation(directory: str | os.PathLike[str], split: str) -> Path:
    """Like `claim`, for an evaluation's two files, which may also lie among other files; those stay as they are.

    Raises:
      UserError: see `check_for_evaluation`.
    """
    if check_for_evaluation(directory, split):
        return claim(directory, EVALUATIONS)
    return files.make_directory(directory)


def check_for_evaluation(directory: str | os.PathLike[str], split: str) -> bool:
    """Refuses a directory that an evaluation may not be written to; returns whether it is for evaluations alone.

    Raises:
      UserError: the path is a file, or a directory of another kind, or one of the two files exists and is not an
        evaluation's.
    """
    path = Path(directory)
    if not path.is_dir() or kind_of(path) is not None or is_empty(path):
        check(path, EVALUATIONS)
        return True
    report = path / f"{split}.json"
    if report.exists() and not _is_evaluation(report):
        raise UserError(f"{report} exists and is no evaluation: choose another output")
    check_scores(path / f"{split}.parquet")
    return False


def mark(directory: str | os.PathLike[str], kind: Kind, entries: Sequence[str] = ()) -> None:
    """Marks a directory; ``entries`` lists all files in it, for a directory that may later be replaced as a whole."""
    marker: dict[str, Any] = {"holds": kind.name}
    if entries:
        marker["entries"] = list(entries)
    files.write_json(Path(directory) / MARKER, marker)


def added(directory: str | os.PathLike[str]) -> list[str]:
    """The files that were added to a directory after it was marked, if its marker lists the files it had."""
    known = _json(Path(directory) / MARKER).get("entries")
    return sorted(set(entries(directory)) - set(known)) if known else []


def entries(directory: str | os.PathLike[str]) -> list[str]:
    """Paths of all files and links in a directory, relative to it, sorted, without its marker."""
    found = []
    for parent, directories, names in os.walk(directory):
        links = [name for name in directories if os.path.islink(os.path.join(parent, name))]
        found += [os.path.relpath(os.path.join(parent, name), directory) for name in [*names, *links]]
    return sorted(name for name in found if name != MARKER)


def check_scores(path: str | os.PathLike[str]) -> None:
    """Refuses to replace a file, unless it is empty or holds scores of rows as our jobs write them.

    Raises:
      UserError: the file holds something else.
    """
    if not os.path.exists(path) or (os.path.isfile(path) and not os.path.getsize(path)):
        return
    try:
        found = pq.read_schema(path)
        ours = found.names[0] in ("row", "row_id") and found.names[-1].startswith("score_")
    except (OSError, pa.ArrowException, IndexError):
        ours = False
    if not ours:
        raise UserError(f"{path} exists and does not hold scores of rows: choose another output")


def write_figures(path: str | os.PathLike[str], value: Any) -> None:
    """Writes measured figures as JSON; replaces no file but JSON.

    Raises:
      UserError: something else is there.
    """
    if os.path.isfile(path) and os.path.getsize(path):
        try:
            json.loads(Path(path).read_bytes())
        except ValueError:
            raise UserError(f"{path} exists and is not JSON: choose another file") from None
    files.write_json(path, value)


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a marker or .json file; ``{}`` where none can be read."""
    try:
        value = json.loads(path.read_bytes()) if path.suffix == ".json" or path.name == MARKER else None
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
