"""Progress: quiet for short work away from a terminal, a line per minute for long work."""

from __future__ import annotations

import io

import pytest

from stem_util.progress import Progress, duration, of_one_job


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("stem_util.progress.time", made)
    return made


def test_is_quiet_for_short_work(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(10, unit="rows", desc="count", stream=stream) as bar:
        bar.update(4)
        clock.now = 59.9
        bar.update(6)
    assert bar.done == 10
    assert stream.getvalue() == ""


def test_prints_a_line_per_minute_for_long_work(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(60_000, unit="rows", desc="count", initial=6_000, note=lambda: "all well", stream=stream) as bar:
        for second in range(10, 140, 10):
            clock.now = second
            bar.update(1_200 if second <= 60 else 2_400)
    assert stream.getvalue().splitlines() == [
        "count: 13,200 of 60,000 rows, 120/s, all well, 6 min left",
        "count: 27,600 of 60,000 rows, 240/s, all well, 2 min left",  # the speed of the second minute
    ]


def test_slow_work_shows_no_rate_of_zero(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(9, unit="sections", desc="report", stream=stream) as bar:
        clock.now = 100
        bar.update(3)
    with Progress(None, unit="rows", desc="scan", stream=stream) as bar:
        clock.now = 200
        bar.update(0)
    assert stream.getvalue() == "report: 3 of 9 sections, 3 min left\nscan: 0 rows\n"


def test_short_phases_of_a_long_job_have_a_line_per_minute_together(clock: Clock) -> None:
    stream = io.StringIO()
    with of_one_job():
        for phase in range(6):
            with Progress(10, unit="rows", desc=f"phase {phase}", stream=stream) as bar:
                clock.now += 25
                bar.update(10)
    assert stream.getvalue() == "phase 2: 10 of 10 rows, 0 s left\nphase 5: 10 of 10 rows, 0 s left\n"


def test_draws_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(4, unit="rows", desc="count", stream=stream) as bar:
        bar.update(4)
    assert "count" in stream.getvalue()


def test_durations() -> None:
    assert [duration(seconds) for seconds in (7.6, 240, 9000)] == ["8 s", "4 min", "2.5 h"]
