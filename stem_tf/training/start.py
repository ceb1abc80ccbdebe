"""Gives a new run the weights, and where it can the whole state of training, of the run that it goes on from.

======================================  ===========================================  ==================================
what                                    from a run's last state                      from weights (best, an export)
======================================  ===========================================  ==================================
weights                                 as they are; rows by value, see `remap`      the same
Adam's moments, Adagrad's sums          as they are; 0 in rows of new values         0
steps of the optimizers                 go on                                        0
steps that rows have missed (deferred)  stay missed; made up for under the earlier   none
                                        settings where the new ones are others
schedules                               go on, or restart                            begin at 0
======================================  ===========================================  ==================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from pipelines import vocabulary
from pipelines.manifest import Manifest
from stem_tf import configs, report, start_from
from stem_tf.start_from import Ancestor
from stem_tf.training import preparation, remap
from stem_tf.training.checkpoints import Held, RunState, hold, latest, read_into
from stem_tf.training.remap import Rows
from stem_tf.training.table_optimizers import DeferredAdam
from stem_util.errors import JobError, UserError, message

if TYPE_CHECKING:
    from stem_tf.models.ranking_model import RankingModel


@dataclass(frozen=True)
class Weights:
    """The weights of a model, without a state of training.

    Attributes:
      table: returns the values of a packed table with rows ``[R, W]``, by its number among those.
      others: values of all other weights, in the order of the model's ``weight_parts``.
    """

    table: Callable[[int], tf.Tensor]
    others: Sequence[tf.Tensor]


def start(
    model: RankingModel,
    state: RunState,
    config: Any,
    manifest: Manifest,
    warn: Callable[[str], None],
) -> list[str]:
    """Starts a run from ``config.start.run``.

    Args:
      model: prepared for training, with initial weights; overwritten, in its strategy's scope.
      state: of the new run; its ``first_step``, ``first_epoch`` and ``ancestor`` are set.
      config: the run's config.
      manifest: of the run's data.
      warn: prints a warning.

    Returns:
      What was done, in lines for the user.

    Raises:
      UserError: there is nothing to go on from, or something that does not fit.
      JobError: it is damaged.
    """
    found = start_from.find(config.start.run)
    start_from.check(found, config, manifest)
    _warn_of_constants(found, manifest, warn)
    rows = remap.remap(
        found.manifest, found.values, manifest, lambda name: vocabulary.load(manifest.vocabulary_path(name))["value"]
    )
    with model.distribute_strategy.scope():
        if found.run is not None and config.start.checkpoint == "latest":
            about = _go_on(model, state, config, found, rows)
        else:
            about = _take_weights(model, found, rows)
        if config.start.new_rows == "mean":
            for group in model.embeddings.groups:
                remap.fill_with_means(group, rows)
    by_feature = {name: of_feature.counts() for name, of_feature in rows.items()}
    state.ancestor = {"from": found.place, **about, "new_rows": config.start.new_rows, "rows": by_feature}
    return describe(state.ancestor)


def describe(ancestor: Mapping[str, Any]) -> list[str]:
    """What a run went on from, in lines for the user; ``ancestor`` as :class:`RunState` holds it."""
    age = report.age(ancestor["epoch"], ancestor["step"])
    what = {
        "run": f"the last state of {ancestor['from']} ({age}): weights and optimizers",
        "best": f"the best weights of {ancestor['from']} ({age}); moments and schedules start anew",
        "export": f"the exported model {ancestor['from']} ({age}); moments and schedules start anew",
    }[ancestor["kind"]]
    lines = [f"goes on from {what}"]
    if ancestor["stored"] != "float32":
        lines.append(f"its tables were rounded to {ancestor['stored']} when it was exported: so are the rows that stay")
    if ancestor["kind"] == "run":
        lines.append(
            f"Adam's step {ancestor['steps'] + 1:,} is next; schedules "
            + ("restart" if ancestor["schedule_step"] == 0 else f"go on at step {ancestor['schedule_step']:,}")
        )
    header = ["rows of", "kept", "new", "reset", "gone", ""]
    cells = [[name, *(f"{n:,}" for n in counts.values()), ""] for name, counts in ancestor["rows"].items()]
    return [*lines, *report.table(header, cells).splitlines()] if cells else lines


def _warn_of_constants(found: Ancestor, manifest: Manifest, warn: Callable[[str], None]) -> None:
    """Warns of numbers that weights will read, or outputs that they make, on another scale than before."""
    before = found.manifest
    refit = [
        feature.name
        for feature in manifest.schema.features
        if feature.kind == "numeric" and before.constants(feature.name) != manifest.constants(feature.name)
    ]
    if refit:
        warn(
            f"the constants of {', '.join(refit)} were fitted anew: the weights read numbers on another scale than "
            "they were trained on"
        )
    scales = [name for name, scale in manifest.label_scales.items() if before.label_scales.get(name) != scale]
    if scales:
        warn(f"the labels of {', '.join(scales)} were standardised anew: the first scores are on the scale of before")


def _take_weights(model: RankingModel, found: Ancestor, rows: Mapping[str, Rows]) -> dict[str, Any]:
    """Takes weights alone; returns where they come from."""
    if found.weights is not None:
        kind, weights, checkpoint = "export", found.weights(), found.place
        epoch, step = found.epoch, found.step
    else:
        from stem_tf import trained
        from stem_tf.models.ranking_model import RankingModel

        assert found.run is not None
        with tf.device("CPU:0"):
            best = trained.load(found.run, found.config, found.manifest, "best", calibrated=False)
        assert isinstance(best.model, RankingModel)
        kind, weights, checkpoint = "best", weights_of(best.model), best.checkpoint
        epoch, step = best.epoch, best.step
    tables = [group for group in model.embeddings.groups if group.rows]
    others = other_weights(model)
    shapes = [tuple(value.shape) for value in weights.others]
    if shapes != [tuple(variable.shape) for variable in others]:
        raise UserError(
            f"--from={found.place} has weights of other shapes than this model: another version of it was trained"
        )
    for variable, value in zip(others, weights.others, strict=True):
        variable.assign(value)
    for number, group in enumerate(tables):
        remap.move(group.table, weights.table(number), group, rows)
    return {
        "kind": kind,
        "checkpoint": checkpoint,
        "epoch": epoch,
        "step": step,
        "steps": 0,
        "schedule_step": 0,
        "stored": found.stored,
    }


def weights_of(model: RankingModel) -> Weights:
    """The weights of a model that is not trained any more."""
    tables = [group.table for group in model.embeddings.groups if group.rows]
    return Weights(lambda number: tables[number].read_value(), [w.read_value() for w in other_weights(model)])


def other_weights(model: RankingModel) -> list[tf.Variable]:
    """All weights but the packed tables."""
    tables = {id(group.table) for group in model.embeddings.groups}
    return [w for part in model.weight_parts.values() for w in part.weights if id(w) not in tables]


def _go_on(
    model: RankingModel, state: RunState, config: Any, found: Ancestor, rows: Mapping[str, Rows]
) -> dict[str, Any]:
    """Takes the last state of a run; returns where it comes from."""
    assert found.run is not None and model.schedule_start is not None
    path = latest(found.run.checkpoints)
    if path is None:
        raise JobError(f"--from={found.place}: none of its checkpoints is whole; take its best weights instead")
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(hold(path))
        except FileNotFoundError as error:
            raise UserError(f"--from={found.place} is being trained by another job: wait until it has ended") from error
        before = RunState()
        names = _names(held)
        settles = config.start.schedule == "restart" or config.start.new_rows == "mean" or _changed(config, found)
        _restore_rest(model, held, before, names)
        now = int(model.global_step.numpy())
        for number, (group, optimizer) in enumerate(
            zip([group for group in model.embeddings.groups if group.rows], model.table_optimizers, strict=True)
        ):
            place = names.get(f"embeddings/groups/{model.embeddings.groups.index(group)}/table")
            place = place or names[f"table_optimizers/{number}/table"]
            remap.move(optimizer.table, _tensor(held, *place), group, rows)
            for index, slot in enumerate(optimizer.slots):
                if slot.dtype == tf.int32:  # the last step of each row; a new one has missed none
                    slot.assign(tf.fill(slot.shape, now))
                remap.move(slot, _tensor(held, *names[f"table_optimizers/{number}/slots/{index}"]), group, rows)
        if settles:
            _settle(model, held, found)
        elif any(isinstance(optimizer, DeferredAdam) for optimizer in model.table_optimizers):
            _restore_sums(model.table_optimizers, held)
    began = int(model.schedule_start.numpy())
    if config.start.schedule == "restart":
        began = now
        model.schedule_start.assign(now)
    state.first_step = now
    state.first_epoch = 0 if config.start.schedule == "restart" else before.first_epoch + before.epoch
    return {
        "kind": "run",
        "checkpoint": path,
        "epoch": before.epoch,
        "step": before.step,
        "steps": now,
        "schedule_step": now - began,
        "stored": "float32",
    }


def _changed(config: Any, found: Ancestor) -> bool:
    """Whether the optimizers have other settings than before."""
    ours, theirs = configs.flat(config), configs.flat(found.config)
    return any(value != theirs[key] for key, value in ours.items() if key.startswith("optimizer."))


def _restore_rest(model: RankingModel, held: Held, state: RunState, names: Mapping[str, Any]) -> None:
    """Restores all but the packed tables and their optimizers."""
    groups = [
        tf.train.Checkpoint(
            **({} if group.numeric_kernel is None else {"numeric_kernel": group.numeric_kernel}),
            dense_kernels=group.dense_kernels,
        )
        for group in model.embeddings.groups
    ]
    parts: dict[str, Any] = {
        "embeddings": tf.train.Checkpoint(groups=groups),
        "network": model.network,
        "network_optimizer": model.network_optimizer,
        "weighting": model.weighting,
        "global_step": model.global_step,
    }
    if "schedule_start" in names:
        parts["schedule_start"] = model.schedule_start
    read_into(parts, held, state)


def _settle(model: RankingModel, held: Held, found: Ancestor) -> None:
    """Makes rows make up for the steps that they have missed, under the settings of the run that made these steps."""
    if not any(optimizer.defers for optimizer in model.table_optimizers):
        return
    config = configs.checked(configs.flat(found.config) | {"train.xla": "off"})
    training = preparation.options(config, found.manifest.schema, model.network.tables)
    assert model.schedule_start is not None
    earlier = preparation.table_optimizers(model, preparation.counted_from(training, model.schedule_start))
    if training.clip_norm:
        _restore_sums(earlier, held)
    for optimizer in earlier:
        optimizer.catch_up(model.global_step)


def _restore_sums(optimizers: Sequence[Any], held: Held) -> None:
    """Restores what deferred steps need to know of how gradients were clipped."""
    sums = [tf.train.Checkpoint(**({"sums": o.sums} if o.clips else {})) for o in optimizers]
    read_into({"table_optimizers": sums}, held, RunState())


def _names(held: Held) -> dict[str, tuple[str, tf.DType]]:
    """Name and dtype of each variable in a checkpoint, by its path below the model."""
    try:
        reader = tf.train.load_checkpoint(held.readable)
        dtypes = reader.get_variable_to_dtype_map()
    except (tf.errors.OpError, ValueError) as error:
        raise _damaged(held, error) from error
    return {
        name.removeprefix("model/").partition("/.ATTRIBUTES")[0]: (name, dtype)
        for name, dtype in dtypes.items()
        if name.startswith("model/")
    }


def _tensor(held: Held, name: str, dtype: tf.DType) -> tf.Tensor:
    """A variable of a checkpoint, in the memory of the host."""
    try:
        with tf.device("CPU:0"):
            return tf.raw_ops.RestoreV2(
                prefix=held.readable, tensor_names=[name], shape_and_slices=[""], dtypes=[dtype]
            )[0]
    except tf.errors.OpError as error:
        raise _damaged(held, error) from error


def _damaged(held: Held, error: Exception) -> JobError:
    why = message(error) if isinstance(error, tf.errors.OpError) else str(error)
    return JobError(f"{held.path} is damaged ({why.replace(held.readable, held.path)}): nothing can go on from it")
