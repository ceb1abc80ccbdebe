"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def run_job() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_job("pipelines.convert", "--input=x")``: the job in a process of its own, with its output and exit code."""

    def run(
        module: str, *arguments: str, cwd: str | os.PathLike[str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"},
            timeout=600,
        )

    return run
