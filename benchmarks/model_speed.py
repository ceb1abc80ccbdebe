"""Speed of each model's training step on one batch in memory, compared with STEM-Net's.

    python -m benchmarks.model_speed --data=census_data --config=census_income --set=model.experts=3 --steps=5

Each model takes turns with STEM-Net, without input and logs; the ratio is the median over the turns. A key of --set
that would do nothing for a model is left out there. AUC of models is compared by stem-compare.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from pipelines import manifest as manifests
from stem_tf import configs, report
from stem_tf.configs.base import models
from stem_util import cli, owned
from stem_util.errors import UserError

flags = cli.Flags()

_DATA = flags.DEFINE(cli.PATH, "data", None, "Converted data.", required=True)
_CONFIG = flags.DEFINE(cli.PATH, "config", "small", "Experiment whose settings all models get.")
_MODELS = flags.DEFINE_list("models", [], "Which models, all if not given.")
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE of the config, for all models that have the key.")
_STEPS = flags.DEFINE_integer("steps", 30, "Steps of each turn.", lower_bound=1)
_JSON = flags.DEFINE(cli.PATH, "json", None, "File for the figures.")

_TURNS = 3


def main(argv: Sequence[str]) -> None:
    del argv
    known = models()
    if unknown := [model for model in _MODELS.value if model not in known]:
        raise UserError(f"--models: no model '{unknown[0]}'. Models: {', '.join(known)}")
    stem_net, lines, found = _turn("stem_net"), [], {}
    for model in _MODELS.value or known:
        other = _turn(model)
        pairs = [(stem_net(), other()) for _ in range(_TURNS)]
        own = statistics.median(speed for _, speed in pairs)
        ratio = statistics.median(speed / reference for reference, speed in pairs)
        found[model] = {"samples_per_second": own, "ratio": ratio, "turns": pairs}
        lines.append([model, f"{own:,.0f}", f"{ratio:.2f}", ""])
    if _JSON.value is not None:
        owned.write_figures(_JSON.value, found)
    print(report.table(["model", "samples/s", "times STEM-Net's", ""], lines))


def _turn(model: str) -> Callable[[], float]:
    """Builds a model; returns a function that measures some of its steps, in samples per second."""
    import tensorflow as tf

    from pipelines.batches.dataset import read_batches
    from stem_tf import models

    overrides = [f"data.dir={_DATA.value}", f"model.name={model}", *_SET.value]
    config = configs.load(_CONFIG.value, overrides, lambda sentence: None)
    manifest = manifests.load(config.data.dir)
    built = models.build(config, manifest)
    reading = configs.reading(config.data)
    batch = next(iter(read_batches(manifest, "train", training=True, seed=0, epoch=0, start_step=0, **reading)))
    step = tf.function(built.train_step)
    for _ in range(3):
        step(batch)

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(_STEPS.value):
            loss = step(batch)["loss"]
        float(loss)
        return float(_STEPS.value * config.data.batch_size / (time.perf_counter() - start))

    return measure


if __name__ == "__main__":
    cli.run(main, flags)
