"""How far any model could get on the contradictory log: what its rows say about a user whose items are known exactly.

    python -m benchmarks.reachable --contradiction=0.7

The truth behind the labels (`pipelines.recipes.contradictory`) is out of reach: a user's tastes have to be learned from
the user's own rows. Here all else is given, each item's topics and appeal and the intercepts, and the tastes and
generosities of a user are those that are the most probable, by the generator's own prior and the user's train rows
(Newton's method). A model has to learn the items, too, and gets less. Once each task has only its own rows, and once
tasks share them as far as their tastes really correlate: the difference is what sharing between tasks can bring.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from pipelines.recipes import truth
from pipelines.recipes.contradictory import RECIPE, World
from stem_util import cli

flags = cli.Flags()

_ITEMS = flags.DEFINE_integer("items", 300, "As of the recipe.", 1)
_CONTRADICTION = flags.DEFINE_float("contradiction", 0.7, "As of the recipe.", 0, 1)
_STEPS = 12
"""Newton steps: more do not change the fourth digit of an AUC."""


def main(argv: Sequence[str]) -> None:
    del argv
    given = {setting.name: setting.default for setting in RECIPE.settings} | {
        "contradiction": _CONTRADICTION.value,
        "items": _ITEMS.value,
    }
    rows = given.pop("rows")
    world = World(**given, seed=0)
    train, test = world.block(0, rows * 8 // 10), world.block(1, rows // 10)
    tasks, strength = world.tasks, given["strength"]
    print(
        f"{train.num_rows:,} train and {test.num_rows:,} test rows, {_ITEMS.value:,} items, "
        f"contradiction {_CONTRADICTION.value:g}"
    )
    _say("the truth itself", test, tasks, [test[truth.column(task)].to_numpy() for task in tasks])
    apart = np.eye(len(tasks))
    together = np.where(apart, 1.0, min(1 - _CONTRADICTION.value, 0.999))
    for what, covariance in (("each task alone", apart), ("tasks together", together)):
        learned = _learn(world, train, covariance, strength)
        _say(f"items known, {what}", test, tasks, _logits(world, test, learned, strength))


def _given(world: World, table: pa.Table, strength: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What a row multiplies a user's tastes and generosity with ``[N, Z + 1]``, and what is added to it ``[T, N]``."""
    item = table["item"].to_numpy()
    factors = np.column_stack([strength * world.topics[item], np.full(len(item), world.BIAS)])
    return factors, world.appeal[:, item] + world.intercepts[:, None]


def _learn(world: World, train: pa.Table, covariance: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    """Each user's most probable tastes and generosities, in units of their deviations: ``[users, T, Z + 1]``."""
    factors, added = _given(world, train, strength)
    labels = np.array([train[task].to_numpy() for task in world.tasks], float)
    width, tasks = factors.shape[1], len(labels)
    prior = np.kron(np.linalg.inv(covariance), np.eye(width))
    users = train["user"].to_numpy()
    order = np.argsort(users, kind="stable")
    found = np.zeros((world.generosity.shape[1], tasks, width))
    for rows in np.split(order, np.flatnonzero(np.diff(users[order])) + 1):
        x, own = factors[rows], found[users[rows[0]]]
        for _ in range(_STEPS):
            hessian = prior.copy()
            gradient = prior @ own.ravel()
            for t in range(tasks):
                place = slice(t * width, (t + 1) * width)
                chance = expit(x @ own[t] + added[t, rows])
                gradient[place] += x.T @ (chance - labels[t, rows])
                hessian[place, place] += (x * (chance * (1 - chance))[:, None]).T @ x
            own -= np.linalg.solve(hessian, gradient).reshape(own.shape)
    return found


def _logits(world: World, table: pa.Table, learned: NDArray[np.float64], strength: float) -> list[NDArray[np.float64]]:
    factors, added = _given(world, table, strength)
    of_rows = learned[table["user"].to_numpy()]
    return [np.einsum("nk,nk->n", factors, of_rows[:, t]) + added[t] for t in range(len(added))]


def _say(what: str, test: pa.Table, tasks: str, scores: Sequence[NDArray[np.float64]]) -> None:
    reached = [roc_auc_score(test[task].to_numpy(), values) for task, values in zip(tasks, scores, strict=True)]
    print(f"{what:>30}  " + "  ".join(f"{task} {auc:.4f}" for task, auc in zip(tasks, reached, strict=True)))


if __name__ == "__main__":
    cli.run(main, flags)
