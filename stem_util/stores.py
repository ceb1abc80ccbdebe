"""Files in object stores and on HDFS, named by URIs: s3://BUCKET/PATH, gs://BUCKET/PATH, hdfs://HOST:PORT/PATH.

pyarrow.fs reads and writes them. Credentials and endpoints come from where each store's own tools find them (for S3
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL and so on), never from a URI.

A request that fails for a reason that may pass is repeated; after the last try there is one error. pyarrow.fs is
imported with the first URI: it takes a tenth of a second.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from stem_util.errors import FULL_DISK, JobError, UserError

if TYPE_CHECKING:
    from pyarrow import NativeFile, fs

Item = TypeVar("Item")
Result = TypeVar("Result")

SCHEMES = ("s3", "gs", "hdfs")

PROBE = "_write-check-"
"""Beginning of the name of a file that is written and deleted again, to see whether that is allowed."""
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_WAITS: Sequence[float] = (1, 4)
"""Seconds before each further try. For S3, each try is up to AWS_MAX_ATTEMPTS requests (5 by default)."""
_AT_ONCE = 8
"""Files that are transferred side by side."""
_BLOCK_BYTES = 8 << 20
_COPIED_BY_S3 = 5 << 30
_DENIED = re.compile(
    r"ACCESS_DENIED|AccessDenied|INVALID_(ACCESS_KEY_ID|CLIENT_TOKEN_ID|SIGNATURE)|SIGNATURE_DOES_NOT_MATCH"
    r"|HTTP status 40[13]|PERMISSION_DENIED|UNAUTHENTICATED|AccessControlException|SignatureDoesNotMatch"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|NoSuchBucket|InvalidBucketName|bucket does not exist")
_CREDENTIALS = {
    "s3": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile in AWS_PROFILE",
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login",
    "hdfs": "check HADOOP_USER_NAME, or run kinit",
}


def is_uri(path: str | os.PathLike[str]) -> bool:
    """Whether a path begins with a scheme, as s3://bucket/path does."""
    return _URI.match(os.fspath(path)) is not None


def absolute(place: str) -> str:
    """A path from the root; a URI as it is."""
    return place if is_uri(place) else os.path.abspath(place)


def check(uri: str) -> str:
    """Returns a URI without slashes at its end.

    Raises:
      UserError: its scheme is unknown, it names no bucket or host, or it has credentials or options in it.
    """
    scheme, _, rest = uri.partition("://")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(f"{uri}: {scheme}:// is not known; a path is local or begins with one of {known}")
    host = rest.partition("/")[0]
    if "@" in host:
        raise UserError(f"{scheme}://...: credentials do not belong in a URI, which is printed and written to files")
    if re.search(r"\?\w+=", uri):
        raise UserError(
            f"{uri}: options after a question mark are not read; the environment has them, such as AWS_ENDPOINT_URL "
            "and AWS_REGION"
        )
    if not host or "//" in rest.rstrip("/") or {".", ".."} & set(rest.split("/")):
        raise UserError(f"{uri}: should be {scheme}://{'HOST:PORT' if scheme == 'hdfs' else 'BUCKET'}/PATH")
    return f"{scheme}://{rest.rstrip('/')}"


@dataclass(frozen=True)
class Stamp:
    """Size of a file and when it was written, in nanoseconds since 1970."""

    bytes: int
    mtime_ns: int


def listing(uri: str) -> dict[str, Stamp]:
    """All files below a URI by their path from there, sorted; {} where there is none.

    Raises:
      UserError: there is no such bucket, access is denied, or a file has a name that cannot be read.
      JobError: the store does not answer.
    """
    from pyarrow import fs

    system, base = _open(uri)

    def once() -> dict[str, Stamp]:
        try:
            found = system.get_file_info(fs.FileSelector(base, recursive=True))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        files = [info for info in found if info.type == fs.FileType.File]
        if unnamed := next((info.path for info in files if "//" in info.path), None):
            raise UserError(f"{uri}: '{unnamed}' has an empty name between two slashes: copy it to another key")
        return dict(sorted((info.path[len(base) :].lstrip("/"), _stamp(info)) for info in files))

    return _retried(uri, once)


def stamp(uri: str) -> Stamp:
    """Size and time of one file; raises FileNotFoundError where there is none, and as `listing`."""
    from pyarrow import fs

    system, path = _open(uri)
    info = _retried(uri, lambda: system.get_file_info(path))
    if info.type != fs.FileType.File:
        raise FileNotFoundError(2, "no such file", uri)
    return _stamp(info)


