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
from pipelines import manifest as manifests
from stem_util import copies, files, owned, stores
from stem_util.errors import JobError, UserError
from stem_util.progress import Progress

_LAST = "saved_model.pb"
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
        used = [int(found[1]) for name in names if (found := _CLAIM.fullmatch(name) or _VERSION.fullmatch(name))]
        publish.use_numbers_after(max(used, default=0), Path(directory))
        yield Path(directory)


def upload(version: Path, place: str) -> str:
    """Uploads a version that was exported to the directory of `staging`; returns where it is then.

    Raises:
      JobError: another job exports a version of this number, or the store does not answer; there is no whole version
        of this number then.
    """
    if not stores.is_uri(place):
        return str(version)
    uri, number = stores.check(place), version.name
    mine = f"_exports/{number}-{os.urandom(4).hex()}"
    stores.write(f"{uri}/{mine}", b"")
    for name in stores.listing(uri).keys() - {mine}:
        found = _CLAIM.fullmatch(name) or _VERSION.fullmatch(name)
        if found and found[1] == number:
            raise JobError(f"another job exports version {number} to {uri}: run this one again")
    names = [owned.MARKER, *(name for name in owned.entries(version) if name != _LAST)]
    sizes = {name: (version / name).stat().st_size for name in names}

    def put(name: str) -> int:
        stores.put(version / name, f"{uri}/{number}/{name}")
        return sizes[name]

    try:
        with Progress(sum(sizes.values()), unit="bytes", desc=f"upload to {uri}/{number}") as progress:
            for size in stores.side_by_side(put, names):
                progress.update(size)
        stores.write(f"{uri}/{number}/{_LAST}", (version / _LAST).read_bytes())
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
    if _LAST not in names:
        whole = versions(uri, names)
        if not whole:
            raise UserError(f"{uri} holds no exported model: neither {_LAST} nor a version with one")
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
    return {name: of for name, of in found.items() if f"{name}/{_LAST}" in names}


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
