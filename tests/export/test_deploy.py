"""stem-deploy: files that fit the model, parse as what reads them, and belong to whoever changed them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from export import warmup
from export.deployment import model as models
from export.deployment import render
from export.deployment.model import Limits, Model
from export.server import configuration
from export.server.metrics import Metrics
from pipelines import schema_yaml
from stem_util import files
from stem_util.errors import UserError
from tests.export import serving_rules

Job = Callable[..., subprocess.CompletedProcess[str]]
OPTIONS = render.Options(
    batching=True, canary=None, replicas=2, limit_p99_ms=50, grace_seconds=10, image="stem-tf", capacity=""
)
LIMITS = Limits(cores=2, max_rows=1024, execution_rows=16, max_calls=128)
SCHEMA = """
name: small
features:
  user: {kind: categorical, side: user, dtype: int64}
  item: {kind: categorical, side: item, dtype: int64}
  tags: {kind: multivalent, side: item, dtype: string, separator: "|", max_length: 3}
tasks:
  click: {label: {column: clicked}}
"""
ROWS: dict[str, tuple[int | None, ...]] = {"user": (None,), "item": (None,), "tags": (None, 3)}
MODEL = Model(
    name="Video_rank.v2",
    version=6,
    others=(5, 7),
    schema=schema_yaml.loads(SCHEMA),
    weight_bytes=3_000_000_000,
    vocabulary_bytes=10_000_000,
    inputs={"serving_default": ROWS, "rank": {"user": (None,), "item": (None, None), "tags": (None, None, 3)}},
    warm_up={"rank": (1, 1, 1), "serving_default": (1, 50, 200)},
)
BEFORE = "max_batch_size { value: 16 } max_enqueued_batches { value: 64 } num_batch_threads { value: 4 }"
# Flags of tensorflow_model_server, written by hand: those that a deployment may need.
SERVING_FLAGS = """
    port rest_api_port model_config_file model_config_file_poll_wait_seconds model_name model_base_path
    file_system_poll_wait_seconds enable_model_warmup enable_grpc_healthcheck_service grpc_max_threads
    grpc_channel_arguments max_num_load_retries load_retry_interval_micros enable_batching batching_parameters_file
    monitoring_config_file allow_version_labels_for_unavailable_models
""".split()


def rendered(model: Model = MODEL, limits: Limits = LIMITS, **chosen: Any) -> dict[str, str]:
    return render.render(model, limits, dataclasses.replace(OPTIONS, **chosen))


def flag_names(arguments: list[str]) -> set[str]:
    return {argument.removeprefix("--").split("=")[0] for argument in arguments}


def objects(text: str) -> dict[str, Any]:
    """The objects of a Kubernetes manifest by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