def _stamp(info: fs.FileInfo) -> Stamp:
    return Stamp(info.size, info.mtime_ns or 0)


def open_file(path: str) -> NativeFile | BinaryIO:
    """Opens a file to read it anywhere in it; a path that is no URI is a local file."""
    if not is_uri(path):
        return open(path, "rb")
    system, place = _open(path)
    return _retried(path, lambda: system.open_input_file(place))


def read(uri: str) -> bytes | None:
    """The content of a small file; None where there is none. Raises as `listing`."""
    system, path = _open(uri)

    def once() -> bytes:
        with system.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())

    try:
        return _retried(uri, once)
    except FileNotFoundError:
        return None


def write(uri: str, data: bytes) -> None:
    """Writes a small file; in an object store readers see the old file or the new one. Raises as `listing`."""
    system, path = _open(uri)

    def once() -> None:
        with system.open_output_stream(path, compression=None) as stream:
            stream.write(data)

    _unbroken(lambda: _retried(uri, once))


def put(source: Path, uri: str) -> tuple[int, str]:
    """Uploads a file; returns the size of what was sent, and its SHA-256 in hexadecimal. Raises as `listing`."""
    system, path = _open(uri)

    def once() -> tuple[int, str]:
        digest, sent = hashlib.sha256(), 0
        with open(source, "rb") as file, system.open_output_stream(path, compression=None) as stream:
            while block := file.read(_BLOCK_BYTES):
                stream.write(block)
                digest.update(block)
                sent += len(block)
        stored = system.get_file_info(path).size
        if stored != sent:
            raise OSError(f"{stored} bytes arrived of {sent}")
        return sent, digest.hexdigest()

    return _retried(uri, once)


def get(uri: str, target: Path, sha256: str) -> None:
    """Downloads a file that has this SHA-256.

    Raises:
      FileNotFoundError: there is no such file.
      JobError: it has other content, or the store does not answer.
    """
    system, path = _open(uri)

    def once() -> None:
        digest = hashlib.sha256()
        with system.open_input_stream(path, compression=None) as stream, open(target, "wb") as file:
            while block := stream.read(_BLOCK_BYTES):
                file.write(block)
                digest.update(block)
        if digest.hexdigest() != sha256:
            raise OSError("its content is not what was published (the SHA-256 differs)")

    _retried(uri, once)


def sha256(uri: str) -> str:
    """The SHA-256 of a file in hexadecimal. Raises FileNotFoundError, and as `listing`."""
    system, path = _open(uri)

    def once() -> str:
        digest = hashlib.sha256()
        with system.open_input_stream(path, compression=None) as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    return _retried(uri, once)


def copy(source: str, target: str) -> None:
    """Copies a file inside a store; S3 does so by itself up to 5 GiB. Raises FileNotFoundError, and as `listing`."""
    (system, old), (_, new) = _open(source), _open(target)

    def once() -> None:
        if source.startswith("s3:") and system.get_file_info(old).size <= _COPIED_BY_S3:
            system.copy_file(old, new)
            return
        with (
            system.open_input_stream(old, compression=None) as stream,
            system.open_output_stream(new, compression=None) as written,
        ):
            while block := stream.read(_BLOCK_BYTES):
                written.write(block)

    _unbroken(lambda: _retried(source, once))


def delete(uri: str) -> None:
    """Deletes a file, if it is there. Raises as `listing`."""
    system, path = _open(uri)
    try:
        _retried(uri, lambda: system.delete_file(path))
    except FileNotFoundError:
        pass


def delete_below(uri: str) -> None:
    """Deletes everything below a URI. Raises as `listing`."""
    system, path = _open(uri)
    try:
        _retried(uri, lambda: system.delete_dir(path))
    except FileNotFoundError:
        pass


def check_writable(uri: str) -> None:
    """Writes a small file below a URI and deletes it again, so that a mistake is known before work starts.

    Raises:
      UserError: there is no such bucket, or it may not be written to.
      JobError: the store does not answer.
    """
    probe = f"{uri}/{PROBE}{os.urandom(4).hex()}"
    write(probe, b"stem-tf")
    delete(probe)


