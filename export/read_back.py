"""What a run that goes on from an exported model needs of it: config, vocabularies and weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pyarrow as pa

from export import publish, stored, vocabulary_asset
from pipelines import hashed_ids, schema_yaml
from pipelines import manifest as manifests
from pipelines.manifest import Constants, Hashed, LabelScale, Manifest, Vocabulary
from stem_tf import configs
from stem_tf.start_from import Ancestor
from stem_util import files
from stem_util.errors import JobError, UserError, message

_AGAIN = "export the model again, or go on from its run"


def read(place: str) -> Ancestor:
    """The version at a path or URI, or the newest one in a directory of versions.

    Raises:
      UserError: there is none, its files have changed, or it lacks what a run needs.
      JobError: a store does not answer.
    """
    directory = publish.version_at(stored.fetched(place))
    if directory is None:
        raise UserError(f"--from={place} holds no exported version")
    if why := publish.damage(directory):
        raise UserError(f"--from={directory} is not the version that was published: {why}")
    path = directory / manifests.FILENAME
    tree = files.read_json(path, _AGAIN)
    try:
        config = configs.checked(tree["run"]["config"])
        manifest = _manifest(directory, tree)
        return Ancestor(
            str(directory),
            config,
            manifest,
            functools.partial(_values, directory, tree, manifest),
            weights=functools.partial(weights, directory),
            stored=tree["tables"]["stored"],
            epoch=tree["run"]["epoch"],
            step=tree["run"]["step"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} lacks what a run needs to go on from it ({error!r}): {_AGAIN}") from None


def _manifest(directory: Path, tree: dict[str, Any]) -> Manifest:
    """The part of the data's manifest that says what the model's rows are of."""
    schema = schema_yaml.load(directory / "schema.yaml")
    hashed = {
        f.name: Hashed(f.hash.buckets, f.hash.hashes, hashed_ids.FUNCTIONS[f.dtype], 0)
        for f in schema.features
        if f.hash
    }
    numerics = {
        name: Constants(**{**constants, "boundaries": tuple(constants["boundaries"])})
        for name, constants in tree["data"]["numerics"].items()
    }
    return Manifest(
        data_dir=str(directory),
        name=tree["data"]["name"],
        seed=0,
        sources=(),
        split={},
        splits={},
        vocabularies={name: Vocabulary(of["size"], of["size"]) for name, of in tree["vocabularies"].items()},
        numerics=numerics,
        label_scales={task: LabelScale(**scale) for task, scale in tree["data"]["label_scales"].items()},
        hashed=hashed,
    )


def _values(directory: Path, tree: dict[str, Any], manifest: Manifest, feature: str) -> pa.ChunkedArray:
    """A feature's vocabulary."""
    path = directory / publish.vocabularies(tree)[feature]
    return pa.chunked_array([vocabulary_asset.read(path, manifest.schema.feature(feature).dtype)])


def weights(directory: Path) -> Any:
    """The weights of a version, see :class:`stem_tf.training.start.Weights`; its tables as float32.

    Raises:
      UserError: it has the weights of several epochs.
      JobError: it is damaged.
    """
    import tensorflow as tf

    from stem_tf.training.start import Weights

    def read(*names: str) -> list[tf.Tensor]:
        keys = [f"{name}/.ATTRIBUTES/VARIABLE_VALUE" for name in names]
        try:
            with files.literal(directory) as path, tf.device("CPU:0"):
                return tf.raw_ops.RestoreV2(
                    prefix=f"{path}/variables/variables",
                    tensor_names=keys,
                    shape_and_slices=[""] * len(keys),
                    dtypes=[dtypes[key] for key in keys],
                )
        except tf.errors.OpError as error:
            raise JobError(f"{directory} cannot be read: {message(error)}") from error

    with files.literal(directory) as path:
        dtypes = tf.train.load_checkpoint(f"{path}/variables/variables").get_variable_to_dtype_map()

    def table(number: int) -> tf.Tensor:
        prefix = f"stored/{number}"
        if f"{prefix}/scales/.ATTRIBUTES/VARIABLE_VALUE" not in dtypes:
            return tf.cast(read(f"{prefix}/values")[0], tf.float32)
        codes, scales = read(f"{prefix}/values", f"{prefix}/scales")
        width = codes.shape[1] // scales.shape[1]
        return tf.cast(codes, tf.float32) * tf.repeat(scales, width, axis=1)

    count = sum(key.startswith("weights/") for key in dtypes)
    return Weights(table, read(*(f"weights/{number}" for number in range(count))))
