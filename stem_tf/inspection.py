"""What is inside a trained model: its tables and parameters, and how each gate uses the experts on a split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipelines.batches.damage import naming_corrupt_records
from pipelines.batches.dataset import read_batches
from pipelines.manifest import Manifest
from stem_tf import configs, dead_experts, report
from stem_tf.layers.gate import Gate, observe, observe_mixtures
from stem_tf.models.predictor import Batch, Predictor
from stem_tf.models.ranking_model import RankingModel
from stem_tf.models.snapshots import Snapshots
from stem_tf.summary import on_level, summary
from stem_tf.trained import Trained
from stem_tf.training.logger import writing
from stem_tf.workdir import Workdir
from stem_util import owned
from stem_util.files import replace_file, write_json
from stem_util.progress import Progress

Use = dict[str, dict[str, Any]]
"""Numbers of each gate, or of each expert, by its name."""


@dataclass(frozen=True)
class Inspection:
    """The result of an inspection.

    Attributes:
      split: the split whose rows the gates saw.
      rows: number of rows in the split.
      epoch: epoch of the weights; by task where each task has weights of its own best epoch.
      summary: tables, parameters and multiply-adds, for people.
      gates, experts: as `utilisation` returns them; empty where the model has none.
    """

    split: str
    rows: int
    epoch: int | dict[str, int]
    summary: str
    gates: Use
    experts: Use

    def __repr__(self) -> str:
        if not self.gates:
            return self.summary
        heading = f"gates on {self.split}, {self.rows:,} rows: mean weight of each expert ± standard deviation"
        warnings = [f"warning: {sentence}" for sentence in dead_experts.sentences(self.experts)]
        return "\n".join([f"{self.summary}\n\n{heading}\n{table(self.gates)}", *warnings])


def inspect(found: Trained, manifest: Manifest, split: str, data: Any) -> Inspection:
    """Looks into a run's model.

    Args:
      found: the run's model.
      manifest: manifest of the run's data.
      split: the split whose rows the gates should see.
      data: the run's ``config.data``.
    """
    sets = members(found.model)
    text = summary(sets[0][0])
    if len(sets) > 1:
        text += f"\n\n{len(sets)} sets of these weights, one for each epoch that is some task's best"
    with naming_corrupt_records(manifest, split, data.input_format):
        batches = read_batches(manifest, split, training=False, **configs.reading(data))
        rows = manifest.rows(split)
        with Progress(rows, unit="rows", desc=f"gates, {split}") as progress:
            gates, experts = utilisation(found.model, _counted(batches, progress, rows, data.batch_size))
    return Inspection(split, rows, found.epoch, text, gates, experts)


def _counted(batches: Iterable[Batch], progress: Progress, rows: int, batch_size: int) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        progress.update(min(batch_size, rows - progress.done))


def write(inspection: Inspection, workdir: Workdir) -> list[str]:
    """Writes the gates as JSON and as a picture into RUN/inspection, and for TensorBoard; returns the files' names.

    There is no picture where matplotlib is not installed.

    Raises:
      UserError: RUN/inspection holds something else.
    """
    split, gates = inspection.split, inspection.gates
    owned.claim(workdir.inspection, owned.INSPECTIONS)
    written = [f"gates-{split}.json"]
    tree = {
        "split": split,
        "rows": inspection.rows,
        "epoch": inspection.epoch,
        "gates": gates,
        "experts": inspection.experts,
    }
    write_json(workdir.inspection / written[0], tree)
    image = workdir.inspection / f"gates-{split}.png"
    if picture(gates, image):
        written.append(image.name)
    _to_tensorboard(workdir, gates, split, image)
    return written


def members(model: Predictor) -> list[tuple[RankingModel, tuple[str, ...]]]:
    """The models that a predictor consists of, each with the tasks that it scores: one, or a few of several epochs."""
    if isinstance(model, Snapshots):
        return list(zip(model.members, model.tasks_of, strict=True))
    assert isinstance(model, RankingModel)
    return [(model, tuple(task.name for task in model.tasks))]


def utilisation(model: Predictor, batches: Iterable[Batch]) -> tuple[Use, Use]:
    """How the gates use the experts, over the rows of ``batches`` that are not padding.

    Returns:
      Gates and experts, each by name. A gate has ``reader``, ``level``, ``experts`` (names [E]), ``mean`` and ``std``
      ([E]) of its weights. An expert has ``level``, ``weight``, the largest mean weight that a gate gives it, and
      ``zeros``, the share of its outputs that are 0. With several sets of weights, a task's gate is read from the set
      that scores the task, and an expert's ``zeros`` from the set where they are least.
    """
    sets = members(model)
    gates: list[Gate] = []

    @tf.function(autograph=False, reduce_retracing=True)
    def sums(batch: Batch) -> list[tuple[tf.Tensor, ...]]:
        """By gate, sums over rows: weights [E], their squares [E], shares of zeros in outputs of experts [E]; rows."""
        real = tf.cast(batch["row_id"] >= 0, tf.float64)
        found: list[tuple[tf.Tensor, ...]] = []
        gates.clear()
        for member, tasks in sets:
            with observe(member) as seen, observe_mixtures() as mixtures:
                member(batch["features"])
            others = {task.name for task in member.tasks} - set(tasks)
            for gate, weights in seen:
                if gate.reader in others:
                    continue
                gates.append(gate)
                w = real[:, tf.newaxis] * tf.cast(weights, tf.float64)
                experts = next(groups for mixed, groups in mixtures if mixed is weights)
                off = [tf.reduce_mean(tf.cast(group == 0, tf.float64), axis=2) for group in experts]  # [K, B]
                zeros = tf.linalg.matvec(tf.concat(off, axis=0), real)
                found.append((tf.reduce_sum(w, 0), tf.reduce_sum(w * w, 0), zeros, tf.reduce_sum(real)))
        return found

    by_batch = [sums(batch) for batch in batches]
    by_gate: Use = {}
    by_expert: Use = {}
    levels = len({gate.level for gate in gates})
    for gate, parts in zip(gates, zip(*by_batch, strict=True), strict=True):
        weights, squares, zeros, rows = (np.sum(part, axis=0) for part in zip(*parts, strict=True))
        mean = weights / rows
        deviation = np.sqrt(np.maximum(squares / rows - mean**2, 0.0))
        by_gate[on_level(gate.reader, gate.level, levels)] = {
            "reader": gate.reader,
            "level": gate.level,
            "experts": list(gate.experts),
            "mean": mean.tolist(),
            "std": deviation.tolist(),
        }
        for expert, weight, share in zip(gate.experts, mean.tolist(), (zeros / rows).tolist(), strict=True):
            known = by_expert.setdefault(
                on_level(expert, gate.level, levels), {"level": gate.level, "weight": weight, "zeros": share}
            )
            known |= {"weight": max(known["weight"], weight), "zeros": min(known["zeros"], share)}
    return by_gate, by_expert


def table(gates: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per gate, one column per expert."""
    experts = list(dict.fromkeys(expert for gate in gates.values() for expert in gate["experts"]))
    lines = []
    for name, gate in gates.items():
        weights = {
            expert: f"{report.number(mean, 3)} ±{report.number(std, 3)}"
            for expert, mean, std in zip(gate["experts"], gate["mean"], gate["std"], strict=True)
        }
        lines.append([name, *(weights.get(expert, "-") for expert in experts), ""])
    return report.table(["gate of", *experts, ""], lines)


