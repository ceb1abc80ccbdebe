"""Trains a model on converted data; the same command continues a run that was stopped.

stem-train --config=kuairand_sample --config.data.dir=DATA --config.model.shared_experts=8 --workdir=RUN
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines import manifest as manifests
from pipelines.manifest import Manifest
from stem_tf import cluster as clusters
from stem_tf import configs, peers, report
from stem_tf.peers import Interrupted, Peers
from stem_tf.runtime import quieten_tensorflow
from stem_tf.training import preconditions
from stem_tf.workdir import Workdir
from stem_util import cli, stores
from stem_util.errors import UserError
from stem_util.version import versions

if TYPE_CHECKING:
    from stem_tf.training.outcome import Outcome
    from stem_tf.training.trainer import Trainer

flags = cli.Flags()

_CONFIG = flags.DEFINE(
    cli.PATH,
    "config",
    None,
    f"Experiment: {', '.join(configs.shipped())}, or the path of a Python file with get_config().",
    required=True,
)
_OVERRIDES = flags.DEFINE_multi_string(configs.OVERRIDE, [], "KEY=VALUE; --config.KEY=VALUE is short for it.")
_WORKDIR = flags.DEFINE(
    cli.PLACE, "workdir", None, "Directory of the run, or its URI; runs/<config.experiment> by default."
)
_INPUT_FORMAT = flags.DEFINE_string(
    "input_format", None, f"{', '.join(manifests.INPUT_FORMATS)}: short for --config.data.input_format."
)
_TASKS = flags.DEFINE_list(
    "tasks", [], "Train these tasks only, and leave out the data's others: short for --config.data.tasks."
)
_FROM = flags.DEFINE(
    cli.PLACE,
    "from",
    None,
    "Go on from this run or exported model, on other data (docs/every_day.md): short for --config.start.run.",
)
_SKIP_UNUSED = flags.DEFINE_bool(
    "skip_unused_keys",
    False,
    "Leave out --config keys that do nothing for the chosen model, and print a line about each, instead of refusing "
    "them: one command line then serves several models.",
)

_serves = False
"""Whether this process is a worker or a parameter server."""


def main(argv: Sequence[str]) -> None:
    del argv
    overrides = [*_OVERRIDES.value]
    if _INPUT_FORMAT.value is not None:
        overrides.append(f"data.input_format={_INPUT_FORMAT.value}")
    if _TASKS.value:
        overrides.append(f"data.tasks={','.join(_TASKS.value)}")
    if _FROM.value is not None:
        overrides.append(f"start.run={stores.absolute(_FROM.value)}")
    config = configs.load(_CONFIG.value, overrides, print if _SKIP_UNUSED.value else None)
    if not config.data.dir:
        raise UserError("--config.data.dir is not given: the directory that stem-convert wrote")
    own = clusters.read(config.train.strategy)
    if own is not None and own.has_servers and not own.is_chief:
        _serve(own, config)
        return
    with preconditions.prepared(config, _WORKDIR.value, own) as (manifest, workdir, found):
        _train(config, manifest, workdir, found)


def _serve(own: clusters.Cluster, config: Any) -> None:
    """Is a worker or a parameter server until the chief ends."""
    global _serves
    _serves = True
    timeout = config.train.peer_timeout
    preconditions.check_strategy(config, _WORKDIR.value)
    chief = peers.attend(own, versions(), timeout)
    quieten_tensorflow()
    from stem_tf.training import servers

    servers.serve(own, chief, Workdir(preconditions.directory_of(config, _WORKDIR.value)).report, timeout)


def _train(config: Any, manifest: Manifest, workdir: Workdir, found: Peers) -> None:
    quieten_tensorflow()
    from stem_tf.training import outcome
    from stem_tf.training.trainer import Trainer

    trainer = Trainer(config, manifest, workdir, peers=found)
    if found.is_chief:
        _say_start(trainer)
    else:
        print(f"process {found.rank} of {found.count}: the chief says how the run goes", flush=True)
    try:
        trainer.run()
    except Interrupted as interrupted:
        written = workdir.named(workdir.checkpoints)
        print(
            f"{interrupted}: stopped at step {trainer.global_step:,}, checkpoint written to {written}\n"
            f"to go on: {cli.command_line('stem_tf.jobs.train')}"
        )
        sys.exit(128 + interrupted.signal)
    if found.is_chief:
        _say_end(trainer, outcome.write(trainer, cli.command_line("stem_tf.jobs.train")))


def _say_start(trainer: Trainer) -> None:
    from stem_tf.training import start

    config, manifest, state = trainer.config, trainer.manifest, trainer.state
    tables, network = trainer.parameters()
    tasks = manifest.schema.task_names
    print(
        f"{config.experiment}: {config.model.name}, {len(tasks)} {'tasks' if len(tasks) > 1 else 'task'}, "
        f"{tables + network:,} parameters ({tables:,} in tables, {network:,} in the network)"
    )
    epochs = config.train.epochs
    print(
        f"data: {manifest.data_dir}, {manifest.rows('train'):,} train and {manifest.rows('validation'):,} validation "
        f"rows\n{trainer.steps:,} steps per epoch, {config.data.batch_size:,} rows each, up to {epochs} "
        f"{'epochs' if epochs > 1 else 'epoch'}"
    )
    if state.best_epoch >= 0 and not any(trainer.workdir.best.glob("*.index")):
        report.warn(
            f"the best weights, those of epoch {state.best_epoch + 1}, are gone from {trainer.workdir.best}; until an "
            "epoch is better, only --checkpoint=latest can be evaluated"
        )
    for path in trainer.checkpoints.damaged:
        report.warn(f"{path} is damaged; the one before it is used")
    if trainer.resumed_from and (state.stopped or state.epoch >= config.train.epochs):
        hint = "" if state.stopped else "; raise --config.train.epochs to train on"
        print(f"{trainer.workdir.path} is finished: {trainer.why_ended()}{hint}")
    elif trainer.resumed_from:
        if state.ancestor:
            print(start.describe(state.ancestor)[0])
        print(
            f"going on from step {trainer.global_step:,} (epoch {state.epoch + 1}, step {state.step:,} of "
            f"{trainer.steps:,}), {trainer.resumed_from}"
        )
    sys.stdout.flush()


def _say_end(trainer: Trainer, reached: Outcome) -> None:
    state, workdir = trainer.state, trainer.workdir
    if not reached.complete:
        report.warn(f"{workdir.metrics} lacks the evaluation of some epochs, and so does the report")
    kind = "mean AUC" if trainer.monitor.kind == "auc" else "loss"
    rate = f"; {state.samples / state.seconds:,.0f} samples/s" if state.seconds else ""
    print(f"{_best_weights(trainer, kind, reached.report['best'])}. Stopped: {reached.report['stopped']}{rate}")
    written = [workdir.best, workdir.checkpoints, workdir.report]
    if reached.picture:
        written.append(workdir.learning_curves)
    else:
        print("no picture of the learning curves: matplotlib is not installed (pip install 'stem-tf[plots]')")
    print(f"written to {workdir.place}: {', '.join(str(path.relative_to(workdir.path)) for path in written)}")
    print(f"next: stem-evaluate --workdir={shlex.quote(workdir.place)} --split=test")


def _best_weights(trainer: Trainer, kind: str, kept: Mapping[str, Any]) -> str:
    """What RUN/best holds and how it scores, in words."""
    state, choice = trainer.state, trainer.choice
    own = {task: (of["best_epoch"] + 1, report.number(of["best_score"])) for task, of in state.by_task.items()}
    if choice is None and own:
        return "best epoch of each task: " + ", ".join(
            f"{task} {epoch} ({score})" for task, (epoch, score) in own.items()
        )
    score = report.number(kept["score"])
    if choice is None or choice.tried is None:
        return f"best epoch {kept['epoch']}: validation {kind} {score}"
    by_task = ", ".join(f"{task} {report.number(value)}" for task, value in choice.by_task.items())
    epochs = ", ".join(f"{task} {epoch}" for task, (epoch, _) in own.items())
    if choice.assembled:
        return (
            f"best weights: each task's own from its best epoch ({epochs}), the rest from epoch {kept['rest_epoch']}: "
            f"validation {kind} {score} ({by_task}); epoch {state.best_epoch + 1} alone reaches "
            f"{report.number(choice.whole)}"
        )
    at_a_cost = (
        ", and a task that this does not count gets worse" if trainer.monitor.better(choice.tried, choice.whole) else ""
    )
    alone = ", ".join(f"{task} {value}" for task, (_, value) in own.items())
    return (
        f"best weights: epoch {kept['epoch']} alone: validation {kind} {score} ({by_task}). The tasks' own weights "
        f"from their best epochs ({epochs}) are not used: together they reach {report.number(choice.tried)}{at_a_cost}."
        f" --config.train.best=by_task, in a new --workdir, serves each task from its best epoch ({alone})"
    )


def _keys() -> str:
    module = next((word.partition("=")[2] for word in sys.argv if word.startswith("--config.model.module=")), "")
    return f"\nConfig keys and their defaults, --config.KEY=VALUE:\n{configs.describe(module)}"


def run() -> None:
    """Console script ``stem-train``."""
    less = "a smaller config.model.dim or config.data.batch_size (or fewer ids: a higher min_count in the schema)"
    try:
        cli.run(main, flags, memory=less, rewritten=configs.override_flags, described=_keys)
    except SystemExit as ended:
        if not _serves:
            raise
        # TensorFlow cannot stop a server, and one that other processes were connected to keeps Python from ending.
        os._exit(ended.code if isinstance(ended.code, int) else int(ended.code is not None))


if __name__ == "__main__":
    run()
