"""How much each feature matters to each task: what a model loses when the feature's values are shuffled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from pipelines.schema import Task
from stem_tf.evaluation import metrics
from stem_tf.evaluation.intervals import Resamples
from stem_tf.models.predictor import Predictor

SHUFFLES = 3
_BATCH_ROWS = 4096


def importance(
    model: Predictor, rows: Mapping[str, Any], groups: NDArray | None, resamples: int, seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Permutation importance (Breiman 2001; Fisher et al., JMLR 2019) of every feature for every task.

    A feature's values are shuffled among the N rows, which keeps their distribution and breaks their connection with
    everything else; the loss is ``AUC before - AUC after``, or for a regression ``MSE after - MSE before``: above 0
    where the model needs the feature. A feature that others can stand in for loses little. The same rows and seed give
    the same shuffles for every model.

    Args:
      model: the model.
      rows: a batch of N rows in numpy arrays.
      groups: [N] users of the rows, for the bootstrap; or None, then rows are drawn.
      resamples, seed: of the bootstrap.

    Returns:
      By feature and task: ``lost``, the mean of the shuffles, and its standard errors ``sd_shuffles`` over them and
      ``sd_rows`` over users. NaN where the task's metric is not defined on these rows.
    """
    count = len(rows["row_id"])
    drawn = Resamples(groups, resamples, seed, rows=count)
    spec = {name: tf.TensorSpec([None, *values.shape[1:]], values.dtype) for name, values in rows["features"].items()}

    @tf.function(input_signature=[spec], autograph=False)
    def score(features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return model.scores(model(features))

    def measured(features: Mapping[str, NDArray]) -> dict[str, NDArray[np.float64]]:
        """By task its metric on the rows, then on each resample: [1 + R], larger is better."""
        parts = []
        for start in range(0, count, _BATCH_ROWS):
            part = score({name: tf.constant(values[start : start + _BATCH_ROWS]) for name, values in features.items()})
            parts.append({task: values.numpy() for task, values in part.items()})
        scores = {task: np.concatenate([part[task] for part in parts]) for task in parts[0]}
        return {
            task.name: _metric(drawn, task, rows["labels"][task.name], scores[task.name], rows["weights"][task.name])
            for task in model.tasks
        }

    before = measured(rows["features"])
    found: dict[str, dict[str, dict[str, float]]] = {}
    for number, (name, values) in enumerate(rows["features"].items()):
        shuffles = [np.random.default_rng((seed, number, again)).permutation(count) for again in range(SHUFFLES)]
        after = [measured({**rows["features"], name: values[order]}) for order in shuffles]
        found[name] = {}
        for task, whole in before.items():
            lost = whole - np.array([of_shuffle[task] for of_shuffle in after])  # [SHUFFLES, 1 + R]
            found[name][task] = {
                "lost": float(lost[:, 0].mean()),
                "sd_shuffles": float(lost[:, 0].std(ddof=1) / SHUFFLES**0.5),
                "sd_rows": float(lost[:, 1:].mean(axis=0).std(ddof=1)),
            }
    return found


def _metric(drawn: Resamples, task: Task, labels: NDArray, scores: NDArray, weights: NDArray) -> NDArray[np.float64]:
    if task.type == "binary":
        return np.r_[metrics.auc(labels, scores, weights), drawn.aucs(labels, scores, weights)]
    errors = np.square(labels.astype(np.float64) - scores)
    return -np.r_[metrics.mse(labels, scores, weights), drawn.means(errors, weights)]
