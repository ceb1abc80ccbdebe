"""Progress: quiet for short work away from a terminal, a line a minute for long work."""

import io

import pytest

from stem_util import progress
from stem_util.progress import Progress


def test_is_quiet_for_short_work() -> None:
    stream = io.StringIO()
    with Progress(10, unit="rows", desc="count", stream=stream) as bar:
        bar.update(4)
        bar.update(6)
    assert bar.done == 10
    assert stream.getvalue() == ""


def test_prints_plain_lines_for_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    stream = io.StringIO()
    with Progress(2000, unit="rows", desc="count", stream=stream) as bar:
        bar.update(1500)
    assert stream.getvalue().startswith("count: 1,500 of 2,000 rows, ")


def test_slow_work_shows_no_rate_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    times = iter([0.0, 100.0])
    monkeypatch.setattr("stem_util.progress.time.monotonic", lambda: next(times))
    stream = io.StringIO()
    with Progress(9, unit="sections", desc="report", stream=stream) as bar:
        bar.update(3)
    assert stream.getvalue() == "report: 3 of 9 sections, 200 s left\n"


def test_draws_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(4, unit="rows", desc="count", stream=stream) as bar:
        bar.update(4)
    assert "count" in stream.getvalue()
