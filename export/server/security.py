"""Who may call: certificates for gRPC and REST, and bearer tokens."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import ssl
import stat
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import grpc

from export.server.access_log import request_id
from export.server.observation import Observation
from export.server.status import StatusError
from stem_util.errors import UserError

_LOOK_SECONDS = 1.0
_LARGEST_FILE = 1 << 20
_HEALTH = "/grpc.health.v1.Health/"


class Certificates:
    """The files of TLS, read again when they change.

    Args:
      certificate: PEM file; the server's own first, then those between it and the root.
      key: PEM, without a password.
      client_ca: PEM; clients must then present a certificate that one of these authorities has signed.
      report: called with a line for the operator: a renewed certificate was loaded, or why it was not.

    Attributes:
      context: for HTTP; another one after each renewal.

    Raises:
      UserError: a file cannot be read or is not PEM, or the key belongs to another certificate.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None, report: Callable[[str], None]) -> None:
        self._paths = [certificate, key, *([client_ca] if client_ca is not None else [])]
        self._report = report
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._seen = [_stat(path) for path in self._paths]
        self._pem = self._read()
        self.context = _context(self._paths, self._pem)
        if why := _expired(self._pem[0]):
            report(f"--tls_certificate={certificate}: {why}")

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Credentials that look here at each handshake, so that a renewed certificate needs no restart.

        Each gRPC server needs its own, because credentials are told of a renewal once.
        """
        given = self._pem

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            """The configuration that gRPC uses from now on; None keeps the current one."""
            nonlocal given
            self.refresh()
            if given is self._pem:
                return None
            given = self._pem
            return self._configuration()

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), renewed, require_client_authentication=len(self._paths) == 3
        )

    def refresh(self) -> None:
        """Looks for changed files, at most once per second, and loads them if certificate and key match.

        A renewal replaces two files, one after the other. While they do not match, the earlier ones stay.
        """
        with self._lock:
            now = time.monotonic()
            if now - self._looked < _LOOK_SECONDS:
                return
            self._looked = now
            seen = [_stat(path) for path in self._paths]
            if seen == self._seen:
                return
            self._seen = seen
            try:
                pem = self._read()
                context = _context(self._paths, pem)
            except UserError as error:
                self._report(f"the earlier certificate stays: {error}")
                return
            self._pem, self.context = pem, context
            self._report(f"{self._paths[0]} was renewed" + (f"; {why}" if (why := _expired(pem[0])) else ""))

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        certificate, key, *client_ca = self._pem
        return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca[0] if client_ca else None)

    def _read(self) -> list[bytes]:
        return [_read(path, flag) for path, flag in zip(self._paths, _FLAGS, strict=False)]


_FLAGS = ("--tls_certificate", "--tls_key", "--tls_client_ca")


def _read(path: Path, flag: str) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{flag}={path} is not a regular file, and has to be read more than once")
        with open(path, "rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(f"{flag}={path}: {error.strerror}") from error
    if len(data) > _LARGEST_FILE:
        raise UserError(f"{flag}={path} is larger than a megabyte: it is another file")
    return data


def _context(paths: list[Path], pem: list[bytes]) -> ssl.SSLContext:
    """A context of the data that was read, even if the files have changed since."""
    certificate, key, *client_ca = pem
    if b"-----BEGIN CERTIFICATE-----" not in certificate:
        raise UserError(f"--tls_certificate={paths[0]} is not PEM: it has no BEGIN CERTIFICATE")
    if b"PRIVATE KEY-----" not in key:
        raise UserError(f"--tls_key={paths[1]} is not PEM: it has no BEGIN PRIVATE KEY")
    if b"ENCRYPTED" in key:
        raise UserError(f"--tls_key={paths[1]} has a password; remove it (openssl pkey -in KEY -out KEY.open)")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    with _in_memory(certificate) as certificate_path, _in_memory(key) as key_path:
        try:
            context.load_cert_chain(certificate_path, key_path, password="")
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise UserError(
                    f"--tls_key={paths[1]} is not the key of the certificate in --tls_certificate={paths[0]}"
                ) from error
            why = error.reason or str(error)
            raise UserError(f"--tls_certificate={paths[0]} or --tls_key={paths[1]} is damaged: {why}") from error
    if client_ca:
        try:
            context.load_verify_locations(cadata=client_ca[0].decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise UserError(f"--tls_client_ca={paths[2]} holds no certificates in PEM: {error}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextlib.contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """A path to ``data`` in memory, for functions that only read files: keys are not written to a disk."""
    with os.fdopen(os.memfd_create("stem-serve"), "wb") as file:
        file.write(data)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _expired(pem: bytes) -> str:
    """Says what is wrong with the dates of the first certificate; "" if nothing is."""
    with _in_memory(pem) as path:
        # Python has no public decoder of certificates; the tests of its ssl module use this one.
        decoded = ssl._ssl._test_decode_cert(path)  # type: ignore[attr-defined]
    now = time.time()
    if now > ssl.cert_time_to_seconds(decoded["notAfter"]):
        return f"the certificate expired on {decoded['notAfter']}: clients refuse it"
    if now < ssl.cert_time_to_seconds(decoded["notBefore"]):
        return f"the certificate is valid from {decoded['notBefore']} on only: clients refuse it until then"
    return ""


class Tokens:
    """Bearer tokens from a file with one token per line, which is read again when it changes.

    Args:
      path: of the file. Empty lines and those that begin with # are skipped.
      report: called with a line for the operator.

    Raises:
      UserError: the file cannot be read, holds no token, or a token has other than visible ASCII characters.
    """

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self._path, self._report = path, report
        self._looked, self._seen = time.monotonic(), _stat(path)
        self._digests = self._read()

    def check(self, authorization: str | bytes | None) -> None:
        """Lets a call with one of the tokens pass.

        Args:
          authorization: the header, ``Bearer TOKEN``.

        Raises:
          StatusError: UNAUTHENTICATED.
        """
        self._refresh()
        given = authorization.encode("utf-8", "surrogateescape") if isinstance(authorization, str) else authorization
        scheme, _, token = (given or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not token:
            raise StatusError(grpc.StatusCode.UNAUTHENTICATED, "the call has no header 'authorization: Bearer TOKEN'")
        digest = hashlib.sha256(token.strip(b" ")).digest()
        # All are compared, each in constant time, so that the time tells nothing about any token.
        if not sum(hmac.compare_digest(digest, each) for each in self._digests):
            raise StatusError(grpc.StatusCode.UNAUTHENTICATED, "the token is not known here")

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        seen = _stat(self._path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._digests = self._read()
        except UserError as error:
            self._report(f"the earlier tokens stay: {error}")
        else:
            self._report(f"{self._path} was read again: {len(self._digests)} tokens")

    def _read(self) -> list[bytes]:
        lines = [line.strip() for line in _read(self._path, "--token_file").splitlines()]
        tokens = [line for line in lines if line and not line.startswith(b"#")]
        if not tokens:
            raise UserError(f"--token_file={self._path} holds no token; write one per line")
        for number, line in enumerate(lines, 1):
            if not all(0x21 <= byte <= 0x7E for byte in line) and not line.startswith(b"#"):
                raise UserError(
                    f"--token_file={self._path}, line {number}: a token is made of visible ASCII characters, no spaces"
                )
        return [hashlib.sha256(token).digest() for token in tokens]


def _stat(path: Path) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (status.st_ino, status.st_size, status.st_mtime_ns)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Lets gRPC calls pass that have a token, and calls of the health service.

    Args:
      tokens: that are known.
      observe: called after each call that was refused.
    """

    def __init__(self, tokens: Tokens, observe: Callable[[Observation], None]) -> None:
        self._tokens, self._observe = tokens, observe

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """gRPC calls this before it reads the request."""
        method = handler_call_details.method
        if not method.startswith(_HEALTH):
            metadata = dict(handler_call_details.invocation_metadata)
            try:
                self._tokens.check(metadata.get("authorization"))
            except StatusError as error:
                return self._refusal(error, method, metadata)
        return await continuation(handler_call_details)

    def _refusal(self, error: StatusError, method: str, metadata: Mapping[str, str | bytes]) -> grpc.RpcMethodHandler:
        async def refuse(requests: object, context: grpc.aio.ServicerContext) -> None:
            del requests
            seen = Observation(method.rpartition("/")[2], code=error.code, text=error.text, peer=context.peer())
            seen.request_id = request_id(metadata.get("x-request-id"))
            self._observe(seen)
            await context.abort(error.code, error.text)

        # A stream can be answered before anything is read.
        return grpc.stream_unary_rpc_method_handler(refuse)
