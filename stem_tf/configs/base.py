"""Every key of an experiment's config: its default, what it does, and which values it takes.

An experiment is a Python file with ``get_config()`` that starts from :func:`get_config` here and changes keys.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_collections

from pipelines.manifest import INPUT_FORMATS, LAYOUTS


@dataclass(frozen=True)
class Key:
    """One config key. Its type is the default's; a tuple holds ints.

    Attributes:
      default: the value where an experiment says nothing.
      help: what the key does.
      by: ``task`` or ``table``: a mapping from their names to values may stand instead of one value.
      by_level: a tuple of values, one a level, may stand instead of one value.
      choices: the values allowed, or () for a range.
      low, high: bounds of a number, or of each number of a tuple; both are allowed themselves.
      above, below: like ``low`` and ``high``, themselves not allowed.
      only_if: (key, values): with other values of that key this one would do nothing, and is refused.
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


INIT_STD, NFWFM_INIT_STD = 1e-4, 0.01
"""Standard deviations that tables start from: the authors' release's, and where experts only multiply embeddings."""

_DECAYING = ("cosine", "exponential")

MODELS: dict[str, str] = {
    "single_task": "a network and a table for each task, nothing shared",
    "shared_bottom": "one bottom, a tower for each task; hard parameter sharing",
    "asymmetric_sharing": "a bottom for each task; receivers also read their giver's",
    "customized_sharing": "a shared bottom and one for each task",
    "cross_stitch": "a bottom for each task, stitched after each layer",
    "sluice": "Cross-Stitch on subspaces, towers read all layers",
    "omoe": "mixture of experts with one gate for all tasks",
    "mmoe": "mixture of experts with a gate for each task",
    "ml_mmoe": "levels of experts, all gates read the input",
    "me_mmoe": "MMoE with a table for each expert",
    "cgc": "experts of each task and shared ones; one level of PLE",
    "ple": "levels of CGC, progressively separated",
    "me_ple": "PLE with a table for each task and a shared one",
    "esmm": "each task's probability is a product along its chain",
    "aitm": "each task attends to what the one before it learned",
    "stem_net": "STEM-Net",
}
"""The models by name: those of the STEM paper and of the PLE paper."""

_MMOES = ("omoe", "mmoe", "ml_mmoe", "me_mmoe")
_PLES = ("cgc", "ple", "me_ple")
_CHAINS = ("esmm", "aitm")
_GATED = (*_MMOES, *_PLES, "stem_net")
_LAYERED = ("ml_mmoe", "ple", "me_ple", "stem_net")
_EXPERT = tuple(name for name in MODELS if name not in ("cross_stitch", "sluice", "esmm"))


def _only(*models: str) -> tuple[str, tuple[str, ...]]:
    return ("model.name", models)


