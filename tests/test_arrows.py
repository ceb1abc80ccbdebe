"""Imports between packages follow the arrows stem_util <- pipelines <- stem_tf <- export; the client stands alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "stem_util": set(),
    "pipelines": {"stem_util"},
    "stem_tf": {"stem_util", "pipelines"},
    "export": {"stem_util", "pipelines", "stem_tf", "stem_client"},
    "stem_client": set(),
}
# Methods of a run that export it and score with its export; a run that goes on from an exported model.
EXCEPTIONS = {("stem_tf/run.py", "export"), ("stem_tf/start_from.py", "export")}


def imported(path: Path) -> Iterator[str]:
    """Names of what a file imports, in functions too: ``pipelines.log.find``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_follow_the_arrows(package: str) -> None:
    others = MAY_IMPORT.keys() - {package} - MAY_IMPORT[package]
    paths = list((ROOT / package).rglob("*.py"))
    found = {(str(path.relative_to(ROOT)), name.partition(".")[0]) for path in paths for name in imported(path)}
    assert paths and {(path, name) for path, name in found if name in others} <= EXCEPTIONS


@pytest.mark.parametrize("package", ("pipelines", "stem_tf", "export"))
def test_only_jobs_import_jobs(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        jobs = [name for name in imported(path) if name.startswith(tuple(f"{p}.jobs" for p in MAY_IMPORT))]
        assert path.parent.name == "jobs" or not jobs, path
