"""The messages of TensorFlow Serving that a ranking call needs, without TensorFlow.

On the wire only method paths and field numbers matter, not the names of messages. So these messages have TensorFlow
Serving's field numbers but their own package name and descriptor pool, and do not collide with TensorFlow's messages in
the same process. The classes are built from a descriptor when this module is imported, because generated code works
with only one major version of protobuf.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "stem_client"
_SERVICE = "/tensorflow.serving.PredictionService"
PREDICT = f"{_SERVICE}/Predict"
GET_MODEL_METADATA = f"{_SERVICE}/GetModelMetadata"

# tensorflow.DataType
DT_FLOAT = 1
DT_STRING = 7
DT_INT64 = 9

# message: its fields as "name = number type"; "map" is map<string, type>.
_MESSAGES = {
    # google.protobuf
    "Int64Value": ["value = 1 int64"],
    "Any": ["type_url = 1 string", "value = 2 bytes"],
    # tensorflow
    "Dim": ["size = 1 int64", "name = 2 string"],
    "TensorShapeProto": ["dim = 2 repeated Dim", "unknown_rank = 3 bool"],
    "TensorProto": [
        "dtype = 1 int32",  # an enum: the same on the wire
        "tensor_shape = 2 TensorShapeProto",
        "tensor_content = 4 bytes",
        "float_val = 5 repeated float",
        "string_val = 8 repeated bytes",
        "int64_val = 10 repeated int64",
    ],
    "TensorInfo": ["name = 1 string", "dtype = 2 int32", "tensor_shape = 3 TensorShapeProto"],
    "SignatureDef": ["inputs = 1 map TensorInfo", "outputs = 2 map TensorInfo", "method_name = 3 string"],
    # tensorflow.serving
    # version and version_label are a oneof there; the client never sends both.
    "ModelSpec": [
        "name = 1 string",
        "version = 2 Int64Value",
        "signature_name = 3 string",
        "version_label = 4 string",
    ],
    "PredictRequest": ["model_spec = 1 ModelSpec", "inputs = 2 map TensorProto"],
    "PredictResponse": ["outputs = 1 map TensorProto", "model_spec = 2 ModelSpec"],
    "GetModelMetadataRequest": ["model_spec = 1 ModelSpec", "metadata_field = 2 repeated string"],
    "GetModelMetadataResponse": ["model_spec = 1 ModelSpec", "metadata = 2 map Any"],
    "SignatureDefMap": ["signature_def = 1 map SignatureDef"],
}

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _Field.TYPE_BOOL,
    "bytes": _Field.TYPE_BYTES,
    "float": _Field.TYPE_FLOAT,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
}


def _add_field(message: Any, name: str, number: int, kind: str, repeated: bool = False) -> None:
    field = message.field.add(name=name, number=number)
    field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"


def _add_message(file: Any, name: str, fields: list[str]) -> None:
    message = file.message_type.add(name=name)
    for text in fields:
        left, right = text.split(" = ")
        number, *label, kind = right.split()
        if label == ["map"]:
            # A map is a repeated message of keys and values, marked as such. Its name is fixed by protobuf.
            entry = message.nested_type.add(name="".join(map(str.capitalize, left.split("_"))) + "Entry")
            entry.options.map_entry = True
            _add_field(entry, "key", 1, "string")
            _add_field(entry, "value", 2, kind)
            kind = f"{name}.{entry.name}"
        _add_field(message, left, int(number), kind, repeated=bool(label))


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}/protocol.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        _add_message(file, name, fields)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


_CLASSES = _classes()
ModelSpec: Any = _CLASSES["ModelSpec"]
TensorProto: Any = _CLASSES["TensorProto"]
PredictRequest: Any = _CLASSES["PredictRequest"]
PredictResponse: Any = _CLASSES["PredictResponse"]
GetModelMetadataRequest: Any = _CLASSES["GetModelMetadataRequest"]
GetModelMetadataResponse: Any = _CLASSES["GetModelMetadataResponse"]
SignatureDefMap: Any = _CLASSES["SignatureDefMap"]
