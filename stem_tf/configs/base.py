"""Every key of an experiment's config: its default, what it does, and which values it takes.

An experiment is a Python file with ``get_config()`` that starts from :func:`get_config` here and changes keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_collections


@dataclass(frozen=True)
class Key:
    """One config key. Its type is the default's; a tuple holds ints.

    Attributes:
      default: the value where an experiment says nothing.
      help: what the key does.
      choices: the values allowed, or () for a range.
      low, high: bounds of a number, or of each number of a tuple; both are allowed themselves.
      above, below: like ``low`` and ``high``, themselves not allowed.
      only_if: (key, values): with other values of that key this one would do nothing, and is refused.
    """

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    only_if: tuple[str, tuple[Any, ...]] | None = None


_DECAYING = ("cosine", "exponential")

KEYS: dict[str, Key] = {
    "experiment": Key("experiment", "name of the experiment; --workdir is runs/<experiment> unless given"),
    "seed": Key(0, "of weights, dropout and the order of rows", low=0, high=2**31 - 1),
    # Data.
    "data.dir": Key("", "converted data, the --output of stem-convert"),
    "data.layout": Key(
        "blocks", "which records to read: blocks (fast) or rows (a tf.Example a row)", ("blocks", "rows")
    ),
    "data.batch_size": Key(4096, "rows a step, over all replicas; evaluation uses the same", low=1),
    "data.on_corrupt": Key("fail", "a damaged record ends the job, or is skipped and counted", ("fail", "skip")),
    # STEM-Net.
    "model.dim": Key(16, "width of an embedding, for features whose schema names none", low=1),
    "model.task_experts": Key(1, "K1, experts of each task", low=0),
    "model.shared_experts": Key(1, "K2, shared experts", low=0),
    "model.expert_units": Key((512, 512, 512), "widths of an expert's layers", low=1),
    "model.gate_units": Key((128, 64), "hidden widths of a gate; () is the paper's linear gate", low=1),
    "model.gate_input": Key(
        "task+shared", "what a task's gate reads: h_t + h_S, h_t or h_S", ("task+shared", "task", "shared")
    ),
    "model.stop_gradient": Key(True, "keep a task's loss from other tasks' experts and tables"),
    "model.layers": Key(1, "STEM layers one upon the other", low=1),
    "model.released_stacking": Key(
        False, "stack layers as the authors' release does, whose shared gate leaks gradients"
    ),
    "model.tower_units": Key((128, 64), "hidden widths of a task's tower", low=1),
    "model.dropout": Key(0.0, "rate after every hidden layer", low=0, below=1),
    "model.batch_norm": Key(False, "batch normalisation in experts, gates and towers"),
    "model.init_std": Key(1e-4, "tables start from N(0, init_std^2)", low=0),
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
    "optimizer.l2": Key(1e-6, "pulls tables to 0 by l2 / 2 * ||table||^2; sparse: only the batch's rows", low=0),
    "optimizer.tables": Key(
        "sparse", "Adam of the tables: dense moves every row, sparse the batch's", ("dense", "sparse")
    ),
    # Training.
    "train.epochs": Key(8, "at most; may be raised when a run goes on", low=1),
    "train.patience": Key(1, "stop after so many epochs in a row without a better score; 0 never stops early", low=0),
    "train.monitor": Key("auc", "what 'better' means on validation: auc, loss, auc:<task> or loss:<task>"),
    "train.checkpoint_every": Key(1000, "steps between checkpoints inside an epoch; 0: at its end only", low=0),
    "train.log_every": Key(100, "steps between lines of metrics.jsonl and points in TensorBoard", low=1),
    "train.steps_per_execution": Key(1, "steps between returns to Python; checkpoints and logs wait for them", low=1),
    "train.precision": Key(
        "float32", "of experts, gates and towers; tables, losses, scores: float32", ("float32", "mixed_bfloat16")
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
    return ml_collections.ConfigDict(tree).lock()


def describe() -> str:
    """All keys with their defaults, as ``--help`` prints them."""
    shown = {path: f"{path}={_shown(key.default)}" for path, key in KEYS.items()}
    width = max(map(len, shown.values()))
    return "\n".join(f"  {text:<{width}}  {KEYS[path].help}" for path, text in shown.items())


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
