"""Splits the test file of Census-Income into two halves, validation and test; every run gives the same halves.

    python examples/census_halves.py runs/census

Writes validation.parquet and test.parquet into that directory. The protocol is that of the MMoE paper (Ma et al., KDD
2018): train on the train file, and divide the test file at random. The AUCs on the two halves differ by about .0016, so
comparisons need the same halves.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

SOURCE = Path(__file__).parent.parent / "datasets" / "census_income" / "test.parquet"
SEED = 1


def main(directory: str) -> None:
    table = pq.read_table(SOURCE)
    order = np.random.RandomState(SEED).permutation(len(table))
    half = len(table) // 2
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, places in (("validation", order[:half]), ("test", order[half:])):
        path = Path(directory) / f"{name}.parquet"
        pq.write_table(table.take(places), path)
        print(f"{path}: {len(places):,} rows")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/census_halves.py DIRECTORY")
    main(sys.argv[1])
