"""The documentation: its links lead somewhere, and what it tells a reader to type works."""

from __future__ import annotations

import datetime
import operator
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines import manifest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("datasets/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def block(page: Path, language: str) -> str:
    """The first fenced block of ``language`` in ``page``."""
    found = re.search(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_own_log_converts_as_written(
    tmp_path: Path, run_job: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # also where stem-tf is not installed
    page = ROOT / "docs/own_log.md"
    (tmp_path / "make_log.py").write_text(block(page, "python"))
    subprocess.run([sys.executable, "make_log.py"], cwd=tmp_path, check=True, timeout=60)
    (tmp_path / "music.yaml").write_text(block(page, "yaml"))
    command = shlex.split(block(page, "sh").splitlines()[0])
    assert command[0] == "stem-convert"
    done = run_job("pipelines.jobs.convert", *command[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    converted = manifest.load(str(tmp_path / "music_data"))
    assert sum(converted.rows(split) for split in manifest.SPLITS) == 20_000
    assert 0 < converted.task_rows("train", "stars") < converted.rows("train") / 5


def test_joins_and_histories_work_as_written(
    tmp_path: Path, run_job: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    duckdb = pytest.importorskip("duckdb")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    page = ROOT / "docs/joins_and_histories.md"
    for name, language in (("make_tables.py", "python"), ("join.sql", "sql"), ("joined.yaml", "yaml")):
        (tmp_path / name).write_text(block(page, language))
    subprocess.run([sys.executable, "make_tables.py"], cwd=tmp_path, check=True, timeout=60)
    by_duckdb, describe, convert = map(shlex.split, block(page, "sh").splitlines())
    subprocess.run([sys.executable, *by_duckdb[1:]], cwd=tmp_path, check=True, timeout=60)

    joined = duckdb.sql(f"FROM '{tmp_path}/joined/*/*.parquet' ORDER BY time, listener, song, clicked").fetchall()
    impressions = pq.read_table(tmp_path / "impressions").to_pylist()
    features = {row["song"]: row for row in pq.read_table(tmp_path / "songs.parquet").to_pylist()}
    order = operator.itemgetter("time", "listener", "song", "clicked")
    clicks: dict[int, list[tuple[int, int]]] = {}
    expected = []
    for row in sorted(impressions, key=order):
        known = [(time, song) for time, song in clicks.get(row["listener"], []) if time < row["time"]]
        # Of one time, the smallest song is first in the list.
        songs = [song for _, song in sorted(known, key=lambda click: (-click[0], click[1]))[:10]]
        about = features.get(row["song"], {"style": None, "seconds": None})
        day = datetime.datetime.fromtimestamp(row["time"], datetime.UTC).date()
        values = (row["listener"], row["song"], row["time"], row["clicked"], about["style"], about["seconds"])
        expected.append((*values, songs or None, day))
        if row["clicked"]:
            clicks.setdefault(row["listener"], []).append((row["time"], row["song"]))
    assert joined == expected

    assert run_job("pipelines.jobs.describe", *describe[1:], cwd=tmp_path).returncode == 0
    draft = (tmp_path / "draft.yaml").read_text()
    assert re.search(r"^  last_songs: {kind: multivalent", draft, re.MULTILINE) and "day" in draft
    done = run_job("pipelines.jobs.convert", *convert[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    converted = manifest.load(str(tmp_path / "data"))
    days = [row[-1].isoformat() for row in joined]
    first = {"train": "2023-11-15", "validation": "2023-11-19", "test": "2023-11-20"}
    assert converted.rows("train") == sum(day < first["validation"] for day in days)
    assert converted.rows("validation") == days.count(first["validation"])
    assert converted.rows("test") == days.count(first["test"])


def test_readme_shows_the_schema_of_own_log() -> None:
    without_comments = re.sub(r" +#.*", "", block(ROOT / "docs/own_log.md", "yaml"))
    assert block(ROOT / "README.md", "yaml") == without_comments
