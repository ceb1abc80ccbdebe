"""Makes the files of a deployment from templates, and writes them to a directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.deployment.model import Limits, Model
from stem_util import owned, templates
from stem_util.errors import UserError

_TEMPLATES = Path(__file__).parent / "templates"
_SCRIPT = "tensorflow_serving.sh"
_MIB = 1 << 20
_METRICS_PORT = 8502

_BASE_MIB = 1024
_VOCABULARY = 8
"""Memory of a vocabulary, relative to its bytes on the disk: 1,000,000 integers (8 MB) make a hash table of 61 MB, and
as many strings of 18 bytes (22 MB) one of 110 MB."""
_SERVING_IMAGE = "tensorflow/serving:2.16.1"


@dataclass(frozen=True)
class Options:
    """The choices of a team.

    Attributes:
      batching: whether TensorFlow Serving joins calls.
      canary: a second version to serve under the label `canary`; None for one version.
      replicas: number of replicas of each server.
      limit_p99_ms: the latency within which 99 % of calls should be answered.
      grace_seconds: time that running calls have when stem-serve stops.
      image: container image with stem-serve.
      capacity: capacity line of `stem-load`.
      flags: the flags of the job that differ from their defaults, as typed.
    """

    batching: bool
    canary: int | None
    replicas: int
    limit_p99_ms: float
    grace_seconds: int
    image: str
    capacity: str
    flags: tuple[str, ...] = ()


def render(model: Model, limits: Limits, options: Options) -> dict[str, str]:
    """Returns the texts of the files by name.

    Raises:
      UserError: a choice does not fit the model.
    """
    _check(model, options)
    environment = templates.environment(_TEMPLATES)
    environment.filters["code"] = _code
    facts = _facts(model, limits, options)

    def text(name: str, **more: Any) -> str:
        return environment.get_template(f"{name}.j2").render(facts | more)

    result = {name: text(name) for name in ("models.config", "monitoring.config")}
    if options.batching:
        result["batching.config"] = text("batching.config")
    for name in (_SCRIPT, "docker-compose.yaml", "alerts.yaml", "RUNBOOK.md"):
        result[name] = text(name)
    configs = {name.replace(".", "_"): result[name].rstrip() for name in result if name.endswith(".config")}
    for name in ("kubernetes/stem-serve.yaml", "kubernetes/tensorflow-serving.yaml"):
        result[name] = text(name, **configs)
    return result


def _check(model: Model, options: Options) -> None:
    if options.batching and model.open_lists:
        raise UserError(
            f"{model.name} version {model.version} takes lists of any length ({', '.join(model.open_lists)}). "
            "TensorFlow Serving's batching would fill them up with values of the request, which changes scores: export "
            "the model again, which fixes their length, or give --nobatching"
        )
    if options.canary == model.version:
        raise UserError(
            f"--canary={options.canary} is the version that --model names, the stable one; name another directory, as "
            "in --model=EXPORT_DIR/6 --canary=7"
        )
    if options.canary is not None and options.canary not in model.others:
        beside = ", ".join(map(str, model.others)) or "none"
        raise UserError(f"--canary={options.canary}: there is no such version of {model.name} (others: {beside})")


def _facts(model: Model, limits: Limits, options: Options) -> dict[str, Any]:
    base_path = f"/models/{model.name}"
    features = model.schema.features
    flags = "".join(f" {flag}" for flag in options.flags)
    exported = "EXPORT_DIR"
    if options.canary is not None:
        exported += f"/{model.version} --canary={options.canary}"
    return {
        "command": f"stem-deploy --model={exported} --output=DIR{flags}",
        "flags": flags,
        "model": model,
        "limits": limits,
        "batching": options.batching,
        "canary": options.canary,
        "replicas": options.replicas,
        "limit_p99_ms": f"{options.limit_p99_ms:g}",
        "grace_seconds": options.grace_seconds,
        "image": options.image,
        "capacity": options.capacity or "not measured; see [capacity](#capacity)",
        "serving_image": _SERVING_IMAGE,
        "resource": model.name.lower().replace("_", "-").replace(".", "-"),
        "base_path": base_path,
        "others": ", ".join(map(str, model.others)) or "none",
        "shared": [feature.name for feature in features if feature.side != "item"],
        "items": [feature.name for feature in features if feature.side == "item"],
        "memory": _memory(model, options),
        "megabytes": lambda size: f"{size / 1e6:,.1f}",
        "metrics_port": _METRICS_PORT,
        # Seconds before SIGTERM for callers to learn that a replica stops; with TensorFlow Serving they must leave it.
        "stem_sleep": 10,
        "serving_sleep": 60,
        "stem_serve": [
            "stem-serve",
            "--model_config_file=/config/models.config",
            "--model_config_file_poll_wait_seconds=30",
            "--host=0.0.0.0",
            "--port=8500",
            f"--metrics_port={_METRICS_PORT}",
            f"--threads={max(2, limits.cores)}",
            "--wait",
            f"--grace_seconds={options.grace_seconds}",
        ],
        "serving_flags": [
            "--file_system_poll_wait_seconds=1",
            "--enable_model_warmup=true",
            "--enable_grpc_healthcheck_service=true",
            f"--grpc_max_threads={limits.grpc_threads}",
            "--max_num_load_retries=5",
            "--load_retry_interval_micros=2000000",
        ],
        "label_flags": ["--allow_version_labels_for_unavailable_models=true"],
        "reasons": [
            f"gRPC threads: each call has one, also while it waits: {limits.max_calls} calls, and some for health and",
            "metadata. Past them: RESOURCE_EXHAUSTED.",
            "Load retries: a version that fails keeps newer ones waiting until it has been tried 5 times, by default a",
            "minute apart. 2 seconds apart, a good one serves after half a minute, and a passing failure heals.",
        ],
        "label_reasons": [
            "Labels: at a start no version is loaded yet, and a label of models.config would be refused."
        ],
    }


def _memory(model: Model, options: Options) -> dict[str, Any]:
    """Requested and allowed memory in MiB: a version loads beside those that serve."""
    versions = 2 if options.canary is None else 3
    loaded = -(-(model.weight_bytes + _VOCABULARY * model.vocabulary_bytes) // _MIB)
    request = _BASE_MIB + versions * loaded
    return {
        "request": request,
        "limit": request + request // 2,
        "reason": (
            f"{_BASE_MIB} MiB for the process, and {versions} times the model's {loaded} MiB: a version loads while "
            "the one before serves."
        ),
    }


def _code(text: str) -> str:
    """Formats a text as code in a cell of a table."""
    return "`" + " ".join(text.replace("`", "'").replace("|", "\\|").split()) + "`"


def write(output: Path, texts: Mapping[str, str], facts: Mapping[str, Any]) -> list[str]:
    """Writes the files; see :func:`stem_util.templates.write`."""
    return templates.write(
        output, owned.DEPLOYMENT, texts, facts, job="stem-deploy", facts_file="deployment.json", scripts=[_SCRIPT]
    )
