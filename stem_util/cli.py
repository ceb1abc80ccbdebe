"""The frame every job runs in: flags, a short ``--help``, one-line errors and exit codes.

Exit codes: 0 done; 1 the job failed (:class:`~stem_util.errors.JobError`, a full disk, out of memory, a bug); 2 the
user can mend it (:class:`~stem_util.errors.UserError`, a bad flag); 130 Ctrl-C; 143 SIGTERM. Whatever is raised ends in
one sentence; ``--debug`` shows the traceback as well.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from absl import app, flags

from stem_util.errors import Stopped, UserError, message


class _Path(flags.ArgumentParser):
    """A path; a leading ~ is somebody's home, as it is to a shell, which only expands it where a word begins."""

    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ValueError("its bytes are not UTF-8") from None
        return os.path.expanduser(argument)


PATH = _Path()
"""For flags that are paths: ``flags.DEFINE(cli.PATH, name, default, help)``."""

_DEBUG = flags.DEFINE_boolean("debug", False, "Show the traceback of an error.")
_HELP = {"--help", "-help", "--helpshort", "-h", "-?"}
_REQUIRED = re.compile(r"flag --(\S+)=None: Flag --\1 must have a value other than None\.")


def run(
    main: Callable[[Sequence[str]], Any],
    arguments: str = "",
    *,
    memory: str = "",
    rewritten: Callable[[Sequence[str]], list[str]] = list,
) -> NoReturn:
    """Runs a job under absl, for ``python -m module`` and for console scripts alike; never returns.

    Args:
      main: called with the program's name and the arguments that are not flags. The docstring of its module heads
        ``--help``, and the flags of that module (and those it adopts) are the ones listed.
      arguments: names the arguments that are not flags in ``--help``, as ``"LOG..."``. A job without any refuses them.
      memory: what needs less memory, as in ``"fewer --processes"``: said when there was not enough.
      rewritten: makes arguments that absl knows of those given, on the command line or in a ``--flagfile``.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        words = set(argv[1 : argv.index("--")] if "--" in argv else argv[1:])
        with _one_sentence("--debug" in words):
            if words & _HELP:
                print(_help(main, arguments), flush=True)
                sys.exit(0)
            try:
                given = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
            except UnicodeError as error:
                raise UserError(f"a --flagfile is not UTF-8 ({error})") from error
            positional = flags.FLAGS([argv[0], *rewritten(given)])
            if len(positional) > 1 and not arguments:
                raise UserError(f"unexpected argument {positional[1]!r}; flags are written --name=value")
        return positional

    def guarded(argv: Sequence[str]) -> Any:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _stop)
        with _one_sentence(_DEBUG.value, memory):
            result = main(argv)
            sys.stdout.flush()
        return result

    app.run(guarded, flags_parser=parse)
    raise AssertionError("absl.app.run does not return")


@contextlib.contextmanager
def _one_sentence(debug: bool, memory: str = "") -> Iterator[None]:
    """Ends the process with the exit code, and the one line, of whatever is raised."""
    try:
        yield
    except (UserError, app.UsageError, flags.Error) as error:
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
    """SIGTERM ends a job as Ctrl-C does, so that what it has begun is cleared away; once, or it would stop that too."""
    del frame
    signal.signal(number, signal.SIG_IGN)
    raise Stopped("stopped by SIGTERM")


def _fail(error: BaseException, code: int, debug: bool, memory: str = "") -> NoReturn:
    if debug:
        traceback.print_exception(error)
    print(f"error: {_line(error, memory)}", file=sys.stderr)
    sys.exit(code)


def _line(error: BaseException, memory: str) -> str:
    if isinstance(error, app.UsageError | flags.Error):
        return " ".join(_REQUIRED.sub(r"--\1 is required", str(error)).split())
    return message(error, memory)


def _help(main: Callable[..., Any], arguments: str) -> str:
    module = sys.modules[main.__module__]
    program = os.path.basename(sys.argv[0])
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if module.__name__ == "__main__" and spec is not None:
        program = f"python -m {spec.name}"
    usage = " ".join(filter(None, ["usage:", program, arguments, "[--flag=value ...]"]))
    own = flags.FLAGS.get_key_flags_for_module(module)
    listed = [flag for flag in own if flag.name != "debug"] + [flags.FLAGS["debug"]]
    return "\n".join([usage, "", (module.__doc__ or "").strip(), "", "flags:", *map(_flag_help, listed)])


def _flag_help(flag: flags.Flag[Any]) -> str:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    plain = isinstance(flag.default, str | int | float) and not flag.boolean
    default = f" (default: {flag.default})" if plain and flag.default != "" else ""
    return flags.text_wrap(f"{flag.help}{default}", indent="      ", firstline_indent=f"  {name}\n      ", length=100)