KEYS: dict[str, Key] = {
    "experiment": Key("experiment", "name of the experiment; --workdir is runs/<experiment> unless given"),
    "seed": Key(0, "of weights, dropout and the order of rows", low=0, high=2**31 - 1),
    # Data.
    "data.dir": Key("", "converted data, the --output of stem-convert"),
    "data.input_format": Key(
        "blocks",
        "what to read: blocks (records, fast), rows (records, a tf.Example a row), or parquet (the log itself)",
        INPUT_FORMATS,
    ),
    "data.batch_size": Key(4096, "rows a step, over all replicas; evaluation uses the same", low=1),
    "data.on_corrupt": Key(
        "fail",
        "a damaged record ends the job, or is skipped and counted",
        ("fail", "skip"),
        only_if=("data.input_format", LAYOUTS),
    ),
    "data.shuffle_megabytes": Key(
        1024,
        "rows held in memory and permuted as a whole; a larger split is dealt out to such pools anew every epoch. Two"
        " are in memory at a time",
        low=1,
    ),
    "data.run_kilobytes": Key(
        0,
        "of a split that is larger than a pool, read so much in one go: more where seeks are dear; 0 is one block",
        low=0,
        only_if=("data.input_format", LAYOUTS),
    ),
    # The model. Network: keyword arguments of its class, and Parts.
    "model.name": Key("stem_net", "which model; they are listed below", tuple(MODELS)),
    "model.dim": Key(16, "width of an embedding, for features whose schema names none", low=1),
    "model.init_std": Key(
        0.0,
        f"tables start from N(0, init_std^2); 0 is the expert's own: {NFWFM_INIT_STD:g} for nfwfm, whose products of"
        f" smaller ones learn late, else {INIT_STD:g}",
        low=0,
    ),
    "model.task_features": Key(
        "schema",
        "features with tables of their own for each task: all, none, user, item, names a,b, or as the schema says",
        only_if=_only("stem_net", "me_ple"),
    ),
    "model.embedding_dropout": Key(0.0, "rate on the embeddings", low=0, below=1),
    "model.layers": Key(
        0, "levels of experts; 0 is the model's own: 2 for ple and ml_mmoe, else 1", low=0, only_if=_only(*_LAYERED)
    ),
    "model.experts": Key(8, "E, experts (of each level)", by_level=True, low=1, only_if=_only(*_MMOES)),
    "model.task_experts": Key(
        1, "K1, experts of each task (and level)", by="task", by_level=True, low=0, only_if=_only(*_PLES, "stem_net")
    ),
    "model.shared_experts": Key(
        1, "K2, shared experts (of each level)", by_level=True, low=0, only_if=_only(*_PLES, "stem_net")
    ),
    "model.expert": Key(
        "mlp",
        "what an expert of the first level is; the bottom, for models without experts",
        ("mlp", "fwfm", "nfwfm", "dcn"),
        only_if=_only(*_EXPERT),
    ),
    "model.expert_units": Key(
        (512, 512, 512),
        "widths of an expert's layers (of each level)",
        by_level=True,
        low=1,
        only_if=_only(*(name for name in MODELS if name != "esmm")),
    ),
    "model.cross_layers": Key(2, "cross layers of an expert", low=1, only_if=("model.expert", ("dcn",))),
    "model.gate_units": Key(
        (128, 64), "hidden widths of a gate; () is the papers' linear gate", low=1, only_if=_only(*_GATED)
    ),
    "model.gate_bias": Key(True, "bias in gates; the papers' equations have none", only_if=_only(*_GATED)),
    "model.gate_input": Key(
        "task+shared",
        "what a task's gate reads: h_t + h_S, h_t or h_S",
        ("task+shared", "task", "shared"),
        only_if=_only("stem_net"),
    ),
    "model.stop_gradient": Key(
        True, "keep a task's loss from other tasks' experts and tables", only_if=_only("stem_net")
    ),
    "model.released_stacking": Key(
        False,
        "levels as in the authors' release: STEM-Net's shared gate leaks gradients, PLE's sees shared experts only",
        only_if=_only("stem_net", "ple", "me_ple"),
    ),
    "model.follows": Key(
        "", "chain of tasks, each with the one it follows: buy:cart,cart:click", by="task", only_if=_only(*_CHAINS)
    ),
    "model.calibrator": Key(
        0.0, "weight of the loss where a task's probability exceeds its predecessor's", low=0, only_if=_only("aitm")
    ),
    "model.gives": Key(
        "", "receivers, each with its giver: like:click", by="task", only_if=_only("asymmetric_sharing")
    ),
    "model.fusion": Key(
        "concat",
        "how a receiver joins its bottom and its giver's",
        ("concat", "sum", "mean"),
        only_if=_only("asymmetric_sharing"),
    ),
    "model.orthogonality": Key(0.0, "weight that keeps a task's subspaces apart", low=0, only_if=_only("sluice")),
    "model.tower_units": Key((128, 64), "hidden widths of a task's tower", low=1),
    "model.dropout": Key(0.0, "rate after every hidden layer", low=0, below=1),
    "model.batch_norm": Key(False, "batch normalisation in experts, gates and towers"),
    # Losses.
    "loss.weights": Key(1.0, "of the tasks, times the schema's", by="task", low=0),
    "loss.weighting": Key(
        "static",
        "of the tasks in training: static, decaying (PLE Eq. 10) or uncertainty (Kendall et al.)",
        ("static", "decaying", "uncertainty"),
    ),
    "loss.gamma": Key(
        1.0,
        "factor on a task's weight every epoch or step",
        by="task",
        above=0,
        only_if=("loss.weighting", ("decaying",)),
    ),
    "loss.gamma_per": Key(
        "epoch", "how often gamma acts", ("epoch", "step"), only_if=("loss.weighting", ("decaying",))
    ),
    "loss.label_smoothing": Key(0.0, "e: binary labels become y (1 - e) + e / 2", by="task", low=0, below=1),
    "loss.positive_weight": Key(1.0, "weight of a binary task's positive rows", by="task", above=0),
    # Optimizer: Adam.
    "optimizer.learning_rate": Key(1e-3, "its peak", above=0),
    "optimizer.schedule": Key("constant", "of the learning rate after the warm-up", ("constant", *_DECAYING)),
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
        0.0, "of the peak, where the cosine ends", low=0, high=1, only_if=("optimizer.schedule", ("cosine",))
    ),
    "optimizer.clip_norm": Key(10.0, "global norm to which gradients are scaled down; 0 never does", low=0),
    "optimizer.l2": Key(
        1e-6,
        "pulls tables to 0 by l2 / 2 * ||table||^2; lazy and adagrad: only the batch's rows",
        by="table",
        low=0,
    ),
    "optimizer.network_l2": Key(0.0, "the same of the network's weights", low=0),
    "optimizer.tables": Key(
        "deferred",
        "how tables are trained: dense, Adam moves every row; deferred, the same result for the work of the batch's"
        " rows, which make up for missed steps when read; lazy, Adam moves the batch's rows only; adagrad, row-wise",
        ("deferred", "dense", "lazy", "adagrad"),
    ),
    "optimizer.slots": Key(
        "float32",
        "moments of the tables: float32; bfloat16, half the memory; rowwise, one second moment an embedding",
        ("float32", "bfloat16", "rowwise"),
        only_if=("optimizer.tables", ("deferred", "lazy")),
    ),
    # Training.
    "train.epochs": Key(8, "at most; may be raised when a run goes on", low=1),
    "train.patience": Key(
        1,
        "stop after so many epochs in a row without a better score; 0 never stops early; may change when a run goes on",
        low=0,
    ),
    "train.monitor": Key("auc", "what 'better' means on validation: auc, loss, auc:<task> or loss:<task>"),
    "train.best": Key(
        "auto",
        "best weights: together, of one epoch; own, of each task's best epoch its own layers and tables, the rest of"
        " the epoch that suits them best, if that beats one epoch; by_task, all of each task's, a set for each; auto:"
        " own for single_task, else together",
        ("auto", "together", "own", "by_task"),
    ),
    "train.checkpoint_every": Key(1000, "steps between checkpoints inside an epoch; 0: at its end only", low=0),
    "train.log_every": Key(100, "steps between lines of metrics.jsonl and points in TensorBoard", low=1),
    "train.steps_per_execution": Key(1, "steps between returns to Python; checkpoints and logs wait for them", low=1),
    "train.precision": Key(
        "float32", "of experts, gates and towers; tables, losses, scores: float32", ("float32", "mixed_bfloat16")
    ),
    "train.xla": Key(
        "auto",
        "compile with XLA: network, the layers; step, the whole step; auto: off on a CPU; on a GPU step, or network for"
        " batches above 32,768 and several replicas",
        ("auto", "off", "network", "step"),
    ),
    "train.strategy": Key(
        "none", "mirrored: all GPUs of the machine, each with its share of the batch", ("none", "mirrored")
    ),
    "train.deterministic": Key(False, "the same bits again from the same seed (slower on a GPU)"),
}


