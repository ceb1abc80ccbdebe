"""Goes from the log to scores over gRPC with the bundled sample. `make quickstart` runs this.

Each step runs a real job with the command line that it prints. A finished step runs again only if its command, the log
or the code has changed; ``--fresh`` starts over. The last step, which starts a server, asks it and stops it, always
runs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HOME = Path("runs/quickstart")
LOG = Path("datasets/kuairand_sample/log.parquet")
DATA, RUN, EXPORT = HOME / "data", HOME / "run", HOME / "export"
PREDICTIONS = RUN / "evaluation" / "test.parquet"

# (step, module, arguments, directory that it writes, files and directories on which its result depends)
STEPS = [
    (
        "convert",
        "pipelines.jobs.convert",
        [str(LOG), "--schema=kuairand_sample", "--split=time", "--split_column=time_ms", f"--output={DATA}"],
        DATA,
        [LOG, Path("pipelines")],
    ),
    (
        "train",
        "stem_tf.jobs.train",
        ["--config=kuairand_sample", f"--config.data.dir={DATA}", f"--workdir={RUN}"],
        RUN,
        [Path("stem_tf")],
    ),
    ("evaluate", "stem_tf.jobs.evaluate", [f"--workdir={RUN}", "--split=test"], None, []),
    ("export", "export.jobs.export", [f"--workdir={RUN}", f"--output={EXPORT}"], EXPORT, [Path("export")]),
]
SERVE = ["-m", "export.jobs.serve", f"--model_base_path={EXPORT}", "--port=0"]


def heading(number: int, name: str, text: str = "") -> None:
    print(f"{number}/{len(STEPS) + 2} {name:<14}{text}".rstrip(), flush=True)


def python() -> str:
    """The interpreter's path, as one types it at the top of the repository."""
    here = Path(sys.executable)
    return str(here.relative_to(ROOT)) if here.is_relative_to(ROOT) else str(here)


def fingerprint(before: str, arguments: list[str], files: list[Path]) -> str:
    """A hash of all that a step's result depends on: the steps before it, its command, and the content of ``files``."""
    digest = hashlib.sha256(json.dumps([before, arguments]).encode())
    for top in files:
        inside = sorted(p for p in (ROOT / top).rglob("*") if p.suffix in (".py", ".yaml"))
        for path in inside or [ROOT / top]:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def load(path: Path) -> dict[str, Any]:
    """The record of a finished step; {} if there is none."""
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
    """Runs a job and prints its output as it comes. The job's stderr, with its progress display, is not captured.

    Returns:
      The exit code and the lines of stdout.
    """
    lines = []
    job = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    # Ctrl-C reaches the job, too. It may have a checkpoint to write, so wait for it to end.
    before = signal.signal(signal.SIGINT, lambda *_: None), signal.signal(signal.SIGTERM, lambda *_: job.terminate())
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("next: "):  # the next step runs this command
            continue
        print(f"    {line}", end="", flush=True)
        lines.append(line)
    code = job.wait()
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])
    return code, lines


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Starts a server of the exported model, and yields its host:port once it serves; stops it at the end."""
    job = subprocess.Popen([sys.executable, *SERVE], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout is not None
        line = job.stdout.readline()
        found = re.fullmatch(r"serving .* on (\S+)\n", line)
        if found is None:
            raise RuntimeError(f"the server does not serve: {line.strip() or f'exit code {job.wait()}'}")
        print(f"    {line}", end="", flush=True)
        yield found[1]
    finally:
        if job.poll() is None:
            job.terminate()
        try:
            job.wait(30)
        except subprocess.TimeoutExpired:
            job.kill()


def serve_and_ask() -> int:
    """Runs the last step; returns its exit code."""
    start = time.monotonic()
    print(f"    $ {shlex.join([python(), *SERVE])}", flush=True)
    with server() as target:
        ask = ["-m", "examples.ask", f"--server={target}", f"--data={DATA}", "--by=long_view"]
        ask.append(f"--predictions={PREDICTIONS}")
        print(f"    $ {shlex.join([python(), *ask])}", flush=True)
        code, _ = run([sys.executable, *ask])
    if code == 0:
        print(f"    {time.monotonic() - start:.0f} s; the server has stopped", flush=True)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results and start over")
    parser.add_argument("--setup_seconds", type=int, default=0, help="how long the environment took; make passes it")
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
            # The directory is from another command or other data.
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

    heading(len(STEPS) + 2, "serve and ask")
    try:
        code = serve_and_ask()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    if code != 0:
        return code if code > 0 else 128 - code

    scripts = Path(python()).parent
    seed = f"--config=kuairand_sample --config.data.dir={DATA} --config.seed=2 --workdir=runs/seed2"
    print(
        f"next:\n"
        f"  {scripts}/stem-serve --model_base_path={EXPORT}\n"
        f"  {python()} -m examples.ask --server=127.0.0.1:8500 --data={DATA} --by=like     # in a second terminal\n"
        f"  {scripts}/stem-predict {DATA}/raw/test --model={EXPORT} --output=runs/scores.parquet\n"
        f"  {scripts}/stem-train {seed}\n"
        f"  {scripts}/tensorboard --logdir=runs\n"
        f"  docs/own_log.md: the same on your own log"
    )
    return 0


def stop(number: int, frame: Any) -> None:
    del frame
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("error: interrupted; `make quickstart` goes on from there", file=sys.stderr)
        sys.exit(130)
