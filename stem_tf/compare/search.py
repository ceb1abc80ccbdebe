"""A search of an arm's hyperparameters by Optuna: asks for trials, is told their scores, and goes on after a kill."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stem_tf.compare.plan import Planned, Range
from stem_util.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

_FIRST_AT_RANDOM = 10  # as TPE has by default


@dataclass(frozen=True)
class Point:
    """A trial: its number, and its overrides as ``KEY=VALUE``."""

    number: int
    words: tuple[str, ...]


class Tuner:
    """The search of one arm, kept in a journal beside the runs.

    A trial that was asked for and never told, because the job was killed or the trial failed, is handed out again by
    the next job; one that was not written to its end counts as failed. A search whose arm or space has changed is
    another one.

    Args:
      arm: an arm with a search.
      journal: file of the journal.
      seed: of the sampler.

    Raises:
      UserError: Optuna is not installed, or the journal is damaged.
    """

    def __init__(self, arm: Planned, journal: Path, seed: int) -> None:
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise UserError("Optuna is not installed, and a search needs it: pip install 'stem-tf[compare]'") from None
        assert arm.search is not None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._search = arm.search
        self._distributions = {key: _distribution(dimension) for key, dimension in arm.search.space.items()}
        said = [
            arm.name,
            arm.words[1:],
            arm.search.sampler,
            {key: repr(d) for key, d in arm.search.space.items()},
            seed,
        ]
        name = f"{arm.name} {hashlib.sha256(json.dumps(said).encode()).hexdigest()[:8]}"
        _mend(journal)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(journal))),
                study_name=name,
                direction="maximize" if arm.search.higher else "minimize",
                load_if_exists=True,
            )
        self._fail_unwritten()
        self._study.sampler = self._sampler(seed + len(self._study.trials))
        if arm.search.sampler == "grid":
            self._enqueue_grid(seed)
        state = optuna.trial.TrialState
        self._complete = state.COMPLETE
        self._waiting = list(self._study.get_trials(deepcopy=False, states=(state.RUNNING,)))
        self._asked = len(self._study.get_trials(deepcopy=False, states=(state.COMPLETE,))) + len(self._waiting)
        self._open: set[int] = set()

    def ask(self) -> Point | None:
        """The next trial to run, or None where all have been handed out."""
        if self._waiting:
            trial: FrozenTrial | Trial = self._waiting.pop(0)
        elif self._asked < self._search.trials:
            trial = self._study.ask(self._distributions)
            self._asked += 1
        else:
            return None
        self._open.add(trial.number)
        return Point(trial.number, self._words(trial.params))

    def tell(self, number: int, score: float | None) -> None:
        """Ends a trial; ``score`` is None where it failed."""
        self._open.discard(number)
        if score is not None and math.isfinite(score):
            self._study.tell(number, score)

    @property
    def ended(self) -> int:
        """Trials that have a score."""
        return len(self._study.get_trials(deepcopy=False, states=(self._complete,)))

    @property
    def left(self) -> int:
        """Trials that have not been handed out yet."""
        return len(self._waiting) + max(0, self._search.trials - self._asked)

    @property
    def running(self) -> bool:
        """Whether a trial was handed out and not told."""
        return bool(self._open)

    def winner(self) -> Point | None:
        """The trial with the best score, the first one of equals; None where none has ended."""
        ended = self._study.get_trials(deepcopy=False, states=(self._complete,))
        if not ended:
            return None
        sign = 1.0 if self._search.higher else -1.0
        trial = max(ended, key=lambda trial: sign * float(trial.values[0]))
        return Point(trial.number, self._words(trial.params))

    def table(self) -> list[dict[str, Any]]:
        """All trials that were handed out: ``number``, ``overrides`` by key, ``score`` (None where there is none)."""
        return [
            {
                "number": trial.number,
                "overrides": dict(word.split("=", 1) for word in self._words(trial.params)),
                "score": trial.value if trial.state == self._complete else None,
            }
            for trial in self._study.get_trials(deepcopy=False)
            if self._written(trial)
        ]

    def _written(self, trial: FrozenTrial) -> bool:
        """Whether the journal holds all parameters of a trial."""
        return trial.params.keys() == self._distributions.keys()

    def _fail_unwritten(self) -> None:
        """Ends trials that a job was writing down when it was killed."""
        from optuna.trial import TrialState

        for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
            if not self._written(trial):
                self._study.tell(trial.number, state=TrialState.FAIL)

    def _words(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(f"{key}={_text(params[key])}" for key in self._search.space)

    def _sampler(self, seed: int) -> BaseSampler:
        from optuna import exceptions, samplers

        if self._search.sampler != "tpe":
            return samplers.RandomSampler(seed)
        first = min(_FIRST_AT_RANDOM, max(1, self._search.trials // 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", exceptions.ExperimentalWarning)
            return samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=first)

    def _enqueue_grid(self, seed: int) -> None:
        """Queues the points of the grid, in an order drawn once: a budget that ends early has then seen all of it.

        Not Optuna's GridSampler, which can only be used inside of Optuna's own loop. A point whose trial was not
        written to its end is queued again.
        """
        from optuna.trial import TrialState

        choices = [d for d in self._search.space.values() if not isinstance(d, Range)]
        points = list(itertools.product(*choices))
        random.Random(seed).shuffle(points)
        trials = self._study.get_trials(deepcopy=False)
        known = [t.system_attrs.get("fixed_params", t.params) for t in trials if t.state != TrialState.FAIL]
        for point in points[: self._search.trials]:
            params = dict(zip(self._search.space, point, strict=True))
            if params not in known:
                self._study.enqueue_trial(params)


def _mend(journal: Path) -> None:
    """Cuts off a last line that a killed job, or a full disk, has left unfinished: Optuna would write behind it.

    Raises:
      UserError: another line is damaged.
    """
    if not journal.exists():
        return
    text = journal.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(journal, len(whole))
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            sound = "op_code" in json.loads(line)
        except (ValueError, TypeError):
            sound = False
        if not sound:
            raise UserError(
                f"{journal} is damaged (line {number:,}): remove it; the search starts anew, and finds the trials that "
                "are trained already"
            )


def _distribution(dimension: tuple[str, ...] | Range) -> BaseDistribution:
    from optuna import distributions

    if not isinstance(dimension, Range):
        return distributions.CategoricalDistribution(dimension)
    if dimension.whole:
        return distributions.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
