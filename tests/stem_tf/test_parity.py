"""The models against exact numbers of the STEM authors' released PyTorch code (tests/data/parity)."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines.schema import Feature, Label, Task
from stem_tf.layers.embedding import Embeddings, Field
from stem_tf.layers.mlp import MLP, Linear
from stem_tf.layers.transforms import InputTransform
from stem_tf.models.chains import AITM, ESMM
from stem_tf.models.mmoe import MMoE, OMoE
from stem_tf.models.network import Network
from stem_tf.models.ple import PLE
from stem_tf.models.ranking_model import RankingModel
from stem_tf.models.sharing import SharedBottom
from stem_tf.models.stem_net import STEMNet
from stem_tf.training import preparation
from stem_tf.training.learning_rate import Schedule
from stem_tf.training.preparation import Training

PARITY = Path(__file__).parent.parent / "data" / "parity"


Pairs = list[tuple[tf.Variable, np.ndarray]]


class Reference:
    """One file of reference numbers, and the model that they belong to."""

    def __init__(self, name: str) -> None:
        self.data = np.load(PARITY / f"{name}.npz")
        meta = self.meta = json.loads(str(self.data["meta"]))
        fields = [f"f{i}" for i in range(len(meta["vocabs"]))]
        names = self.names = [f"t{i}" for i in range(meta["tasks"])]
        features = tuple(Feature(f, "categorical", "context", f, "int64") for f in fields)
        sizes = {"expert_units": meta["experts"], "gate_units": meta["gates"], "tower_units": meta["towers"]}
        units = {name: tuple(widths) for name, widths in sizes.items()}
        kind, own, self._network_pairs = MODELS[meta["model"]]
        given = units | own(names, meta)
        of_the_model = {field.name for field in dataclasses.fields(kind.Hyperparameters)}
        hyper = kind.Hyperparameters(**{name: value for name, value in given.items() if name in of_the_model})
        network = kind(names, hyper)
        tabled = [Field(name, rows=rows) for name, rows in zip(fields, meta["vocabs"], strict=True)]
        embeddings = Embeddings(tabled, meta["dim"], network.tables, train_tables=False)
        tasks = tuple(Task(name, Label(name)) for name in names)
        self.model = RankingModel(tasks, InputTransform(features, {}), embeddings, network)
        self.model.build_weights()
        preparation.prepare(self.model, Training(Schedule(meta["lr"]), "dense", meta["reg"], clip_norm=meta["clip"]))
        self.batch = {
            "features": {f: tf.constant(self.data["ids"][:, i], tf.int32) for i, f in enumerate(fields)},
            "labels": {n: tf.constant(self.data["labels"][:, i]) for i, n in enumerate(names)},
            "weights": {n: tf.ones(len(self.data["labels"])) for n in names},
        }
        self.load("w0")

    def mlp(self, mlp: MLP, which: str, *torch_names: str) -> Pairs:
        """Variables of ``mlp`` beside the reference's values; several torch MLPs are the experts of one group."""
        pairs = []
        for i, layer in enumerate(mlp.linears):
            kernels = [self.data[f"{which}/{name}.mlp.{2 * i}.weight"].T for name in torch_names]
            biases = [self.data[f"{which}/{name}.mlp.{2 * i}.bias"] for name in torch_names]
            pairs.append((layer.kernel, np.stack(kernels).reshape(layer.kernel.shape)))
            pairs.append((layer.bias, np.stack(biases).reshape(layer.bias.shape)))
        return pairs

    def linear(self, linear: Linear, which: str, torch_name: str) -> Pairs:
        """Variables of ``linear`` beside the reference's values."""
        weight, bias = (self.data[f"{which}/{torch_name}.{part}"] for part in ("weight", "bias"))
        return [(linear.kernel, weight.T), (linear.bias, bias)]

    def pairs(self, which: str) -> Pairs:
        """Every variable of the model beside the reference's array ``which`` (w0, g0, w5) for it."""
        rows = [
            self.data[f"{which}/embedding_layer.embedding_layer.embedding_layers.f{i}.weight"]
            for i in range(len(self.meta["vocabs"]))
        ]
        pairs = [(self.model.embeddings.groups[0].table, np.concatenate(rows))]
        pairs += self._network_pairs(self, self.model.network, which)
        towers = list(self.model.network.towers.values())
        # The released ESMM's tower 0 is that of the conversion, its tower 1 that of the click before it.
        for t, tower in enumerate(towers[::-1] if self.meta["model"] == "ESMM" else towers):
            pairs += self.mlp(tower, which, f"tower.{t}")
        return pairs

    def load(self, which: str) -> None:
        for variable, value in self.pairs(which):
            variable.assign(value)

    def predictions(self) -> np.ndarray:
        scores = self.model.predict_step(self.batch)["scores"]
        return np.stack([scores[task.name] for task in self.model.tasks], axis=1)


def stacked(reference: Reference, name: str, layers: Sequence[Any], paths: Sequence[str], which: str) -> Pairs:
    """Layers with experts of each task and shared ones, and a gate for each path, the shared one last."""
    pairs: Pairs = []
    for number, layer in enumerate(layers):
        prefix = f"{name}.{number}"
        for t, path in enumerate(paths[:-1]):
            experts = [f"{prefix}.specific_experts.{t}.{k}" for k in range(reference.meta["k1"])]
            pairs += reference.mlp(layer.experts[path], which, *experts)
        experts = [f"{prefix}.shared_experts.{k}" for k in range(reference.meta["k2"])]
        pairs += reference.mlp(layer.experts["shared"], which, *experts)
        for t, path in enumerate(paths):
            if path in layer.gates:
                pairs += reference.mlp(layer.gates[path].mlp, which, f"{prefix}.gate.{t}")
    return pairs


