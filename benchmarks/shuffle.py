"""Test AUC with the order of the training job, compared with a plain loop that permutes all rows every epoch.

    python -m benchmarks.shuffle --data=DIR --output=runs/shuffle

The plain loop has no pools: it holds the train split in numpy, permutes it and feeds slices to the same model through a
generator. Both have experts 256-128, gates and towers 64, D = 16, batch 4096, lr 1e-3, patience 1. There is one run per
model, L2, order and seed; test AUC is that of the best epoch. A finished run is not trained again.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import manifest as manifests
from stem_tf import configs, report
from stem_tf.runtime import quieten_tensorflow
from stem_util import cli, owned

flags = cli.Flags()

_DATA = flags.DEFINE(cli.PATH, "data", None, "Converted data, with records.", required=True)
_OUTPUT = flags.DEFINE(cli.PATH, "output", "runs/shuffle", "Where figures are kept.")
_MODELS = flags.DEFINE_list("models", ["shared_bottom", "stem_net"], "config.model.name.")
_L2 = flags.DEFINE_list("l2", ["1e-6", "1e-4"], "config.optimizer.l2.")
_ORDERS = flags.DEFINE_list("orders", ["job", "plain"], "Of job and plain, which to train in.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the runs.")
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE of the config, for all runs.")
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the figures to this file.")

_SETTINGS = ["model.expert_units=256,128", "model.tower_units=64"]


def main(argv: Sequence[str]) -> None:
    del argv
    quieten_tensorflow()
    manifest, output = manifests.load(_DATA.value), Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    experiment = output / "experiment.py"
    experiment.write_text("from stem_tf.configs.base import get_config\n", encoding="utf-8")
    lines, figures = [], []
    for model in _MODELS.value:
        gates = ["model.gate_units=64"] if model == "stem_net" else []
        for l2 in _L2.value:
            for order in _ORDERS.value:
                tests, epochs = [], []
                for seed in _SEEDS.value:
                    path = output / f"{model}-{l2}-{order}-{seed}.json"
                    overrides = [f"data.dir={manifest.data_dir}", f"model.name={model}", f"optimizer.l2={l2}"]
                    overrides += [f"seed={seed}", "train.best=together", *_SETTINGS, *gates, *_SET.value]
                    if not path.exists():
                        config = configs.load(str(experiment), overrides)
                        path.write_text(json.dumps(_run(config, manifest, order)), encoding="utf-8")
                    found = json.loads(path.read_text(encoding="utf-8"))
                    figures.append({"model": model, "l2": l2, "order": order, "seed": seed, **found})
                    tests.append(found["test"])
                    epochs.append(found["best_epoch"])
                    print(f"{path.stem}: {found}", file=sys.stderr, flush=True)
                spread = report.number((max(tests) - min(tests)) / 2)
                mean = f"{report.number(statistics.mean(tests))} ±{spread}"
                lines.append([model, l2, order, mean, " ".join(map(report.number, tests)), " ".join(map(str, epochs))])
    print(report.table(["model", "L2", "order", "test AUC", "by seed", "best epochs"], lines))
    if _JSON.value:
        owned.write_figures(_JSON.value, figures)


def _run(config: Any, manifest: manifests.Manifest, order: str) -> dict[str, Any]:
    """Trains until patience ends; the mean AUC over the tasks on test and validation at the best epoch."""
    import tensorflow as tf

    from pipelines.batches.dataset import count_batches
    from stem_tf import models
    from stem_tf.evaluation import metrics, predictions, scoring

    tf.keras.utils.set_random_seed(config.seed)
    model = models.build(config, manifest)
    reading = configs.reading(config.data)
    steps = count_batches(manifest, "train", training=True, **reading)
    epochs = _permuted(manifest, config) if order == "plain" else _of_the_job(manifest, config)

    def score(split: str) -> float:
        predicted = scoring.predict(model, manifest, split, config.data, desc=split)
        return metrics.mean_auc(predictions.evaluate(predicted, manifest))

    best: dict[str, Any] = {"best_epoch": 0, "validation": 0.0}
    for epoch in range(1, config.train.epochs + 1):
        model.epoch.assign(epoch - 1)
        model.fit(next(epochs), initial_epoch=epoch - 1, epochs=epoch, steps_per_epoch=steps, verbose=0)
        validation = score("validation")
        if validation > best["validation"]:
            best = {"best_epoch": epoch, "validation": validation, "test": score("test")}
        elif epoch - best["best_epoch"] >= config.train.patience > 0:
            break
    return best


def _of_the_job(manifest: manifests.Manifest, config: Any) -> Iterator[Any]:
    from pipelines.batches.dataset import read_batches

    for epoch in range(config.train.epochs):
        yield read_batches(
            manifest, "train", training=True, seed=config.seed, epoch=epoch, **configs.reading(config.data)
        )


def _permuted(manifest: manifests.Manifest, config: Any) -> Iterator[Any]:
    """Epochs of batches of all rows, permuted by numpy."""
    import tensorflow as tf

    from pipelines.batches.dataset import read_batches

    size = config.data.batch_size
    in_order = read_batches(manifest, "train", training=False, **configs.reading(config.data))
    rows = tf.nest.map_structure(lambda *parts: np.concatenate(parts), *in_order.as_numpy_iterator())
    rows = tf.nest.map_structure(lambda values: values[: manifest.rows("train")], rows)
    random = np.random.default_rng(config.seed)
    while True:
        order = random.permutation(manifest.rows("train"))

        def batches(order: np.ndarray = order) -> Iterator[Any]:
            for start in range(0, len(order) - size + 1, size):
                places = order[start : start + size]
                yield tf.nest.map_structure(lambda values, places=places: values[places], rows)

        yield tf.data.Dataset.from_generator(batches, output_signature=in_order.element_spec).prefetch(2)


if __name__ == "__main__":
    cli.run(main, flags)
