"""Searches the parameters of a ranking: by Optuna, on validation, for the best NDCG@k of the gain.

A trial needs no model: it is a formula of scores that are known. So a search of some hundred trials takes seconds to
minutes, and is not resumed; the same seed gives the same trials.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines import outputs, yaml_reader
from pipelines import ranking as rankings
from pipelines.manifest import Manifest
from pipelines.schema import Parameter, Ranking
from stem_tf import report
from stem_tf.evaluation import ranking_score
from stem_tf.evaluation.predictions import Predictions
from stem_util import files
from stem_util.errors import UserError
from stem_util.progress import Progress

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

BLOCK, TRIALS = "ranking.yaml", "ranking_search.json"
"""What a search writes beside an evaluation."""


@dataclass(frozen=True)
class Search:
    """How to search.

    Attributes:
      trials: how many combinations of the parameters' values to try; the first is the one of the block.
      seed: of the sampler.
    """

    trials: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Trial:
    """One combination of values.

    Attributes:
      values: by parameter.
      ndcg: NDCG@k of the gain on validation; NaN where it is not defined.
      tasks: grouped AUC of each binary task, in lists by this score.
    """

    values: dict[str, float]
    ndcg: float
    tasks: dict[str, float]


@dataclass(frozen=True)
class Chosen:
    """What a search has found.

    Attributes:
      before: the ranking as it was.
      ranking: with the values of the best trial.
      trials: all, in their order.
      best: the place of the best one.
      search: how it was searched.
      k: of NDCG@k.
    """

    before: Ranking
    ranking: Ranking
    trials: tuple[Trial, ...]
    best: int
    search: Search
    k: int

    @property
    def front(self) -> list[int]:
        """The places of the trials that no other trial is better than in one task, and as good as in all others."""
        points = np.array([list(trial.tasks.values()) for trial in self.trials])
        return pareto(points) if points.shape[1] else [self.best]


def searched(ranking: Ranking) -> dict[str, tuple[Parameter, tuple[float, float]]]:
    """The parameters that have a range, and their ranges, by name."""
    return {p.name: (p, p.range) for p in ranking.parameters if p.range is not None}


def pareto(points: NDArray[np.float64]) -> list[int]:
    """The places of the points [M, T] that no other point dominates: more in one coordinate, and not less in any.

    Of equal points, the first one is in the front. A NaN counts as the least value.
    """
    values = np.nan_to_num(points, nan=-np.inf)
    front = []
    for place, point in enumerate(values):
        others = values[(values >= point).all(axis=1) & (values > point).any(axis=1)]
        if not len(others) and not (values[:place] == point).all(axis=1).any():
            front.append(place)
    return front


def search(predicted: Predictions, manifest: Manifest, k: int, how: Search) -> Chosen:
    """Searches on validation.

    Args:
      predicted: scores and labels of validation.
      manifest: manifest of the data; its ranking has a parameter with a range.
      k: of NDCG@k.
      how: how many trials, and the seed.

    Raises:
      UserError: Optuna is not installed, a gain is below 0, or NDCG@k is not defined for any trial.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("Optuna is not installed, and a search needs it: pip install 'stem-tf[compare]'") from None
    schema = manifest.schema
    before = schema.ranking
    assert before is not None
    rows = ranking_score.rows(predicted, manifest, "validation")
    free = searched(before)
    distributions: dict[str, BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(*ends, log=parameter.log)
        for name, (parameter, ends) in free.items()
    }
    start = {name: parameter.value for name, (parameter, _) in free.items()}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=how.seed, multivariate=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial(start)
    trials: list[Trial] = []
    with Progress(how.trials, unit="trials", desc="search the ranking") as progress:
        for _ in range(how.trials):
            asked = study.ask(distributions)
            values = {name: _rounded(asked.params[name], ends) for name, (_, ends) in free.items()} if trials else start
            other = dataclasses.replace(schema, ranking=_with(before, values))
            scores = ranking_score.score(rows, other)
            trial = Trial(values, ranking_score.ndcg(rows, scores, k), ranking_score.of_tasks(rows, schema, scores))
            if np.isnan(trial.ndcg):
                raise UserError(
                    f"--search_ranking: no {schema.group} of validation has rows of unequal gain, so that any order is "
                    "equally good"
                )
            study.tell(asked, trial.ndcg)
            trials.append(trial)
            progress.update(1)
    best = max(range(len(trials)), key=lambda place: trials[place].ndcg)
    return Chosen(before, _with(before, trials[best].values), tuple(trials), best, how, k)


