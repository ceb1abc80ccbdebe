"""The files of deploy/ are what TensorFlow Serving and docker compose read, and fit the embedded server's flags."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import yaml
from absl import flags
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import DESCRIPTOR as WRAPPERS
from tensorflow_serving.config import model_server_config_pb2

import export.serve  # noqa: F401  defines its flags

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
# Of session_bundle_config.proto and monitoring_config.proto of TensorFlow Serving, which its Python package leaves out.
PROTOS = """
name: "deploy_test.proto" package: "deploy_test" syntax: "proto3" dependency: "google/protobuf/wrappers.proto"
message_type { name: "BatchingParameters"
  field { name: "max_batch_size" number: 1 label: LABEL_OPTIONAL type_name: ".google.protobuf.Int64Value" }
  field { name: "batch_timeout_micros" number: 2 label: LABEL_OPTIONAL type_name: ".google.protobuf.Int64Value" }
  field { name: "max_enqueued_batches" number: 3 label: LABEL_OPTIONAL type_name: ".google.protobuf.Int64Value" }
  field { name: "num_batch_threads" number: 4 label: LABEL_OPTIONAL type_name: ".google.protobuf.Int64Value" }
  field { name: "thread_pool_name" number: 5 label: LABEL_OPTIONAL type_name: ".google.protobuf.StringValue" }
  field { name: "allowed_batch_sizes" number: 6 label: LABEL_REPEATED type: TYPE_INT64 }
  field { name: "pad_variable_length_inputs" number: 7 label: LABEL_OPTIONAL type: TYPE_BOOL } }
message_type { name: "PrometheusConfig"
  field { name: "enable" number: 1 label: LABEL_OPTIONAL type: TYPE_BOOL }
  field { name: "path" number: 2 label: LABEL_OPTIONAL type: TYPE_STRING } }
message_type { name: "MonitoringConfig"
  field { name: "prometheus_config" number: 1 label: LABEL_OPTIONAL type_name: ".deploy_test.PrometheusConfig" } }
"""


def parse(name: str, kind: str) -> Message:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(WRAPPERS.serialized_pb)
    pool.Add(text_format.Parse(PROTOS, descriptor_pb2.FileDescriptorProto()))
    message = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"deploy_test.{kind}"))()
    return text_format.Parse((DEPLOY / name).read_text(encoding="utf-8"), message)


def test_models_config() -> None:
    text = (DEPLOY / "models.config").read_text(encoding="utf-8")
    parsed = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    (model,) = parsed.model_config_list.config
    assert (model.name, model.base_path, model.model_platform) == ("ranker", "/models/ranker", "tensorflow")
    assert model.model_version_policy.latest.num_versions == 1


def test_batching_and_monitoring_config() -> None:
    batching = parse("batching.config", "BatchingParameters")
    assert batching.pad_variable_length_inputs and batching.max_batch_size.value > 1
    assert parse("monitoring.config", "MonitoringConfig").prometheus_config.enable


def test_compose_mounts_files_that_exist_and_uses_flags_that_exist() -> None:
    services = yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text(encoding="utf-8"))["services"]
    name, *arguments = services["embedded"]["command"]
    assert name == "stem-serve"
    known = flags.FLAGS.get_key_flags_for_module("export.serve")
    assert {x.removeprefix("--").split("=")[0] for x in arguments} <= {flag.name for flag in known}
    serving = services["tensorflow-serving"]
    mounts = dict(volume.rsplit(":", 2)[:2] for volume in serving["volumes"] if volume.startswith("./"))
    assert all((DEPLOY / source).is_file() for source in mounts)
    files = {x.split("=")[1] for x in serving["command"] if "_file=" in x}
    assert files == set(mounts.values())


def test_script_gives_tensorflow_serving_the_files_beside_it(tmp_path: Path) -> None:
    program = tmp_path / "tensorflow_model_server"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    (tmp_path / "export dir").mkdir()
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [str(DEPLOY / "tensorflow_serving.sh"), "export dir", "--port=9000"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    given = done.stdout.splitlines()
    assert f"--model_base_path={tmp_path / 'export dir'}" in given and given[-1] == "--port=9000"
    files = [x.split("=", 1)[1] for x in given if "_file=" in x]
    assert len(files) == 2 and all(Path(file).is_file() for file in files)


def test_script_says_how_it_is_called() -> None:
    done = subprocess.run([DEPLOY / "tensorflow_serving.sh"], capture_output=True, text=True)
    assert done.returncode != 0 and "usage: tensorflow_serving.sh EXPORT_DIR" in done.stderr
