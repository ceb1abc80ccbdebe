"""STEM-Net and its rivals: layers, models, optimizers, training and evaluation.

``stem_tf.describe``, ``convert``, ``train`` and ``Run`` are the Python API (docs/python.md).

Importing this package does not import TensorFlow; it makes sure that TensorFlow, when it comes, brings Keras 2
(tf_keras), the only Keras that TensorFlow Recommenders works with.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stem_tf.api import Run, convert, describe, train

_HERE = Path(__file__).resolve().parent.parent

for _name in ("stem_util", "pipelines", "export"):  # other projects may use these names, too
    _spec = importlib.util.find_spec(_name)
    if _spec is None or _spec.origin is None or Path(_spec.origin).resolve().parent.parent != _HERE:
        _found = "nowhere" if _spec is None else [*(_spec.submodule_search_locations or []), _spec.origin][0]
        raise ImportError(
            f"the package {_name} of stem-tf should lie beside {_HERE / 'stem_tf'}, but Python finds {_found}: rename "
            "that folder, start Python in another directory, or uninstall what brought it"
        )

# TensorFlow reads this when `tf.keras` is first touched.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
if "tensorflow" in sys.modules:
    import tensorflow as tf

    # `tf.keras` is loaded when first touched: this fails only where that was before the variable was set.
    if "tf_keras" not in tf.keras.__name__:
        raise ImportError(
            f"tf.keras is {tf.keras.__name__}, but stem_tf needs Keras 2: import stem_tf before tf.keras "
            "is first used, or set TF_USE_LEGACY_KERAS=1 in the environment."
        )

from stem_util.version import __version__  # noqa: E402  once it is known to be ours

__all__ = ["Run", "__version__", "convert", "describe", "train"]


def __getattr__(name: str) -> Any:
    """Imports the API when it is first used: the jobs do not need pandas."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stem_tf import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
