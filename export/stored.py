"""Versions of a model in a store: BASE/1, BASE/2, ..., each with its files under the names that they have locally.

``saved_model.pb`` comes last. TensorFlow Serving takes BASE/3 for a version as soon as one file is there, but it cannot
load it without ``saved_model.pb``; it tries again (5 times, a minute apart, by default), and the version before serves
meanwhile. A reader of ours does not see a version before its ``saved_model.pb``, and then goes by the SHA-256 of each
file in its manifest.

Before an upload a job writes BASE/_exports/3-1f0c52ab and looks who else has. Of two jobs that have the same number at
least one sees the other and fails. These objects stay: the number of a version that was deleted is not used again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from export import publish
from export.publish import GRAPH
from pipelines import manifest as manifests
from stem_util import copies, files, owned, stores
from stem_util.errors import JobError, UserError
from stem_util.progress import Progress

_CLAIM = re.compile(r"_exports/([0-9]+)-[0-9a-f]{8}")
_VERSION = re.compile(r"([0-9]+)/.+")


@contextlib.contextmanager
def staging(place: str) -> Iterator[Path]:
    """Yields the directory to export to: ``place``, or for a URI a temporary one in which the next number is the URI's.

    Raises:
      UserError: the URI holds something else or may not be written to, or there is no such bucket.
      JobError: the store does not answer.
    """
    if not stores.is_uri(place):
        yield Path(place)
        return
    uri = stores.check(place)
    names = stores.listing(uri)
    if copies.COMPLETE in names:
        raise UserError(f"{uri} holds converted data or a run, not exported versions: choose another place")
    stores.check_writable(uri)
    with tempfile.TemporaryDirectory(dir=files.make_directory(copies.cache())) as directory:
        found = (_CLAIM.fullmatch(name) or _VERSION.fullmatch(name.removeprefix(f"{publish.ASIDE}/")) for name in names)
        used = [int(match[1]) for match in found if match]
        publish.use_numbers_after(max(used, default=0), Path(directory))
        yield Path(directory)


def upload(version: Path, place: str, newest: int | None = None) -> str:
    """Uploads a version that was exported to the directory of `staging`; returns where it is then.

    Args:
      version: its directory.
      place: where it goes; a path is where it is already.
      newest: the number that has to be the newest one at the URI; 0 for none.

    Raises:
      JobError: another job exports a version of this number, another version is the newest one now, or the store does
        not answer; there is no whole version of this number then.
    """
    if not stores.is_uri(place):
        return str(version)
    uri, number = stores.check(place), version.name
    mine = f"_exports/{number}-{os.urandom(4).hex()}"
    stores.write(f"{uri}/{mine}", b"")
    there = stores.listing(uri)
    for name in there.keys() - {mine}:
        found = _CLAIM.fullmatch(name) or _VERSION.fullmatch(name)
        if found and found[1] == number:
            raise JobError(f"another job exports version {number} to {uri}: run this one again")
    publish.check_newest(uri, max(map(int, versions(uri, there)), default=0), newest)
    names = [owned.MARKER, *(name for name in owned.entries(version) if name != GRAPH)]
    sizes = {name: (version / name).stat().st_size for name in names}

    def put(name: str) -> int:
        stores.put(version / name, f"{uri}/{number}/{name}")
        return sizes[name]

    try:
        with Progress(sum(sizes.values()), unit="bytes", desc=f"upload to {uri}/{number}") as progress:
            for size in stores.side_by_side(put, names):
                progress.update(size)
        stores.write(f"{uri}/{number}/{GRAPH}", (version / GRAPH).read_bytes())
    except JobError:
        with contextlib.suppress(JobError):
            stores.delete_below(f"{uri}/{number}")
        raise
    return f"{uri}/{number}"


def fetched(place: str) -> Path:
    """The local path of a version or of all versions; of a URI, a copy of that version, or of the newest one there.

    Raises:
      UserError: the URI holds no version, or not one that stem-export published.
      JobError: a file of the version is missing or damaged, or the store does not answer.
    """
    if not stores.is_uri(place):
        return Path(place)
    uri = stores.check(place)
    names = stores.listing(uri)
    if GRAPH not in names:
        whole = versions(uri, names)
        if not whole:
            raise UserError(f"{uri} holds no exported model: neither {GRAPH} nor a version with one")
        uri = f"{uri}/{max(whole, key=int)}"
    text = stores.read(f"{uri}/{manifests.FILENAME}")
    try:
        listed: dict[str, str] = json.loads(text or b"")["files"]
        if any(map(files.leads_outside, listed)):
            raise ValueError("a file is outside")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{uri}/{manifests.FILENAME} is no manifest of stem-export ({error!r})") from None
    copy = copy_of(uri)
    files.make_directory(copy.parent)
    with files.locked(files.hidden(copy, "lock"), copy, wait=True):
        known = copy / manifests.FILENAME
        if known.exists() and known.read_bytes() == text and not publish.damage(copy):
            return copy
        scratch = files.hidden(copy, "download")
        shutil.rmtree(scratch, ignore_errors=True)  # of a job that was killed
        try:
            _download(uri, listed, text or b"", scratch)
            shutil.rmtree(copy, ignore_errors=True)
            os.rename(scratch, copy)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return copy


def newest(place: str) -> Path | None:
    """The newest version under ``place``, of a URI a copy; None where there is none.

    Raises: as `fetched`.
    """
    if stores.is_uri(place):
        uri = stores.check(place)
        return fetched(uri) if versions(uri, stores.listing(uri)) else None
    return publish.newest(Path(place))


def versions(uri: str, names: Mapping[str, stores.Stamp]) -> dict[str, list[tuple[str, stores.Stamp]]]:
    """The whole versions at a URI by the name of their directory, each with its files; ``names`` is its listing."""
    found: dict[str, list[tuple[str, stores.Stamp]]] = {}
    for name, stamp in names.items():
        if match := _VERSION.fullmatch(name):
            found.setdefault(match[1], []).append((name, stamp))
    return {name: of for name, of in found.items() if f"{name}/{GRAPH}" in names}


def damage(version: str) -> str:
    """How a version at a URI differs from the one that was published, or ""; as `publish.damage`, without a copy of it.

    Raises:
      UserError: access is denied.
      JobError: the store does not answer.
    """
    try:
        listed = dict(json.loads(stores.read(f"{version}/{manifests.FILENAME}") or b"")["files"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{manifests.FILENAME} is not a manifest"
    if any(map(files.leads_outside, listed)):
        return f"{manifests.FILENAME} is not a manifest: a file is not below the version's place"

    def differs(name: str) -> str:
        try:
            same = stores.sha256(f"{version}/{name}") == listed[name]
        except FileNotFoundError:
            return f"{name!r}, listed in {manifests.FILENAME}, is missing"
        return "" if same else f"{name!r} is not the file of {manifests.FILENAME}: its SHA-256 differs"

    return next(filter(None, stores.side_by_side(differs, listed)), "")


def move(version: str, place: str) -> None:
    """Moves a version to another place of its store, where it appears whole; then the old one goes.

    Raises:
      JobError: the store does not answer. The version is in its old place, or in both.
    """
    names, moved = stores.listing(version), f"{place}/{version.rpartition('/')[2]}"
    for _ in stores.side_by_side(
        lambda name: stores.copy(f"{version}/{name}", f"{moved}/{name}"), [name for name in names if name != GRAPH]
    ):
        pass
    stores.copy(f"{version}/{GRAPH}", f"{moved}/{GRAPH}")
    delete(version)


def delete(version: str) -> None:
    """Deletes a version; at once it is none for a reader of ours."""
    stores.delete(f"{version}/{GRAPH}")
    stores.delete_below(version)


def halves(names: Mapping[str, stores.Stamp]) -> list[str]:
    """The numbers in a listing that have files, but no ``saved_model.pb``: uploads in progress, what a kill left."""
    found = {match[1] for name in names if (match := _VERSION.fullmatch(name))}
    return sorted(name for name in found if f"{name}/{GRAPH}" not in names)


def copy_of(uri: str) -> Path:
    """Where the copy of a version lies: those of one model lie side by side under the names that they have there."""
    base, _, name = uri.rpartition("/")
    return copies.cache() / f"versions-{hashlib.sha256(base.encode()).hexdigest()[:12]}" / name


def _download(uri: str, listed: dict[str, str], manifest: bytes, directory: Path) -> None:
    directory.mkdir()
    for name in listed:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)

    def get(name: str) -> int:
        stores.get(f"{uri}/{name}", directory / name, listed[name])
        return (directory / name).stat().st_size

    try:
        with Progress(None, unit="bytes", desc=f"download {uri}") as progress:
            for size in stores.side_by_side(get, listed):
                progress.update(size)
    except FileNotFoundError as error:
        raise JobError(f"{uri}: a file that its manifest lists is missing: export the model again") from error
    (directory / manifests.FILENAME).write_bytes(manifest)
