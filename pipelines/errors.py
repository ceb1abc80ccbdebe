"""Errors a person can act on, and the one place that turns them into exit codes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave (flags, schema, data). Its sentence names the thing, the place and the way out.

    Jobs print it without a traceback and exit with code 2.
    """


class JobError(Exception):
    """A failure of the job itself (disk full, NaN loss, a worker died). Jobs print it and exit with code 1."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """``"; did you mean 'long_view'?"`` when one of ``allowed`` is spelled like ``word``, else an empty string."""
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
