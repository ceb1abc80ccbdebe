"""Hides TensorFlow's own log in jobs, whose every line should be worth reading."""

from __future__ import annotations

import functools
import logging
import os

import absl.logging


def quieten_tensorflow() -> None:
    """Call before TensorFlow is imported. TF_CPP_MIN_LOG_LEVEL in the environment has its way.

    Level 3 leaves only fatal messages of the C++ side: what goes wrong comes as an exception, and TensorFlow 2.16 logs
    errors about CUDA factories on every import.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    absl.logging.set_verbosity(absl.logging.WARNING)


@functools.cache
def start_xla() -> None:
    """Compiles something small with XLA, whose start says lines on stderr that no setting of TensorFlow 2.16 hides.

    Stderr is closed meanwhile. Call it where something is about to be compiled; it takes a quarter of a second, once.
    """
    import tensorflow as tf

    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        with tf.init_scope():  # also while a graph is traced
            tf.function(tf.negative, jit_compile=True)(tf.constant(0.0))
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
