"""Looks inside a trained run: its tables and parameters, and how each gate uses the experts on a split (PLE Fig. 8).

    stem-inspect --workdir=RUN --split=test

Prints the model and the mean and standard deviation of every gate's weights; writes them as JSON and as a picture, and
for TensorBoard.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines import manifest as manifests
from pipelines.manifest import Manifest
from stem_tf import report
from stem_tf.runtime import quieten_tensorflow, use_memory_as_needed
from stem_tf.workdir import Workdir
from stem_util import cli, owned
from stem_util.files import replace_file, write_json

if TYPE_CHECKING:
    from stem_tf.models.ranking_model import RankingModel

flags = cli.Flags()

_WORKDIR = flags.DEFINE(cli.PATH, "workdir", None, "Directory of the run, as given to stem-train.", required=True)
_SPLIT = flags.DEFINE_string("split", "test", f"Which rows the gates see: {', '.join(manifests.SPLITS)}.")
_CHECKPOINT = flags.DEFINE(cli.PATH, "checkpoint", "best", "best, latest, or the path of one without its suffix.")
_DATA = flags.DEFINE(cli.PATH, "data", None, "The run's converted data, where it has moved since.")


def main(argv: Sequence[str]) -> None:
    del argv
    workdir, split = Workdir(_WORKDIR.value), _SPLIT.value
    config = workdir.config()
    manifest = workdir.data(config, _DATA.value, split)
    output = workdir.path / "inspection"
    owned.check(output, owned.INSPECTIONS)
    with manifests.in_use(manifest.data_dir):
        _inspect(workdir, config, manifest, split, output)


def _inspect(workdir: Workdir, config: Any, manifest: Manifest, split: str, output: Path) -> None:
    """Looks, prints and writes."""
    quieten_tensorflow()
    from stem_tf import summary, trained
    from stem_tf.models.snapshots import Snapshots

    use_memory_as_needed()
    found = trained.load(workdir, config, manifest, _CHECKPOINT.value)
    age = report.age(found.epoch, found.step)
    print(f"{config.experiment}: {config.model.name}; {found.checkpoint} ({age})\n")
    members = found.model.members if isinstance(found.model, Snapshots) else [found.model]
    print(summary.summary(members[0]))
    if len(members) > 1:
        print(f"\n{len(members)} sets of these weights, one for each epoch that is some task's best")

    # Of several sets of weights each task's gate is looked at in the one that scores the task.
    tasks_of = found.model.tasks_of if isinstance(found.model, Snapshots) else [manifest.schema.task_names]
    gates: dict[str, Any] = {}
    for member, tasks in zip(members, tasks_of, strict=True):
        seen = utilisation(member, manifest, split, config.data)
        others = {task.name for task in member.tasks} - set(tasks)
        gates |= {name: values for name, values in seen.items() if values["reader"] not in others}
    if not gates:
        print(f"\n{config.model.name} has no gates")
        return
    rows = manifest.rows(split)
    print(f"\ngates on {split}, {rows:,} rows: mean weight of each expert ± standard deviation\n{table(gates)}")
    owned.claim(output, owned.INSPECTIONS)
    write_json(output / f"gates-{split}.json", {"split": split, "rows": rows, "epoch": found.epoch, "gates": gates})
    written = [f"gates-{split}.json"]
    if picture(gates, output / f"gates-{split}.png"):
        written.append(f"gates-{split}.png")
    else:
        print("no picture: matplotlib is not installed (pip install 'stem-tf[plots]')")
    _to_tensorboard(workdir, gates, split, output / f"gates-{split}.png")
    print(f"written to {output}: {', '.join(written)}; for TensorBoard under {workdir.tensorboard / 'gates'}")
    print(f"next: tensorboard --logdir={shlex.quote(str(workdir.tensorboard))}")


def utilisation(model: RankingModel, manifest: Manifest, split: str, data: Any) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation, over a split's rows, of every gate's weights.

    Returns:
      By the gate's name: ``reader``, ``level``, ``experts`` (names [E]), ``mean`` and ``std`` ([E]).
    """
    import tensorflow as tf

    from pipelines.batches.damage import naming_corrupt_records
    from pipelines.batches.dataset import read_batches
    from stem_tf.evaluation import predictions
    from stem_tf.layers.gate import Gate, observe
    from stem_tf.summary import gate_names
    from stem_util.progress import Progress

    gates: list[Gate] = []

    @tf.function(autograph=False)
    def sums(batch: Mapping[str, Any]) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """Of each gate's weights, and of their squares; rows that only pad the batch left out."""
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
        for batch in read_batches(manifest, split, training=False, **predictions.reading(data)):
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
    """A line a gate, a column an expert."""
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
    """Draws a panel a gate: bars of the mean weights, lines of their standard deviations, as PLE Fig. 8 does.

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
    import tensorflow as tf

    from stem_tf.training.logger import writing

    with writing(workdir.tensorboard):
        with tf.summary.create_file_writer(str(workdir.tensorboard / "gates")).as_default(step=0):
            for name, gate in gates.items():
                for expert, mean, std in zip(gate["experts"], gate["mean"], gate["std"], strict=True):
                    tf.summary.scalar(f"gate/{split}/{name}/{expert}/mean", mean)
                    tf.summary.scalar(f"gate/{split}/{name}/{expert}/std", std)
            if image.exists():
                tf.summary.image(f"gates/{split}", tf.image.decode_png(image.read_bytes(), channels=3)[tf.newaxis])


def run() -> None:
    """Console script ``stem-inspect``."""
    cli.run(main, flags, memory="a run with a smaller config.model.dim or config.data.batch_size")


if __name__ == "__main__":
    run()
