"""Latencies in bounded memory: counts in buckets that grow by a constant factor.

HdrHistogram's Python package asks for a newer setuptools than TensorFlow 2.16 works with.
"""

from __future__ import annotations

import math

import numpy as np

_SMALLEST, _LARGEST = 1e-5, 3600.0
_PER_FACTOR_TEN = 232
_BUCKETS = math.ceil(_PER_FACTOR_TEN * math.log10(_LARGEST / _SMALLEST)) + 1


class Histogram:
    """Counts of durations from 10 us to one hour, to 1 %; durations outside count as the nearest of these."""

    def __init__(self) -> None:
        self._counts = np.zeros(_BUCKETS, np.int64)
        self.longest = 0.0

    def __len__(self) -> int:
        return int(self._counts.sum())

    def add(self, seconds: float) -> None:
        bounded = min(max(seconds, _SMALLEST), _LARGEST)
        self._counts[math.ceil(_PER_FACTOR_TEN * math.log10(bounded / _SMALLEST))] += 1
        self.longest = max(self.longest, seconds)

    def quantile(self, share: float) -> float:
        """The seconds that ``share`` of the durations did not exceed; NaN if there are none."""
        total = len(self)
        if not total:
            return math.nan
        bucket = int(np.searchsorted(self._counts.cumsum(), max(1, math.ceil(share * total))))
        return min(float(_SMALLEST * 10 ** (bucket / _PER_FACTOR_TEN)), self.longest)
