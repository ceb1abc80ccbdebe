"""Uniform samples in bounded memory: each element has a random or hashed key, and those with the smallest are kept."""

from __future__ import annotations

from typing import Any

import numpy as np


def bound(keys: np.ndarray, size: int) -> Any:
    """The smallest key after the ``size`` smallest of ``keys`` [n], or None if there are no more than ``size``.

    The sample is the elements with ``keys < bound``.
    """
    return None if len(keys) <= size else np.partition(keys, size)[size]
