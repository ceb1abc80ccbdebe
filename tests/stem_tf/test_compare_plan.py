"""Plans: what they mean, and each mistake in one sentence, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.yaml_reader import Node, parse
from stem_tf import configs
from stem_tf.compare import plan
from stem_tf.compare.plan import Range
from stem_tf.configs import base
from stem_util.errors import UserError


def read(text: str, data: Path) -> plan.Plan:
    return plan.load(plan.changed(parse(text, "p.yaml"), data=str(data)))


def test_a_plan(tiny_data: Path) -> None:
    found = read(
        """
name: which one
set: {model.gate_units: [4], train.epochs: 2}
seeds: [3, 1]
incumbent: mmoe
overwhelming: 6
arms:
  single_task:
  mmoe: {model.experts: 6, train.epochs: 3, search: false}
  ple, <one> "task": {model.name: ple, tasks: [click], loss.weights: {click: 2}}
  wide: {model.dim: 32, search: {trials: 1, space: {optimizer.learning_rate: [0.001, 0.002]}}}
search:
  space: {model.dim: [4, 8], model.task_experts: [1, 2]}
""",
        tiny_data,
    )
    assert found.name == "which one" and found.seeds == (3, 1) and found.trial_seed == 4
    assert found.single == "single_task" and found.incumbent == "mmoe" and found.settings.overwhelming == 6
    single, mmoe, ple, wide = found.arms.values()
    data = f"data.dir={tiny_data}"
    assert single.words == (data, "train.epochs=2", "model.name=single_task")
    assert [plan.key_of(sentence) for sentence in single.left_out] == ["model.gate_units"]
    assert single.search is not None and dict(single.search.space) == {"model.dim": ("4", "8")}
    assert mmoe.words == (data, "model.gate_units=4", "model.name=mmoe", "model.experts=6", "train.epochs=3")
    assert mmoe.search is None and mmoe.overrides["model.name"] == "mmoe"
    assert ple.words[-2:] == ("loss.weights=click:2", "data.tasks=click") and ple.overrides["tasks"] == "click"
    assert ple.search is not None and ple.search.trials == 4 and ple.search.higher
    assert wide.search is not None and wide.search.trials == 1
    assert list(wide.search.space) == ["model.task_experts", "optimizer.learning_rate"]
    config = configs.load("small", ple.words)
    assert config.loss.weights.click == 2 and config.model.gate_units == (4,)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (1e-6, "1e-06"),
        ([64, 32], "64,32"),
        ([], ""),
        ([[8], [6]], "[[8], [6]]"),
        ({"click": 2, "watched": 1}, "click:2,watched:1"),
        ({"click": [1, 2]}, "{'click': [1, 2]}"),
        ("nfwfm", "nfwfm"),
    ],
)
def test_words_of_a_command_line(value: Any, text: str) -> None:
    assert plan.word("key", value) == f"key={text}"


def test_ranges(tiny_data: Path) -> None:
    text = """
arms: {ple: {}}
search:
  sampler: tpe
  trials: 5
  space: {optimizer.l2: {low: 1e-6, high: 1e-2, log: true}, model.dim: {low: 4, high: 8}}
