"""Searches: every point once, the best wins, and a journal goes on where a kill has cut it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stem_tf.compare.plan import Dimension, Planned, Range, Search
from stem_tf.compare.search import Point, Tuner
from stem_util.errors import UserError

GRID: dict[str, Dimension] = {"a": ("1", "2", "3"), "b": ("x", "y,z")}
NUMBERS: dict[str, Dimension] = {"a": ("1", "2"), "l": Range(1e-6, 1e-2, True, False), "w": Range(1, 8, False, True)}


def arm(sampler: str, trials: int, *, higher: bool = True, name: str = "ple") -> Planned:
    space = GRID if sampler == "grid" else NUMBERS
    return Planned(name, {}, ("data.dir=/d", "model.name=ple"), (), Search(sampler, trials, space, higher))


def rest(tuner: Tuner, score: float = 0.5) -> list[Point]:
    points = []
    while (point := tuner.ask()) is not None:
        points.append(point)
        tuner.tell(point.number, score)
    return points


def test_a_grid_tries_each_point_once_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    first = Tuner(arm("grid", 6), tmp_path / "j", 0)
    one, two, three = first.ask(), first.ask(), first.ask()
    assert one is not None and two is not None and three is not None and first.left == 3
    first.tell(one.number, 0.7)
    first.tell(two.number, None)  # failed
    assert first.running
    second = Tuner(arm("grid", 6), tmp_path / "j", 0)
    assert second.ended == 1 and second.left == 5
    points = rest(second)
    assert points[:2] == [two, three] and len({one, *points}) == 6
    assert {point.words for point in [one, *points]} == {(f"a={a}", f"b={b}") for a in "123" for b in ("x", "y,z")}
    assert second.winner() == one and not second.running and second.left == 0
    assert [row["score"] for row in second.table()].count(0.7) == 1 and len(second.table()) == 6
    assert rest(Tuner(arm("grid", 6), tmp_path / "j", 0)) == []


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_numbers_of_ranges(sampler: str, tmp_path: Path) -> None:
    first = Tuner(arm(sampler, 4), tmp_path / "j", 0)
    points = rest(first)
    again = rest(Tuner(arm(sampler, 4), tmp_path / "k", 0))
    assert points == again and len(points) == 4
    for point in points:
        values = dict(word.split("=") for word in point.words)
        assert values["a"] in "12" and 1e-6 <= float(values["l"]) <= 1e-2 and 1 <= int(values["w"]) <= 8
    more = rest(Tuner(arm(sampler, 6), tmp_path / "j", 0))
    assert [point.number for point in more] == [4, 5] and not {p.words for p in more} & {p.words for p in points}


def test_lower_losses_win_and_another_arm_is_another_search(tmp_path: Path) -> None:
    tuner = Tuner(arm("grid", 6, higher=False), tmp_path / "j", 0)
    assert tuner.winner() is None
    for score in (0.4, 0.2, 0.2, float("nan")):
        point = tuner.ask()
        assert point is not None
        tuner.tell(point.number, score)
    winner = tuner.winner()
    assert winner is not None and winner.number == 1
    assert Tuner(arm("grid", 6, higher=False, name="mmoe"), tmp_path / "j", 0).ended == 0


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_a_job_may_be_killed_while_it_writes_the_journal(sampler: str, tmp_path: Path) -> None:
    journal = tmp_path / "j"
    tuner = Tuner(arm(sampler, 3), journal, 0)
    one = tuner.ask()
    assert one is not None
    tuner.tell(one.number, 0.7)
    tuner.ask()
    whole = journal.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in [5, *ends, *(end - 2 for end in ends)]:
        journal.write_bytes(whole[:cut])
        points = rest(Tuner(arm(sampler, 3), journal, 0))
        again = Tuner(arm(sampler, 3), journal, 0)
        assert again.ended == 3 and again.left == 0 and again.ask() is None, cut
        tried = [row["overrides"] for row in again.table() if row["score"] is not None]
        assert len(points) in (2, 3) and all(overrides.keys() == tried[0].keys() for overrides in tried)
        if sampler == "grid":
            assert len({tuple(overrides.items()) for overrides in tried}) == 3


@pytest.mark.parametrize("line", [b"hello", b"[]", b"{}", b"1", b"\0\0"])
def test_a_damaged_journal_is_named(line: bytes, tmp_path: Path) -> None:
    rest(Tuner(arm("grid", 2), tmp_path / "j", 0))
    text = (tmp_path / "j").read_bytes().split(b"\n")
    (tmp_path / "j").write_bytes(b"\n".join([text[0], line, *text[2:]]))
    with pytest.raises(UserError, match="j is damaged .line 2.: remove it"):
        Tuner(arm("grid", 2), tmp_path / "j", 0)
