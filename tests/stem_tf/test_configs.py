from pathlib import Path

import pytest

from stem_tf import configs
from stem_util.errors import UserError


def test_shipped_experiments_load_complete_and_read_only() -> None:
    assert "base" not in configs.shipped() and "_load" not in configs.shipped()
    for name in configs.shipped():
        config = configs.load(name)
        assert set(configs.flat(config)) == set(configs.keys())
        with pytest.raises(AttributeError):
            config.seed = 3


def test_a_config_and_values_in_place_of_a_name_and_texts() -> None:
    ours = configs.load("kuairand_sample", {"model.dim": 8, "loss.weights": {"click": 2.0}, "train": {"epochs": 3}})
    assert (ours.model.dim, ours.train.epochs, dict(ours.loss.weights.items())) == (8, 3, {"click": 2.0})
    again = configs.load(ours, {"model.name": "mmoe"})
    assert (again.model.name, again.model.dim) == ("mmoe", 8)
    with pytest.raises(UserError, match="the config has no key 'model.dims'; did you mean 'model.dim'?"):
        configs.load({"model.dims": 8})
    with pytest.raises(UserError, match="--config.dim: the config has no such key; did you mean 'model.dim'?"):
        configs.load(ours, {"dim": 8})
    with pytest.raises(UserError, match="config.model.dim should be a whole number, but is '8'"):
        configs.load(ours, {"model.dim": "8"})


def test_help_lists_every_key_with_its_default() -> None:
    text = configs.describe()
    assert all(f"  {key}=" in text for key in configs.keys())
    assert "model.gate_units=128,64 " in text


def test_overrides_take_the_type_of_the_default() -> None:
    config = configs.load(
        "kuairand_sample",
        [
            "model.dim=8",
            "optimizer.l2=0",
            "model.expert_units=(64, 32)",
            "model.gate_units=",
            "model.tower_units=16",
            "train.deterministic",
            "seed=1",
            "seed=2",
        ],
    )
    assert config.model.dim == 8 and config.optimizer.l2 == 0.0 and isinstance(config.optimizer.l2, float)
    assert config.model.expert_units == (64, 32) and config.model.gate_units == () and config.model.tower_units == (16,)
    assert config.train.deterministic is True
    assert config.seed == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.dmi=3", "--config.model.dmi: the config has no such key; did you mean 'model.dim'?"),
        ("dim=3", "did you mean 'model.dim'?"),
        ("nonsense=3", "stem-train --help lists them"),
        ("model.dim=3.5", "config.model.dim should be a whole number, but is 3.5"),
        ("model.dim=big", "--config.model.dim should be a whole number, but is 'big'"),
        ("model.dim=True", "config.model.dim should be a whole number, but is True"),
        ("model.expert_units=8,a", "should be whole numbers, as in 256,128"),
        ("model.expert_units=", "config.model.expert_units should name at least one layer"),
        ("optimizer.l2=small", "--config.optimizer.l2 should be a number, or table:1e-06,..., but is 'small'"),
        ("model.dropout=1", "config.model.dropout should be less than 1, but is 1"),
        ("model.dropout=nan", "config.model.dropout should be at least 0, but is nan"),
        (
            "optimizer.learning_rate=inf",
            "config.optimizer.learning_rate should be a finite number (float32), but is inf",
        ),
        ("loss.weights=income:1e999", "config.loss.weights should be a finite number (float32), but is inf"),
        ("optimizer.l2=1e39", "config.optimizer.l2 should be a finite number (float32), but is 1e+39"),
        ("train.epochs=10000000000", "config.train.epochs should be a number of 32 bits, but is 10000000000"),
        ("optimizer.learning_rate=0", "should be more than 0"),
        ("model.expert_units=8,0", "config.model.expert_units should be at least 1, but is 0"),
        ("train.deterministic=maybe", "--config.train.deterministic should be true or false, but is 'maybe'"),
        ("data.input_format=row", "should be one of blocks, rows, parquet, but is 'row'; did you mean 'rows'?"),
        ("optimizer.decay_steps=9", "would do nothing with config.optimizer.schedule=constant"),
        ("optimizer.schedule=cosine", "config.optimizer.decay_steps should be given for the schedule cosine"),
        ("model.released_stacking=1", "would do nothing with one layer"),
        ("model.name=stem", "stem_net, cross_stitch, sluice, but is 'stem'; did you mean 'stem_net'?"),
        ("model.experts=4", "=4 would do nothing with config.model.name=stem_net; set that to omoe or mmoe"),
        ("model.follows=a:b", "set that to esmm or aitm, or leave this at nothing"),
        ("model.gives=like", "config.model.gives should be task:task,..., but is 'like'"),
        ("model.cross_layers=3", "would do nothing with config.model.expert=mlp"),
        ("model.expert=fwfm", "should be one width for experts of kind fwfm, but is (256, 128)"),
        ("model.shared_experts=1,2", "config.model.shared_experts=(1, 2) names 2 levels, but stem_net has 1"),
        ("model.task_experts=income:1,never_married:-1", "config.model.task_experts should be at least 0, but is -1"),
        ("model.task_experts=income:x", "or task:1,..., but is 'income:x'"),
        ("loss.gamma=0.9", "would do nothing with config.loss.weighting=static"),
        ("loss.label_smoothing=income:1", "config.loss.label_smoothing should be less than 1, but is 1"),
        ("train.monitor=auc:", "should be auc, loss, auc:<task> or loss:<task>, but is 'auc:'"),
        ("train.monitor=mse", "should be auc, loss, auc:<task> or loss:<task>"),
    ],
)
def test_each_mistake_has_its_message(override: str, words: str) -> None:
    settings = [override]
    if override == "optimizer.decay_steps=9":
        settings.append("optimizer.schedule=constant")
    with pytest.raises(UserError) as error:
        configs.load("census_income", settings)
    assert words in str(error.value)


