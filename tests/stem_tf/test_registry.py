"""Models declare themselves: which keys they take, in this package and in modules of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from stem_tf import configs
from stem_tf.configs import base
from stem_tf.models.network import Network
from stem_tf.models.registry import register
from stem_util.errors import UserError

OWN = """
from dataclasses import dataclass

from stem_tf.models.hyperparameters import Experts, hyperparameter
from stem_tf.models.network import Network
from stem_tf.models.registry import register


@register("{name}", "a model of one's own")
class Own(Network):
    @dataclass(frozen=True)
    class Hyperparameters(Experts):
        {field}
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Writes a module with the text of ``request.param``; its name, which no other test has."""
    name = f"own_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(request.param)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize(
    ("key", "takers"),
    [
        ("layers", "me_ple ml_mmoe ple stem_net"),
        ("experts", "me_mmoe ml_mmoe mmoe omoe"),
        ("task_experts", "cgc me_ple ple stem_net"),
        ("released_stacking", "me_ple ple stem_net"),
        ("task_features", "me_ple stem_net"),
        ("gate_units", "cgc me_mmoe me_ple ml_mmoe mmoe omoe ple stem_net"),
        ("stop_gradient", "stem_net"),
        ("follows", "aitm esmm"),
        ("calibrator", "aitm"),
        ("gives", "asymmetric_sharing"),
        ("orthogonality", "sluice"),
    ],
)
def test_which_models_take_a_key(key: str, takers: str) -> None:
    assert sorted(name for name, model in base.models().items() if key in model.keys) == takers.split()


def test_families_of_all_models() -> None:
    models = base.models()
    assert len(models) == 16
    assert [name for name, model in models.items() if "expert_units" not in model.keys] == ["esmm"]
    assert [name for name, model in models.items() if "expert" not in model.keys] == ["esmm", "cross_stitch", "sluice"]
    assert [name for name, model in models.items() if not model.network.shares] == ["single_task"]
    assert configs.best(configs.checked({"model.name": "single_task"})) == "own"
    assert configs.best(configs.checked({})) == "together"


def test_depth_is_the_models_own_unless_given() -> None:
    def depth(name: str, **given: int) -> int:
        values = configs.flat(configs.checked({"model.name": name} | {f"model.{key}": v for key, v in given.items()}))
        return base.models()[name].hyperparameters(values).depth

    assert {name: depth(name) for name in ("ple", "ml_mmoe", "me_ple", "stem_net", "cgc", "esmm")} == {
        "ple": 2, "ml_mmoe": 2, "me_ple": 1, "stem_net": 1, "cgc": 1, "esmm": 1
    }  # fmt: skip
    assert (depth("ple", layers=1), depth("stem_net", layers=3)) == (1, 3)


def test_a_module_of_ones_own_brings_its_keys_and_only_to_configs_that_name_it() -> None:
    given = ["model.module=examples.my_model", "model.name=scaled_bottom"]
    config = configs.load("small", [*given, "model.strength=3"])
    assert config.model.strength == 3.0 and config.model.expert_units == (64, 32)
    assert "model.strength" in configs.flat(config) and "model.strength" not in configs.flat(configs.load("small"))
    assert configs.flat(configs.checked(configs.flat(config))) == configs.flat(config)
    assert base.get_config("examples.my_model").model.strength == 2.0
    with pytest.raises(UserError, match="config.model.strength should be more than 0, but is 0"):
        configs.load("small", [*given, "model.strength=0"])
    with pytest.raises(
        UserError, match="model.strength=3.0 would do nothing with config.model.name=stem_net; set that"
    ):
        configs.load("small", [*given[:1], "model.strength=3"])
    with pytest.raises(UserError, match="model.gate_units=.* would do nothing with config.model.name=scaled_bottom"):
        configs.load("small", [*given, "model.gate_units=8"])
    with pytest.raises(UserError, match="the config has no such key; did you mean 'model.strength'"):
        configs.load("small", [*given, "model.strenght=3"])
    with pytest.raises(UserError, match="--config.model.strength: the config has no such key"):
        configs.load("small", ["model.strength=3"])


def test_a_module_that_is_not_there_or_registers_nothing() -> None:
    with pytest.raises(UserError, match="there is no module 'nowhere_at_all'; it should be a name .* on PYTHONPATH"):
        configs.load("small", ["model.module=nowhere_at_all.models"])
    with pytest.raises(UserError, match="config.model.module=json registers no model: put @register"):
        configs.load("small", ["model.module=json"])
    with pytest.raises(UserError, match="registers no model"):  # which has shipped ones
        configs.load("small", ["model.module=stem_tf.models.ple"])
    with pytest.raises(UserError, match="config.model.module should be a text, but is 3"):
        configs.checked({"model.module": 3})


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("import numpyy", "cannot be imported: ModuleNotFoundError: No module named 'numpyy'"),
        (OWN.format(name="ple", field="pass"), "a model 'ple' is registered by stem_tf.models.ple.PLE and by own_"),
        (
            OWN.format(name="deep", field='layers: int = hyperparameter(3, "levels", low=1)'),
            "'deep' declares config.model.layers, which is declared differently already: give the hyperparameter",
        ),
        (
            OWN.format(name="wide", field='dim: int = hyperparameter(3, "width", low=1)'),
            "'wide' declares config.model.dim, which is declared differently already",
        ),
    ],
    indirect=["written"],
)  # fmt: skip
def test_a_module_with_a_mistake_is_one_sentence(written: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        configs.load("small", [f"model.module={written}"])


def test_a_cell_of_a_notebook_may_run_twice() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stem_tf.models.registry._REGISTERED", {})
        for _ in range(2):
            register("again", "a cell")(type("Again", (Network,), {"__module__": "__main__"}))
