"""TensorFlow Serving's gRPC services: their methods and messages."""

from __future__ import annotations

from typing import NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.message import Message
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    predict_pb2,
    regression_pb2,
)

PREDICTION_SERVICE = "tensorflow.serving.PredictionService"
MODEL_SERVICE = "tensorflow.serving.ModelService"
# TensorFlow Serving's health service knows its services by their short names.
HEALTH_SERVICES = ("", PREDICTION_SERVICE, MODEL_SERVICE, "PredictionService", "ModelService")


class Method(NamedTuple):
    request: type[Message]
    response: type[Message]


SERVICES: dict[str, dict[str, Method]] = {
    PREDICTION_SERVICE: {
        "Classify": Method(classification_pb2.ClassificationRequest, classification_pb2.ClassificationResponse),
        "Regress": Method(regression_pb2.RegressionRequest, regression_pb2.RegressionResponse),
        "Predict": Method(predict_pb2.PredictRequest, predict_pb2.PredictResponse),
        "MultiInference": Method(inference_pb2.MultiInferenceRequest, inference_pb2.MultiInferenceResponse),
        "GetModelMetadata": Method(
            get_model_metadata_pb2.GetModelMetadataRequest, get_model_metadata_pb2.GetModelMetadataResponse
        ),
    },
    MODEL_SERVICE: {
        "GetModelStatus": Method(
            get_model_status_pb2.GetModelStatusRequest, get_model_status_pb2.GetModelStatusResponse
        ),
        "HandleReloadConfigRequest": Method(
            model_management_pb2.ReloadConfigRequest, model_management_pb2.ReloadConfigResponse
        ),
    },
}
_FILES = {
    PREDICTION_SERVICE: "tensorflow_serving/apis/prediction_service.proto",
    MODEL_SERVICE: "tensorflow_serving/apis/model_service.proto",
}


def describe_services() -> None:
    """Adds the two services to protobuf's pool, for reflection.

    tensorflow_serving's own modules for them were generated for protobuf 3 and do not import with protobuf 4; these are
    the same two files.
    """
    pool = descriptor_pool.Default()
    for service, methods in SERVICES.items():
        package, _, short = service.rpartition(".")
        messages = [message.DESCRIPTOR for method in methods.values() for message in method]
        file = descriptor_pb2.FileDescriptorProto(
            name=_FILES[service],
            package=package,
            syntax="proto3",
            dependency=dict.fromkeys(descriptor.file.name for descriptor in messages),
        )
        if service == PREDICTION_SERVICE:
            file.options.cc_enable_arenas = True
        described = file.service.add(name=short)
        for name, method in methods.items():
            described.method.add(
                name=name,
                input_type=f".{method.request.DESCRIPTOR.full_name}",
                output_type=f".{method.response.DESCRIPTOR.full_name}",
            )
        pool.AddSerializedFile(file.SerializeToString())
