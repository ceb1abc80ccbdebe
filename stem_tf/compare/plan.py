"""A plan: which arms to compare, on which data, with which seeds; from YAML or flags. docs/plans.md explains it.

name: which experts
data: music_data          # what stem-convert wrote
config: small             # the experiment that all arms start from
set: {train.epochs: 10}   # overrides for all arms; those that do nothing for an arm's model are left out
seeds: 3                  # seeds 0, 1, 2; or a list
incumbent: mmoe           # the arm to beat, beside Single-Task
arms:
  single_task: {}         # the model of that name
  mmoe: {model.experts: 6}
  ple, two tasks: {model.name: ple, tasks: [click, like]}
search:                   # hyperparameters to choose on validation, for each arm
  sampler: grid           # or random, tpe
  space: {optimizer.l2: [1e-6, 1e-5, 1e-4]}
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from pipelines import manifest as manifests
from pipelines import yaml_reader
from pipelines.manifest import Manifest
from pipelines.yaml_reader import Node
from stem_tf import configs
from stem_tf.compare import runs
from stem_tf.compare.comparison import Settings
from stem_tf.configs import base
from stem_tf.training import monitor
from stem_tf.training.monitor import Monitor
from stem_util import stores
from stem_util.errors import UserError, did_you_mean

SAMPLERS = ("grid", "random", "tpe")
_KEYS = ("name", "data", "config", "set", "seeds", "incumbent", "single", "arms", "search")
_JUDGING = ("level", "resamples", "comparable", "overwhelming")
_OF_THE_PLAN = {
    "data.dir": "all arms of a comparison have the same data: the plan's key 'data', or --data",
    "data.tasks": "an arm's key 'tasks' names the tasks that it predicts",
    "seed": "the plan's key 'seeds' gives each arm its seeds",
    "model.module": "the key may stand in 'set' or in the config, since it adds models for all arms",
}
"""Keys of the config that an arm cannot set, and what to do instead."""
_MOST_TRIALS, _MOST_SEEDS, _MOST_RESAMPLES = 1000, 1000, 100_000
"""More would be a slip: each trial and seed is a training, and resamples are held in memory."""


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``; whole ones where ``whole``, evenly in their logarithm where ``log``."""

    low: float
    high: float
    log: bool
    whole: bool


Dimension = tuple[str, ...] | Range
"""What a search may choose for one key: one of several texts, as on a command line, or a number of a range."""


@dataclass(frozen=True)
class Search:
    """A search of hyperparameters, of which the validation score decides.

    Attributes:
      sampler: one of :data:`SAMPLERS`.
      trials: how many points are tried.
      space: by config key, in the plan's order.
      higher: whether the arm's ``train.monitor`` is better when it is higher, as an AUC is.
    """

    sampler: str
    trials: int
    space: Mapping[str, Dimension]
    higher: bool


