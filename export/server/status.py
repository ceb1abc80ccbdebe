"""Errors that become gRPC status codes, with TensorFlow Serving's numbers and texts."""

from __future__ import annotations

import grpc

STOPPING = "the server is stopping"
"""The text of UNAVAILABLE after SIGTERM."""
_LIMIT = 1024
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class StatusError(Exception):
    """An error that a call answers instead of a response.

    Attributes:
      code: the gRPC status code.
      text: its message, cut after 1024 bytes of UTF-8 as in TensorFlow Serving. gRPC sends it in a header, with three
        bytes for each byte that is not ASCII, and answers with another status if the header is too long.
    """

    def __init__(self, code: grpc.StatusCode | int, text: str) -> None:
        self.code = _CODES.get(code, grpc.StatusCode.UNKNOWN) if isinstance(code, int) else code
        # Text from a request may hold halves of surrogate pairs, which UTF-8 cannot encode.
        encoded = text.encode("utf-8", "backslashreplace")
        cut = encoded[:_LIMIT].decode("utf-8", "ignore") + "...TRUNCATED"
        self.text = encoded.decode("utf-8") if len(encoded) <= _LIMIT else cut
        super().__init__(self.text)

    @property
    def number(self) -> int:
        return int(self.code.value[0])


def invalid_argument(text: str) -> StatusError:
    return StatusError(grpc.StatusCode.INVALID_ARGUMENT, text)


def not_found(text: str) -> StatusError:
    return StatusError(grpc.StatusCode.NOT_FOUND, text)
