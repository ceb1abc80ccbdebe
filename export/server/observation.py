"""What a call was and how it ended, for metrics and the access log."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import grpc
import numpy as np

from export.server.servable import Servable


@dataclasses.dataclass
class Observation:
    """One call that was answered.

    Attributes:
      method: "Predict", "GetModelMetadata", ...
      entrypoint: "GRPC" or "REST".
      model, version, signature: what answered; as asked for where nothing did (None: no version was named).
      code, text: the status.
      rows: that were scored, 0 where it did not come to that.
      request_bytes, response_bytes: of the two messages.
      seconds: from the first byte that was read to the answer.
      waited: seconds of that in the queue.
      request_id: the client's metadata ``x-request-id``, or one of our own.
      peer: the client's address.
      servable: the version, where one was found.
      inputs, outputs: by name, where the call was run.
    """

    method: str
    entrypoint: str = "GRPC"
    model: str = ""
    version: int | None = None
    signature: str = ""
    code: grpc.StatusCode = grpc.StatusCode.OK
    text: str = ""
    rows: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    request_id: str = ""
    peer: str = ""
    servable: Servable | None = None
    inputs: Mapping[str, np.ndarray] | None = None
    outputs: Mapping[str, np.ndarray] | None = None