@dataclass(frozen=True)
class Planned:
    """An arm of a plan.

    Attributes:
      name: its name.
      overrides: what it sets itself, model and tasks included, as it was written.
      words: all of its overrides as ``KEY=VALUE``, those of the plan included; without the seed.
      left_out: a sentence for each override of the plan that would do nothing for this arm.
      search: its search, or None.
      mirrored: whether each of its runs uses all GPUs.
    """

    name: str
    overrides: Mapping[str, Any]
    words: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    search: Search | None = None
    mirrored: bool = False


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
      name: title of the report.
      manifest: manifest of the data.
      config: the experiment that all arms start from: its name, or the path of its file.
      seeds: seeds of each arm's reported runs, in the order in which they are run.
      arms: by name, in the plan's order.
      single, incumbent: names of the arms to judge against, or None.
      settings: how to judge.
      text: the plan as it was given.
    """

    name: str
    manifest: Manifest
    config: str
    seeds: tuple[int, ...]
    arms: Mapping[str, Planned]
    single: str | None
    incumbent: str | None
    settings: Settings
    text: str = field(default="", compare=False)

    @property
    def trial_seed(self) -> int:
        """The seed of all trials: none of the reported ones, so that a lucky trial does not reach the report."""
        return max(self.seeds) + 1


def shipped() -> dict[str, Any]:
    """The plans that come with the package, by name."""
    folder = resources.files("stem_tf").joinpath("compare").joinpath("plans")
    if not folder.is_dir():
        return {}
    return {entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}


def read(path_or_name: str) -> Node:
    """The YAML of a plan: a file, or a shipped plan by its name.

    Raises:
      UserError: no such file, or not YAML.
    """
    path, known = Path(path_or_name), shipped()
    if not path.is_file() and path_or_name in known:
        return yaml_reader.parse(known[path_or_name].read_text("utf-8"), f"{path_or_name}.yaml")
    if not path.is_file():
        why = "is a directory, not a plan" if path.is_dir() else "no such plan"
        raise UserError(
            f"{path_or_name}: {why}{did_you_mean(path_or_name, known) or '.'} Shipped: {', '.join(sorted(known))}"
        )
    try:
        return yaml_reader.parse(path.read_text("utf-8"), path_or_name)
    except UnicodeDecodeError as error:
        raise UserError(f"{path_or_name}: is not UTF-8 text (byte {error.start})") from error


def changed(root: Node, **values: Any) -> Node:
    """A plan in which flags have replaced keys; a value of None leaves its key as it is, a mapping is merged."""
    tree = dict(root.mapping())
    plain = {key: node.value for key, node in tree.items()}
    for key, value in values.items():
        if isinstance(value, Mapping):
            given = tree[key].mapping() if plain.get(key) is not None else {}
            plain[key] = {**{name: node.value for name, node in given.items()}, **value}
        elif value is not None:
            plain[key] = value
    return Node(root.source, "", plain)


def load(root: Node) -> Plan:
    """Checks a plan against the models, their keys and the data, and completes it. Imports TensorFlow.

    Raises:
      UserError: the first mistake, with its place and the closest name.
    """
    fields = root.record({"arms": "what is compared"}, [key for key in (*_KEYS, *_JUDGING) if key != "arms"], "a plan")
    experiment = fields["config"].text() if "config" in fields else "small"
    with _at(fields.get("config", root)):
        start = configs.load(experiment)
    data = fields["data"].text() if "data" in fields else start.data.dir
    if not data:
        root.fail("the key 'data' is missing (the directory that stem-convert wrote); --data gives it, too")
    data = os.path.expanduser(data)
    manifest = manifests.load(data)
    runs.check_data(manifest)
    for_all = fields["set"].mapping() if "set" in fields else {}
    for key in ("data.dir", "seed"):
        if key in for_all:
            for_all[key].fail(_OF_THE_PLAN[key])
    search = fields.get("search")
    children = fields["arms"].mapping("a mapping from names of arms to what they set")
    if not children:
        fields["arms"].fail("is empty; at least one arm is needed")
    reader = _Reader(experiment, data if stores.is_uri(data) else manifest.data_dir, manifest, for_all, search)
    arms = {name: reader.arm(name, node) for name, node in children.items()}
    for one, other in itertools.combinations(arms.values(), 2):
        if sorted(one.words) == sorted(other.words) and one.search == other.search:
            children[other.name].fail(f"sets the same as the arm '{one.name}'; leave one of the two out")
    if search is not None:
        _check_searched(search, arms)
    single = _arm_named(fields, "single", arms)
    return Plan(
        name=fields["name"].text() if "name" in fields else manifest.name,
        manifest=manifest,
        config=experiment,
        seeds=_seeds(fields["seeds"]) if "seeds" in fields else (0, 1, 2),
        arms=arms,
        single=single if single is not None else reader.single(arms),
        incumbent=_arm_named(fields, "incumbent", arms),
        settings=judging(root),
        text=yaml_reader.inline(root.value),
    )


def word(key: str, value: Any) -> str:
    """An override as one writes it on a command line: ``model.expert_units=64,32``, ``loss.weights=click:2,like:1``."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, list) and all(type(item) is int for item in value):
        text = ",".join(map(str, value))
    elif isinstance(value, dict) and not any(isinstance(item, list | dict) for item in value.values()):
        text = ",".join(f"{name}:{item}" for name, item in value.items())
    else:
        text = str(value)
    return f"{key}={text}"


