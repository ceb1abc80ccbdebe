"""Training: one run from its start, or from where it stopped, to its best weights."""
