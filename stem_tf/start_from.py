"""The run, or the exported model, that a run goes on from: found and compared, without TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import manifest as manifests
from pipelines import vocabulary
from pipelines.manifest import Manifest
from pipelines.schema import Feature, Schema, Task
from stem_tf import configs
from stem_tf.workdir import Workdir, has_checkpoints
from stem_util import copies, owned, stores
from stem_util.errors import UserError

_MAY_DIFFER = ("model.dropout", "model.embedding_dropout", "model.init_std")
"""Keys of a model that change neither its weights nor what they mean."""
_OF_STATE = ("optimizer.tables", "optimizer.slots", "loss.weighting")
"""Keys beside those of the model on which it depends what the state of training consists of."""


@dataclass(frozen=True)
class Ancestor:
    """What a run goes on from.

    Attributes:
      place: its path or URI, as users know it.
      config: its config.
      manifest: of the data that it was trained on. Schema and vocabularies lie with the run or the export, so that the
        data themselves may be gone.
      values: the vocabulary of a feature, in the order of the ids.
      run: the run's directory; None for an exported model.
      weights: of an exported model, reads its weights; see :class:`stem_tf.training.start.Weights`.
      stored: how an exported model's tables are stored: float32, or what they were rounded to.
      epoch, step: how far an exported model was trained.
    """

    place: str
    config: Any
    manifest: Manifest
    values: Callable[[str], pa.ChunkedArray]
    run: Workdir | None = None
    weights: Callable[[], Any] | None = None
    stored: str = "float32"
    epoch: Any = 0
    step: int = 0


def find(place: str) -> Ancestor:
    """The run or the exported model at a path or URI; of a directory of versions the newest one.

    Raises:
      UserError: there is neither, or it is damaged.
      JobError: a store does not answer.
    """
    if stores.is_uri(place):
        uri = stores.check(place)
        return _run(place, Workdir.fetched(uri)) if copies.COMPLETE in stores.listing(uri) else _exported(place)
    if not os.path.isdir(place):
        raise UserError(f"--from={place}: there is no such directory")
    kind = owned.kind_of(place)
    if kind == owned.RUN:
        return _run(place, Workdir(place))
    if kind in (owned.VERSIONS, owned.VERSION):
        return _exported(place)
    if (Path(place) / "saved_model.pb").exists():
        raise UserError(
            f"--from={place} is a SavedModel that stem-export did not write: a run goes on from a run or an export of "
            "this program, whose config and vocabularies are known"
        )
    holds = f"holds {kind.name}" if kind else "holds neither"
    raise UserError(f"--from={place} {holds}: give the directory of a run or of an exported model")


def _exported(place: str) -> Ancestor:
    from export import read_back  # what an export holds is for that package to know

    return read_back.read(place)


def _run(place: str, workdir: Workdir) -> Ancestor:
    config = workdir.config()
    manifest = configs.data(config, str(workdir.path))
    manifest.check()

    def values(feature: str) -> pa.ChunkedArray:
        return vocabulary.load(manifests.vocabulary_path(str(workdir.path), feature))["value"]

    return Ancestor(place, config, manifest, values, run=workdir)


def check(ancestor: Ancestor, config: Any, manifest: Manifest) -> None:
    """Refuses an ancestor whose weights would not mean the same in a run of ``config`` on the data of ``manifest``.

    Raises:
      UserError: names the first things that differ, or what the ancestor lacks.
    """
    ours, theirs = configs.flat(config), configs.flat(ancestor.config)
    whole = ancestor.run is not None and config.start.checkpoint == "latest"
    keys = [key for key in ours | theirs if key.startswith("model.") and key not in _MAY_DIFFER]
    if differing := [key for key in keys if ours.get(key) != theirs.get(key)]:
        raise UserError(
            f"--from={ancestor.place} is another model ({_listed(differing, theirs, ours)}): give the same keys, or "
            "train without --from"
        )
    if differing := list(_differences(ancestor.manifest.schema, manifest.schema)):
        raise UserError(
            f"--from={ancestor.place} was trained on data of another schema ({'; '.join(differing)}): convert with the "
            "same features and tasks, or train without --from"
        )
    if whole and (differing := [key for key in _OF_STATE if ours[key] != theirs[key]]):
        raise UserError(
            f"--from={ancestor.place} was trained with other optimizers ({_listed(differing, theirs, ours)}): give the "
            "same keys, or go on from its weights alone (--config.start.checkpoint=best)"
        )
    if ancestor.run is not None:
        _check_run(ancestor.place, ancestor.run, configs.best(ancestor.config), whole)


def _check_run(place: str, run: Workdir, best: str, whole: bool) -> None:
    if run.locked_by() is not None:
        raise UserError(f"--from={place} is being trained by another job: wait until it has ended")
    if whole and not has_checkpoints(run.checkpoints):
        raise UserError(f"--from={place} has no checkpoint: it was not trained, or its {run.checkpoints.name}/ is gone")
    if not whole and not any(run.best.glob("*.index")):
        raise UserError(
            f"--from={place} has no best weights: no epoch was finished, or its {run.best.name}/ is gone; go on from "
            "its last state (--config.start.checkpoint=latest)"
        )
    if not whole and best == "by_task":
        raise UserError(
            f"--from={place} has best weights for each task (its train.best is by_task), of which no one set can be "
            "trained on: go on from its last state (--config.start.checkpoint=latest)"
        )


def _listed(keys: list[str], theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    return "; ".join(f"config.{key} is {theirs.get(key)} there, and {ours.get(key)} here" for key in keys)


def _differences(old: Schema, new: Schema) -> Iterator[str]:
    """What differs between two schemas in what weights depend on, in words."""
    yield from _of_names("feature", [f.name for f in old.features], [f.name for f in new.features])
    yield from _of_names("task", list(old.task_names), list(new.task_names))
    parts: list[list[Feature | Task]] = [[*schema.features, *schema.tasks] for schema in (old, new)]
    before, now = ({(type(part), part.name): _meaning(part) for part in of_schema} for of_schema in parts)
    for key, meaning in now.items():
        for what, value in meaning.items():
            if key in before and before[key][what] != value:
                yield f"{what} of '{key[1]}' is {before[key][what]} there, and {value} here"
    old_tables, new_tables = ([feature.name for feature in schema.task_features] for schema in (old, new))
    if old_tables != new_tables:
        there, here = (", ".join(names) or "no feature" for names in (old_tables, new_tables))
        yield f"tables by task are for {there} there, and for {here} here"


def _of_names(kind: str, old: list[str], new: list[str]) -> Iterator[str]:
    for name in dict.fromkeys([*old, *new]):
        if (name in old) != (name in new):
            yield f"the {kind} '{name}' is only {'there' if name in old else 'here'}"
    if sorted(old) == sorted(new) and old != new:
        yield f"{kind}s are in another order, {', '.join(old)} there"


def _meaning(part: Feature | Task) -> dict[str, Any]:
    """What weights depend on, by the schema's words for it."""
    if isinstance(part, Task):
        return {"type": part.type, "output": part.output, "standardise": part.label.standardise}
    return {
        "kind": part.kind,
        "dtype": part.dtype,
        "dim": part.dim,
        "hash": part.hash,
        "pooling": part.pooling,
        "length": part.length,
        "transform": part.transform,
        "bucketise": part.bucketised,
    }