"""
    search = read(text, tiny_data).arms["ple"].search
    assert search is not None and search.trials == 5
    assert dict(search.space) == {"optimizer.l2": Range(1e-6, 1e-2, True, False), "model.dim": Range(4, 8, False, True)}


def test_equal_configs_have_one_name(tiny_data: Path) -> None:
    def named(*words: str) -> str:
        return plan.fingerprint(configs.load("small", words))

    assert named("seed=1", "data.dir=/a", "train.log_every=3") == named("model.dim=16") == named()
    assert len({named(), named("model.dim=8"), named("model.name=ple"), named("train.patience=2")}) == 4


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("arms: {}", "p.yaml: arms: is empty"),
        ("seeds: 2", "the key 'arms' is missing"),
        ("arms: {ple: {}, again: {model.name: ple}}", "arms.again: sets the same as the arm 'ple'"),
        ("arms: [ple]", "p.yaml: arms: should be a mapping"),
        ("arm: {ple: {}}", "unknown key 'arm' of a plan; did you mean 'arms'"),
        ("arms: {pel: {}}", "p.yaml: arms.pel: sets nothing, and no model has its name; did you mean 'ple'"),
        ("arms: {a: {model.name: pel}}", "arms.a: config.model.name should be one of .* did you mean 'ple'"),
        (
            "arms: {ple: {model.dmi: 3}}",
            "arms.ple: --config.model.dmi: the config has no such key; did you mean 'model.dim'",
        ),
        ("arms: {ple: {model.dim: x}}", "arms.ple: --config.model.dim should be a whole number"),
        ("arms: {ple: {model.dim: 0}}", "arms.ple: config.model.dim should be at least 1"),
        ("arms: {single_task: {model.experts: 3}}", "arms.single_task: config.model.experts=3 would do nothing"),
        ("arms: {ple: {tasks: [clik]}}", "arms.ple.tasks.0.: 'clik' .* did you mean 'click'"),
        ("arms: {ple: {tasks: [click, click]}}", "names a task twice"),
        ("arms: {ple: {data.dir: x}}", "arms.ple.data.dir: all arms of a comparison have the same data"),
        ("arms: {ple: {seed: 1}}", "arms.ple.seed: the plan's key 'seeds'"),
        ("arms: {ple: {train.monitor: 'auc:clik'}}", "arms.ple: .*clik"),
        ("arms: {ple: {loss.weights: {clik: 1}}}", "arms.ple: .*no task 'clik'; did you mean 'click'"),
        ("arms: {ple: {}}\nset: {seed: 1}", "set.seed: the plan's key 'seeds'"),
        ("arms: {ple: {}}\nset: {nothing: 1}", "the config has no such key"),
        ("arms: {ple: {}}\nconfig: smal", "config: --config=smal: no experiment of that name; did you mean 'small'"),
        ("arms: {ple: {}}\nseeds: [1, 1]", "seeds: names a seed twice"),
        ("arms: {ple: {}}\nseeds: 0", "seeds: should be a whole number of at least 1"),
        ("arms: {ple: {}}\nincumbent: mmoe", "incumbent: 'mmoe' .* allowed: ple"),
        ("arms: {ple: {}}\nsingle: pel", "single: 'pel' .* did you mean 'ple'"),
        ("arms: {ple: {}}\nlevel: 1", "level: should lie between 0 and 1"),
        ("arms: {ple: {}}\ncomparable: 5", "comparable=5 should be less than overwhelming=5"),
        ("arms: {ple: {}}\nsearch: {}", "search: the key 'space' is missing"),
        ("arms: {ple: {search: {sampler: tpe}}}", "arms.ple.search: the key 'space' is missing"),
        ("arms: {ple: {search: {space: {model.dmi: [1]}}}}", "space.model.dmi: the config has no such key"),
        ("arms: {single_task: {search: {space: {model.experts: [1]}}}}", "would do nothing with the model single_task"),
        ("arms: {ple: {model.dim: 8, search: {space: {model.dim: [1, 2]}}}}", "the arm sets this key"),
        ("arms: {ple: {search: {space: {model.dim: [8, 8]}}}}", "names a choice twice"),
        ("arms: {ple: {search: {space: {model.dim: [0]}}}}", "space.model.dim: config.model.dim should be at least 1"),
        ("arms: {ple: {search: {space: {train.monitor: [loss]}}}}", "it would change what is compared"),
        (
            "arms: {ple: {search: {space: {model.dim: {low: 1, high: 2}}}}}",
            "a grid needs a list of choices for model.dim",
        ),
        (
            "arms: {ple: {search: {sampler: tpe, space: {model.dim: {low: 1, high: 2}}}}}",
            "arms.ple: the search needs the key 'trials'",
        ),
        (
            "arms: {ple: {search: {sampler: tpe, trials: 2, space: {model.dim: {low: 2, high: 1}}}}}",
            "should go from low to a greater high",
        ),
        (
            "arms: {ple: {search: {sampler: tpe, trials: 2, space: {model.expert: {low: 1, high: 2}}}}}",
            "has no range of numbers",
        ),
        ("arms: {ple: {}}\nset: [1]", "p.yaml: set: should be a mapping"),
        ("arms: {ple: false}", "arms.ple: should be a mapping"),
        ('arms: {"a\\nb": {model.name: ple}}', "an arm's name should be text of one line"),
        ("arms: {ple: {}}\nseeds: 1000000000", "seeds: should be a whole number of at least 1, at most 1,000"),
        ("arms: {ple: {}}\nseeds: [2147483647]", "seeds.0.: should be a whole number .* at most 2,147,483,646"),
        ("arms: {ple: {}}\nresamples: 1000000000", "resamples: .* at most 100,000"),
        ("arms: {ple: {}}\nsearch: {trials: 3}", "search: searches nothing"),
        ("arms: {ple: {}}\nsearch: {space: {}}", "search: searches nothing"),
        ("arms: {single_task: {}}\nsearch: {space: {model.experts: [1, 2]}}", "search: searches nothing"),
        (
            "arms: {single_task: {}}\nsearch: {space: {model.experts: [1, 2], model.dim: [4, 8]}}",
            "search.space.model.experts: is searched for no arm",
        ),
        (
            "arms: {ple: {}}\nsearch: {sampler: random, trials: 100000000, space: {model.dim: {low: 4, high: 8}}}",
            "trials: .* at most 1,000",
        ),
        (
            "arms: {ple: {train.monitor: loss}}\nsearch: {space: {loss.weights: [{click: 1}, {click: 2}]}}",
            "space.loss.weights: cannot be searched: it changes what train.monitor measures",
        ),
        (
            "arms: {ple: {}}\nsearch: {space: {loss.weights: [{click: 1}, {click: 0}]}}",
            "space.loss.weights: ",
        ),
        (
            "arms: {ple: {search: {sampler: tpe, trials: 2, space: {optimizer.l2: {low: 0, high: 1, log: true}}}}}",
            "both above 0 for log",
        ),
    ],
)
def test_mistakes_name_the_place(text: str, why: str, tiny_data: Path) -> None:
    with pytest.raises(UserError, match=why) as raised:
        plan.load(plan.changed(parse(text, "p.yaml"), data=str(tiny_data), set={}))
    assert "\n" not in str(raised.value)


def test_data_are_needed_and_flags_replace_keys(tiny_data: Path) -> None:
    root = parse("arms: {ple: {}}\nset: {model.dim: 4}\nseeds: 5", "p.yaml")
    with pytest.raises(UserError, match="the key 'data' is missing"):
        plan.load(root)
    found = plan.load(plan.changed(root, data=str(tiny_data), seeds=[7], set={"train.epochs": "1"}, name=None))
    assert found.seeds == (7,) and found.arms["ple"].words[1:3] == ("model.dim=4", "train.epochs=1")


def test_files_of_plans(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.yaml: no such plan"):
        plan.read(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(UserError, match="is a directory, not a plan"):
        plan.read(str(tmp_path))
    (tmp_path / "p.yaml").write_bytes(b"arms: \xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        plan.read(str(tmp_path / "p.yaml"))
    for name in plan.shipped():
        assert isinstance(plan.read(name), Node)


def test_tasks_for_all_arms(tiny_data: Path) -> None:
    found = read("set: {data.tasks: click}\narms: {ple: {}, mmoe: {tasks: [watched]}}", tiny_data)
    assert found.arms["ple"].words[1] == "data.tasks=click" and found.arms["mmoe"].words[-1] == "data.tasks=watched"


@pytest.mark.parametrize("name", plan.shipped())
def test_shipped_plans_name_models_keys_and_experiments_that_are_there(name: str) -> None:
    fields = plan.read(name).mapping()
    known, models = configs.keys(), base.models()
    assert fields["config"].value in configs.shipped() if "config" in fields else True
    assert set(fields["set"].value) <= set(known) if "set" in fields else True
    arms = fields["arms"].value
    for arm, sets in arms.items():
        sets = sets or {}
        model = sets.get("model.name", arm)
        own = {key.removeprefix("model.") for key in sets if key.startswith("model.")} - {"name", "dim"}
        assert model in models and own <= set(models[model].keys) and set(sets) - {"tasks"} <= set(known)
    assert fields["incumbent"].value in arms if "incumbent" in fields else True
