"""Directories in a store (see `stem_util.stores`) and their local copies, on which the jobs work.

A job needs a local directory: locks, renames, files that are mapped into memory. So what a URI names is copied to a
cache ($STEM_TF_CACHE, by default ~/.cache/stem-tf), and what is written there is published:

    s3://bucket/run/000001-5f2c01ab/...     the files that one publication uploaded, and that stay as they are
    s3://bucket/run/000002-90d1e7f3/...
    s3://bucket/run/_COMPLETE               written last: which object is which file, with its size and SHA-256

Readers go by the last object alone, so they see all of a publication or nothing of it, although a store cannot rename a
directory. Files that have not changed are not uploaded again. What no longer belongs to a publication is deleted after
the next one.

One job at a time should write to a URI. Of two, the second to publish finds another's `_COMPLETE` and fails; if both
write it in the same moment, the last one wins, and its files are whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from stem_util import files, owned, stores
from stem_util.errors import JobError, UserError
from stem_util.owned import Kind
from stem_util.progress import Progress

COMPLETE = "_COMPLETE"
_STATE = ".stem-tf-published"
"""File in a copy: the ``_COMPLETE`` that the copy was made from or published as."""
_UPLOAD = re.compile(r"(\d{6,})-[0-9a-f]{8}")
"""Directory of the files that one publication uploaded."""
_TRIES = 10
"""How often, a second apart, a reader looks again while a publication is replaced."""


@dataclass(frozen=True)
class Stored:
    """A file in a store: the object that holds it, its size and its SHA-256."""

    object: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Publication:
    """What ``_COMPLETE`` says.

    Attributes:
      holds: what the directory holds, see `stem_util.owned.Kind`.
      number: 1 for the first publication, and one more for each later one.
      files: the files by their path in the directory.
      text: the content of the object; b"" before the first publication.
    """

    holds: str
    number: int
    files: dict[str, Stored]
    text: bytes

    @classmethod
    def parse(cls, text: bytes, uri: str) -> Publication:
        """Raises UserError where the text is no publication."""
        try:
            tree = json.loads(text)
            stored = {path: Stored(**of) for path, of in tree["files"].items()}
            for path in (*stored, *(of.object for of in stored.values())):
                if files.leads_outside(path):
                    raise ValueError(f"{path} is outside")
            return cls(tree["holds"], tree["number"], stored, text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{uri}/{COMPLETE} is damaged ({error!r}): delete it and write {uri} again") from None


def _text(holds: str, number: int, stored: dict[str, Stored]) -> bytes:
    by_path = {path: dataclasses.asdict(of) for path, of in stored.items()}
    return json.dumps({"holds": holds, "number": number, "files": by_path}, indent=1).encode()


def cache() -> Path:
    """The directory of local copies."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.environ.get("STEM_TF_CACHE") or os.path.join(base, "stem-tf")))