def stem_net(reference: Reference, network: STEMNet, which: str) -> Pairs:
    return stacked(reference, "stem_layers", network.stem_layers, network.tables, which)


def omoe(reference: Reference, network: OMoE, which: str) -> Pairs:
    experts = [f"omoe_layer.experts.{k}" for k in range(reference.meta["mmoe_experts"])]
    pairs = reference.mlp(network.experts, which, *experts)
    return pairs + reference.mlp(network.gate.mlp, which, "omoe_layer.gate")


def mmoe(reference: Reference, network: MMoE, which: str) -> Pairs:
    experts = [f"mmoe_layer.experts.{k}" for k in range(reference.meta["mmoe_experts"])]
    pairs = reference.mlp(network.experts, which, *experts)
    for t, gate in enumerate(network.gates.values()):
        pairs += reference.mlp(gate.mlp, which, f"mmoe_layer.gate.{t}")
    return pairs


def ple(reference: Reference, network: PLE, which: str) -> Pairs:
    """The last level's shared gate, which nothing reads, is in the files alone."""
    return stacked(reference, "cgc_layers", network.levels, network.paths, which)


def shared_bottom(reference: Reference, network: SharedBottom, which: str) -> Pairs:
    return reference.mlp(network.bottom, which, "bottom")


def aitm(reference: Reference, network: AITM, which: str) -> Pairs:
    pairs: Pairs = []
    for t, bottom in enumerate(network.bottoms.values()):
        pairs += reference.mlp(bottom, which, f"bottom.{t}")
    for t, info in enumerate(network.infos.values()):
        pairs += reference.linear(info, which, f"g.{t}")
    for name in ("h1", "h2", "h3"):
        pairs += reference.linear(getattr(network, name), which, name)
    return pairs


def in_order(names: list[str]) -> dict[str, str]:
    """Each task follows the one before it."""
    return {task: previous for previous, task in itertools.pairwise(names)}


def levels(names: list[str], meta: dict[str, Any]) -> dict[str, Any]:
    counts = {"task_experts": meta["k1"], "shared_experts": meta["k2"]}
    return counts | {"layers": meta["layers"], "released_stacking": True}


MODELS: dict[str, tuple[type[Network], Callable[..., dict[str, Any]], Callable[..., Pairs]]] = {
    "SharedBottom": (SharedBottom, lambda names, meta: {}, shared_bottom),
    "OMoE": (OMoE, lambda names, meta: {"experts": meta["mmoe_experts"]}, omoe),
    "MMoE": (MMoE, lambda names, meta: {"experts": meta["mmoe_experts"]}, mmoe),
    "PLE": (PLE, levels, ple),
    "STEM": (STEMNet, levels, stem_net),
    "ESMM": (ESMM, lambda names, meta: {"follows": in_order(names)}, lambda reference, network, which: []),
    "AITM": (AITM, lambda names, meta: {"follows": in_order(names)}, aitm),
}
"""By the model's name in the files: its class, hyperparameters of its own, and its weights, towers apart, beside the
reference's."""


@pytest.fixture(params=sorted(path.stem for path in PARITY.glob("*.npz")))
def reference(request: Any) -> Reference:
    return Reference(request.param)


def test_every_weight_is_compared(reference: Reference) -> None:
    compared = {variable.ref() for variable, _ in reference.pairs("w0")}
    assert compared == {v.ref() for part in reference.model.weight_parts.values() for v in part.weights}


def test_predictions_and_loss(reference: Reference) -> None:
    np.testing.assert_allclose(reference.predictions(), reference.data["pred0"], atol=1e-6)
    assert float(reference.model.compute_loss(reference.batch)) == pytest.approx(
        float(reference.data["loss0"]), abs=1e-6
    )


def test_gradients(reference: Reference) -> None:
    model, data = reference.model, reference.data
    inputs = model.inputs(reference.batch["features"])
    (ids,), (group,), (optimizer,) = model.embeddings.ids(inputs), model.embeddings.groups, model.table_optimizers
    looked_up = group.look_up(ids)
    assert ids is not None and looked_up is not None
    variables = model.network_optimizer.variables_
    with tf.GradientTape() as tape:
        tape.watch(looked_up)
        outputs = model.forward(inputs, [looked_up], training=True)
        spaces = {task.name: tf.constant(float(len(data["labels"]))) for task in model.tasks}
        loss = tf.reduce_sum(model.training_step.losses(reference.batch, outputs, spaces))
    gradients, by_position = tape.gradient(loss, [variables, looked_up])
    table = optimizer.gradient(optimizer.read(ids, model.global_step), by_position).values
    by_variable = {v.ref(): g for v, g in zip(variables, gradients, strict=True)}
    by_variable[group.table.ref()] = tf.reshape(table, group.table.shape)

    expected = reference.pairs("g0")
    largest = max(np.abs(value).max() for _, value in expected)
    for variable, value in expected:
        np.testing.assert_allclose(by_variable[variable.ref()], value, atol=1e-5 * largest, err_msg=variable.name)
    norm = tf.linalg.global_norm(list(by_variable.values()))
    assert float(norm) == pytest.approx(float(data["gnorm0"]), rel=1e-5)


def test_five_steps_of_dense_adam(reference: Reference) -> None:
    step = tf.function(reference.model.train_step)
    losses = []
    for _ in range(5):
        reference.model.reset_metrics()
        losses.append(float(step(reference.batch)["loss"]))
    np.testing.assert_allclose(losses, reference.data["loss"], atol=1e-5)
    for variable, value in reference.pairs("w5"):
        np.testing.assert_allclose(variable, value, atol=1e-4, err_msg=variable.name)
    np.testing.assert_allclose(reference.predictions(), reference.data["pred5"], atol=1e-5)
