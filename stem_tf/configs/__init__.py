"""Experiments by name or path, overridden key by key and checked.

Importing this package does not import TensorFlow. Loading or checking a config does: the models declare their own keys.
"""

from stem_tf.configs._check import check_names, checked
from stem_tf.configs._help import describe
from stem_tf.configs._load import OVERRIDE, load, override_flags, shipped
from stem_tf.configs._read import applying, best, data, flat, model_of, of_task, reading, task_features
from stem_tf.configs.base import keys, plain

__all__ = [
    "OVERRIDE",
    "applying",
    "best",
    "check_names",
    "checked",
    "data",
    "describe",
    "flat",
    "keys",
    "load",
    "model_of",
    "of_task",
    "override_flags",
    "plain",
    "reading",
    "shipped",
    "task_features",
]
