"""Hides TensorFlow's own log in jobs, whose every line should be worth reading."""

from __future__ import annotations

import logging
import os

import absl.logging


def quieten_tensorflow() -> None:
    """Call before TensorFlow is imported. TF_CPP_MIN_LOG_LEVEL in the environment has its way.

    Level 3 leaves only fatal messages of the C++ side: what goes wrong comes as an exception, and TensorFlow 2.16 logs
    errors about CUDA factories on every import.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    absl.logging.set_verbosity(absl.logging.WARNING)
