"""Batches for training and evaluation, from records or from the log itself."""
