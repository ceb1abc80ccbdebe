"""The options of operators, for the flags; imported before TensorFlow."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Options:
    """What is turned on; None is off.

    Attributes:
      host: that ports are opened on.
      metrics_port: of metrics and health over HTTP; 0 is any free one.
      metrics_sample: share of the calls whose features and scores are counted.
      rest_port: of the REST API; 0 is any free one.
      rest_seconds: the longest time of a call over REST.
      rest_max_bytes: the largest body of such a call.
      access_log: a path, or "-".
      tls_certificate, tls_key, tls_client_ca: PEM files.
      token_file: of bearer tokens.
    """

    host: str
    metrics_port: int | None = None
    metrics_sample: float = 0.1
    rest_port: int | None = None
    rest_seconds: float = 30.0
    rest_max_bytes: int = 4 << 20
    access_log: str | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
