"""One call and how it ended, for metrics and the access log."""

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
      model, version, signature: that answered; if none did, as asked for (version None: none was named).
      code, text: the status.
      rows: that were scored; 0 if the call was not run.
      request_bytes, response_bytes: of the two messages.
      seconds: from the first byte to the answer.
      waited: seconds of that in the queue.
      request_id: the client's metadata ``x-request-id``, or a new one.
      peer: the client's address.
      servable: the version, if one was found.
      inputs, outputs: by name, if the call was run.
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
