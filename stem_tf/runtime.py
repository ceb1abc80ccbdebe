"""Sets TensorFlow up for a job: its log, its memory, XLA, and the devices that a run is spread over."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import absl.logging

from stem_tf import cluster as clusters
from stem_util.errors import UserError

if TYPE_CHECKING:
    import tensorflow as tf


def quieten_tensorflow() -> None:
    """Call before TensorFlow is imported. TF_CPP_MIN_LOG_LEVEL in the environment takes precedence.

    Level 3 leaves only fatal messages of the C++ side: what goes wrong comes as an exception, and TensorFlow 2.16 logs
    errors about CUDA factories on every import.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    absl.logging.set_verbosity(absl.logging.WARNING)


@functools.cache
def start_xla() -> None:
    """Starts XLA, without the lines that it prints.

    Call it before something is compiled; it compiles something small, which takes a quarter of a second, once.
    """
    import tensorflow as tf

    with _stderr_closed(), tf.init_scope():  # also while a graph is traced
        tf.function(tf.negative, jit_compile=True)(tf.constant(0.0))


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
    """Closes stderr for what prints lines that no setting of TensorFlow 2.16 hides."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def use_memory_as_needed() -> None:
    """Keeps TensorFlow from taking all memory of the GPUs at the start."""
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # too late where TensorFlow runs already, as it may in a notebook
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)


def start_tensorflow() -> None:
    """Imports TensorFlow, quiet, and with the memory of GPUs taken as needed."""
    quieten_tensorflow()
    use_memory_as_needed()


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Makes a GPU multiply in float32 like a CPU, so that their scores can be compared; otherwise it rounds to TF32."""
    import tensorflow as tf

    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


def set_up(config: Any) -> tf.distribute.Strategy:
    """Sets TensorFlow up for a run, before anything is built; returns the strategy to build the model in.

    Raises:
      UserError: the replicas cannot share the batch evenly, or TensorFlow runs already and can no longer be made
        deterministic, or join a cluster.
    """
    import tensorflow as tf

    use_memory_as_needed()
    if config.train.deterministic:  # weights, dropout and the order of rows have seeds of their own
        tf.config.experimental.enable_op_determinism()
        # AddN sums its inputs starting with the first one whose buffer nobody else is reading, which depends on the
        # order in which threads finish other operations. Kernels still use all cores.
        try:
            tf.config.threading.set_inter_op_parallelism_threads(1)
        except RuntimeError:
            raise UserError(
                "config.train.deterministic has to be set before TensorFlow runs anything in a process: restart Python "
                "(the notebook's kernel) and train first"
            ) from None
    if config.train.strategy in ("none", "parameter_server"):
        return tf.distribute.get_strategy()
    if config.train.strategy == "multi_worker":
        strategy = _multi_worker()
    else:
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        strategy = _mirrored(tuple(device.name for device in devices))
    if config.data.batch_size % strategy.num_replicas_in_sync:
        raise UserError(
            f"config.data.batch_size={config.data.batch_size} does not divide by the {strategy.num_replicas_in_sync} "
            f"replicas of config.train.strategy={config.train.strategy}"
        )
    return strategy


@functools.cache
def _multi_worker() -> tf.distribute.Strategy:
    """The process's only strategy over the cluster in TF_CONFIG: TensorFlow can join one cluster, once."""
    import tensorflow as tf

    own = clusters.parse(os.environ[clusters.VARIABLE])  # TensorFlow's own reader crashes on a kind without tasks
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(own.addresses), task_type=own.kind, task_id=own.index, rpc_layer="grpc"
    )
    try:
        with _stderr_closed():
            return tf.distribute.MultiWorkerMirroredStrategy(resolver)
    except RuntimeError:
        raise UserError(
            "config.train.strategy=multi_worker has to be set before TensorFlow runs anything in a process: restart "
            "Python and train first"
        ) from None


@functools.cache
def _mirrored(devices: tuple[str, ...]) -> tf.distribute.Strategy:
    """The process's only strategy over ``devices``.

    TensorFlow remembers a process's collective operations by number, and every new strategy counts from the start: its
    sums would be taken for those of a strategy before, and fail where their shapes differ.
    """
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(devices)
