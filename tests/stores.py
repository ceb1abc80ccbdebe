"""A real S3 server on this machine (moto's), and a proxy in front of it that breaks connections."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Self

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}


class Server:
    """moto's server in a process of its own.

    Attributes:
      port: where it listens on 127.0.0.1.
    """

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            env=os.environ | KEYS,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._buckets = itertools.count(1)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            time.sleep(0.05)
        self.stop()
        raise TimeoutError("moto's server does not start")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def bucket(self) -> str:
        """Creates a bucket; returns its name."""
        name = f"bucket-{next(self._buckets)}"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        return name

    @contextlib.contextmanager
    def denying(self) -> Iterator[None]:
        """Inside this context the server asks whether a key may do what it does; none may."""
        self._authenticate_after("0")
        try:
            yield
        finally:
            self._authenticate_after("inf")

    def _authenticate_after(self, requests: str) -> None:
        address = f"http://127.0.0.1:{self.port}/moto-api/reset-auth"
        request = urllib.request.Request(address, requests.encode(), {"Content-Type": "text/plain"})
        urllib.request.urlopen(request, timeout=10).close()


class Proxy:
    """Passes connections on to a port, and breaks those that carry much while ``cuts`` lasts.

    Attributes:
      port: where it listens on 127.0.0.1.
      cuts: how many more connections to break.
      after: bytes in one direction after which a connection is broken.
    """

    def __init__(self, target: int) -> None:
        self._target, self.cuts, self.after = target, 0, 1 << 18
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while block := source.recv(1 << 16):
                passed += len(block)
                if self.cuts and passed > self.after:
                    self.cuts -= 1
                    break
                target.sendall(block)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
