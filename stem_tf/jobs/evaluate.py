"""Evaluates a trained run on a split, beside trivial answers: train means per user and per item, and a bias model.

    stem-evaluate --workdir=RUN --split=test
    stem-evaluate --workdir=RUN --slice=hour,user_id:new     # these rows by themselves, too
    stem-evaluate --workdir=RUN --ranking=ranking.yaml --search_ranking     # one score to rank by

Prints tables; writes metrics as JSON and predictions as Parquet. Metrics have intervals over users.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pipelines import manifest as manifests
from pipelines import ranking
from stem_tf import report
from stem_tf.evaluation import evaluator, ranking_search
from stem_tf.workdir import Workdir
from stem_util import cli
from stem_util.errors import UserError

flags = cli.Flags()

_DEFAULT = ranking_search.Search()

_WORKDIR = flags.DEFINE(
    cli.PLACE, "workdir", None, "Directory or URI of the run, as given to stem-train.", required=True
)
_SPLIT = flags.DEFINE_string("split", "test", f"Which rows: {', '.join(manifests.SPLITS)}.")
_CHECKPOINT = flags.DEFINE(cli.PATH, "checkpoint", "best", "best, latest, or the path of one without its suffix.")
_OUTPUT = flags.DEFINE(
    cli.PATH, "output", None, "Where to write <split>.json and <split>.parquet; RUN/evaluation by default."
)
_DATA = flags.DEFINE(cli.PLACE, "data", None, "The run's converted data, if it has moved since.")
_INPUT_FORMAT = flags.DEFINE_string(
    "input_format", None, f"{', '.join(manifests.INPUT_FORMATS)}: what to read the rows from; as in the run by default."
)
_CALIBRATED = flags.DEFINE_bool(
    "calibrated", True, "Calibrated scores, where the run's config.train.calibration asks for them."
)
_K = flags.DEFINE_integer("k", 10, "How many places of each group's list NDCG looks at.")
_SLICE = flags.DEFINE_list(
    "slice",
    [],
    "Rows to measure by themselves, too: COLUMN (each value, or ranges of numbers), COLUMN=VALUE, COLUMN:new (not seen "
    "in train), COLUMN:rare (seen least in train). Any feature, or column that the raw log keeps.",
)
_RANKING = flags.DEFINE(
    cli.PATH,
    "ranking",
    None,
    "One score to rank by, instead of the schema's: a YAML file with a block `ranking`, or a formula such as "
    "click^2*like.",
)
_SEARCH = flags.DEFINE_boolean(
    "search_ranking",
    False,
    "Search the parameters of the ranking that have a range, on validation, for the best NDCG of its gain; writes the "
    "block as ranking.yaml and all trials as ranking_search.json beside the evaluation.",
)
_TRIALS = flags.DEFINE_integer("trials", None, f"How many trials the search makes; {_DEFAULT.trials} by default.")
_SEED = flags.DEFINE_integer("seed", None, f"Seed of the search; {_DEFAULT.seed} by default.")


def main(argv: Sequence[str]) -> None:
    del argv
    search = _search()
    workdir, split = Workdir.fetched(_WORKDIR.value), _SPLIT.value
    evaluation = evaluator.evaluate_run(
        workdir,
        split,
        checkpoint=_CHECKPOINT.value,
        data=_DATA.value,
        input_format=_INPUT_FORMAT.value,
        output=_OUTPUT.value,
        calibrated=_CALIBRATED.value,
        k=_K.value,
        slices=_SLICE.value,
        ranking=_RANKING.value,
        search=search,
    )
    manifest, found, rows = evaluation.manifest, evaluation.found, evaluation.metrics["rows"]
    print(f"{split} of {manifest.data_dir}, {rows:,} rows; {found.checkpoint} ({report.age(found.epoch, found.step)})")
    print(evaluation.table)
    if evaluation.chosen is not None:
        print(f"\n{ranking_search.tables(evaluation.chosen, evaluation.metrics, split)}")
        block = workdir.named(evaluation.output / ranking_search.BLOCK)
        print(f"\n{ranking.text(evaluation.chosen.ranking)}")
        print(f"written to {block}: for the schema, or for --ranking of stem-export and stem-publish")
    print(f"written to {workdir.named(evaluation.output)}: metrics {split}.json, predictions {split}.parquet")
    if split != "test" and manifest.rows("test"):
        print(f"next: stem-evaluate --workdir={shlex.quote(workdir.place)} --split=test")


def _search() -> ranking_search.Search | None:
    if not _SEARCH.value:
        for flag in (_TRIALS, _SEED):
            if flag.present:
                raise UserError(f"--{flag.name} belongs to --search_ranking")
        return None
    trials = _DEFAULT.trials if _TRIALS.value is None else _TRIALS.value
    seed = _DEFAULT.seed if _SEED.value is None else _SEED.value
    if trials < 1 or not 0 <= seed < 2**32:
        raise UserError(f"--trials={trials} --seed={seed}: a search has 1 trial or more, and a seed from 0 to 2^32 - 1")
    return ranking_search.Search(trials, seed)


def run() -> None:
    """Console script ``stem-evaluate``."""
    cli.run(main, flags, memory="a run with a smaller config.model.dim or config.data.batch_size")


if __name__ == "__main__":
    run()
