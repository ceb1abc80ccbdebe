"""Fitted constants: moments in pieces, samples by hash, boundaries of quantiles."""

import numpy as np
import pytest

from pipelines import hashing
from pipelines.convert import numeric_fit
from pipelines.convert.numeric_fit import Moments, NumericFit, ValueSample
from pipelines.manifest import Constants
from pipelines.schema import Feature


def _feature(**settings: object) -> Feature:
    return Feature("x", "numeric", "item", "x", "float32", **settings)  # type: ignore[arg-type]


def _fit(feature: Feature, values: list[float]) -> NumericFit:
    fit = NumericFit.empty(feature)
    fit.add(np.array(values, np.float32), hashing.seeded64(np.arange(len(values)), 0, "sample"))
    return fit


def test_moments_in_pieces_do_not_cancel() -> None:
    values = 1e9 + np.random.default_rng(0).normal(size=1000)
    parts = sum((Moments.of(part) for part in np.array_split(values, 9)), Moments())
    assert parts.count == 1000
    np.testing.assert_allclose([parts.mean, parts.std], [values.mean(), values.std()], rtol=1e-8)
    assert Moments() + Moments() == Moments()


@pytest.mark.parametrize(
    ("steps", "mean", "std", "after"),
    [
        ((), 4.0, np.std([0, 4, 8]), 4.0),
        (("standardise",), 4.0, np.std([0, 4, 8]), 0.0),
        (("log1p",), np.mean(np.log1p([0, 4, 8])), np.std(np.log1p([0, 4, 8])), np.mean(np.log1p([0, 4, 8]))),
        (("log1p", "standardise"), np.mean(np.log1p([0, 4, 8])), np.std(np.log1p([0, 4, 8])), 0.0),
    ],
)
def test_constants_by_transform(steps: tuple[str, ...], mean: float, std: float, after: float) -> None:
    constants = _fit(_feature(transform=steps), [0, np.nan, 4, 8]).constants()
    np.testing.assert_allclose([constants.mean, constants.std, constants.mean_after], [mean, std, after])


def test_constant_and_absent_values_have_std_1() -> None:
    assert _fit(_feature(), [3.0, 3.0]).constants().std == 1.0
    assert _fit(_feature(quantiles=4), [np.nan]).constants() == Constants(0.0, 1.0, 0.0, ())


def test_quantile_boundaries() -> None:
    values = np.arange(100, dtype=np.float32)
    assert numeric_fit.quantile_boundaries(values, 4) == (25.0, 50.0, 75.0)
    # Nine of ten values are 0: their bucket is one, and 0 is no boundary, as nothing lies below it.
    assert numeric_fit.quantile_boundaries(np.array([0] * 90 + [1] * 10, np.float32), 10) == (1.0,)
    assert numeric_fit.quantile_boundaries(np.zeros(5, np.float32), 3) == ()


def test_given_boundaries_are_kept() -> None:
    assert _fit(_feature(boundaries=(1.0, 2.0)), [5.0]).constants().boundaries == (1.0, 2.0)


def test_sample_depends_on_hashes_only() -> None:
    values = np.arange(10_000, dtype=np.float32)
    hashes = hashing.seeded64(np.arange(10_000), 0, "sample")
    kept = []
    for order in (np.arange(10_000), np.random.default_rng(0).permutation(10_000)):
        sample = ValueSample(100)
        for part in np.array_split(order, 13):
            sample.add(values[part], hashes[part])
        kept.append(sorted(sample.values))
    assert kept[0] == kept[1] == sorted(values[np.argsort(hashes)[:100]])
