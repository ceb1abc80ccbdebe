"""Looking inside a model: sizes counted by hand, and gates averaged over real rows only."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines import manifest as manifests
from pipelines.batches.dataset import read_batches
from stem_tf import configs, dead_experts, inspection, models, trained
from stem_tf.layers.gate import observe
from stem_tf.models.ranking_model import RankingModel
from stem_tf.models.snapshots import Snapshots
from stem_tf.summary import multiply_adds, summary

RunJob = Callable[..., subprocess.CompletedProcess[str]]


def build(settings: dict[str, Any]) -> RankingModel:
    config = configs.checked(settings)
    return models.build(config, manifests.load(config.data.dir), training=False)


def test_parameters_and_multiply_adds_by_hand(tiny_settings: dict[str, Any]) -> None:
    """D = 4 fields x 4; an expert 16 x 8, a gate 16 x 3, a tower 8 x 4 x 1; two tasks."""
    model = build(tiny_settings)
    expert, gate, tower = 16 * 8, 16 * 3, 8 * 4 + 4
    assert multiply_adds(model) == 3 * expert + 2 * gate + 2 * tower
    lines = {line.split()[0]: line.split()[1:] for line in summary(model).splitlines() if line}
    assert lines["click"] == lines["watched"] == ["136", "51", "41", "228"]
    assert lines["shared"] == ["136", "0", "0", "136"]
    assert lines["tables:"] == ["task:click,", "task:watched,", "shared"]
    rows = int(lines["user"][1])
    assert lines["user"][4:] == [f"{rows * 3 * 4 * 4 / 1000:.1f}", "kB"]


def test_every_model_has_a_summary(zoo_settings: dict[str, Any]) -> None:
    model = build(zoo_settings)
    last = summary(model).splitlines()[-2].split()
    assert last[0] == "all" and int(last[-1].replace(",", "")) == sum(int(tf.size(w)) for w in model.network.weights)


@pytest.mark.parametrize("best", ["together", "by_task"])
def test_gates_of_a_run(
    tmp_path: Path, tiny_settings: dict[str, Any], train: Callable[..., Any], run_job: RunJob, best: str
) -> None:
    run = tmp_path / "run"
    trainer = train(run, tiny_settings | {"train.best": best})
    job = run_job("stem_tf.jobs.inspect", f"--workdir={run}", "--split=validation")
    assert job.returncode == 0, job.stderr
    assert "gates on validation, 150 rows: mean weight of each expert ± standard deviation" in job.stdout
    found = json.loads((run / "inspection" / "gates-validation.json").read_text())["gates"]
    assert list(found) == ["click", "watched"]
    assert (run / "inspection" / "gates-validation.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard" / "gates").glob("events*"))
    if best == "by_task":
        return
    # 150 rows in batches of 64: the last one is padded with 42 rows that must not count.
    model = trained.load(trainer.workdir, trainer.config, trainer.manifest, "best").model
    batch = next(
        iter(read_batches(trainer.manifest, "validation", training=False, batch_size=150, input_format="blocks"))
    )
    with observe(model) as seen:
        model(batch["features"])
    for gate, weights in seen:
        assert found[gate.reader]["experts"] == ["click", "watched", "shared"]
        np.testing.assert_allclose(found[gate.reader]["mean"], np.mean(weights, axis=0), rtol=1e-5)
        np.testing.assert_allclose(found[gate.reader]["std"], np.std(weights, axis=0), rtol=1e-3, atol=1e-6)


def test_a_model_without_gates(
    tmp_path: Path, tiny_settings: dict[str, Any], train: Callable[..., Any], run_job: RunJob, job_in_process: RunJob
) -> None:
    run = tmp_path / "run"
    settings = configs.applying(tiny_settings, "shared_bottom")
    train(run, settings | {"model.name": "shared_bottom", "train.epochs": 1})
    job = run_job("stem_tf.jobs.inspect", f"--workdir={run}")
    assert job.returncode == 0 and job.stdout.endswith("shared_bottom has no gates\n"), job.stderr
    job = job_in_process("stem_tf.jobs.inspect", f"--workdir={run}", "--split=tset")
    assert job.returncode == 2 and "--split=tset: no such split; did you mean 'test'?" in job.stderr


def test_dead_and_unused_experts(tiny_settings: dict[str, Any], tiny_data: Path) -> None:
    """MMoE with four experts: a bias far below 0 kills the second, and no gate reads the third."""
    settings = configs.applying(tiny_settings, "mmoe") | {"model.name": "mmoe", "model.experts": 4}
    model = build(settings)
    _, bias = model.network.experts.linears[-1].weights
    bias.assign(tf.tensor_scatter_nd_update(bias, [[1]], tf.fill([1, 1, 8], -1e6)))
    for gate in model.network.gates.values():
        gate.mlp.linears[-1].bias.assign([0.0, 0.0, -20.0, 0.0])
    batches = list(
        read_batches(manifests.load(str(tiny_data)), "test", training=False, batch_size=64, input_format="blocks")
    )
    gates, experts = inspection.utilisation(model, batches)
    assert experts["expert 2"]["zeros"] == 1.0 and experts["expert 3"]["weight"] < 1e-6
    x = tf.concat([model.embeddings(model.inputs(batch["features"]))["shared"] for batch in batches], axis=0)[:150]
    outputs = model.network.experts(x).numpy()
    np.testing.assert_allclose([experts[f"expert {i}"]["zeros"] for i in (1, 2, 3, 4)], (outputs == 0).mean((1, 2)))
    largest = np.max([gate["mean"] for gate in gates.values()], axis=0)
    np.testing.assert_allclose([experts[f"expert {i}"]["weight"] for i in (1, 2, 3, 4)], largest)
    dead, unused = dead_experts.sentences(experts)
    assert dead.startswith("expert 'expert 2' is dead: its outputs are 0 for every row")
    assert unused.startswith("expert 'expert 3' is not used: no gate gives it even 1 % of its weight")
    shown = repr(inspection.Inspection("test", 150, 1, "", gates, experts))
    assert shown.endswith(f"warning: {dead}\nwarning: {unused}")


def test_experts_of_two_sets_of_weights(tiny_settings: dict[str, Any], tiny_data: Path) -> None:
    """An expert that is dead in the weights of one epoch and alive in those of another is not reported."""
    settings = configs.applying(tiny_settings, "omoe") | {"model.name": "omoe", "model.experts": 2}
    members = [build(settings | {"seed": seed}) for seed in (0, 1)]
    _, bias = members[0].network.experts.linears[-1].weights
    bias.assign(tf.fill(bias.shape, -1e6))
    both = Snapshots([(members[0], ["click"]), (members[1], ["watched"])])
    batches = list(
        read_batches(manifests.load(str(tiny_data)), "test", training=False, batch_size=64, input_format="blocks")
    )
    _, experts = inspection.utilisation(both, batches)
    _, alive = inspection.utilisation(members[1], batches)
    assert [expert["zeros"] for expert in experts.values()] == [expert["zeros"] for expert in alive.values()]
    assert not dead_experts.sentences(experts)