def _rounded(value: float, ends: tuple[float, float]) -> float:
    """A value that a person can read."""
    return min(max(float(f"{value:.4g}"), ends[0]), ends[1])


def _with(ranking: Ranking, values: Mapping[str, float]) -> Ranking:
    parameters = (dataclasses.replace(p, value=values.get(p.name, p.value)) for p in ranking.parameters)
    return dataclasses.replace(ranking, parameters=tuple(parameters))


def check(output: Path) -> None:
    """Refuses to replace files that no search has written.

    Raises:
      UserError: one is there.
    """
    block, trials = output / BLOCK, output / TRIALS
    if block.exists() and not _is_block(block):
        raise UserError(f"{block} exists and holds no ranking: choose another --output")
    if trials.exists() and "trials" not in files.read_json(trials, "choose another --output"):
        raise UserError(f"{trials} exists and is not of a search: choose another --output")


def _is_block(path: Path) -> bool:
    try:
        return set(yaml_reader.parse(path.read_text("utf-8"), str(path)).value) == {"ranking"}
    except (OSError, UserError, UnicodeDecodeError, TypeError):
        return False


def write(output: Path, chosen: Chosen, tree: Mapping[str, Any]) -> None:
    """Writes the block and all trials.

    Args:
      output: directory of the evaluation.
      chosen: what the search has found.
      tree: the content of ``<split>.json``.
    """
    front = set(chosen.front)
    trials = [dataclasses.asdict(t) | {"pareto": place in front} for place, t in enumerate(chosen.trials)]
    found = {
        "chosen_on": "validation",
        "k": chosen.k,
        "seed": chosen.search.seed,
        "weights": tree["weights"],
        "best": chosen.best,
        "before": rankings.fields(chosen.before),
        "ranking": rankings.fields(chosen.ranking),
        "trials": trials,
    }
    files.write_json(output / TRIALS, report.finite(found))
    files.write_atomically(output / BLOCK, rankings.text(chosen.ranking).encode())


def tables(chosen: Chosen, tree: Mapping[str, Any], split: str) -> str:
    """What a search has found, as text: the trade-off between tasks on validation, and what came of it on the split."""
    named = _named(chosen)
    tasks = list(chosen.trials[0].tasks)
    parameters = list(chosen.trials[0].values)
    head = ["validation", *parameters, f"NDCG@{chosen.k}", *tasks, ""]
    lines = [
        [
            ", ".join(names),
            *(f"{chosen.trials[place].values[name]:.4g}" for name in parameters),
            report.number(chosen.trials[place].ndcg),
            *(report.number(chosen.trials[place].tasks[task]) for task in tasks),
            "",
        ]
        for place, names in named.items()
    ]
    found = tree["ranking"]["search"]
    after = tree["ranking"]["orders"][outputs.RANKING_SCORE]
    lines_of_split = [
        ["before", report.number(found["ndcg_before"]), *(report.number(found["tasks_before"][t]) for t in tasks), ""],
        ["chosen", report.number(after["ndcg"]), *(report.number(after["tasks"][t]) for t in tasks), ""],
    ]
    count = len(chosen.trials)
    return "\n\n".join(
        [
            report.table(head, lines),
            f"{count:,} trials; {len(chosen.front):,} of them gain in one task only at the cost of another (Pareto)\n"
            "by task: the grouped AUC of its label in lists by the score",
            report.table([split, f"NDCG@{chosen.k}", *tasks, ""], lines_of_split),
            f"chosen on validation; on {split} NDCG@{chosen.k} moved by {_signed(found['lead'])}, "
            f"{_signed(found['low'])} to {_signed(found['high'])} (95 % interval)",
        ]
    )


def _named(chosen: Chosen) -> dict[int, list[str]]:
    """The trials that a person looks at first, by their places: before, chosen, and the best one for each task."""
    named: dict[int, list[str]] = {0: ["before"]}
    named.setdefault(chosen.best, []).append("chosen")
    for task in chosen.trials[0].tasks:
        best = max(range(len(chosen.trials)), key=lambda place: np.nan_to_num(chosen.trials[place].tasks[task], nan=-1))
        named.setdefault(best, []).append(f"best for {task}")
    return named


def _signed(value: float | None) -> str:
    return "-" if value is None else ("" if value < 0 else "+") + report.number(value)
