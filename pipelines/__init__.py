"""From raw interaction logs to batches: schema, conversion to TFRecord, input pipelines.

This package imports neither ``stem_tf`` nor ``export``, and never touches ``tf.keras``.
"""

from pathlib import Path

import stem_util

_HERE = Path(__file__).resolve().parent.parent

if stem_util.__file__ is None or Path(stem_util.__file__).resolve().parent.parent != _HERE:
    raise ImportError(
        f"the package stem_util of stem-tf should lie beside {_HERE / 'pipelines'}, but Python finds "
        f"{[*stem_util.__path__][0]}: rename that folder, start Python in another directory, or uninstall what brought "
        "it"
    )
