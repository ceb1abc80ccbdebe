"""The keys of an experiment's config that are not a model's own: defaults, what they do, which values they take.

A model declares its hyperparameters itself (stem_tf/models), and :func:`keys` adds them to those here. An experiment is
a Python file with ``get_config()`` that starts from :func:`get_config` here and changes keys.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import ml_collections

from pipelines.manifest import INPUT_FORMATS, LAYOUTS
from stem_tf.runtime import quieten_tensorflow
from stem_util.errors import UserError

if TYPE_CHECKING:
    from stem_tf.models.registry import Model


@dataclass(frozen=True)
class Key:
    """One config key. Its type is the default's; a tuple holds ints.

    Attributes:
      default: the value where an experiment says nothing.
      help: what the key does.
      by: ``task`` or ``table``: a mapping from their names to values may be given instead of one value.
      by_level: a tuple with a value per level may be given instead of one value.
      choices: the values allowed, or () for a range.
      low, high: bounds of a number, or of each number of a tuple; both are allowed themselves.
      above, below: like ``low`` and ``high``, but not allowed themselves.
      only_if: (key, values): with other values of that key this one would do nothing, and is refused.
      only_with: a key; where that is empty, this one would do nothing, and is refused.
      stacked: whether it does something only in a model with several levels.
    """

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    by: Literal["", "task", "table"] = ""
    by_level: bool = False
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    only_if: tuple[str, tuple[Any, ...]] | None = None
    only_with: str = ""
    stacked: bool = False


INIT_STD, NFWFM_INIT_STD = 1e-4, 0.01
"""Initial standard deviation of tables: the authors' release's, and the one for experts that multiply embeddings."""

_DECAYING = ("cosine", "exponential")
_TABLES_ADAM = ("optimizer.tables", ("deferred", "dense", "lazy"))

KEYS: dict[str, Key] = {
    "experiment": Key("experiment", "name of the experiment; --workdir is runs/<experiment> unless given"),
    "seed": Key(0, "seed of weights, dropout and the order of rows", low=0, high=2**31 - 1),
    # Data.
    "data.dir": Key("", "converted data, the --output of stem-convert"),
    "data.tasks": Key("", "the tasks to train, as in click,like; all tasks of the data if empty"),
    "data.input_format": Key(
        "blocks",
        "what to read: blocks (records, fast), rows (records, one tf.Example per row), or parquet (the log itself)",
        INPUT_FORMATS,
    ),
    "data.batch_size": Key(4096, "rows per step, over all replicas; evaluation uses the same", low=1),
    "data.parts": Key(
        0,
        "parts that the rows of train are dealt out to in every epoch, each with an equal share of every batch; 0: as"
        " many as processes. Runs of as many parts have the same batches, whatever the number of processes",
        low=0,
        only_if=("data.input_format", LAYOUTS),
    ),
    "data.on_corrupt": Key(
        "fail",
        "a damaged record ends the job, or is skipped and counted",
        ("fail", "skip"),
        only_if=("data.input_format", LAYOUTS),
    ),
    "data.shuffle_megabytes": Key(
        1024,
        "size of the pool of rows that is shuffled as a whole; a larger split is dealt out to several pools, anew every"
        " epoch. Two pools are in memory at a time",
        low=1,
    ),
    "data.run_kilobytes": Key(
        0,
        "how much of a split that is larger than a pool is read in one go: more where seeks are slow; 0 is one block",
        low=0,
        only_if=("data.input_format", LAYOUTS),
    ),
    # The model. Its own hyperparameters follow: see keys().
    "model.name": Key("stem_net", "which model; they are listed below"),
    "model.module": Key("", "Python module that registers models of your own, as in my_team.my_model"),
    "model.dim": Key(16, "width of an embedding, for features whose schema names none", low=1),
    "model.init_std": Key(
        0.0,
        f"tables start from N(0, init_std^2); 0 is the expert's own: {NFWFM_INIT_STD:g} for nfwfm, whose products of"
        f" smaller embeddings learn late, else {INIT_STD:g}",
        low=0,
    ),
    "model.embedding_dropout": Key(0.0, "dropout rate on the embeddings", low=0, below=1),
    # Losses.
    "loss.weights": Key(1.0, "weights of the tasks, times the schema's", by="task", low=0),
    "loss.weighting": Key(
        "static",
        "how the tasks' weights change in training: static, decaying (PLE Eq. 10), uncertainty (Kendall et al.), or"
        " gradnorm (Chen et al.), for a backward pass per task",
        ("static", "decaying", "uncertainty", "gradnorm"),
    ),
    "loss.gamma": Key(
        1.0,
        "factor on a task's weight per epoch or step",
        by="task",
        above=0,
        only_if=("loss.weighting", ("decaying",)),
    ),
    "loss.gamma_per": Key(
        "epoch",
        "whether gamma acts per epoch or per step",
        ("epoch", "step"),
        only_if=("loss.weighting", ("decaying",)),
    ),
    "loss.gradnorm_alpha": Key(
        1.5,
        "how much more a task that learns slowly is to pull on what the tasks share; at 0 all pull alike",
        low=0,
        only_if=("loss.weighting", ("gradnorm",)),
    ),
    "loss.gradnorm_learning_rate": Key(
        0.01,
        "learning rate of the tasks' weights, whose sum stays",
        above=0,
        only_if=("loss.weighting", ("gradnorm",)),
    ),
    "loss.label_smoothing": Key(0.0, "e: binary labels become y (1 - e) + e / 2", by="task", low=0, below=1),
    "loss.positive_weight": Key(1.0, "weight of a binary task's positive rows", by="task", above=0),
    # Optimizer: Adam.
    "optimizer.learning_rate": Key(1e-3, "peak of the learning rate", above=0),
    "optimizer.schedule": Key("constant", "learning rate after the warm-up", ("constant", *_DECAYING)),
    "optimizer.warmup_steps": Key(0, "steps over which the learning rate rises to its peak", low=0),
    "optimizer.decay_steps": Key(
        0,
        "cosine: steps until the final fraction; exponential: steps per decay_rate",
        low=0,
        only_if=("optimizer.schedule", _DECAYING),
    ),
    "optimizer.decay_rate": Key(
        0.5,
        "factor on the learning rate every decay_steps",
        above=0,
        high=1,
        only_if=("optimizer.schedule", ("exponential",)),
    ),
    "optimizer.final_fraction": Key(
        0.0, "fraction of the peak at which the cosine ends", low=0, high=1, only_if=("optimizer.schedule", ("cosine",))
    ),
    "optimizer.clip_norm": Key(10.0, "global norm to which gradients are scaled down; 0 never does", low=0),
    "optimizer.conflicts": Key(
        "sum",
        "tasks' gradients on the weights that several tasks train: sum; or pcgrad (Yu et al.), what points against"
        " another task's is taken out of each first, for a backward pass per task",
        ("sum", "pcgrad"),
    ),
    "optimizer.l2": Key(
        1e-6,
        "pulls tables to 0 by l2 / 2 * ||table||^2; lazy and adagrad: only the batch's rows",
        by="table",
        low=0,
    ),
    "optimizer.network_l2": Key(0.0, "the same for the network's weights", low=0),
    "optimizer.tables": Key(
        "deferred",
        "how tables are trained: dense, Adam moves every row; deferred, the same result for the work of the batch's"
        " rows, which make up for missed steps when read; lazy, Adam moves the batch's rows only; adagrad, row-wise",
        ("deferred", "dense", "lazy", "adagrad"),
    ),
    "optimizer.tables_learning_rate": Key(
        0.0, "peak learning rate of the tables, on the same schedule; 0 is optimizer.learning_rate", low=0
    ),
    "optimizer.tables_beta_1": Key(
        0.9, "decay of the first moment per step, in the tables' Adam", above=0, below=1, only_if=_TABLES_ADAM
    ),
    "optimizer.tables_beta_2": Key(0.999, "the same for the second moment", above=0, below=1, only_if=_TABLES_ADAM),
    "optimizer.slots": Key(
        "float32",
        "moments of the tables: float32; bfloat16, half the memory; rowwise, one second moment per embedding",
        ("float32", "bfloat16", "rowwise"),
        only_if=("optimizer.tables", ("deferred", "lazy")),
    ),
    # What a run starts from, instead of initial weights.
    "start.run": Key(
        "", "a run, or an exported model, that this run goes on from on other data (docs/every_day.md); short: --from"
    ),
    "start.checkpoint": Key(
        "latest",
        "latest, the whole state of training that the run ended with; best, its best weights, with fresh moments and"
        " step 0. Of an exported model there are weights only",
        ("latest", "best"),
        only_with="start.run",
    ),
    "start.new_rows": Key(
        "fresh",
        "rows of the tables for values that the run did not know: fresh, initial weights; mean, the mean over the"
        " feature's values that stay",
        ("fresh", "mean"),
        only_with="start.run",
    ),
    "start.schedule": Key(
        "continue",
        "learning rate and decaying loss weights: continue, from the step that the run has reached; restart, from step"
        " 0 (Adam's bias correction goes on with its moments)",
        ("continue", "restart"),
        only_with="start.run",
    ),
    # Training.
    "train.epochs": Key(8, "most epochs to train; may be raised when a run is continued", low=1),
    "train.patience": Key(
        1,
        "stop after this many epochs in a row without a better score; 0 never stops early; may change when a run is"
        " continued",
        low=0,
    ),
    "train.monitor": Key("auc", "what 'better' means on validation: auc, loss, auc:<task> or loss:<task>"),
    "train.best": Key(
        "auto",
        "best weights to keep: together, those of one epoch; own, each task's own layers and tables from its best"
        " epoch, the rest from the epoch that suits them best, if that beats one epoch alone; by_task, a whole set of"
        " weights for each task, from its best epoch; auto, own for a model whose tasks share nothing, else together",
        ("auto", "together", "own", "by_task"),
    ),
    "train.calibration": Key(
        "none",
        "how scores of binary tasks are made probabilities, fitted on validation at the end of training: platt,"
        " temperature, isotonic; undersampling, a correction for negatives that the log lacks; may change when a run is"
        " continued (docs/every_day.md)",
        ("none", "platt", "temperature", "isotonic", "undersampling"),
        by="task",
    ),
    "train.negatives_kept": Key(
        1.0,
        "share of a task's negatives that the log has kept",
        by="task",
        above=0,
        high=1,
        only_if=("train.calibration", ("undersampling",)),
    ),
    "train.checkpoint_every": Key(1000, "steps between checkpoints inside an epoch; 0: at its end only", low=0),
    "train.log_every": Key(100, "steps between lines of metrics.jsonl and points in TensorBoard", low=1),
    "train.steps_per_execution": Key(1, "steps between returns to Python; checkpoints and logs wait for them", low=1),
    "train.precision": Key(
        "float32", "of experts, gates and towers; tables, losses and scores are float32", ("float32", "mixed_bfloat16")
    ),
    "train.xla": Key(
        "auto",
        "compile with XLA: network, the layers; step, the whole step; auto: off on a CPU; on a GPU step, or network for"
        " batches above 32,768 and several replicas",
        ("auto", "off", "network", "step"),
    ),
    "train.strategy": Key(
        "none",
        "mirrored: all GPUs of the machine, each with its share of the batch; multi_worker: the same over the processes"
        " in TF_CONFIG; parameter_server: processes that hold the tables by rows, and workers that train asynchronously"
        " (docs/beyond_one_machine.md)",
        ("none", "mirrored", "multi_worker", "parameter_server"),
    ),
    "train.peer_timeout": Key(
        600.0,
        "seconds after which a process of the cluster that does not answer ends the run, or one that gets no further"
        " (compiling a step counts); as long do processes wait for each other at the start",
        low=30,
        only_if=("train.strategy", ("multi_worker", "parameter_server")),
    ),
    "train.deterministic": Key(False, "the same seed gives the same bits (slower on a GPU)"),
}


def models(module: str = "") -> Mapping[str, Model]:
    """The models by name: those of stem_tf.models, and those that ``module`` registers. Imports TensorFlow.

    Raises:
      UserError: the module cannot be imported, or registers nothing.
    """
    if "tensorflow" not in sys.modules:
        quieten_tensorflow()
    from stem_tf.models import registry

    return registry.models(module)


def keys(module: str = "") -> dict[str, Key]:
    """All keys: those of :data:`KEYS`, and after ``model.*`` the models' own, the most widely shared ones first.

    Raises:
      UserError: two models declare one key differently, or see :func:`models`.
    """
    own: dict[str, Key] = {}
    taken_by: Counter[str] = Counter()
    known = models(module)
    for name, model in known.items():
        for hyperparameter, key in model.keys.items():
            path = f"model.{hyperparameter}"
            if (KEYS | own).get(path, key) != key:
                raise UserError(
                    f"the model '{name}' declares config.{path}, which is declared differently already: give the "
                    "hyperparameter another name, or inherit it"
                )
            own[path] = key
            taken_by[path] += 1
    named = {"model.name": dataclasses.replace(KEYS["model.name"], choices=tuple(known))}
    groups = list(dict.fromkeys(path.partition(".")[0] for path in KEYS))
    together = KEYS | named | {path: own[path] for path, _ in taken_by.most_common()}
    return {path: together[path] for path in sorted(together, key=lambda path: groups.index(path.partition(".")[0]))}


def get_config(module: str = "") -> ml_collections.ConfigDict:
    """The defaults: STEM-Net as in the paper. ``module`` registers models of your own, and adds their keys."""
    return from_flat({path: key.default for path, key in keys(module).items()} | {"model.module": module})


def from_flat(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """``{"model.dim": 8, ...}`` as a config of groups; no keys can be added to it."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *groups, name = path.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    # Not type-safe: a mapping may be given for a number. stem_tf.configs.checked() checks the types.
    return ml_collections.ConfigDict(tree, type_safe=False).lock()


def to_flat(config: Any, known: Mapping[str, Key]) -> dict[str, Any]:
    """``{"model.dim": 8, ...}`` of a config of groups. ``known``: the keys, whose values may be mappings themselves."""
    values: dict[str, Any] = {}

    def add(node: Any, prefix: str) -> None:
        for name, value in node.items():
            path = f"{prefix}{name}"
            if isinstance(value, Mapping | ml_collections.ConfigDict) and path not in known:
                add(value, f"{path}.")
            else:
                values[path] = plain(value)

    add(config, "")
    return values


def plain(value: Any) -> Any:
    """A mapping as a dict, whichever kind of mapping it is."""
    return dict(value.items()) if isinstance(value, Mapping | ml_collections.ConfigDict) else value


def numbers(value: Any) -> list[Any]:
    """All numbers of a value, however deep in mappings and tuples."""
    if isinstance(value, dict):
        value = tuple(value.values())
    return [n for v in value for n in numbers(v)] if isinstance(value, tuple) else [value]