def picture(gates: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Draws one panel per gate: bars of the mean weights, lines of their standard deviations, as PLE Fig. 8 does.

    Returns:
      False where matplotlib is not installed.
    """
    pyplot = report.plotting()
    if pyplot is None:
        return False
    columns = min(len(gates), 3)
    rows = -(-len(gates) // columns)
    size = (4.2 * columns, 3.0 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis in axes.flat[len(gates) :]:
        axis.set_axis_off()
    for axis, (name, gate) in zip(axes.flat, gates.items(), strict=False):
        own = [expert == gate["reader"] or expert.startswith(f"{gate['reader']} ") for expert in gate["experts"]]
        colours = ["tab:orange" if mine else "tab:blue" for mine in own]
        axis.bar(gate["experts"], gate["mean"], yerr=gate["std"], capsize=3, color=colours)
        axis.set_title(f"gate of {name}", fontsize="medium")
        axis.tick_params(axis="x", rotation=45)
        axis.set_ylim(0, 1)
    axes[0, 0].set_ylabel("weight")
    with replace_file(path) as beside:
        figure.savefig(beside, format="png", dpi=110)
    pyplot.close(figure)
    return True


def _to_tensorboard(workdir: Workdir, gates: Mapping[str, Mapping[str, Any]], split: str, image: Path) -> None:
    with writing(workdir.tensorboard):
        with tf.summary.create_file_writer(str(workdir.tensorboard / "gates")).as_default(step=0):
            for name, gate in gates.items():
                for expert, mean, std in zip(gate["experts"], gate["mean"], gate["std"], strict=True):
                    tf.summary.scalar(f"gate/{split}/{name}/{expert}/mean", mean)
                    tf.summary.scalar(f"gate/{split}/{name}/{expert}/std", std)
            if image.exists():
                tf.summary.image(f"gates/{split}", tf.image.decode_png(image.read_bytes(), channels=3)[tf.newaxis])
