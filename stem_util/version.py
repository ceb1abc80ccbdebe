"""The one place that holds the version: setup.py reads it as text, manifests and exports record it."""

import contextlib
import importlib.metadata
import platform

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of this package, of Python, and of the packages that decide what a run computes, as installed."""
    found = {"stem-tf": __version__, "Python": platform.python_version()}
    for package in ("tensorflow", "tf-keras", "numpy", "pyarrow", "optuna"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
