"""Samples of the elements with the smallest keys."""

import numpy as np

from pipelines import sampling


def test_keys_below_the_bound_are_the_smallest() -> None:
    keys = np.array([7, 1, 9, 3, 5], np.uint64)
    bound = sampling.bound(keys, 3)
    assert bound == 7 and keys[keys < bound].tolist() == [1, 3, 5]
    assert sampling.bound(keys, 5) is None and sampling.bound(keys[:0], 5) is None


def test_keys_that_equal_the_bound_are_left_out() -> None:
    keys = np.array([0.5, 0.25, 0.5, 0.75])
    assert keys[keys < sampling.bound(keys, 2)].tolist() == [0.25]