def container(text: str) -> Any:
    (found,) = objects(text)["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


@pytest.fixture(scope="module")
def deployed(nasty_export: Path, run_job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the job writes for a real export."""
    output = tmp_path_factory.mktemp("deployed") / "out"
    done = run_job("export.jobs.deploy", f"--model={nasty_export}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert "batching.config" in done.stdout and done.stdout.endswith(f"next: {output}/RUNBOOK.md\n")
    return output


def test_an_export_loads_under_its_batching_and_did_not_under_the_one_before(
    nasty_export: Path, deployed: Path
) -> None:
    version = nasty_export / "1"
    inputs = models.signature_inputs(version)
    requests = list(warmup.read(version / warmup.IN_A_VERSION))
    assert len(requests) == 9
    assert serving_rules.broken((deployed / "batching.config").read_text(), inputs, requests) == []
    problems = serving_rules.broken(f"{BEFORE} pad_variable_length_inputs: true", inputs, requests)
    assert problems and set(problems) == {
        "Task size 50 is larger than maximum input batch size 16",
        "Task size 200 is larger than maximum input batch size 16",
    }


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"max_rows": 199}, "--max_rows=199"),
        ({"max_rows": 300, "execution_rows": 301}, "--execution_rows=301"),
    ],
)
def test_limits_that_warm_up_or_splitting_break_are_refused(flags: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        models.limits(MODEL, **({"cores": 2, "max_rows": None, "execution_rows": 16, "max_calls": None} | flags))


@pytest.mark.parametrize(("max_rows", "execution_rows", "max_calls"), [(200, 200, 1), (1024, 1, 1), (5000, 7, 300)])
def test_every_choice_of_limits_keeps_the_rules(max_rows: int, execution_rows: int, max_calls: int) -> None:
    limits = models.limits(MODEL, cores=3, max_rows=max_rows, execution_rows=execution_rows, max_calls=max_calls)
    texts = rendered(limits=limits)
    assert serving_rules.broken(texts["batching.config"], MODEL.inputs, []) == []
    (threads,) = re.findall(r"--grpc_max_threads=(\d+)", texts["tensorflow_serving.sh"])
    assert int(threads) > max_calls


def test_limits_grow_with_the_warm_up() -> None:
    model = dataclasses.replace(MODEL, warm_up={"serving_default": (1, 3000)})
    limits = models.limits(model, cores=2, max_rows=None, execution_rows=16, max_calls=None)
    assert (limits.max_rows, limits.max_calls) == (3000, 128)


def test_lists_of_any_length_are_not_batched() -> None:
    model = dataclasses.replace(MODEL, inputs={"serving_default": ROWS | {"tags": (None, None)}})
    with pytest.raises(UserError, match=r"lists of any length \(tags\).*--nobatching"):
        rendered(model)
    texts = rendered(model, batching=False)
    assert "batching.config" not in texts
    assert not any("enable_batching" in text for name, text in texts.items() if name != "RUNBOOK.md")


def test_a_model_that_does_not_rank_is_not_filled_up() -> None:
    model = dataclasses.replace(MODEL, inputs={"serving_default": ROWS})
    text = rendered(model)["batching.config"]
    assert serving_rules.broken(text, model.inputs, []) == []
    assert not serving_rules.parse(text, "BatchingParameters").pad_variable_length_inputs


def test_models_and_monitoring_config() -> None:
    texts = rendered()
    (model,) = served(texts["models.config"])
    assert (model.name, model.base_path) == ("Video_rank.v2", "/models/Video_rank.v2")
    assert model.model_platform == "tensorflow" and model.model_version_policy.latest.num_versions == 1
    assert serving_rules.parse(texts["monitoring.config"], "MonitoringConfig").prometheus_config.enable


def served(text: str) -> Any:
    return text_format.Parse(text, model_server_config_pb2.ModelServerConfig()).model_config_list.config


def test_a_canary_is_loaded_beside_the_stable_version_and_has_room() -> None:
    texts, one = rendered(canary=7), rendered()
    (model,) = served(objects(texts["kubernetes/tensorflow-serving.yaml"])["ConfigMap"]["data"]["models.config"])
    assert list(model.model_version_policy.specific.versions) == [6, 7]
    assert dict(model.version_labels) == {"stable": 6, "canary": 7}
    (ours,) = configuration.models(configuration.parse(texts["models.config"]))  # as stem-serve reads it
    assert ours.labels == {"stable": 6, "canary": 7} and ours.policy.specific == {6, 7}
    assert objects(texts["kubernetes/stem-serve.yaml"])["ConfigMap"]["data"]["models.config"] == texts["models.config"]
    small, large = (memory(t["kubernetes/tensorflow-serving.yaml"]) for t in (one, texts))
    loaded = -(-(3_000_000_000 + 8 * 10_000_000) // 2**20)
    assert small == 1024 + 2 * loaded and large == 1024 + 3 * loaded


def memory(text: str) -> int:
    return int(container(text)["resources"]["requests"]["memory"].removesuffix("Mi"))


@pytest.mark.parametrize(("canary", "why"), [(6, "the stable one"), (9, r"no such version.*others: 5, 7")])
def test_a_canary_that_is_none_is_refused(canary: int, why: str) -> None:
    with pytest.raises(UserError, match=why):
        rendered(canary=canary)


def test_compose_mounts_the_files_that_are_named() -> None:
    texts = rendered()
    for service in yaml.safe_load(texts["docker-compose.yaml"])["services"].values():
        assert "./:/config:ro" in service["volumes"]
        named = [argument.split("=/config/")[1] for argument in service["command"] if "_file=" in argument]
        assert "models.config" in named and set(named) <= texts.keys()


def test_flags_are_those_of_the_servers(run_job: Job) -> None:
    texts = rendered()
    services = yaml.safe_load(texts["docker-compose.yaml"])["services"]
    stem_serve = [services["stem-serve"]["command"], container(texts["kubernetes/stem-serve.yaml"])["command"]]
    known = set(re.findall(r"^  --(?:\[no\])?(\w+)$", run_job("export.jobs.serve", "--help").stdout, re.MULTILINE))
    for name, *arguments in stem_serve:
        assert name == "stem-serve" and flag_names(arguments) <= known
    serving = [
        services["tensorflow-serving"]["command"],
        container(texts["kubernetes/tensorflow-serving.yaml"])["args"],
        re.findall(r"--\w+", texts["tensorflow_serving.sh"].split("exec ")[1]),
    ]
    for arguments in serving:
        assert flag_names(arguments) <= set(SERVING_FLAGS)
        assert {"max_num_load_retries", "load_retry_interval_micros"} <= flag_names(arguments)


@pytest.mark.parametrize("server", ["stem-serve", "tensorflow-serving"])
def test_replicas_stop_after_their_callers_have_gone(server: str) -> None:
    text = rendered(grace_seconds=33)[f"kubernetes/{server}.yaml"]
    deployment = objects(text)["Deployment"]["spec"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    pod, found = deployment["template"]["spec"], container(text)
    sleep = int(found["lifecycle"]["preStop"]["exec"]["command"][1])
    grace = 33 if server == "stem-serve" else 0
    assert pod["terminationGracePeriodSeconds"] > sleep + grace
    if server == "tensorflow-serving":
        (age,) = (int(x.rsplit("=", 1)[1]) for x in found["args"] if "max_connection_age_ms" in x)
        assert sleep > age / 1000 + 30  # gRPC clients look a name up every 30 s at most
    ports = {port["name"]: port["containerPort"] for port in found["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        ((kind, asked),) = ((k, v) for k, v in found[probe].items() if isinstance(v, dict))
        assert kind in ("grpc", "tcpSocket", "httpGet")
        assert asked["port"] in ports or asked["port"] in ports.values()
    selector = objects(text)["Service"]["spec"]
    assert selector["clusterIP"] == "None"  # callers balance
    labels = deployment["template"]["metadata"]["labels"]
    assert selector["selector"].items() <= labels.items()
    assert objects(text)["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for each in objects(text).values():
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", each["metadata"]["name"])


@pytest.mark.parametrize("server", ["stem-serve", "tensorflow-serving"])
@pytest.mark.parametrize("chosen", [{}, {"batching": False, "canary": 5}])
def test_manifests_are_what_kubernetes_takes(server: str, chosen: dict[str, Any]) -> None:
    for each in yaml.safe_load_all(rendered(**chosen)[f"kubernetes/{server}.yaml"]):
        kubernetes_validate.validate(each, "1.31", strict=True)


def test_alerts_are_in_the_runbook() -> None:
    texts = rendered()
    (group,) = yaml.safe_load(texts["alerts.yaml"])["groups"]
    titles = re.findall(r"^### (\w+)$", texts["RUNBOOK.md"], re.MULTILINE)
    assert [rule["alert"] for rule in group["rules"]] == titles
    for rule in group["rules"]:
        assert rule["annotations"]["runbook"] == f"RUNBOOK.md#{rule['alert'].lower()}"
        assert rule["expr"].count("(") == rule["expr"].count(")")
    anchors = {line.lower().replace(" ", "-") for line in re.findall(r"^#+ (.+)$", texts["RUNBOOK.md"], re.MULTILINE)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", texts["RUNBOOK.md"])) <= anchors


def test_alerts_ask_for_metrics_that_stem_serve_has() -> None:
    known = set(re.findall(r"^# HELP (\S+)", Metrics(dict, 1.0).text().decode(), re.MULTILINE))
    asked = set(re.findall(r"stem_serve_\w+|:tensorflow:serving:\w+", rendered()["alerts.yaml"].split("groups:")[1]))
    assert len(asked) > 8
    for name in asked:
        assert name in known or name.rsplit("_", 1)[0] in known, name


def test_runbook_says_the_models_names_and_numbers() -> None:
    text = rendered(capacity="410 calls/s of 200 candidates")["RUNBOOK.md"]
    assert "stem-deploy --model=EXPORT_DIR --output=DIR\n" in text
    assert "stem-deploy --model=EXPORT_DIR/6 --canary=7 --output=DIR\n" in rendered(canary=7)["RUNBOOK.md"]
    for word in ("`Video_rank.v2`", "`click`", "`tags`", "410 calls/s of 200 candidates", "3,000.0 MB", "5, 7"):
        assert word in text


def test_script_gives_tensorflow_serving_the_files_beside_it(deployed: Path, tmp_path: Path) -> None:
    program = tmp_path / "tensorflow_model_server"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    (tmp_path / "export dir").mkdir()
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = deployed / "tensorflow_serving.sh"
    command = [str(script), "export dir", "--port=9000"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    given = done.stdout.splitlines()
    assert f"--model_base_path={tmp_path / 'export dir'}" in given and given[-1] == "--port=9000"
    named = [x.split("=", 1)[1] for x in given if "_file=" in x]
    assert len(named) == 2 and all(Path(file).is_file() for file in named)
    done = subprocess.run([script], capture_output=True, text=True)
    assert done.returncode != 0 and "usage: tensorflow_serving.sh EXPORT_DIR" in done.stderr


def test_what_was_changed_by_hand_stays(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert len(render.write(output, rendered(), {})) == len(rendered())
    assert render.write(output, rendered(), {}) == []
    assert render.write(output, rendered(batching=False), {}) and not (output / "batching.config").exists()
    alerts = output / "alerts.yaml"
    alerts.write_text("mine")
    with pytest.raises(UserError, match=r"alerts\.yaml changed since"):
        render.write(output, rendered(), {})
    assert alerts.read_text() == "mine" and not (output / "batching.config").exists()


def test_a_job_killed_between_its_files_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    render.write(output, rendered(), {})
    write = files.write_atomically

    def killed(path: Path, data: bytes) -> None:
        write(path, data)
        if path.name == "RUNBOOK.md":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(files, "write_atomically", killed)
        render.write(output, rendered(replicas=5), {})
    assert render.write(output, rendered(replicas=3), {})
    assert "replicas: 3" in (output / "kubernetes/stem-serve.yaml").read_text()


def test_every_flag_reaches_the_files(nasty_export: Path, run_job: Job, tmp_path: Path) -> None:
    (tmp_path / "capacity.json").write_text(json.dumps({"capacity_line": "77 calls/s"}))
    flags: dict[str, Any] = {
        "cores": 3,
        "max_rows": 500,
        "execution_rows": 50,
        "max_calls": 70,
        "replicas": 5,
        "limit_p99_ms": 80,
    }
    flags |= {"grace_seconds": 20, "image": "registry.local/x:1", "batching": False}
    given = [f"--{name}={value}" for name, value in flags.items()]
    output = tmp_path / "out"
    more = [f"--capacity={tmp_path / 'capacity.json'}", f"--output={output}"]
    done = run_job("export.jobs.deploy", f"--model={nasty_export}", *given, *more)
    assert done.returncode == 0, done.stderr
    facts = json.loads((output / "deployment.json").read_text())
    assert facts.items() >= (flags | {"model": "nasty", "version": 1, "capacity": "77 calls/s"}).items()
    text = (output / "kubernetes/stem-serve.yaml").read_text()
    for word in ('cpu: "3"', "replicas: 5", "--grace_seconds=20", 'image: "registry.local/x:1"', "--threads=3"):
        assert word in text
    assert "> 80\n" in (output / "alerts.yaml").read_text()
    runbook = (output / "RUNBOOK.md").read_text()
    assert "77 calls/s" in runbook and "stem-deploy --model=EXPORT_DIR --output=DIR --cores=3 --max_rows=500" in runbook
    assert " --nobatching " in runbook and runbook.count("--image=registry.local/x:1") >= 2  # and with --capacity


def test_mistakes_are_said(nasty_export: Path, deployed: Path, job_in_process: Job, tmp_path: Path) -> None:
    def error(**flags: Any) -> str:
        given = {"model": nasty_export, "output": tmp_path / "out"} | flags
        done = job_in_process("export.jobs.deploy", *(f"--{name}={value}" for name, value in given.items()))
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    (tmp_path / "capacity.json").write_text(json.dumps({"capacity_line": None}))
    assert "holds no capacity" in error(capacity=tmp_path / "capacity.json")
    assert "holds exported versions, not a deployment" in error(output=nasty_export)
    assert "is no name of an image" in error(image="a b")
    copy = tmp_path / "copy"
    shutil.copytree(nasty_export / "1", copy / "1")
    (copy / "1/variables/variables.index").write_bytes(b"")
    assert "its SHA-256 differs" in error(model=copy)
    assert not (tmp_path / "out").exists()


def test_servers_go_by_the_number_of_the_directory(nasty_export: Path, tmp_path: Path) -> None:
    for name in ("4", "9", "backup"):
        shutil.copytree(nasty_export / "1", tmp_path / name)
    assert (models.read(tmp_path).version, models.read(tmp_path).others) == (9, (4,))
    assert (models.read(tmp_path / "4").version, models.read(tmp_path / "4").others) == (4, (9,))
    assert models.read(tmp_path / "backup").version == 1


def test_a_name_that_does_not_fit_is_refused(nasty_export: Path, tmp_path: Path) -> None:
    copy = tmp_path / "1"
    shutil.copytree(nasty_export / "1", copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"model": 'x"\n$(rm)'}))
    with pytest.raises(UserError, match="does not fit paths"):
        models.read(copy)
