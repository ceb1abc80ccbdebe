"""Uniform samples in bounded memory: each element has a key, random or a hash, and those with the smallest are kept."""

from __future__ import annotations

from typing import Any

import numpy as np


def bound(keys: np.ndarray, size: int) -> Any:
    """The key after the ``size`` smallest of ``keys`` [n], or None where there are no more than ``size``.

    ``keys < bound`` are the sample; keys that equal the bound are left out.
    """
    return None if len(keys) <= size else np.partition(keys, size)[size]
