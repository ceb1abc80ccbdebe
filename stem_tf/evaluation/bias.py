"""The additive model: one bias per user and one per item. What a label is worth before any feature is looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MOST_STEPS = 50  # Newton's method needs fewer than ten
_MOST_PRODUCTS = 500  # of one Newton step
_PRECISION = 1e-5


@dataclass(frozen=True)
class Biases:
    """The fitted model: z = intercept + users[user] + items[item].

    Attributes:
      intercept: the value of a row whose user and item are both unknown.
      users: [U].
      items: [I].
    """

    intercept: float
    users: NDArray[np.float64]
    items: NDArray[np.float64]


def fit(
    users: ArrayLike, items: ArrayLike, labels: ArrayLike, weights: ArrayLike | None, prior_rows: float, kind: str
) -> Biases:
    """The biases that minimise sum_n w_n loss(y_n, z_n) + c/2 (sum of squared biases); the intercept is free.

    The loss of a binary task is the logloss of sigmoid(z), and c = prior_rows w m (1 - m), with the mean weight w and
    the mean label m: as much as ``prior_rows`` rows at the mean say about a bias. The loss of a regression is
    (y - z)^2 / 2, and c = prior_rows w; with users alone that is the smoothed mean of each user.

    Newton's method; each step is solved by conjugate gradients, which read the rows and keep no matrix. Besides the
    arguments, 40 bytes per row are held.

    Args:
      users: [M], numbers from 0 to U - 1, each of which occurs.
      items: [M], numbers from 0 to I - 1, each of which occurs.
      labels: [M], 0 or 1 in a binary task.
      weights: [M], above 0, or None where all rows count alike.
      prior_rows: above 0.
      kind: ``binary`` or ``regression``.

    Returns:
      The biases, each exact to about 1e-5 (standard deviations of the label in a regression). Where all labels are
      equal they are 0, and the intercept of a binary task is infinite. NaN and no biases without rows.
    """
    user, item = np.asarray(users, np.intp), np.asarray(items, np.intp)
    y = np.asarray(labels, np.float64)
    if not len(y):
        return Biases(float("nan"), np.zeros(0), np.zeros(0))
    w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    count_users, count_items = int(user.max()) + 1, int(item.max()) + 1
    mean, binary = float(np.average(y, weights=w)), kind == "binary"
    with np.errstate(divide="ignore"):
        intercept = float(np.log(mean) - np.log1p(-mean)) if binary else mean
    if y.min() == y.max():
        return Biases(intercept, np.zeros(count_users), np.zeros(count_items))
    unit, start = 1.0, intercept
    if not binary:  # in standard deviations from the mean, so that labels of any size have the same precision
        unit, start = float(np.std(y)), 0.0
        y = (y - mean) / unit
    prior = prior_rows * w.mean() * (mean * (1 - mean) if binary else 1.0)
    penalty = np.r_[0.0, np.full(count_users + count_items, prior)]

    def values(b: NDArray) -> NDArray:
        """Adds up the biases of each row: [1 + U + I] to [M]."""
        z = b[1 : 1 + count_users][user]
        z += b[1 + count_users :][item]
        z += b[0]
        return z

    def sums(rows: NDArray) -> NDArray:
        """Adds up the rows of each bias: [M] to [1 + U + I]."""
        by_user = np.bincount(user, rows, count_users)
        return np.concatenate([[by_user.sum()], by_user, np.bincount(item, rows, count_items)])

    def objective(b: NDArray, z: NDArray) -> float:
        loss = np.logaddexp(0, z) - y * z if binary else (y - z) ** 2 / 2
        return float(loss @ w + penalty @ b**2 / 2)

    b = np.r_[start, np.zeros(count_users + count_items)]
    if binary:  # where each bias would be if it were alone: Newton's method gets from there in a few steps
        rows = prior_rows * w.mean()
        alone = (sums(w * y) + rows * mean) / (sums(w) + rows)
        b[1:] = (np.log(alone) - np.log1p(-alone) - start)[1:]
    z = values(b)
    now = objective(b, z)
    for _ in range(_MOST_STEPS):
        predicted = 0.5 + 0.5 * np.tanh(z / 2) if binary else z
        gradient = sums(w * (predicted - y)) + penalty * b
        if np.abs(gradient).max() <= _PRECISION * prior:
            break
        curvature = w * predicted * (1 - predicted) if binary else w
        step = _solve(
            lambda v, h=curvature: sums(h * values(v)) + penalty * v,  # type: ignore[misc]
            sums(curvature) + penalty,
            -gradient,
            # A hundredth of the gradient is enough far from the minimum; near to it, what the result should have.
            max(0.1 * _PRECISION * prior, 0.01 * float(np.abs(gradient).max())),
        )
        size, decrease, along = 1.0, float(gradient @ step), values(step)
        # Armijo's rule; at the minimum the objective's own rounding, up to 1e-10 of it, is no rise.
        while (new := objective(b + size * step, z + size * along)) > now * (1 + 1e-10) + 1e-4 * size * decrease:
            size /= 2
        b, z, now = b + size * step, z + size * along, new
    b *= unit
    return Biases(intercept - start + float(b[0]), b[1 : 1 + count_users], b[1 + count_users :])


def _solve(product: Callable[[NDArray], NDArray], diagonal: NDArray, right: NDArray, tolerance: float) -> NDArray:
    """Solves A x = right by conjugate gradients, preconditioned by the diagonal of A."""
    x, residual = np.zeros_like(right), right.copy()
    scaled = residual / diagonal
    direction, square = scaled, float(residual @ scaled)
    for _ in range(_MOST_PRODUCTS):
        if np.abs(residual).max() <= tolerance:
            break
        image = product(direction)
        length = square / float(direction @ image)
        x += length * direction
        residual -= length * image
        scaled = residual / diagonal
        square, before = float(residual @ scaled), square
        direction = scaled + square / before * direction
    return x
