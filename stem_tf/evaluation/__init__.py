"""Scores of a whole split, exact metrics of them, and the trivial answers that they should beat."""
