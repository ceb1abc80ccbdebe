"""What is inside a trained model: its tables and parameters, and how each gate uses the experts on a split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from pipelines.batches.damage import naming_corrupt_records
from pipelines.batches.dataset import read_batches
from pipelines.manifest import Manifest
from stem_tf import configs, report
from stem_tf.layers.gate import Gate, observe
from stem_tf.models.ranking_model import RankingModel
from stem_tf.models.snapshots import Snapshots
from stem_tf.summary import gate_names, summary
from stem_tf.trained import Trained
from stem_tf.training.logger import writing
from stem_tf.workdir import Workdir
from stem_util import owned
from stem_util.files import replace_file, write_json
from stem_util.progress import Progress


@dataclass(frozen=True)
class Inspection:
    """The result of an inspection.

    Attributes:
      split: the split whose rows the gates saw.
      rows: number of rows in the split.
      epoch: epoch of the weights; by task where each task has weights of its own best epoch.
      summary: tables, parameters and multiply-adds, for people.
      gates: as `utilisation` returns them; empty where the model has none.
    """

    split: str
    rows: int
    epoch: int | dict[str, int]
    summary: str
    gates: dict[str, dict[str, Any]]

    def __repr__(self) -> str:
        if not self.gates:
            return self.summary
        heading = f"gates on {self.split}, {self.rows:,} rows: mean weight of each expert ± standard deviation"
        return f"{self.summary}\n\n{heading}\n{table(self.gates)}"


def inspect(found: Trained, manifest: Manifest, split: str, data: Any) -> Inspection:
    """Looks into a run's model.

    Args:
      found: the run's model.
      manifest: manifest of the run's data.
      split: the split whose rows the gates should see.
      data: the run's ``config.data``.
    """
    members = found.model.members if isinstance(found.model, Snapshots) else [found.model]
    text = summary(members[0])
    if len(members) > 1:
        text += f"\n\n{len(members)} sets of these weights, one for each epoch that is some task's best"
    # With several sets of weights, a task's gate is read from the set that scores the task.
    tasks_of = found.model.tasks_of if isinstance(found.model, Snapshots) else [manifest.schema.task_names]
    gates: dict[str, dict[str, Any]] = {}
    for member, tasks in zip(members, tasks_of, strict=True):
        seen = utilisation(member, manifest, split, data)
        others = {task.name for task in member.tasks} - set(tasks)
        gates |= {name: values for name, values in seen.items() if values["reader"] not in others}
    return Inspection(split, manifest.rows(split), found.epoch, text, gates)


def write(inspection: Inspection, workdir: Workdir) -> list[str]:
    """Writes the gates as JSON and as a picture into RUN/inspection, and for TensorBoard; returns the files' names.

    There is no picture where matplotlib is not installed.

    Raises:
      UserError: RUN/inspection holds something else.
    """
    split, gates = inspection.split, inspection.gates
    owned.claim(workdir.inspection, owned.INSPECTIONS)
    written = [f"gates-{split}.json"]
    tree = {"split": split, "rows": inspection.rows, "epoch": inspection.epoch, "gates": gates}
    write_json(workdir.inspection / written[0], tree)
    image = workdir.inspection / f"gates-{split}.png"
    if picture(gates, image):
        written.append(image.name)
    _to_tensorboard(workdir, gates, split, image)
    return written


def utilisation(model: RankingModel, manifest: Manifest, split: str, data: Any) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation, over a split's rows, of every gate's weights.

    Returns:
      By the gate's name: ``reader``, ``level``, ``experts`` (names [E]), ``mean`` and ``std`` ([E]).
    """
    gates: list[Gate] = []

    @tf.function(autograph=False)
    def sums(batch: Mapping[str, Any]) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """Sums of each gate's weights, and of their squares, over the rows that are not padding."""
        with observe(model) as seen:
            model(batch["features"])
        gates[:] = [gate for gate, _ in seen]
        real = tf.cast(batch["row_id"] >= 0, tf.float64)[:, tf.newaxis]
        weights = [tf.cast(w, tf.float64) for _, w in seen]
        return [(tf.reduce_sum(real * w, 0), tf.reduce_sum(real * w * w, 0)) for w in weights]

    total: list[tuple[NDArray, NDArray]] = []
    rows = manifest.rows(split)
    with (
        Progress(rows, unit="rows", desc=f"gates, {split}") as progress,
        naming_corrupt_records(manifest, split, data.input_format),
    ):
        for batch in read_batches(manifest, split, training=False, **configs.reading(data)):
            part = [(s.numpy(), q.numpy()) for s, q in sums(batch)]
            total = [(a + s, b + q) for (a, b), (s, q) in zip(total, part, strict=True)] if total else part
            progress.update(min(data.batch_size, rows - progress.done))
    result = {}
    for name, gate, (s, q) in zip(gate_names(gates), gates, total, strict=True):
        mean = s / rows
        deviation = np.sqrt(np.maximum(q / rows - mean**2, 0.0))
        result[name] = {
            "reader": gate.reader,
            "level": gate.level,
            "experts": list(gate.experts),
            "mean": mean.tolist(),
            "std": deviation.tolist(),
        }
    return result


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
