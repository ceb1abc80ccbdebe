"""The one place that holds the version: setup.py reads it as text, manifests and exports record it."""

__version__ = "0.1.0"