class Copy:
    """A local copy of a directory in a store; a process has one `Copy` of it, see `of`.

    Args:
      uri: the directory.
      kind: what it holds.
      apart: directories in it that are published by themselves.
      path: the copy's path; one in the cache by default.

    Attributes:
      path: the copy, which may not exist yet. It may hold more than was published, after a job was killed.
    """

    def __init__(self, uri: str, kind: Kind, apart: Collection[str], path: Path | None) -> None:
        self.uri, self._kind, self._apart = uri, kind, apart
        name = f"{os.path.basename(uri)}-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"
        self.path = path or cache() / name
        self._lock: int | None = None
        self._base = b""  # text of the publication that the copy comes from, for `publish`
        self._sha256s: dict[str, tuple[tuple[int, int, int], str]] = {}  # of local files, as long as they stay

    def published(self) -> Publication | None:
        """What is published at the URI now.

        Raises:
          UserError: something else is published there, or access is denied, or there is no such bucket.
          JobError: the store does not answer.
        """
        text = stores.read(f"{self.uri}/{COMPLETE}")
        if text is None:
            return None
        found = Publication.parse(text, self.uri)
        if found.holds != self._kind.name:
            raise UserError(f"{self.uri} holds {found.holds}, not {self._kind.name}")
        return found

    def fetch(self) -> Path:
        """Brings the copy to what is published; other processes leave it so until this one ends. Returns its path.

        A copy of what is published is taken as it is, with what a job that was killed has added.

        Raises:
          UserError: nothing is published at the URI, or another job works on an older state of the copy; and as
            `published`.
          JobError: a published file is missing or damaged, or the store does not answer.
        """
        for tries in range(1, _TRIES + 1):
            found = self.published()
            if found is None:
                raise self._unpublished()
            try:
                if self._bring(found):
                    self._base = found.text
                    return self.path
                problem: Exception = self._in_use()
            except FileNotFoundError:
                problem = JobError(f"{self.uri}: an object that {COMPLETE} names is missing: write {self.uri} again")
            if tries < _TRIES:
                time.sleep(1)  # it may be replaced right now
        raise problem

    def prepare(self, *, anew: bool = False) -> Path:
        """Prepares the copy for a job that writes to it and then calls `publish`. Returns its path.

        Args:
          anew: the copy is emptied; otherwise it goes on from what is published, as `fetch` brings it.

        Raises:
          UserError: the URI holds something else or may not be written to; and as `fetch`.
          JobError: as `fetch`.
        """
        found = self.published()
        if found is None and (foreign := self._foreign()):
            raise UserError(f"{self.uri} holds something else ({foreign}): choose another place")
        stores.check_writable(self.uri)
        if found is not None and not anew:
            return self.fetch()
        if anew or self._recorded():
            if not self._hold(exclusive=True):
                raise self._in_use()
            shutil.rmtree(self.path, ignore_errors=True)
        self._hold(exclusive=False)
        self._base = found.text if found else b""
        return self.path

    def publish(self) -> None:
        """Uploads what has changed in the copy, and then ``_COMPLETE``.

        Raises:
          JobError: another job has published at the URI, or the store does not answer; nothing is published then.
        """
        before = self._unchanged()
        number = before.number + 1
        upload = f"{number:06d}-{os.urandom(4).hex()}"
        stored: dict[str, Stored] = {}
        new: list[str] = []
        for path in self._local():
            old = before.files.get(path)
            if old and old.bytes == (self.path / path).stat().st_size and old.sha256 == self._sha256(path):
                stored[path] = old
            else:
                new.append(path)
        stored |= self._put(new, upload)
        self._unchanged()
        text = _text(self._kind.name, number, dict(sorted(stored.items())))
        stores.write(f"{self.uri}/{COMPLETE}", text)
        self._base = text
        files.write_atomically(self.path / _STATE, text)
        with contextlib.suppress(JobError):  # all is published; what is left is deleted after the next publication
            self._delete_unused(number, {of.object for of in stored.values()})

    def _put(self, paths: list[str], upload: str) -> dict[str, Stored]:
        """Uploads files; returns where they are stored."""
        sizes = {path: (self.path / path).stat().st_size for path in paths}
        stored = {}

        def put(path: str) -> Stored:
            before = _stamp(self.path / path)
            size, sha256 = stores.put(self.path / path, f"{self.uri}/{upload}/{path}")
            self._sha256s[path] = (before, sha256)
            return Stored(f"{upload}/{path}", size, sha256)

        with Progress(sum(sizes.values()), unit="bytes", desc=f"upload to {self.uri}") as progress:
            for path, one in zip(paths, stores.side_by_side(put, paths), strict=True):
                stored[path] = one
                progress.update(sizes[path])
        return stored

    def _bring(self, found: Publication) -> bool:
        """Makes the copy that of a publication, unless another job works on it; returns whether it is."""
        if self._hold(exclusive=True):
            if self._recorded() != found.text:
                self._download(found)
        self._hold(exclusive=False)
        return self._recorded() == found.text

    def _download(self, found: Publication) -> None:
        """Downloads the files of a publication that the copy lacks, and removes those that it has too many."""
        files.make_directory(self.path)
        (self.path / _STATE).unlink(missing_ok=True)
        for path in set(self._local()) - found.files.keys():
            (self.path / path).unlink()
        wanted = [path for path, of in found.files.items() if not self._has(path, of)]

        def get(path: str) -> int:
            of, target = found.files[path], self.path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            stores.get(f"{self.uri}/{of.object}", target, of.sha256)
            return of.bytes

        total = sum(found.files[path].bytes for path in wanted)
        with Progress(total, unit="bytes", desc=f"download {self.uri}") as progress:
            for size in stores.side_by_side(get, wanted):
                progress.update(size)
        files.write_atomically(self.path / _STATE, found.text)

    def _has(self, path: str, of: Stored) -> bool:
        local = self.path / path
        return local.is_file() and local.stat().st_size == of.bytes and self._sha256(path) == of.sha256

    def _local(self) -> list[str]:
        """Paths of the copy's files that belong to a publication."""
        found = [owned.MARKER, *owned.entries(self.path)] if (self.path / owned.MARKER).exists() else []
        return [path for path in found if path == owned.MARKER or not _is_apart(path, self._apart)]

    def _sha256(self, path: str) -> str:
        now = _stamp(self.path / path)
        if path not in self._sha256s or self._sha256s[path][0] != now:
            with open(self.path / path, "rb") as file:
                self._sha256s[path] = (now, hashlib.file_digest(file, "sha256").hexdigest())
        return self._sha256s[path][1]

    def _unchanged(self) -> Publication:
        """What is published, after checking that it is what this copy comes from."""
        found = self.published()
        if (found.text if found else b"") != self._base:
            raise JobError(f"another job has published at {self.uri} since this one began; this one publishes nothing")
        return found or Publication(self._kind.name, 0, {}, b"")

    def _delete_unused(self, number: int, used: Collection[str]) -> None:
        """Deletes what earlier publications uploaded, except what is ``used``."""
        alive, dead = {name.partition("/")[0] for name in used}, set()
        for name in stores.listing(self.uri):
            upload = name.partition("/")[0]
            match = _UPLOAD.fullmatch(upload)
            if match and int(match[1]) < number and name not in used:
                if upload in alive:
                    stores.delete(f"{self.uri}/{name}")
                else:
                    dead.add(upload)
        for upload in dead:
            stores.delete_below(f"{self.uri}/{upload}")

    def _unpublished(self) -> UserError:
        if not stores.listing(self.uri):
            return UserError(f"{self.uri} is empty: it does not hold {self._kind.name}")
        return UserError(
            f"{self.uri} has no {COMPLETE}, which is written last: {self._kind.name} is still being uploaded there, or "
            "its job was stopped, or no job of stem-tf wrote it"
        )

    def _foreign(self) -> str:
        """A file at the URI that is neither an upload nor a part that is published by itself; "" if there is none."""
        for name in stores.listing(self.uri):
            first = name.partition("/")[0]
            if not (_UPLOAD.fullmatch(first) or first in self._apart or first.startswith(stores.PROBE)):
                return name
        return ""

    def _in_use(self) -> UserError:
        return UserError(
            f"another job works on the copy of {self.uri} in {self.path}, which has to change now: wait for that job, "
            "or set STEM_TF_CACHE to another directory"
        )

    def _recorded(self) -> bytes:
        """The text of the publication that the copy was made from or published as; b"" if there was none."""
        with contextlib.suppress(FileNotFoundError):
            return (self.path / _STATE).read_bytes()
        return b""

    def _hold(self, *, exclusive: bool) -> bool:
        """Locks the copy until this process ends. A shared lock waits; False where no exclusive one can be had."""
        if self._lock is None:
            files.make_directory(self.path.parent)
            self._lock = os.open(files.hidden(self.path, "copy.lock"), os.O_RDWR | os.O_CREAT, 0o644)
        return files.try_lock(self._lock, shared=not exclusive, wait=not exclusive)


