"""Certificates and tokens: what is refused at the start, and what changes while the server runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest

from export.server.security import Certificates, Tokens
from export.server.status import StatusError
from stem_util.errors import UserError

PEM = Path(__file__).parents[2] / "stem_client"
CERTIFICATE, KEY = PEM / "localhost.certificate.pem", PEM / "localhost.key.pem"


def make_certificate(directory: Path, name: str, *options: str) -> tuple[Path, Path]:
    """A certificate for localhost and 127.0.0.1, signed by itself, and its key."""
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate, *names, *options], check=True, capture_output=True)
    return certificate, key


needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates with openssl")


def test_files_that_are_no_certificate_and_key_are_named(tmp_path: Path) -> None:
    garbage, broken = tmp_path / "garbage", tmp_path / "broken"
    garbage.write_bytes(os.urandom(100))
    broken.write_bytes(CERTIFICATE.read_bytes()[:200] + b"\n-----END CERTIFICATE-----\n")
    os.mkfifo(tmp_path / "pipe")
    encrypted = tmp_path / "encrypted"
    encrypted.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    for certificate, key, client_ca, message in [
        (tmp_path / "none", KEY, None, "--tls_certificate=.*none: No such file or directory"),
        (tmp_path, KEY, None, "--tls_certificate=.* is not a regular file"),
        (CERTIFICATE, tmp_path / "pipe", None, "--tls_key=.*pipe is not a regular file"),
        (garbage, KEY, None, "--tls_certificate=.*garbage is not PEM"),
        (KEY, CERTIFICATE, None, "--tls_certificate=.*key.pem is not PEM"),
        (CERTIFICATE, garbage, None, "--tls_key=.*garbage is not PEM"),
        (CERTIFICATE, encrypted, None, "--tls_key=.*encrypted has a password; remove it"),
        (broken, KEY, None, "broken or --tls_key=.* is damaged"),
        (CERTIFICATE, KEY, garbage, "--tls_client_ca=.*garbage holds no certificates in PEM"),
        (CERTIFICATE, KEY, KEY, "--tls_client_ca=.*key.pem holds no certificates in PEM"),
    ]:
        with pytest.raises(UserError, match=message):
            Certificates(certificate, key, client_ca, print)


@needs_openssl
def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    _, key = make_certificate(tmp_path, "other")
    with pytest.raises(UserError, match=r"--tls_key=.*other.key is (not the key of|damaged)|or --tls_key"):
        Certificates(CERTIFICATE, key, None, print)


@pytest.mark.parametrize(("now", "why"), [(9e9, "the certificate expired on"), (1e6, "is valid from")])
def test_dates_are_warned_of(now: float, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("time.time", lambda: now)
    Certificates(CERTIFICATE, KEY, None, said.append)
    assert len(said) == 1 and said[0].startswith(f"--tls_certificate={CERTIFICATE}: the certificate") and why in said[0]


@needs_openssl
def test_a_renewed_pair_is_taken_when_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.server.security._LOOK_SECONDS", 0.0)
    said: list[str] = []
    certificate, key = make_certificate(tmp_path, "first")
    new_certificate, new_key = make_certificate(tmp_path, "second")
    certificates = Certificates(certificate, key, None, said.append)
    before = certificates.context
    new_certificate.replace(certificate)
    certificates.refresh()
    assert certificates.context is before and "the earlier certificate stays" in said[0]
    certificates.refresh()
    assert len(said) == 1, "said once"
    new_key.replace(key)
    certificates.refresh()
    assert certificates.context is not before and said[1].endswith("first.pem was renewed")
    key.unlink()
    certificates.refresh()
    assert "No such file or directory" in said[2]


def _refusal(tokens: Tokens, authorization: str | bytes | None) -> str:
    with pytest.raises(StatusError) as caught:
        tokens.check(authorization)
    assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
    return caught.value.text


def test_tokens_let_in_who_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.server.security._LOOK_SECONDS", 0.0)
    path, said = tmp_path / "tokens", list[str]()
    path.write_text("# of the feed team\r\nsecret-1\r\n\n  secret-2  \n")
    tokens = Tokens(path, said.append)
    for good in ("Bearer secret-1", b"bearer secret-2", "BEARER  secret-2 "):
        tokens.check(good)
    for none in (None, "", "secret-1", "Basic secret-1", "Bearer", "Bearer "):
        assert _refusal(tokens, none) == "the call has no header 'authorization: Bearer TOKEN'"
    wrong = (
        "Bearer secret",
        "Bearer secret-1\n",
        "Bearer # of the feed team",
        b"Bearer \xff",
        "Bearer \udcff",
        "Bearer é",
    )
    for stranger in wrong:
        assert _refusal(tokens, stranger) == "the token is not known here"
    path.write_text("secret-3\n")
    tokens.check("Bearer secret-3")
    assert said == [f"{path} was read again: 1 tokens"]
    _refusal(tokens, "Bearer secret-1")
    path.write_text("")
    tokens.check("Bearer secret-3")  # an empty file is a mistake, and no reason to let nobody in
    assert "the earlier tokens stay" in said[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no token"),
        (b"# only words\n", "holds no token"),
        (b"good\ntwo words\n", "line 2: a token is made of visible ASCII"),
        ("gé".encode(), "line 1: a token"),
        (b"\x00" * 9, "line 1: a token"),
        (b"x" * (2 << 20), "larger than a megabyte"),
    ],
)
def test_token_files_that_are_none_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_bytes(content)
    with pytest.raises(UserError, match=f"--token_file={tmp_path}/tokens.*{message}") as caught:
        Tokens(tmp_path / "tokens", print)
    assert "good" not in str(caught.value), "a message shows no token"
