"""The frame every job runs in: flags, a short ``--help``, one-line errors and exit codes.

Exit codes: 0 done; 1 the job failed (:class:`~stem_util.errors.JobError`, a full disk, out of memory, a bug); 2 the
user can fix it (:class:`~stem_util.errors.UserError`, a bad flag); 3 the gate of stem-publish refuses; 130 Ctrl-C;
143 SIGTERM. Every exception is printed as one sentence; ``--debug`` shows the traceback as well.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import absl.flags
from absl import app

from stem_util import progress, stores
from stem_util.errors import Stopped, UserError, message


class _Path(absl.flags.ArgumentParser):
    """A path. A leading ~ is expanded to a home directory: a shell does that only where a word begins."""

    syntactic_help = "a path"

    def __init__(self, *, stored: bool = False) -> None:
        self._stored = stored

    def parse(self, argument: str) -> str:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ValueError("its bytes are not UTF-8") from None
        if not stores.is_uri(argument):
            return os.path.expanduser(argument)
        if not self._stored:
            raise ValueError("it has to be on this machine, not in a store")
        try:
            return stores.check(argument)
        except UserError as error:
            raise ValueError(str(error)) from None


PATH = _Path()
"""For flags that are paths of this machine: ``flags.DEFINE(cli.PATH, name, default, help)``."""
PLACE = _Path(stored=True)
"""For flags that are paths or URIs, such as s3://bucket/path."""

_HELP = {"--help", "-help", "--helpshort", "-h", "-?"}
_REQUIRED = re.compile(r"flag --(\S+)=None: Flag --\1 must have a value other than None\.")


class Flags:
    """The flags of one job: ``flags = cli.Flags()``, then absl's ``flags.DEFINE_string(...)`` and so on.

    absl by itself keeps the flags of all modules in one set, and refuses to import two jobs with a ``--workdir``.

    Attributes:
      values: absl's flag values, ``--debug`` included.
    """

    def __init__(self) -> None:
        self.values = absl.flags.FlagValues()
        self.debug = self.DEFINE_boolean("debug", False, "Show the traceback of an error.")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.startswith("DEFINE"):
            raise AttributeError(name)
        return functools.partial(getattr(absl.flags, name), flag_values=self.values)

    def parse(self, argv: Sequence[str], rewritten: Callable[[Sequence[str]], list[str]]) -> list[str]:
        """Sets the job's flags and absl's (``--verbosity``, ...); returns the program name and the other arguments."""
        together = absl.flags.FlagValues()
        together.append_flag_values(self.values)
        for name in absl.flags.FLAGS:
            if name not in together and absl.flags.FLAGS[name].name == name:
                together[name] = absl.flags.FLAGS[name]
        try:
            given = together.read_flags_from_files(argv[1:], force_gnu=False)
        except UnicodeError as error:
            raise UserError(f"a --flagfile is not UTF-8 ({error})") from error
        positional = together([argv[0], *rewritten(given)])
        absl.flags.FLAGS.mark_as_parsed()
        self.values.mark_as_parsed()
        self.values.validate_all_flags()
        return list(positional)

    def reset(self) -> None:
        """Gives each flag its default again."""
        for name in self.values:
            self.values[name].unparse()


def run(
    main: Callable[[Sequence[str]], Any],
    flags: Flags,
    arguments: str = "",
    *,
    memory: str = "",
    rewritten: Callable[[Sequence[str]], list[str]] = list,
    described: Callable[[], str] = str,
) -> NoReturn:
    """Runs a job under absl, for ``python -m module`` and for console scripts alike; ends in SystemExit.

    Args:
      main: called with the program's name and the arguments that are not flags. The docstring of its module heads
        ``--help``.
      flags: the job's flags. They are reset to their defaults afterwards, so that a process can run a job again.
      arguments: what ``--help`` calls the arguments that are not flags, such as ``"LOG..."``; without it the job
        refuses such arguments.
      memory: what would need less memory, such as ``"fewer --processes"``; part of the message when memory runs out.
      rewritten: rewrites the arguments, of the command line or a ``--flagfile``, into ones that absl knows.
      described: returns text for ``--help`` to show below the docstring; called only then, since it may be slow.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        words = set(argv[1 : argv.index("--")] if "--" in argv else argv[1:])
        with _one_sentence("--debug" in words):
            if words & _HELP:
                print(_help(main, flags, arguments, described()), flush=True)
                sys.exit(0)
            positional = flags.parse(argv, rewritten)
            if len(positional) > 1 and not arguments:
                raise UserError(f"unexpected argument {positional[1]!r}; flags are written --name=value")
        return positional

    def guarded(argv: Sequence[str]) -> Any:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _stop)
        with _one_sentence(flags.debug.value, memory), progress.of_one_job():
            result = main(argv)
            sys.stdout.flush()
        return result

    try:
        app.run(guarded, flags_parser=parse)
    finally:
        flags.reset()
    raise AssertionError("absl.app.run does not return")


@contextlib.contextmanager
def _one_sentence(debug: bool, memory: str = "") -> Iterator[None]:
    """Turns an exception into one line on stderr and an exit code."""
    try:
        yield
    except (UserError, app.UsageError, absl.flags.Error) as error:
        _fail(error, 2, debug)
    except BrokenPipeError as error:
        # The reader of our output has gone (`... | head`). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(error, 1, debug)
    except KeyboardInterrupt as error:
        _fail(error, 128 + signal.SIGINT, debug)
    except Stopped as error:
        _fail(error, 128 + signal.SIGTERM, debug)
    except Exception as error:
        _fail(error, 1, debug, memory)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Ends a job on SIGTERM as on Ctrl-C, so that it clears up; a second SIGTERM is ignored, to let it finish that."""
    del frame
    signal.signal(number, signal.SIG_IGN)
    raise Stopped("stopped by SIGTERM")


def _fail(error: BaseException, code: int, debug: bool, memory: str = "") -> NoReturn:
    if debug:
        traceback.print_exception(error)
    print(f"error: {_line(error, memory)}", file=sys.stderr)
    sys.exit(code)


def _line(error: BaseException, memory: str) -> str:
    if isinstance(error, app.UsageError | absl.flags.Error):
        return " ".join(_REQUIRED.sub(r"--\1 is required", str(error)).split())
    return message(error, memory)


def command_line(module: str) -> str:
    """The command line of the job that runs, ``module``, as one would type it again."""
    program = Path(sys.argv[0])
    words = [program.name] if program.suffix != ".py" else ["python", "-m", module]
    return shlex.join([*words, *sys.argv[1:]])


def _help(main: Callable[..., Any], flags: Flags, arguments: str, described: str) -> str:
    module = sys.modules[main.__module__]
    program = os.path.basename(sys.argv[0])
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if module.__name__ == "__main__" and spec is not None:
        program = f"python -m {spec.name}"
    usage = " ".join(filter(None, ["usage:", program, arguments, "[--flag=value ...]"]))
    debug, *own = (flags.values[name] for name in flags.values)
    about = "\n".join(filter(None, [(module.__doc__ or "").strip(), described]))
    return "\n".join([usage, "", about, "", "flags:", *map(_flag_help, [*own, debug])])


def _flag_help(flag: absl.flags.Flag[Any]) -> str:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    plain = isinstance(flag.default, str | int | float) and not flag.boolean
    default = f" (default: {flag.default})" if plain and flag.default != "" else ""
    return absl.flags.text_wrap(
        f"{flag.help}{default}", indent="      ", firstline_indent=f"  {name}\n      ", length=100
    )
