"""A trained run in Python: its model, metrics, scores and export. docs/python.md has examples."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pandas as pd
import pyarrow.parquet as pq

from pipelines import manifest as manifests
from pipelines.log.parts import CsvOptions
from pipelines.manifest import Manifest
from pipelines.schema import Schema
from stem_tf import configs
from stem_tf.evaluation import evaluator
from stem_tf.in_memory import Log, files_of
from stem_tf.runtime import start_tensorflow
from stem_tf.workdir import Workdir
from stem_util import stores
from stem_util.errors import UserError

if TYPE_CHECKING:
    import tf_keras

    from stem_tf.inspection import Inspection
    from stem_tf.trained import Trained

Tables = Literal["float32", "bfloat16", "int8"]


class Run:
    """A run that `stem_tf.train`, or the job stem-train, has trained.

    Methods that need the weights load them on the first call and keep them: open a run again after more training.

    Args:
      workdir: directory of the run, or its URI.
      checkpoint: ``best``, ``latest``, or the path of one without its suffix.
      data: directory of the run's converted data, if it has moved since.
      calibrated: calibrated scores, where the run's config asks for them (``train.calibration``).

    Attributes:
      workdir: paths and files of the run.
      config: its config, complete and read-only.

    Raises:
      UserError: there is no run in ``workdir``.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        checkpoint: str | os.PathLike[str] = "best",
        data: str | os.PathLike[str] | None = None,
        calibrated: bool = True,
    ) -> None:
        self.workdir = Workdir.fetched(os.path.expanduser(workdir))
        self.config = self.workdir.config()
        self._checkpoint, self._calibrated = os.fspath(checkpoint), calibrated
        self._data = None if data is None else os.path.expanduser(data)

    def __repr__(self) -> str:
        return f"Run({self.workdir.place!r}): {self.config.experiment}, {self.config.model.name}"

    @property
    def schema(self) -> Schema:
        """The schema of the data that the run was trained on."""
        return self._copies.schema

    @property
    def model(self) -> tf_keras.Model:
        """The trained model, a ``tf_keras.Model``: from ids and numbers as converted data holds them to logits.

        `predict` takes raw values.

        Raises:
          UserError: there is no such checkpoint.
        """
        return self._trained.model

    def history(self) -> pd.DataFrame:
        """Validation metrics, one row per epoch: epoch, step, score and columns such as ``auc/click``."""
        records = [record for record in self.workdir.read_metrics() if record["kind"] == "validation"]
        return pd.DataFrame.from_records(records).drop(columns="kind", errors="ignore")

    def evaluate(
        self,
        split: str = "test",
        output: str | os.PathLike[str] | None = None,
        *,
        k: int = 10,
        slices: Sequence[str] = (),
        ranking: str | None = None,
    ) -> dict[str, Any]:
        """The metrics of the run on a split, as the job stem-evaluate measures them; prints nothing.

        Args:
          split: ``train``, ``validation`` or ``test``.
          output: where to write ``<split>.json`` and ``<split>.parquet``; RUN/evaluation by default.
          k: how many places of each group's list NDCG looks at.
          slices: rows to measure by themselves, too, such as ``["hour", "user_id:new"]``; see ``stem-evaluate --help``.
          ranking: one score to rank by, instead of the schema's: a YAML file or a formula.

        Returns:
          The content of ``<split>.json``: ``mean_auc``, the metrics of each task in ``tasks``, and the checkpoint that
          was evaluated. A metric that is not defined is None.

        Raises:
          UserError: other data, no such split, no rows in it, or no such checkpoint or slice.
        """
        return evaluator.evaluate_run(
            self.workdir,
            split,
            data=self._data,
            output=None if output is None else os.path.expanduser(output),
            found=self._trained,
            k=k,
            slices=slices,
            ranking=ranking,
        ).metrics

    def inspect(self, split: str = "test") -> Inspection:
        """Tables, parameters, and how each gate uses the experts on a split, as the job stem-inspect shows them.

        Returns:
          An `Inspection`: ``print()`` it, or read its ``gates``.

        Raises:
          UserError: other data, no such split, no rows in it, or no such checkpoint.
        """
        manifest = self.workdir.data(self.config, self._data, split)
        with manifests.in_use(manifest.data_dir):
            found = self._trained
            from stem_tf import inspection

            return inspection.inspect(found, manifest, split, self.config.data)

    def predict(
        self,
        log: Log,
        *,
        csv: CsvOptions | None = None,
        drop_bad_rows: bool = False,
    ) -> pd.DataFrame:
        """Scores raw rows with the graph that an export has: a server returns the same scores.

        Args:
          log: a DataFrame or a pyarrow Table with the columns of the features, or the paths of a log.
          csv: how CSV files are written.
          drop_bad_rows: leave out rows that conversion would refuse, instead of refusing the log.

        Returns:
          Float32 columns: outputs that are made of scores, as ``ranking_score``, then the tasks. The index is the
          DataFrame's, or each row's place in the log.

        Raises:
          UserError: columns or rows that do not fit the schema, or no such checkpoint.
        """
        scorer = self._scorer
        # Imported here: stem_tf does not depend on export, except when these methods are called.
        from export import scoring

        with tempfile.TemporaryDirectory() as scratch, files_of(log) as paths:
            output = Path(scratch) / "scores.parquet"
            scoring.score_log(scorer, paths, output, csv=csv, drop_bad_rows=drop_bad_rows)
            columns = scoring.score_columns(scorer)
            scores = pq.read_table(output, columns=[scoring.ROW, *columns.values()]).to_pandas()
        rows = scores.pop(scoring.ROW)
        scores.columns = pd.Index(columns)
        return scores.set_axis(log.index[rows] if isinstance(log, pd.DataFrame) else pd.Index(rows))

    def export(
        self,
        output: str | os.PathLike[str],
        *,
        name: str = "ranker",
        tables: Tables = "float32",
        ranking: str | None = None,
    ) -> Path | str:
        """Publishes the run as the next version under ``output``, as the job stem-export does.

        Args:
          output: directory of the model's versions, or its URI.
          name: the model's name, by which services ask for it.
          tables: how embedding tables are stored.
          ranking: one score to rank by, instead of the schema's: a YAML file or a formula.

        Returns:
          The version's directory; a str, its URI, where ``output`` is one.

        Raises:
          UserError: an output that may not be written to, other data, no such checkpoint, or a mistake in ``ranking``.
          JobError: the exported model does not reproduce the trainer's scores, or a store does not answer.
        """
        from export import preconditions, stored  # see `predict`

        if tables not in get_args(Tables):
            raise UserError(f"--tables={tables}: should be one of {', '.join(get_args(Tables))}")
        place = os.path.expanduser(output)
        with stored.staging(place) as directory:
            manifest = preconditions.check(self.workdir, self.config, self._data, directory, name, ranking)
            start_tensorflow()
            from export import exporter

            version, _ = exporter.export(
                self.workdir,
                self.config,
                manifest,
                self._checkpoint,
                directory,
                name,
                tables,
                calibrated=self._calibrated,
            )
            uploaded = stored.upload(version, place)
        return uploaded if stores.is_uri(place) else version

    @functools.cached_property
    def _copies(self) -> Manifest:
        """The run's copy of the manifest of its data; copies of the vocabularies lie beside it."""
        return configs.data(self.config, str(self.workdir.path))

    @functools.cached_property
    def _trained(self) -> Trained:
        start_tensorflow()
        from stem_tf import trained

        return trained.load(self.workdir, self.config, self._copies, self._checkpoint, calibrated=self._calibrated)

    @functools.cached_property
    def _scorer(self) -> Any:
        found = self._trained
        from export.unpublished import Unpublished  # see `predict`

        return Unpublished(self.workdir, self._copies, found.model)
