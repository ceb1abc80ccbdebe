"""Writes the files that a team needs to operate an exported model.

    stem-deploy --model=EXPORT_DIR --output=DIR

They are made for this model: TensorFlow Serving's configuration, with batching limits that the model's warm-up requests
keep, a start script, a compose file, Kubernetes manifests for both servers, Prometheus alerts and a runbook. A file
that was changed by hand is not replaced. See docs/serving.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from stem_tf.runtime import quieten_tensorflow
from stem_util import cli, files, owned, templates
from stem_util.errors import UserError

flags = cli.Flags()

_MODEL = flags.DEFINE(
    cli.PATH,
    "model",
    None,
    "The exported model: the directory of a version, or of all versions to take the newest.",
    required=True,
)
_OUTPUT = flags.DEFINE(cli.PATH, "output", None, "The directory to write to.", required=True)
_CORES = flags.DEFINE_integer("cores", 2, "Cores per server.", lower_bound=1)
_MAX_ROWS = flags.DEFINE_integer(
    "max_rows",
    None,
    "Rows of the largest call: users for rank, rows for the other signatures (default: 1024, or the largest warm-up "
    "request if that is larger).",
    lower_bound=1,
)
_EXECUTION_ROWS = flags.DEFINE_integer(
    "execution_rows", 16, "Rows that TensorFlow Serving runs at once; larger calls are split.", lower_bound=1
)
_MAX_CALLS = flags.DEFINE_integer(
    "max_calls", None, "Calls that run or wait in TensorFlow Serving (default: 64 per core).", lower_bound=1
)
_BATCHING = flags.DEFINE_boolean(
    "batching",
    True,
    "Let TensorFlow Serving join calls. Without, no request can harm another, but each costs more.",
)
_CANARY = flags.DEFINE_integer(
    "canary",
    None,
    "A second version: it is served under the label canary, the model's own under stable.",
    lower_bound=1,
)
_REPLICAS = flags.DEFINE_integer("replicas", 2, "Replicas in Kubernetes.", lower_bound=1)
_LIMIT = flags.DEFINE_float(
    "limit_p99_ms", 50, "Latency that 99 % of the calls should keep; alerts fire above it.", lower_bound=0.1
)
_GRACE = flags.DEFINE_integer(
    "grace_seconds", 10, "How long calls in flight may take when stem-serve stops.", lower_bound=0
)
_IMAGE = flags.DEFINE_string("image", "stem-tf", "The container image with stem-serve; see docker/Dockerfile.")
_CAPACITY = flags.DEFINE(
    cli.PATH, "capacity", None, "The file that stem-load --steps --json wrote: its capacity goes into the runbook."
)
_NUMBERS = (_CORES, _MAX_ROWS, _EXECUTION_ROWS, _MAX_CALLS, _BATCHING, _REPLICAS, _LIMIT, _GRACE, _IMAGE)
"""The flags whose values the files depend on."""


def main(argv: Sequence[str]) -> None:
    del argv
    templates.check_image(_IMAGE.value)
    owned.check(_OUTPUT.value, owned.DEPLOYMENT)
    capacity = _capacity(_CAPACITY.value)
    quieten_tensorflow()
    from export.deployment import model as models
    from export.deployment import render

    model = models.read(Path(_MODEL.value))
    limits = models.limits(
        model,
        cores=_CORES.value,
        max_rows=_MAX_ROWS.value,
        execution_rows=_EXECUTION_ROWS.value,
        max_calls=_MAX_CALLS.value,
    )
    options = render.Options(
        batching=_BATCHING.value,
        canary=_CANARY.value,
        replicas=_REPLICAS.value,
        limit_p99_ms=_LIMIT.value,
        grace_seconds=_GRACE.value,
        image=_IMAGE.value,
        capacity=capacity,
        flags=tuple(flags.values[flag.name].serialize() for flag in _NUMBERS if flag.value != flag.default),
    )
    facts = {"model": model.name, "version": model.version} | dataclasses.asdict(limits) | dataclasses.asdict(options)
    written = render.write(Path(_OUTPUT.value), render.render(model, limits, options), facts)
    print(f"{model.name} version {model.version}: {', '.join(written) if written else 'no file has changed'}")
    print(f"next: {Path(_OUTPUT.value) / 'RUNBOOK.md'}")


def _capacity(path: str | None) -> str:
    """The capacity line of a measurement; "" without one."""
    if path is None:
        return ""
    line = files.read_json(path, "stem-load --steps=x1.25 --json=FILE writes it").get("capacity_line")
    if not isinstance(line, str) or "\n" in line:
        raise UserError(f"--capacity={path}: it holds no capacity; stem-load with --steps measures one")
    return line


def run() -> None:
    """Console script ``stem-deploy``."""
    cli.run(main, flags)


if __name__ == "__main__":
    run()
