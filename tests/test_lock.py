"""The lock files fit what setup.py asks for, in both distributions."""

from __future__ import annotations

import re
import tomllib
from distutils.core import run_setup
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def locked(extra: str) -> dict[str, str]:
    """The version of each distribution in ``requirements/<extra>.txt``."""
    lines = (ROOT / f"requirements/{extra}.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", lines, re.MULTILINE))


def required(extra: str, monkeypatch: pytest.MonkeyPatch) -> list[Requirement]:
    """What the two distributions need with ``extra``, and what builds them."""
    texts: list[str] = []
    for folder in (ROOT, ROOT / "stem_client"):
        monkeypatch.chdir(folder)
        distribution: Any = run_setup("setup.py", stop_after="init")
        texts += [*distribution.install_requires, *distribution.extras_require.get(extra, [])]
        texts += tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    return [requirement for text in texts if (requirement := Requirement(text)).name != "stem-tf-client"]


@pytest.mark.parametrize("extra", ["plots", "dev"])
def test_locked_versions_are_those_that_setup_asks_for(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    versions, requirements = locked(extra), required(extra, monkeypatch)
    assert len(requirements) > 20
    wrong = [
        str(requirement)
        for requirement in requirements
        if not requirement.specifier.contains(versions.get(canonicalize_name(requirement.name), "0"))
    ]
    assert not wrong, "make lock"


def test_both_lock_files_have_the_same_versions() -> None:
    assert locked("plots").items() <= locked("dev").items()