def get_config() -> ml_collections.ConfigDict:
    """The defaults: STEM-Net as in the paper."""
    return from_flat({path: key.default for path, key in KEYS.items()})


def from_flat(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """``{"model.dim": 8, ...}`` as a config of groups; no keys can be added to it."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *groups, name = path.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    # Not type-safe: a mapping may stand for a number. stem_tf.configs.checked() sees to the types.
    return ml_collections.ConfigDict(tree, type_safe=False).lock()


def describe() -> str:
    """All keys with their defaults and the models by name, as ``--help`` prints them."""
    keys = [(f"{path}={_shown(key.default)}", _help(key)) for path, key in KEYS.items()]
    return "\n".join([*_columns(keys), "\nModels, --config.model.name=NAME:", *_columns(list(MODELS.items()))])


def _help(key: Key) -> str:
    words = [key.help]
    if key.by and key.default != "":
        words.append(f"one value, or by {key.by}: NAME:VALUE,NAME:VALUE")
    if key.only_if is not None:
        other, allowed = key.only_if
        few = len(allowed) < len(MODELS) / 2
        words.append(f"only for {'' if other == 'model.name' else f'{other}='}{', '.join(allowed)}" if few else "")
    return "; ".join(filter(None, words))


def _columns(rows: Sequence[tuple[str, str]], wide: int = 118) -> list[str]:
    """Two columns as lines of text, the second one wrapped."""
    width = max(len(first) for first, _ in rows)
    lines = []
    for first, second in rows:
        start, *rest = textwrap.wrap(second, wide - width - 4)
        lines += [f"  {first:<{width}}  {start}", *(f"{'':{width + 4}}{line}" for line in rest)]
    return lines


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
