"""The frame every job runs in: flags, a short ``--help``, one-line errors and exit codes.

Exit codes: 0 done; 1 the job failed (:class:`~pipelines.errors.JobError`, a full disk); 2 the user can mend it
(:class:`~pipelines.errors.UserError`, a bad flag); 130 interrupted. ``--debug`` shows the traceback as well.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags

from pipelines.errors import JobError, UserError

_DEBUG = flags.DEFINE_boolean("debug", False, "Show the traceback of an error.")
_HELP = {"--help", "-help", "--helpshort", "-h", "-?"}
_REQUIRED = re.compile(r"flag --(\S+)=None: Flag --\1 must have a value other than None\.")


def run(main: Callable[[Sequence[str]], Any], arguments: str = "") -> NoReturn:
    """Runs a job under absl, for ``python -m module`` and for console scripts alike; never returns.

    Args:
      main: called with the program's name and the arguments that are not flags. The docstring of its module heads
        ``--help``, and the flags of that module (and those it adopts) are the ones listed.
      arguments: names the arguments that are not flags in ``--help``, as ``"LOG..."``. A job without any refuses them.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        words = set(argv[1 : argv.index("--")] if "--" in argv else argv[1:])
        if words & _HELP:
            print(_help(main, arguments))
            sys.exit(0)
        try:
            positional = flags.FLAGS(argv)
            if len(positional) > 1 and not arguments:
                raise UserError(f"unexpected argument {positional[1]!r}; flags are written --name=value")
        except (flags.Error, UserError, OSError) as error:
            _fail(error, 2, debug="--debug" in words)
        return positional

    def guarded(argv: Sequence[str]) -> Any:
        try:
            result = main(argv)
            sys.stdout.flush()
            return result
        except (UserError, app.UsageError, flags.Error) as error:
            _fail(error, 2, debug=_DEBUG.value)
        except BrokenPipeError as error:
            # The reader of our output has gone (`... | head`). Python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _fail(error, 1, debug=_DEBUG.value)
        except (JobError, OSError) as error:
            _fail(error, 1, debug=_DEBUG.value)
        except KeyboardInterrupt as error:
            _fail(error, 130, debug=_DEBUG.value)

    app.run(guarded, flags_parser=parse)
    raise AssertionError("absl.app.run does not return")


def _fail(error: BaseException, code: int, *, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exception(error)
    print(f"error: {_message(error)}", file=sys.stderr)
    sys.exit(code)


def _message(error: BaseException) -> str:
    """One line, whatever the error holds."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(_REQUIRED.sub(r"--\1 is required", text).split()) or type(error).__name__


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
