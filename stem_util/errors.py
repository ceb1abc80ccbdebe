"""Errors that a user can act on, and one-sentence messages for all others."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator

_RESOURCE_EXHAUSTED = 8  # TensorFlow's error code for a lack of memory or of disk space
_ALLOCATING = re.compile(r"allocating tensor with shape\[([0-9,]*)\]")
_WHERE_IN_TENSORFLOW = re.compile(
    r"""\AGraph\ execution\ error:\s+ (?:(?:Detected\ at\ node|File\ ")[^\n]*\s+)*  # where in the program
    | \d+\ root\ error\(s\)\ found\.\s+ \(0\)\ [A-Z_]+:\s+
    | \s*(?:\[Op:\w+\] | \[\[\{\{node | Hint:\ If\ you\ want | Additional\ GRPC\ error).*
    | \{\{[^}]*\}\}\s*""",
    re.DOTALL | re.VERBOSE,
)
_DETAIL = re.compile(r"^\[Errno \d+\] .* Detail: \[errno \d+\] ")


class UserError(Exception):
    """A mistake in what the user gave (flags, schema, data). Its sentence names the thing, the place and the fix.

    Jobs print it without a traceback and exit with code 2.
    """


class JobError(Exception):
    """A failure of the job itself (disk full, NaN loss, a worker died). Jobs print it and exit with code 1."""


class Stopped(BaseException):
    """SIGTERM has arrived. Like KeyboardInterrupt it may be raised anywhere, and ``except Exception`` lets it pass."""


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a write that failed for lack of space."""


@contextlib.contextmanager
def naming_full_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds ``path`` to the OSError of a write that failed for lack of space, which names no file by itself."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK and error.filename is None:
            error.filename = os.fspath(path)
        raise


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """``"; did you mean 'long_view'?"`` when one of ``allowed`` is spelled like ``word``, else an empty string."""
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def message(error: BaseException, memory: str = "") -> str:
    """An exception as one line.

    Args:
      error: any exception; the text of a :class:`UserError` or :class:`JobError` is taken as it is.
      memory: what would need less memory; part of the line where memory ran out.
    """
    return "; ".join(" ".join(text.split()) for text in [_sentence(error, memory), *getattr(error, "__notes__", ())])


def _sentence(error: BaseException, memory: str) -> str:
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, UserError | JobError | Stopped):
        return text or type(error).__name__
    code = getattr(error, "error_code", None)  # TensorFlow's OpError has one; TensorFlow is not imported here
    text = _WHERE_IN_TENSORFLOW.sub("", text)
    full = os.strerror(errno.ENOSPC) in text  # TensorFlow calls a full disk an exhausted resource, as it does memory
    if isinstance(error, MemoryError) or (code == _RESOURCE_EXHAUSTED and not full):
        shape = _ALLOCATING.search(text)
        what = f" (a tensor of shape [{shape[1]}] did not fit)" if shape else f" ({text})" if text else ""
        return f"out of memory{what}: {f'{memory} needs less' if memory else 'this machine does not have enough'}"
    if isinstance(error, OSError) and error.strerror:
        why = _DETAIL.sub("", error.strerror)
        return f"{error.filename}: {why}" if error.filename else why
    if isinstance(error, OSError) or code is not None:
        return text or type(error).__name__
    return (
        f"{type(error).__name__}: {text or 'no message'}. That is a bug, or a case nobody thought of: the same command "
        "with --debug shows where; please report it"
    )
