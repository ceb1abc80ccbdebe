"""Fits the constants of numeric transforms (mean, standard deviation, boundaries) on train.

`stem_tf.layers.transforms` applies the transforms at the model's input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipelines import sampling
from pipelines.manifest import Constants
from pipelines.schema import Feature

SAMPLE_SIZE = 200_000
_STD_FLOOR = 1e-12


@dataclass(frozen=True)
class Moments:
    """Count (or sum of weights), mean, and sum of squared deviations from the mean, of float64 values."""

    count: float = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: np.ndarray, weights: np.ndarray | None = None) -> Moments:
        """The moments of finite values [n] with positive weights [n] (1 if not given)."""
        if not len(values):
            return cls()
        if weights is not None:
            mean = float(np.average(values, weights=weights))
            return cls(float(weights.sum()), mean, float((weights * np.square(values - mean)).sum()))
        mean = float(values.mean())
        return cls(len(values), mean, float(np.square(values - mean).sum()))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets together, by the update of Chan et al. (1979): sums of squares would lose digits."""
        count = self.count + other.count
        if not count:
            return self
        step = other.mean - self.mean
        mean = self.mean + step * other.count / count
        squares = self.squares + other.squares + step * step * self.count * other.count / count
        return Moments(count, mean, squares)

    @property
    def std(self) -> float:
        """The population standard deviation; 1 if it is too small to divide by."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return std if std > _STD_FLOOR else 1.0


class ValueSample:
    """A uniform sample of values: those with the smallest hashes.

    Args:
      size: number of values to keep.
    """

    def __init__(self, size: int = SAMPLE_SIZE) -> None:
        self._size = size
        self.values = np.zeros(0, np.float32)
        self.hashes = np.zeros(0, np.uint64)
        self._bound: np.uint64 | None = None

    def add(self, values: np.ndarray, hashes: np.ndarray) -> None:
        """Adds values, float32 [n], with their hashes, uint64 [n], which should be distinct."""
        if self._bound is not None:
            near = hashes < self._bound
            values, hashes = values[near], hashes[near]
        self.values = np.concatenate([self.values, values])
        self.hashes = np.concatenate([self.hashes, hashes])
        bound = sampling.bound(self.hashes, self._size)
        if bound is not None:
            kept = self.hashes < bound
            self.values, self.hashes, self._bound = self.values[kept], self.hashes[kept], bound


@dataclass
class NumericFit:
    """What pass 1 gathers for one numeric feature on train rows."""

    feature: Feature
    moments: Moments
    sample: ValueSample

    @classmethod
    def empty(cls, feature: Feature) -> NumericFit:
        return cls(feature, Moments(), ValueSample())

    def add(self, values: np.ndarray, hashes: np.ndarray) -> None:
        """Adds values, float32 [n] with NaN for missing ones, and the hashes of their rows, uint64 [n]."""
        present = ~np.isnan(values)
        values = values[present]
        wide = values.astype(np.float64)
        self.moments += Moments.of(np.log1p(wide) if "log1p" in self.feature.transform else wide)
        if self.feature.quantiles:
            self.sample.add(values, hashes[present])

    def merge(self, other: NumericFit) -> None:
        """Adds what was gathered on later rows."""
        self.moments += other.moments
        self.sample.add(other.sample.values, other.sample.hashes)

    def constants(self) -> Constants:
        """The feature's constants; if train has no value: mean 0, std 1, no fitted boundaries."""
        mean = self.moments.mean
        after = 0.0 if "standardise" in self.feature.transform else mean
        boundaries = self.feature.boundaries
        if self.feature.quantiles:
            boundaries = quantile_boundaries(self.sample.values, self.feature.quantiles)
        return Constants(mean, self.moments.std, after, boundaries)


def quantile_boundaries(values: np.ndarray, buckets: int) -> tuple[float, ...]:
    """Boundaries of about equally filled buckets: at most ``buckets - 1``, fewer if values repeat.

    A value that equals a boundary belongs to the bucket above it, so the smallest value is never a boundary.
    """
    if not len(values):
        return ()
    ordered = np.sort(values)
    places = (np.arange(1, buckets) * len(ordered)) // buckets
    boundaries = np.unique(ordered[places])
    return tuple(float(b) for b in boundaries if b > ordered[0])
