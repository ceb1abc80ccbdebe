"""The documentation: its links lead somewhere, and what it tells a reader to type works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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


def test_readme_shows_the_schema_of_own_log() -> None:
    without_comments = re.sub(r" +#.*", "", block(ROOT / "docs/own_log.md", "yaml"))
    assert block(ROOT / "README.md", "yaml") == without_comments