def test_no_experts_at_all() -> None:
    with pytest.raises(UserError, match="there are no experts"):
        configs.load("census_income", ["model.task_experts=0", "model.shared_experts=0"])


def test_experiments_by_name_or_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'kuairand_sample'.*Shipped: ali_ccp, census_income"):
        configs.load("kuairand_smaple")
    with pytest.raises(UserError, match="there is no such file"):
        configs.load(str(tmp_path / "mine.py"))

    mine = tmp_path / "mine.py"
    mine.write_text("def get_config():\n    return {'model': {'dim': 5}, 'seed': 7}\n")
    config = configs.load(str(mine))
    assert (config.model.dim, config.seed, config.model.layers) == (5, 7, 0)

    mine.write_text("def get_config():\n    return {'model': {'dmi': 5}}\n")
    with pytest.raises(UserError, match=r"mine.py: the config has no key 'model.dmi'; did you mean 'model.dim'\?"):
        configs.load(str(mine))
    mine.write_text("def get_config():\n    return {'model': {'dim': '5'}}\n")
    with pytest.raises(UserError, match="config.model.dim should be a whole number, but is '5'"):
        configs.load(str(mine))
    mine.write_text("def config():\n    return {}\n")
    with pytest.raises(UserError, match=r"mine.py has no function get_config\(\)"):
        configs.load(str(mine))
    mine.write_text("import nowhere_to_be_found\n")
    with pytest.raises(UserError, match="mine.py: line 1: ModuleNotFoundError: No module named 'nowhere_to_be_found'"):
        configs.load(str(mine))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("config.model.dimm = 3", "the config has no key 'dimm'; did you mean 'model.dim'?"),
        ("config.model.dim = config.modle.dim", "the config has no key 'modle'; did you mean 'model'?"),
        ("config['model']['dimm'] = 3", "the config has no key 'dimm'; did you mean 'model.dim'?"),
        ("config.update({'sed': 3})", "the config has no key 'sed'; did you mean 'seed'?"),
        ("config.something.new = 3", "the config has no key 'something'; stem-train --help lists them"),
        ("{}['a']", "KeyError: 'a'"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_sentence_with_its_line(tmp_path: Path, line: str, words: str) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from stem_tf.configs import base\n\n\ndef get_config():\n"
        f"    config = base.get_config()\n    {line}\n    return config\n"
    )
    with pytest.raises(UserError) as error:
        configs.load(str(mine))
    assert str(error.value) == f"{mine}: line 6: {words}"


def test_tables_start_from_what_suits_the_expert() -> None:
    assert configs.load("census_income").model.init_std == 1e-4
    assert configs.load("production").model.init_std == 0.01
    assert configs.load("production", ["model.init_std=0.3"]).model.init_std == 0.3
    # What an experiment says of its own expert is not meant for another one.
    assert configs.load("kuairand_sample").model.init_std == 1e-3
    assert configs.load("kuairand_sample", ["model.expert=nfwfm"]).model.init_std == 0.01
    assert configs.load("kuairand_sample", ["model.expert=nfwfm", "model.init_std=0.2"]).model.init_std == 0.2


def test_keys_without_use_may_be_left_out_with_a_line_each() -> None:
    given = ["model.experts=4", "model.expert=dcn", "model.cross_layers=3", "model.dropout=0.1", "model.gives=a:b"]
    left_out: list[str] = []
    config = configs.load("kuairand_sample", ["model.name=esmm", *given, "model.follows=a:b"], left_out.append)
    assert (config.model.name, config.model.expert, config.model.dropout) == ("esmm", "mlp", 0.1)
    assert [line.split()[0] for line in left_out] == [
        "--config.model.experts", "--config.model.expert", "--config.model.cross_layers", "--config.model.gives",
    ]  # fmt: skip
    assert left_out[2].endswith(" is left out: it would do nothing with config.model.name=esmm")
    left_out.clear()
    # A key that is of use only beside another one goes with it.
    configs.load("kuairand_sample", ["model.cross_layers=3"], left_out.append)
    assert left_out[0].endswith("cross_layers is left out: it would do nothing with config.model.expert=mlp")

    left_out.clear()
    config = configs.load("kuairand_sample", ["model.name=mmoe", *given], left_out.append)
    assert (config.model.experts, config.model.cross_layers) == (4, 3)
    assert [line.split()[0] for line in left_out] == ["--config.model.gives"]
    with pytest.raises(UserError, match="config.model.dropout should be less than 1"):
        configs.load("kuairand_sample", ["model.dropout=2", "model.experts=4"], left_out.append)


def test_override_flags_may_stand_anywhere() -> None:
    words = ["--config.model.dim=8", "--config=x", "--config.seed", "3", "-config.train.deterministic", "--workdir=y"]
    assert configs.override_flags([*words, "--noconfig.model.stop_gradient", "--", "--config.a=1"]) == [
        "--config_key=model.dim=8",
        "--config=x",
        "--config_key=seed=3",
        "--config_key=train.deterministic",
        "--workdir=y",
        "--config_key=model.stop_gradient=false",
        "--",
        "--config.a=1",
    ]


def test_home_in_the_data_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert configs.load("kuairand_sample", ["data.dir=~/data"]).data.dir == "/home/me/data"
