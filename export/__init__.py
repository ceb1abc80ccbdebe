"""From a trained run to a service: makes, checks and publishes a SavedModel, serves it, and scores logs with it.

This package imports ``pipelines`` and ``stem_tf``; neither imports it.
"""

import stem_tf  # noqa: F401  chooses Keras 2
