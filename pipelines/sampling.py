"""Uniform samples in bounded memory: each element has a key, random or a hash, and those with the smallest are kept."""

from __future__ import annotations

from typing import Any

import numpy as np


def bound(keys: np.ndarray, size: int) -> Any:
    """What the keys of a sample lie below: that of the next one.

    Args:
      keys: numbers [n].
      size: of the sample.

    Returns:
      A number of the keys' type: ``keys < bound`` holds for the ``size`` smallest ones, but for those that equal the
      next. None where there are no more than ``size`` keys.
    """
    return None if len(keys) <= size else np.partition(keys, size)[size]