def side_by_side(action: Callable[[Item], Result], items: Collection[Item]) -> Iterator[Result]:
    """Yields ``action(item)`` for each item in order, several at once; after an error no further one is begun."""
    pool = ThreadPoolExecutor(min(_AT_ONCE, max(len(items), 1)))
    try:
        yield from pool.map(action, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _unbroken(action: Callable[[], None]) -> None:
    """Runs ``action`` to its end, whatever signal comes: it runs in a thread, and signals raise in the main one.

    A stream of pyarrow that is given up is closed, and so would publish an empty or shortened object.
    """
    for _ in side_by_side(lambda run: run(), [action]):
        pass


def matches(path: str, pattern: str) -> bool:
    """Whether a path fits a pattern as glob.glob takes it: * and ? stay inside a name, ** stands for any directories.

    A name that begins with a dot fits a pattern that begins with one.
    """
    return _matches(path.split("/"), pattern.split("/"))


def _matches(names: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not names
    hidden = bool(names) and names[0].startswith(".")
    if patterns[0] == "**":
        return _matches(names, patterns[1:]) or (bool(names) and not hidden and _matches(names[1:], patterns))
    if not names or (hidden and not patterns[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def _open(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI, and the path in it."""
    scheme, _, rest = check(uri).partition("://")
    host, _, path = rest.partition("/")
    variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_MAX_ATTEMPTS")
    try:
        if scheme == "s3":
            system = _s3(host, *(os.environ.get(name, "") for name in variables))
        else:
            system = _filesystem(scheme, host)
    except ValueError as error:
        raise UserError(f"{uri}: the address of the store in the environment is wrong ({_reason(error)})") from error
    except (OSError, ImportError) as error:
        if problem := _mistake(uri, error):
            raise problem from error
        raise JobError(f"{scheme}://{host} cannot be reached: {_reason(error)}") from error
    return system, f"/{path}" if scheme == "hdfs" else rest


@functools.lru_cache
def _filesystem(scheme: str, host: str) -> fs.FileSystem:
    from pyarrow import fs

    return fs.FileSystem.from_uri(f"{scheme}://{host}/")[0]


@functools.lru_cache
def _s3(
    bucket: str, s3_endpoint: str, endpoint: str, region: str, default_region: str, max_attempts: str
) -> fs.S3FileSystem:
    """S3 as the environment describes it: pyarrow finds the credentials there by itself, but not the rest."""
    from pyarrow import fs

    scheme, _, address = (s3_endpoint or endpoint).rpartition("://")
    region = region or default_region or ("us-east-1" if address else fs.resolve_s3_region(bucket))
    attempts = int(max_attempts) if max_attempts.isdecimal() else 5
    return fs.S3FileSystem(
        region=region,
        endpoint_override=address or None,
        scheme=scheme.lower() or "https",
        connect_timeout=10,
        request_timeout=30,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )


def _retried(uri: str, once: Callable[[], Result]) -> Result:
    """Calls ``once`` until it succeeds, a few times; raises as `listing`, and FileNotFoundError at once."""
    for wait in (*_WAITS, None):
        try:
            return once()
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.filename is not None or error.errno in FULL_DISK:
                raise  # a local file
            if problem := _mistake(uri, error):
                raise problem from error
            if wait is None:
                raise JobError(f"{uri}: {_reason(error)} (tried {len(_WAITS) + 1} times)") from error
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _mistake(uri: str, error: Exception) -> UserError | None:
    """The error for a cause that does not pass by itself, if it is one."""
    text = str(error)
    scheme, _, rest = uri.partition("://")
    host = rest.partition("/")[0]
    if _NO_BUCKET.search(text):
        return UserError(f"{uri}: there is no bucket '{host}'; create it, or check the name and AWS_ENDPOINT_URL")
    if _DENIED.search(text) or isinstance(error, PermissionError):
        return UserError(f"{uri}: access is denied; {_CREDENTIALS[scheme]}")
    if "libjvm" in text or "libhdfs" in text:
        return UserError(
            f"{uri}: hdfs:// needs Java and Hadoop's libhdfs.so: set JAVA_HOME, HADOOP_HOME and "
            "CLASSPATH=$($HADOOP_HOME/bin/hadoop classpath --glob)"
        )
    if isinstance(error, ImportError):
        return UserError(f"{uri}: this pyarrow was built without {scheme}:// ({text})")
    return None


def _reason(error: Exception) -> str:
    """The first line of an error, without what only the store's support can use."""
    return re.sub(r" \(Request ID: .*\)", "", next(iter(str(error).splitlines()), type(error).__name__))
