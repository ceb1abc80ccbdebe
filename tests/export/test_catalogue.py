"""Versions as a person keeps them: what is served, promotion and roll-back, under kills and side by side."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from export import catalogue, publish, stored
from export.server.directories import version_directories, versions_at
from stem_util import owned, stores
from stem_util.errors import JobError, UserError


def published(directory: Path, newest: int | None = None) -> int:
    """Publishes a version with a manifest, as far as files go."""
    with publish.publishing(directory, newest) as (number, building):
        (building / "saved_model.pb").write_text(f"graph {number}")
        digest = hashlib.sha256(f"graph {number}".encode()).hexdigest()
        tree = {
            "format": 1,
            "model": "ranker",
            "version": number,
            "signatures": [],
            "files": {"saved_model.pb": digest},
        }
        (building / "manifest.json").write_text(json.dumps(tree))
    return number


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A directory of versions 1 to 5."""
    for _ in range(5):
        published(tmp_path / "served")
    return tmp_path / "served"


def highest(directory: Path) -> int:
    """The version that TensorFlow Serving and stem-serve take."""
    return max(version_directories(directory).versions)


def numbers(directory: Path) -> tuple[list[int], list[int]]:
    return publish.versions(directory), publish.versions(directory / publish.ASIDE)


def test_promote_roll_back_and_publish_again(served: Path) -> None:
    assert catalogue.roll_back(served) == 4 == highest(served)
    assert catalogue.roll_back(served) == 3 == highest(served)
    assert numbers(served) == ([1, 2, 3], [4, 5])
    catalogue.promote(served, 5)  # from aside; 4 stays there
    assert numbers(served) == ([1, 2, 3, 5], [4]) and highest(served) == 5
    catalogue.promote(served, 4)
    assert numbers(served) == ([1, 2, 3, 4], [5])
    catalogue.promote(served, 4)
    assert numbers(served) == ([1, 2, 3, 4], [5])
    (served / ".last_version").unlink()
    assert published(served) == 6  # 5 lies aside: its number is not used again
    assert [(v.number, v.served, v.aside) for v in catalogue.versions(served)] == [
        (1, False, False), (2, False, False), (3, False, False), (4, False, False), (5, False, True), (6, True, False),
    ]  # fmt: skip
    assert owned.kind_of(served) == owned.VERSIONS


def test_a_kill_at_any_rename_leaves_the_old_or_the_new_one_served(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue.promote(served, 4)
    rename = os.rename
    for target, moves in ((2, 2), (5, 1), (1, 3)):
        for kill in range(moves):
            copy = tmp_path / f"{target}-{kill}"
            shutil.copytree(served, copy)
            left = iter([True] * kill)
            seen: list[int] = []

            def dying(*paths: Any, left: Iterator[bool] = left, copy: Path = copy, seen: list[int] = seen) -> None:
                if not next(left, False):
                    raise KeyboardInterrupt
                rename(*paths)
                seen.append(highest(copy))

            monkeypatch.setattr(os, "rename", dying)
            with pytest.raises(KeyboardInterrupt):
                catalogue.promote(copy, target)
            monkeypatch.undo()
            assert {*seen, highest(copy)} <= {4}
            catalogue.promote(copy, target)
            assert highest(copy) == target
            assert sorted([*numbers(copy)[0], *numbers(copy)[1]]) == [1, 2, 3, 4, 5]


def test_damaged_versions_are_not_promoted_but_moved_out_of_the_way(served: Path) -> None:
    (served / "4" / "saved_model.pb").write_text("other")
    (served / "5" / "saved_model.pb").unlink()
    with pytest.raises(UserError, match=r"4 is not the version .* so it was not promoted: saved_model.pb"):
        catalogue.roll_back(served)
    assert numbers(served) == ([1, 2, 3, 4, 5], [])
    assert {n: bool(why) for n, why in catalogue.verify(served).items()} == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1}
    catalogue.promote(served, 3)
    assert numbers(served) == ([1, 2, 3], [4, 5])


