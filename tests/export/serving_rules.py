"""What TensorFlow Serving asks of its batching configuration and of a model's warm-up requests.

From shared_batch_scheduler.h and batching_session.cc of TensorFlow 2.16, and seen on the server itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.wrappers_pb2 import DESCRIPTOR as WRAPPERS

# Of session_bundle_config.proto and monitoring_config.proto of TensorFlow Serving, which its Python package leaves out.
# Text format goes by the names; the last two numbers are ours.
_PROTOS = """
name: "rules.proto" package: "rules" syntax: "proto3" dependency: "google/protobuf/wrappers.proto"
message_type { name: "BatchingParameters"
  field { name: "max_batch_size" number: 1 label: LABEL_OPTIONAL type_name: ".google.protobuf.Int64Value" }
  field { name: "batch_timeout_micros" number: 2 label: LABEL_OPTIONAL type_name: ".google.protobuf.Int64Value" }
  field { name: "max_enqueued_batches" number: 3 label: LABEL_OPTIONAL type_name: ".google.protobuf.Int64Value" }
  field { name: "num_batch_threads" number: 4 label: LABEL_OPTIONAL type_name: ".google.protobuf.Int64Value" }
  field { name: "thread_pool_name" number: 5 label: LABEL_OPTIONAL type_name: ".google.protobuf.StringValue" }
  field { name: "allowed_batch_sizes" number: 6 label: LABEL_REPEATED type: TYPE_INT64 }
  field { name: "pad_variable_length_inputs" number: 7 label: LABEL_OPTIONAL type: TYPE_BOOL }
  field { name: "enable_large_batch_splitting" number: 8 label: LABEL_OPTIONAL type_name: ".google.protobuf.BoolValue" }
  field { name: "max_execution_batch_size" number: 9 label: LABEL_OPTIONAL type_name: ".google.protobuf.Int64Value" } }
message_type { name: "PrometheusConfig"
  field { name: "enable" number: 1 label: LABEL_OPTIONAL type: TYPE_BOOL }
  field { name: "path" number: 2 label: LABEL_OPTIONAL type: TYPE_STRING } }
message_type { name: "MonitoringConfig"
  field { name: "prometheus_config" number: 1 label: LABEL_OPTIONAL type_name: ".rules.PrometheusConfig" } }
"""


def parse(text: str, kind: str) -> Any:
    """A BatchingParameters or MonitoringConfig in text format."""
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(WRAPPERS.serialized_pb)
    pool.Add(text_format.Parse(_PROTOS, descriptor_pb2.FileDescriptorProto()))
    message = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"rules.{kind}"))()
    return text_format.Parse(text, message)


def broken(text: str, inputs: Mapping[str, Mapping[str, tuple[int | None, ...]]], requests: Iterable[Any]) -> list[str]:
    """The rules that a configuration and a model break together; none where the model loads and calls are joined well.

    Args:
      text: BatchingParameters.
      inputs: shapes by signature and input.
      requests: of the warm-up.
    """
    batching = parse(text, "BatchingParameters")
    largest, splits = batching.max_batch_size.value, batching.enable_large_batch_splitting.value
    execution = batching.max_execution_batch_size.value if splits else largest
    sizes, problems = list(batching.allowed_batch_sizes), []
    if not 0 < execution <= largest:
        problems.append(f"max_execution_batch_size {execution} beside max_batch_size {largest}")
    if sizes != sorted(set(sizes)) or (sizes and sizes[-1] != execution):
        problems.append(f"allowed_batch_sizes {sizes} do not ascend to {execution}")
    if batching.num_batch_threads.value < 1:
        problems.append("no thread runs batches")
    if splits and largest > batching.max_enqueued_batches.value * execution:
        problems.append(f"a call of {largest} rows finds no room in the queue")
    for signature, shapes in inputs.items():
        for name, shape in shapes.items():
            candidates = signature == "rank" and len(shape) == 1 + len(inputs["serving_default"][name])
            open_axes = [axis for axis, size in enumerate(shape) if axis and size is None]
            if open_axes and not batching.pad_variable_length_inputs:
                problems.append(f"{signature}: {name} {shape} may differ between calls, and is not filled up")
            if open_axes and open_axes != [1] * candidates:
                problems.append(f"{signature}: {name} {shape} is filled up with values that count")
    for request in requests:
        rows = {tensor.tensor_shape.dim[0].size for tensor in request.inputs.values()}
        if len(rows) != 1:
            problems.append(f"{request.model_spec.signature_name}: inputs of {sorted(rows)} rows")
        if max(rows) > largest:
            problems.append(f"Task size {max(rows)} is larger than maximum input batch size {largest}")
        if min(rows) < 1:
            problems.append("a call without rows waits for ever")
    return problems
