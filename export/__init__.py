"""From a trained run to a service: SavedModel, its check and publication, server and batch scoring.

Imports ``pipelines`` and ``stem_tf``; neither imports this.
"""

import stem_tf  # noqa: F401  sees to Keras 2
