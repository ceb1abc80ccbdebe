"""Goes through several days of the bundled sample with stem-daily, and prints a table of the days.

    python -m examples.every_day --output=runs/every_day
    python -m examples.every_day --output=runs/every_day --days=3      # shorter

The sample has fourteen dates. The first log holds the oldest of them; each of the others holds one date, and arrives in
a folder as a file of its own. The jobs are those that cron or Airflow would start. The same command goes on where an
earlier one was stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "datasets/kuairand_sample/log.parquet"
DATES = 14
RULES = """\
# A day of this sample holds back some 500 rows, too few to prove that a model is not worse: refuse only what is worse
# beyond chance.
auc: {margin: .02, in_doubt: publish, at_least: off}
logloss: {margin: .05, in_doubt: publish}
mse: {margin: .05, in_doubt: publish}
calibration_error: {margin: .05, in_doubt: publish, at_most: off}
predicted_over_observed: {margin: .3, in_doubt: publish, at_least: off, at_most: off}
unknown_ids: {at_most: off}
latency: off
"""


def cut(folder: Path, days: int) -> None:
    """Writes the sample as one file per day; the first holds all dates before the last ``days`` - 1."""
    table = pq.read_table(LOG)
    dates = sorted(table["date"].unique().to_pylist())
    groups = [dates[: DATES - days + 1], *([date] for date in dates[DATES - days + 1 :])]
    folder.mkdir(parents=True, exist_ok=True)
    for group in groups:
        last = str(group[-1])
        path = folder / f"{last[:4]}-{last[4:6]}-{last[6:]}.parquet"
        if not path.exists():
            rows = table.filter(pc.is_in(table["date"], pc.cast(group, table["date"].type)))
            beside = path.with_suffix(".tmp")
            pq.write_table(rows, beside)
            beside.rename(path)  # a name that a watcher takes appears with the whole file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/every_day"), help="directory for logs and days")
    parser.add_argument("--days", type=int, default=7, choices=range(2, DATES + 1), help="how many days to go through")
    parser.add_argument("arguments", nargs="*", help="further arguments of stem-daily, after --")
    flags = parser.parse_args()

    logs, state, rules = flags.output / "logs", flags.output / "state", flags.output / "rules.yaml"
    cut(logs, flags.days)
    rules.write_text(RULES)
    daily = [sys.executable, "-m", "export.jobs.daily", f"--state={state}"]
    done = subprocess.run(
        [
            *daily,
            f"--watch={logs}",
            "--drain",
            "--settle_seconds=0",
            "--config=kuairand_sample",
            "--schema=kuairand_sample",
            f"--rules={rules}",
            "--convert_args=--split=time --split_column=time_ms --fractions=.7,.1,.2",
            *flags.arguments,
        ]
    )
    return done.returncode or subprocess.run([*daily, "--history"]).returncode


if __name__ == "__main__":
    sys.exit(main())
