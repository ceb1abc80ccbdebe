"""A generated log whose tasks contradict each other as much as one wants, with the probabilities behind its labels.

Every user has a taste for each of Z topics, and every item is about some of them. With s the share of contradiction,

    taste_t(u)    = sqrt(1 - s) common(u) + sqrt(s) own_t(u)          common, own_t: N(0, 1) for each user and topic
    logit_t(u, i) = strength <taste_t(u), topics(i)> + generosity_t(u) + appeal_t(i) + intercept_t
    label_t(u, i) ~ Bernoulli(sigmoid(logit_t(u, i)))

topics(i) is drawn from Dirichlet(0.3) and is the same for all tasks. generosity_t and appeal_t are mixed of a common
and an own part as the taste is, with a standard deviation of 0.5. So the logits of two tasks correlate by 1 - s: at 0
they order all rows alike and differ in their rates only; at 1 what a user likes in one task says nothing about another.
"""

from __future__ import annotations

import string

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit

from pipelines.convert.options import Options
from pipelines.recipes import truth
from pipelines.recipes.recipe import Prepare, Recipe, Setting, write
from pipelines.schema import Feature, Label, Schema, Task
from stem_util.errors import UserError

_BLOCK = 1 << 17
"""Rows that are drawn at a time, each block from a seed of its own."""
_CONCENTRATION = 0.3
_FOR_INTERCEPTS = 400_000
"""Pairs of user and item from which the intercepts are found that give the wanted rates."""


class World:
    """Users, items and what they mean to each other. Arguments are the recipe's settings.

    Attributes:
      tasks: the tasks' names: a, b, ...
      topics: what each item is about, ``[items, Z]``.
      generosity, appeal: ``[T, users]`` and ``[T, items]``.
      intercepts: ``[T]``.
    """

    BIAS = 0.5
    """Standard deviation of generosity and appeal."""

    def __init__(
        self,
        *,
        users: int,
        items: int,
        topics: int,
        strength: float,
        contradiction: float,
        rates: tuple[float, ...],
        popularity: float,
        seed: int,
    ) -> None:
        self.tasks = string.ascii_lowercase[: len(rates)]
        self._seed = seed
        random = np.random.default_rng([seed, 0])
        own, common = np.sqrt(contradiction), np.sqrt(1 - contradiction)

        def mixed(*shape: int) -> NDArray[np.float64]:
            """[T, *shape]: N(0, 1), a common part and one for each task."""
            return common * random.normal(size=shape) + own * random.normal(size=(len(rates), *shape))

        self.topics = random.dirichlet(np.full(topics, _CONCENTRATION), items)
        self._taste = strength * mixed(users, topics)
        self.generosity, self.appeal = self.BIAS * mixed(users), self.BIAS * mixed(items)
        shown = random.permutation(np.arange(1, items + 1) ** -popularity)
        self._shown = np.cumsum(shown / shown.sum())
        self.intercepts = np.zeros(len(rates))
        logits = self._logits(*self._pairs(random, _FOR_INTERCEPTS))
        self.intercepts = np.array([_intercept(*of_task) for of_task in zip(logits, rates, strict=True)])

    def _pairs(self, random: np.random.Generator, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Users and items of some impressions, int64 [N] each."""
        user = random.integers(len(self.generosity[0]), size=rows)
        item = np.searchsorted(self._shown, random.random(rows), "right")
        return user, np.minimum(item, len(self.topics) - 1)

    def _logits(self, user: NDArray[np.int64], item: NDArray[np.int64]) -> NDArray[np.float64]:
        """[T, N]."""
        taste = np.einsum("tnz,nz->tn", self._taste[:, user], self.topics[item])
        return taste + self.generosity[:, user] + self.appeal[:, item] + self.intercepts[:, None]

    def block(self, number: int, rows: int) -> pa.Table:
        """Rows of one block: user, item, a label (0 or 1) and a truth for each task."""
        random = np.random.default_rng([self._seed, 1, number])
        user, item = self._pairs(random, rows)
        chances = expit(self._logits(user, item))
        labels = (random.random(chances.shape) < chances).astype(np.int8)
        columns = {"user": user, "item": item}
        columns |= {task: labels[t] for t, task in enumerate(self.tasks)}
        return pa.table(columns | {truth.column(task): chances[t] for t, task in enumerate(self.tasks)})


def _intercept(logits: NDArray[np.float64], rate: float) -> float:
    """What to add to the logits so that their mean probability is the rate."""
    limit = np.abs(logits).max() + 50
    return float(brentq(lambda intercept: expit(logits + intercept).mean() - rate, -limit, limit))


def schema(tasks: str) -> Schema:
    """The schema of the log: two ids, and one binary task per letter."""
    return Schema(
        name="contradictory",
        features=(
            Feature("user", "categorical", "user", "user", "int64"),
            Feature("item", "categorical", "item", "item", "int64"),
        ),
        tasks=tuple(Task(task, Label(task)) for task in tasks),
        group="user",
        item="item",
    )


def _prepare(given: Prepare) -> Options:
    settings = dict(given.settings)
    rows, rates = settings.pop("rows"), settings["rates"]
    if not 1 <= len(rates) <= len(string.ascii_lowercase) or not all(0 < rate < 1 for rate in rates):
        raise UserError(f"--rates={','.join(f'{r:g}' for r in rates)}: should be 1 to 26 rates above 0 and below 1")
    world = World(**settings, seed=given.seed)
    blocks = (world.block(number, min(_BLOCK, rows - start)) for number, start in enumerate(range(0, rows, _BLOCK)))
    path = write(given.scratch, blocks, rows)
    return Options(schema=schema(world.tasks), output="", log=str(path), split="random")


RECIPE = Recipe(
    name="contradictory",
    title="generated: users whose tastes differ between tasks, with the true probabilities",
    about="""\
One row is an item that was shown to a user, with the label of each task (a, b, ...). Users have a taste for each topic,
partly common to all tasks and partly the task's own: --contradiction is the own part's share of the variance, and the
logits of two tasks correlate by 1 - contradiction. The probabilities that labels were drawn from are kept beside the
rows of validation and test, so the best AUC that any model could reach is known. Split at random: 80, 10 and 10 %.""",
    source="generated by stem-recipe",
    licence="none: no data of others",
    prepare=_prepare,
    config="small",
    settings=(
        Setting("rows", 1_000_000, "Rows.", low=100),
        Setting("users", 4000, "Users, all equally active.", low=1),
        Setting(
            "items",
            300,
            "Items; with ten times as many, a million rows teach a model their mean labels and little more.",
            low=1,
        ),
        Setting("topics", 12, "Topics.", low=1),
        Setting("strength", 2.0, "Strength of tastes beside generosity and appeal, which have a deviation of 0.5.", 0),
        Setting("contradiction", 0.7, "Share of the tastes' variance that is a task's own: 0 none, 1 all.", 0, 1),
        Setting("rates", (0.28, 0.016), "Share of label 1 for each task; one task per number."),
        Setting("popularity", 0.0, "Zipf's exponent: the item of rank r is shown in proportion to r^-exponent.", 0),
    ),
)