def _is_apart(path: str, apart: Collection[str]) -> bool:
    """Whether a file is not part of a publication: it belongs to another one, or is hidden."""
    parts = path.split("/")
    return parts[0] in apart or any(part.startswith(".") for part in parts)


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.cache
def _copy(uri: str, kind: Kind, apart: tuple[str, ...], path: Path | None, cache: Path) -> Copy:
    del cache
    return Copy(uri, kind, apart, path)


def of(uri: str, kind: Kind, *, apart: tuple[str, ...] = (), path: Path | None = None) -> Copy:
    """This process's `Copy` of what a URI names; raises UserError as `stem_util.stores.check`."""
    return _copy(stores.check(uri), kind, apart, path, cache())


def local(place: str | os.PathLike[str], kind: Kind) -> str:
    """The local path of a directory to read: the path itself, or an up-to-date copy of what a URI names.

    Raises: as `Copy.fetch`.
    """
    path = os.fspath(place)
    return str(of(path, kind).fetch()) if stores.is_uri(path) else path


@contextlib.contextmanager
def output(place: str, kind: Kind, *, overwrite: bool) -> Iterator[str]:
    """Yields a local directory to create; if ``place`` is a URI, it is published when the block ends without an error.

    Raises:
      UserError: something is published at the URI and ``overwrite`` is False; and as `Copy.prepare`.
      JobError: as `Copy.publish`.
    """
    if not stores.is_uri(place):
        yield place
        return
    copy = of(place, kind)
    if not overwrite and copy.published() is not None:
        raise UserError(f"{place} exists already; --overwrite replaces it")
    yield str(copy.prepare(anew=True))
    copy.publish()
