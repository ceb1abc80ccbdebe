"""The file of --model_config_file, which is read again from time to time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from export.server import configuration
from export.server.configuration import ConfigError, Model
from export.server.status import StatusError

_LONGEST_WAIT = 60.0


class ConfigFile:
    """A ModelServerConfig in text format on disk.

    Args:
      path: of the file.
      report: called with a line for the operator.
    """

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self._path, self._report = path, report
        self._text = ""
        self._stopping = threading.Event()

    def models(self) -> list[Model]:
        """Returns the models that the file lists now.

        Raises:
          ConfigError: the file cannot be read, or is wrong.
        """
        self._text = configuration.read(self._path)
        models, remarks = _parsed(self._text)
        for line in remarks:
            self._report(line)
        return models

    def follow(self, replace: Callable[[Sequence[Model]], None], seconds: float) -> None:
        """Reads the file every so many seconds in a thread; calls ``replace`` with its models when it has changed."""
        threading.Thread(target=self._watch, args=(replace, seconds), name="model config file", daemon=True).start()

    def stop(self) -> None:
        """Ends :meth:`follow`."""
        self._stopping.set()

    def _watch(self, replace: Callable[[Sequence[Model]], None], seconds: float) -> None:
        wait, said = seconds, ""
        while not self._stopping.wait(wait):
            try:
                text = configuration.read(self._path)
                if text != self._text:
                    listed, remarks = _parsed(text)
                    replace(listed)
                    self._text = text
                    for line in (f"{self._path} has changed: its models serve", *remarks):
                        self._report(line)
                wait, said = seconds, ""
            except Exception as error:
                # Tried again after longer and longer waits: its models may load only later.
                wait = max(seconds, min(_LONGEST_WAIT, wait * 2))
                why = str(error) if isinstance(error, ConfigError | StatusError) else repr(error)
                if why != said:
                    self._report(f"{self._path}: {why}; the models before go on serving")
                said = why


def _parsed(text: str) -> tuple[list[Model], list[str]]:
    config = configuration.parse(text)
    return configuration.models(config), configuration.remarks(config)