def test_retain_keeps_what_is_served(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue.promote(served, 3)
    assert catalogue.retain(served, 2) == [1]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            catalogue.retain(served, 1)
    assert numbers(served)[0] == [3] and (served / ".deleted-2").is_dir()
    assert catalogue.retain(served, 1) == [4] and numbers(served) == ([3], [5])
    assert not list(served.glob(".deleted-*"))
    (served / "3" / "saved_model.pb").write_text("other")
    with pytest.raises(UserError, match=r"3, which is served, .* so nothing was deleted"):
        catalogue.retain(served, 1)
    with pytest.raises(UserError, match="keep 1 or more"):
        catalogue.retain(served, 0)
    with pytest.raises(UserError, match="no version before the served one"):
        catalogue.roll_back(served)


def test_links_and_leading_zeros_are_versions_as_for_servers(served: Path, tmp_path: Path) -> None:
    (served / "5").rename(tmp_path / "elsewhere")
    (served / "5").symlink_to(tmp_path / "elsewhere")
    (served / "4").rename(served / "004")
    assert catalogue.roll_back(served) == 4 and highest(served) == 4
    catalogue.promote(served, 5)
    assert catalogue.retain(served, 1) == [1, 2, 3, 4]
    catalogue.promote(served, 5)
    published(served)
    assert catalogue.retain(served, 1) == [5] and (tmp_path / "elsewhere" / "saved_model.pb").exists()


def test_a_roll_back_need_not_wait_for_an_export_which_then_is_not_published(served: Path) -> None:
    with pytest.raises(JobError, match="version 4 is served now, not 5 any more"), publish.publishing(served, 5):
        assert catalogue.roll_back(served) == 4
    assert highest(served) == 4 and published(served, 4) == 6
    with pytest.raises(JobError, match="not 0 any more"):
        published(served, 0)


def test_two_at_once(served: Path) -> None:
    seen, stop, looking = set(), threading.Event(), ThreadPoolExecutor(1)

    def look() -> None:
        while not stop.is_set():
            seen.add(highest(served))

    looked = looking.submit(look)
    with ThreadPoolExecutor(4) as jobs:
        done = [jobs.submit(catalogue.promote, served, number) for number in (2, 5, 3, 1, 4) * 4]
    stop.set()
    for job in (looked, *done):
        job.result()
    in_place, aside = numbers(served)
    assert sorted([*in_place, *aside]) == [1, 2, 3, 4, 5] and seen <= {1, 2, 3, 4, 5}
    assert not (served / ".moving").exists()


@pytest.fixture
def in_store(served: Path, s3: str) -> str:
    """The same versions at a URI."""
    for number in range(1, 6):
        stored.upload(served / str(number), f"{s3}/models/feed")
    return f"{s3}/models/feed"


def places(uri: str) -> tuple[list[int], list[int]]:
    found = catalogue.versions(uri)
    return [v.number for v in found if not v.aside], [v.number for v in found if v.aside]


def test_versions_in_a_store(in_store: str, job_in_process: Callable[..., Any]) -> None:
    assert catalogue.roll_back(in_store) == 4 and places(in_store) == ([1, 2, 3, 4], [5])
    assert versions_at(in_store).listing().versions.keys() == {1, 2, 3, 4}  # as stem-serve sees it
    catalogue.promote(in_store, 5)
    catalogue.promote(in_store, 3)
    assert places(in_store) == ([1, 2, 3], [4, 5])
    assert catalogue.retain(in_store, 1) == [1, 2, 4] and places(in_store) == ([3], [5])
    stores.delete_below(f"{in_store}/_exports")  # as where another program copied the versions there
    with stored.staging(in_store) as output:
        assert published(output) == 6  # 5 lies aside: its number is not used again
        with pytest.raises(JobError, match="version 3 is served now, not 4 any more, so nothing was published"):
            stored.upload(output / "6", in_store, newest=4)
    table = job_in_process("export.jobs.versions", "list", in_store).stdout.splitlines()
    assert [line.split()[:2] for line in table[1:]] == [["3", "ranker"], ["5", "ranker"]]
    assert "served" in table[1] and "aside" in table[2]
    stores.write(f"{in_store}/3/saved_model.pb", b"other")
    job = job_in_process("export.jobs.versions", "verify", in_store)
    assert job.returncode == 1 and "version 3: 'saved_model.pb' is not the file of manifest.json" in job.stdout
    assert f"{in_store} version 5: whole" in job.stdout
    with pytest.raises(UserError, match="so nothing was deleted"):
        catalogue.retain(in_store, 1)
    stores.delete(f"{in_store}/aside/5/manifest.json")
    with pytest.raises(UserError, match=r"aside/5 is not the version .*: manifest.json is not a manifest"):
        catalogue.promote(in_store, 5)
    with pytest.raises(UserError, match="none holds no versions"):
        catalogue.versions(f"{in_store}/none")


@pytest.mark.parametrize("target", [2, 5])
def test_a_kill_between_requests_to_a_store(in_store: str, target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each one that changes something: what was served is served on, and the same command completes it."""
    catalogue.promote(in_store, 4)
    stores.write(f"{in_store}/7/variables/data", b"another job uploads this")
    deadly, done = 0, False
    while not done:
        left = iter([True] * deadly)

        def dying(request: Callable[..., Any], left: Iterator[bool] = left) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                if not next(left, False):
                    raise KeyboardInterrupt
                return request(*arguments)

            return call

        with monkeypatch.context() as patch:
            for name in ("copy", "delete", "delete_below"):
                patch.setattr(stores, name, dying(getattr(stores, name)))
            try:
                catalogue.promote(in_store, target)
                done = True
            except KeyboardInterrupt:
                assert max(places(in_store)[0]) in (4, target)
        in_place, aside = places(in_store)
        assert sorted([*in_place, *aside]) == [1, 2, 3, 4, 5]
        deadly += 1
    assert deadly > 5 and max(places(in_store)[0]) == target
    assert set(catalogue.verify(in_store).values()) == {""}
    assert {name.split("/")[0] for name in stores.listing(in_store)} == {*map(str, in_place), "7", "aside", "_exports"}


def test_the_job(served: Path, job_in_process: Callable[..., Any], tmp_path: Path) -> None:
    def run(*words: str, code: int = 0) -> str:
        done = job_in_process("export.jobs.versions", *words)
        assert done.returncode == code, done.stderr
        return str(done.stdout if code == 0 else done.stderr)

    (served / "4" / "verdict.json").write_text(
        json.dumps({"checks": [{"outcome": "holds"}, {"outcome": "not judged"}], "served": {"version": 3}})
    )
    assert "version 4 is served" in run("roll-back", str(served))
    lines = run("list", str(served)).splitlines()
    assert "served" in lines[4] and "1 rules held, against 3" in lines[4]
    assert "aside" in lines[5] and "no gate" in lines[5]
    assert "version 2 is served" in run("promote", str(served), "2")
    assert "deleted 1, 3, 4" in run("retain", str(served), "1")
    assert "whole" in run("verify", str(served))
    (served / "2" / "saved_model.pb").write_text("other")
    assert "1 of its versions are not what was published" in run("verify", str(served), code=1)
    for words, message in (
        (("promote", str(served)), "needs the version's number, a whole number"),
        (("promote", str(served), "two"), "a whole number, not 'two'"),
        (("promote", str(served), "9"), "has no version 9"),
        (("rollback", str(served)), "is not an action; did you mean 'roll_back'"),
        (("list", str(served), "3"), "unexpected argument '3'"),
        (("list", str(tmp_path / "gone")), "no such directory"),
        (("list", "s4://models"), "stem-versions list: s4://models: s4:// is not known"),
        (("list", str(tmp_path)), "nothing says that it is exported versions"),
        (("list",), "are required"),
    ):
        sentence = run(*words, code=2)
        assert message in sentence and sentence.count("\n") == 1
