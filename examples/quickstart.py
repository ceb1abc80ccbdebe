"""The whole path on the bundled sample: environment, convert, train, evaluate. `make quickstart` runs this.

Every step is the real job, run with the command line that is printed. A finished step is not run again unless its
command, the log or the code changed; ``--fresh`` starts over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HOME = Path("runs/quickstart")
LOG = Path("datasets/kuairand_sample/log.parquet")
DATA, RUN = HOME / "data", HOME / "run"

# (step, module, arguments, directory it writes, files and folders whose content decides the result)
STEPS = [
    (
        "convert",
        "pipelines.convert",
        [str(LOG), "--schema=kuairand_sample", "--split=time", "--split_column=time_ms", f"--output={DATA}"],
        DATA,
        [LOG, Path("pipelines")],
    ),
    (
        "train",
        "stem_tf.train",
        ["--config=kuairand_sample", f"--config.data.dir={DATA}", f"--workdir={RUN}"],
        RUN,
        [Path("stem_tf")],
    ),
    ("evaluate", "stem_tf.evaluate", [f"--workdir={RUN}", "--split=test"], None, []),
]


def heading(number: int, name: str, text: str = "") -> None:
    print(f"{number}/{len(STEPS) + 1} {name:<14}{text}".rstrip(), flush=True)


def python() -> str:
    """The interpreter as one would type it from the repository."""
    here = Path(sys.executable)
    return str(here.relative_to(ROOT)) if here.is_relative_to(ROOT) else str(here)


def fingerprint(before: str, arguments: list[str], files: list[Path]) -> str:
    """Of everything a step's result depends on: the steps before it, its command, and the content of ``files``."""
    digest = hashlib.sha256(json.dumps([before, arguments]).encode())
    for top in files:
        inside = sorted(p for p in (ROOT / top).rglob("*") if p.suffix in (".py", ".yaml"))
        for path in inside or [ROOT / top]:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def load(path: Path) -> dict[str, Any]:
    """The record of a step, or an empty one."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def save(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(record, indent=1))
    beside.replace(path)


def run(command: list[str]) -> tuple[int, list[str]]:
    """Runs a job and prints its lines as they come; its stderr, and so its live display, goes straight through.

    Returns:
      The exit code and the lines of stdout.
    """
    lines = []
    job = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    # Ctrl-C reaches the job as well; it may have a checkpoint to write, so wait for it to end.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: job.terminate())
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("next: "):  # that is what the next step runs
            continue
        print(f"    {line}", end="", flush=True)
        lines.append(line)
    code = job.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return code, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results and start over")
    parser.add_argument("--setup_seconds", type=int, default=0, help="what the environment took, as make tells it")
    flags = parser.parse_args()

    if flags.fresh:
        shutil.rmtree(ROOT / HOME, ignore_errors=True)
    environment = f"{sys.prefix}, Python {platform.python_version()}, tensorflow {metadata.version('tensorflow')}"
    heading(1, "environment", f"{environment.replace(f'{ROOT}/', '')}   {flags.setup_seconds} s")

    before = ""
    for number, (name, module, arguments, directory, files) in enumerate(STEPS, start=2):
        before = fingerprint(before, [module, *arguments], files)
        path = ROOT / HOME / f"{name}.json"
        record = load(path)
        heading(number, name)
        print(f"    $ {shlex.join([python(), '-m', module, *arguments])}", flush=True)
        if record.get("fingerprint") != before:
            # What is there belongs to another command or other data.
            if directory is not None:
                shutil.rmtree(ROOT / directory, ignore_errors=True)
            save(path, {"fingerprint": before})
        elif record.get("lines") is not None and (directory is None or (ROOT / directory).is_dir()):
            print("".join(f"    {line}" for line in record["lines"]), end="")
            print(
                f"    reused: done before in {record['seconds']} s; `make quickstart FRESH=1` starts over", flush=True
            )
            continue
        start = time.monotonic()
        code, lines = run([sys.executable, "-m", module, *arguments])
        seconds = round(time.monotonic() - start)
        if code != 0:
            print(
                f"error: step {name} ended with code {code} after {seconds} s; `make quickstart` goes on from there",
                file=sys.stderr,
            )
            return code if code > 0 else 128 - code
        save(path, {"fingerprint": before, "lines": lines, "seconds": seconds})
        print(f"    {seconds} s", flush=True)

    scripts = Path(python()).parent
    seed = f"--config=kuairand_sample --config.data.dir={DATA} --config.seed=2 --workdir=runs/seed2"
    print(
        f"next:\n"
        f"  {scripts}/stem-train {seed}\n"
        f"  {scripts}/tensorboard --logdir=runs\n"
        f"  docs/own_log.md: the same on your own log"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
