"""Scores raw values with a run's model in this process, by the graph that an export would publish."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf

from export import exporter, graph
from export.published import Call
from pipelines import outputs
from pipelines.manifest import Manifest
from stem_tf.models.predictor import Predictor
from stem_tf.runtime import exact_products
from stem_tf.workdir import Workdir


class Unpublished:
    """A run's model in the form that `export.scoring.score_log` takes.

    Args:
      workdir: the run, which has copies of its vocabularies.
      manifest: manifest of its data.
      model: the trained model.

    Attributes:
      schema: the schema of the data.
      tasks: names of the tasks.
      outputs: names of the outputs that are made of their scores.
    """

    def __init__(self, workdir: Workdir, manifest: Manifest, model: Predictor) -> None:
        self.schema = manifest.schema
        self.tasks = self.schema.task_names
        self.outputs = tuple(output.name for output in outputs.of(self.schema))
        with tempfile.TemporaryDirectory() as scratch:  # lookup tables read their files at once
            vocabularies = exporter.write_vocabularies(workdir, manifest, Path(scratch))
            self._module = graph.ServingModule(self.schema, model, vocabularies)
        shapes = {feature.name: graph.shape(feature, 1) for feature in self.schema.features}
        inputs = {f.name: tf.TensorSpec(shapes[f.name], tf.as_dtype(f.dtype)) for f in self.schema.features}
        self._score = tf.function(self._module.score, input_signature=[inputs], autograph=False)

    def signature(self, name: str) -> Call:
        """Returns a function from tensors by feature to scores by task, for ``serving_default`` only."""
        if name != "serving_default":
            raise ValueError(name)

        def call(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            with exact_products():
                return {task: scores.numpy() for task, scores in self._score(dict(arrays)).items()}

        return call