def key_of(sentence: str) -> str:
    """The key that a sentence of `stem_tf.configs.load` says is left out."""
    return sentence.removeprefix("--config.").partition(" ")[0]


def fingerprint(config: Any) -> str:
    """A short name of a config, equal for runs that differ only in seed and place of the data.

    Values at their defaults do not count, so that a key that a later version adds changes no name.
    """
    keys = configs.keys(config.model.module)
    values = {
        key: value
        for key, value in configs.flat(config).items()
        if key not in runs.SAME_ARM and value != keys[key].default
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


@contextlib.contextmanager
def _at(node: Node) -> Iterator[None]:
    """Names the place in the plan where a config's check has failed."""
    try:
        yield
    except UserError as error:
        node.fail(str(error))


class _Reader:
    """Reads arms, each of which starts from one experiment and the overrides for all.

    Args:
      experiment: its name or path.
      data: directory or URI of the data.
      manifest: its manifest.
      for_all: overrides for all arms.
      search: the search for all arms, or None.
    """

    def __init__(
        self, experiment: str, data: str, manifest: Manifest, for_all: Mapping[str, Node], search: Node | None
    ) -> None:
        self._experiment, self._manifest, self._for_all, self._search = experiment, manifest, for_all, search
        self._data = word("data.dir", data)
        module = [word(key, node.value) for key, node in for_all.items() if key == "model.module"]
        start = configs.load(experiment, module)
        self._models = tuple(base.models(start.model.module))

    def single(self, arms: Mapping[str, Planned]) -> str | None:
        """The one arm of the model single_task."""
        found = [name for name, arm in arms.items() if arm.overrides.get("model.name") == "single_task"]
        return found[0] if len(found) == 1 else None

    def arm(self, name: str, node: Node) -> Planned:
        if not name.strip() or len(name) > 100 or not name.isprintable():
            node.fail("an arm's name should be text of one line, at most 100 characters")
        value = {} if node.value is None else node.value
        fields = Node(node.source, node.path, value).mapping("a mapping of what the arm sets")
        tasks, search = fields.pop("tasks", None), fields.pop("search", None)
        for key, child in fields.items():
            if key in _OF_THE_PLAN:
                child.fail(_OF_THE_PLAN[key])
        overrides = {key: child.value for key, child in fields.items()}
        if "model.name" not in overrides and name in self._models:
            overrides = {"model.name": name} | overrides
        if not overrides and tasks is None:
            node.fail(f"sets nothing, and no model has its name{yaml_reader.hint(name, self._models)}")
        if tasks is not None:
            overrides["data.tasks"] = ",".join(self._tasks(tasks))
        own = [word(key, value) for key, value in overrides.items()]
        config, words, left_out = self._complete(node, own, overrides)
        found = self._search_of(node, search, own, words, config)
        shown = dict(overrides)
        if "data.tasks" in shown:
            shown["tasks"] = shown.pop("data.tasks")
        return Planned(name, shown, words, left_out, found, config.train.strategy == "mirrored")

    def _tasks(self, node: Node) -> list[str]:
        known = self._manifest.schema.task_names
        names = [item.choice(known) for item in node.items("a list of the data's tasks")]
        if len(set(names)) < len(names):
            node.fail("names a task twice")
        return names

    def _complete(
        self, node: Node, own: Sequence[str], overrides: Mapping[str, Any]
    ) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
        """An arm's config, all of its words, and sentences about those for all arms that would do nothing for it."""
        shared = {key: word(key, child.value) for key, child in self._for_all.items() if key not in overrides}
        left_out: list[str] = []
        with _at(node):
            configs.load(self._experiment, [self._data, *shared.values(), *own], left_out.append)
            left_out = [sentence for sentence in left_out if key_of(sentence) in shared]
            useless = set(map(key_of, left_out))
            words = (self._data, *(text for key, text in shared.items() if key not in useless), *own)
            config = configs.load(self._experiment, words)  # refuses what the arm itself sets to no effect
            manifest = configs.data(config)
            features = [feature.name for feature in manifest.schema.features]
            configs.check_names(config, manifest.schema.task_names, features)
            monitor.monitor(config, manifest)
        return config, words, tuple(left_out)

    def _search_of(
        self, node: Node, own: Node | None, fixed: Sequence[str], words: Sequence[str], config: Any
    ) -> Search | None:
        """An arm's search: its own keys replace those for all arms, its own space is added to theirs."""
        if own is not None and own.value is False:
            return None
        fields: dict[str, Node] = {}
        spaces: list[tuple[bool, Node]] = []
        for is_own, given in ((False, self._search), (True, own)):
            if given is not None:
                fields |= (record := given.record({}, ("sampler", "trials", "space"), "a search"))
                spaces += [(is_own, record["space"])] if "space" in record else []
        if not spaces:
            if own is not None:
                own.fail("the key 'space' is missing (the config keys to choose, and from what)")
            if self._search is not None and not fields:
                self._search.fail("the key 'space' is missing (the config keys to choose, and from what)")
            return None
        acting, monitored = configs.model_of(config).keys, monitor.monitor(config, configs.data(config))
        known = configs.keys(config.model.module)
        set_here = {text.partition("=")[0] for text in fixed}
        space: dict[str, Dimension] = {}
        places: dict[str, Node] = {}
        for is_own, given in spaces:
            for key, child in given.mapping("a mapping from config keys to choices").items():
                if key in (*_OF_THE_PLAN, "train.monitor", "model.name"):
                    child.fail(_OF_THE_PLAN.get(key, "cannot be searched: it would change what is compared"))
                if key not in known:
                    child.fail(f"the config has no such key{did_you_mean(key, known)}")
                idle = key not in base.KEYS and key.removeprefix("model.") not in acting
                if is_own and key in set_here:
                    child.fail("the arm sets this key; leave one of the two out")
                if is_own and idle:
                    child.fail(f"would do nothing with the model {config.model.name}")
                if key not in set_here and not idle:
                    space[key], places[key] = _dimension(child, key, known[key]), child
        self._try_each(places, space, words, monitored)
        return self._checked(node, fields, space, monitored.kind == "auc") if space else None

    def _checked(self, node: Node, fields: Mapping[str, Node], space: Mapping[str, Dimension], higher: bool) -> Search:
        sampler = fields["sampler"].choice(SAMPLERS) if "sampler" in fields else "grid"
        points: int | None = None
        if all(isinstance(dimension, tuple) for dimension in space.values()):
            points = math.prod(len(dimension) for dimension in space.values() if isinstance(dimension, tuple))
        if sampler == "grid":
            if points is None:
                numbers = [key for key, dimension in space.items() if isinstance(dimension, Range)]
                node.fail(f"a grid needs a list of choices for {numbers[0]}; random and tpe take a range")
            if points > _MOST_TRIALS:
                node.fail(f"its grid has {points:,} points, more than {_MOST_TRIALS:,}: take sampler random or tpe")
        elif "trials" not in fields:
            node.fail(f"the search needs the key 'trials': how many points {sampler} tries")
        trials = fields["trials"].integer(1, _MOST_TRIALS) if "trials" in fields else points or 1
        return Search(sampler, trials if points is None else min(trials, points), space, higher)

    def _try_each(
        self, places: Mapping[str, Node], space: Mapping[str, Dimension], words: Sequence[str], monitored: Monitor
    ) -> None:
        """Refuses a choice that no config could have: neither alone, nor beside the ends of the other keys."""
        ends = {key: _ends(key, dimension) for key, dimension in space.items()}
        for key, dimension in space.items():
            texts = [f"{key}={text}" for text in dimension] if isinstance(dimension, tuple) else ends[key]
            for text in texts:
                others = [[end[place] for other, end in ends.items() if other != key] for place in (0, -1)]
                refusals = [self._refusal([*words, *beside, text], monitored) for beside in ([], *others)]
                if all(refusals):
                    places[key].fail(refusals[0])

    def _refusal(self, words: Sequence[str], monitored: Monitor) -> str:
        """Why no trial may have these words; "" where one may."""
        try:
            config = configs.load(self._experiment, words, lambda sentence: None)
            found = monitor.monitor(config, configs.data(config))
        except UserError as error:
            return str(error)
        if (found.kind, found.weights) != (monitored.kind, monitored.weights):
            return "cannot be searched: it changes what train.monitor measures, so that trials could not be compared"
        return ""


def _dimension(node: Node, key: str, declared: base.Key) -> Dimension:
    """What a search may choose for a key."""
    if isinstance(node.value, list):
        texts = tuple(word(key, item.value).partition("=")[2] for item in node.items("choices"))
        if len(set(texts)) < len(texts):
            node.fail("names a choice twice")
        return texts
    fields = node.record(
        {"low": "the least number", "high": "the greatest number"}, ("log",), "a range; or a list of choices"
    )
    low, high = fields["low"].number(), fields["high"].number()
    log = fields["log"].flag() if "log" in fields else False
    if not low < high or (log and low <= 0):
        node.fail(f"should go from low to a greater high{', both above 0 for log' if log else ''}")
    if type(declared.default) not in (int, float):
        node.fail("has no range of numbers: give a list of choices")
    whole = isinstance(declared.default, int)
    if whole and not (low.is_integer() and high.is_integer()):
        node.fail("should go from a whole number to a whole number")
    return Range(low, high, log, whole)


def _ends(key: str, dimension: Dimension) -> list[str]:
    """The first and the last choice, as words."""
    if isinstance(dimension, tuple):
        return [f"{key}={dimension[0]}", f"{key}={dimension[-1]}"]
    return [word(key, int(end) if dimension.whole else end) for end in (dimension.low, dimension.high)]


def _check_searched(search: Node, arms: Mapping[str, Planned]) -> None:
    """Refuses a search for all arms, or a key of it, that is used for none."""
    searches = [arm.search for arm in arms.values() if arm.search is not None]
    if not searches:
        search.fail("searches nothing: no arm has a key to choose (the key 'space' says which, and from what)")
    for key, child in (search.mapping()["space"].mapping() if "space" in search.value else {}).items():
        if not any(key in found.space for found in searches):
            child.fail("is searched for no arm: each one sets it, searches nothing, or has a model without such a key")


def _arm_named(fields: Mapping[str, Node], key: str, arms: Mapping[str, Planned]) -> str | None:
    return fields[key].choice(arms) if key in fields else None


def _seeds(node: Node) -> tuple[int, ...]:
    if isinstance(node.value, list):
        most = int(base.KEYS["seed"].high or 0) - 1  # the one after it is the trials'
        seeds = tuple(item.integer(0, most) for item in node.items("a list of whole numbers"))
        if len(set(seeds)) < len(seeds):
            node.fail("names a seed twice")
    else:
        seeds = tuple(range(node.integer(1, _MOST_SEEDS)))
    return seeds


def judging(root: Node) -> Settings:
    """How a plan, or the flags of a comparison of runs, want the report to judge.

    Raises:
      UserError: a value out of its range.
    """
    fields = root.mapping()
    found: dict[str, Any] = {}
    if "level" in fields:
        found["level"] = fields["level"].number(0)
        if not 0 < found["level"] < 1:
            fields["level"].fail(f"should lie between 0 and 1, as in 0.05; got {found['level']:g}")
    for key, least, most in (("resamples", 100, _MOST_RESAMPLES), ("comparable", 0, 9), ("overwhelming", 1, 9)):
        if key in fields:
            found[key] = fields[key].integer(least, most)
    settings = Settings(**found)
    if not settings.comparable < settings.overwhelming <= 9:
        place = fields.get("overwhelming") or fields.get("comparable")
        assert place is not None
        place.fail(
            f"comparable={settings.comparable} should be less than overwhelming={settings.overwhelming}, and that at "
            "most 9: they are differences of ten buckets"
        )
    return settings
