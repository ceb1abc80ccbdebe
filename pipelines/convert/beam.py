"""Runs the steps of a conversion on Apache Beam (`stem-convert --runner=direct`, flink, spark or dataflow).

Each step is one pipeline: numbers of tasks -> reshuffle -> `work`, which does what `stem_util.workers.Pool` has its
processes do. Arguments and results lie in files beside the other scratch files. So this process takes results in the
order of the tasks, one at a time, and the output has the same bytes as that of the local converter.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import io
import logging
import os
import pickle
import shlex
import shutil
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self, TypeVar

import apache_beam
import grpc
from apache_beam.options.pipeline_options import (
    DirectOptions,
    FlinkRunnerOptions,
    PipelineOptions,
    PortableOptions,
    SparkRunnerOptions,
)
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.runner import PipelineState, create_runner
from apache_beam.transforms.environments import SubprocessSDKEnvironment

from pipelines.convert.encode import forget_vocabularies
from stem_util import files
from stem_util.errors import FULL_DISK, JobError, Stopped, UserError, did_you_mean
from stem_util.progress import Progress
from stem_util.version import __version__

Result = TypeVar("Result")

_NEAR = 0.85  # of names that are one another misspelled
_ANSWERS_IN_SECONDS = 10.0
_LOOKS_EVERY_SECONDS = 2.0


class BeamPool:
    """Runs tasks as `stem_util.workers.Pool` does, on the workers of a Beam runner.

    Args:
      runner: direct, flink, spark or dataflow.
      arguments: Beam's pipeline options, after `check`.
      scratch: directory of the scratch files, which all workers see under this path.
    """

    def __init__(self, runner: str, arguments: str, scratch: str) -> None:
        self._runner, self._arguments, self._scratch = runner, arguments, scratch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass  # a pipeline's workers end with it

    def run(self, function: Callable[..., Result], tasks: Sequence[tuple[str, tuple]]) -> Iterator[Result]:
        """Yields ``function(*arguments)`` for every (name, arguments), in the order of the tasks, when all are done.

        Raises:
          JobError: Beam could not do them.
        """
        if not tasks:
            return
        step = os.path.join(self._scratch, f"{function.__name__}-{uuid.uuid4().hex}")
        os.mkdir(step)
        with open(_tasks_path(step), "wb") as file:
            pickle.dump(__version__, file)
            pickle.dump((function, [arguments for _, arguments in tasks]), file)
        self._execute(function.__name__, len(tasks), step)
        for number in range(len(tasks)):
            with open(_result_path(step, number), "rb") as file:
                result = pickle.load(file)
            if isinstance(result, Exception):
                raise result
            yield result
        files.remove_tree(step)

    def _execute(self, name: str, tasks: int, step: str) -> None:
        pipeline = _pipeline(self._runner, self._arguments, tasks)
        numbers = pipeline | apache_beam.Create(range(tasks)) | apache_beam.Reshuffle()
        _ = numbers | name >> apache_beam.Map(work, step)
        result = None
        try:
            with _noticing_deaths(), _showing_progress(name, tasks, step):
                result = pipeline.run()
                state = result.wait_until_finish() or result.state
        except (KeyboardInterrupt, Stopped):
            if result is not None:
                result.cancel()
            raise
        except JobError:
            raise
        except Exception as error:
            raise JobError(f"Apache Beam's {self._runner} runner failed at {name}: {_last_line(error)}") from error
        if state != PipelineState.DONE:
            raise JobError(f"Apache Beam's {self._runner} runner failed at {name}: the pipeline is {state}")


def check(runner: str, arguments: str) -> None:
    """Refuses pipeline options that Beam does not know or that do not fit the runner, before anything starts.

    Args:
      runner: direct, flink, spark or dataflow.
      arguments: the options, written as on a command line.

    Raises:
      UserError: names the option.
    """
    try:
        words = shlex.split(arguments)
    except ValueError as error:
        raise UserError(f"--beam_args={arguments}: {error}") from None
    loose = [word for word in words if not word.startswith("--")]
    if loose:
        raise UserError(f"--beam_args: unexpected word '{loose[0]}'; options are written --name=value")
    if "--runner" in (word.partition("=")[0] for word in words):
        raise UserError("--beam_args: the runner is chosen by --runner of stem-convert")
    known = PipelineOptions([]).get_all_options()
    with _one_line(runner):
        given = PipelineOptions(words).get_all_options(retain_unknown_options=True)
    for name in given.keys() - known.keys():
        # A job server of Flink or Spark knows options that this Beam does not.
        foreign = runner in ("flink", "spark") and not difflib.get_close_matches(name, known, 1, _NEAR)
        if not foreign:
            raise UserError(f"--beam_args: Apache Beam has no option --{name}{did_you_mean(name, known)}")
    if PipelineOptions(words).view_as(DirectOptions).direct_num_workers < 0:
        raise UserError("--beam_args: --direct_num_workers should be 0 (the number of cores) or more")
    if runner == "dataflow" and importlib.util.find_spec("apitools") is None:
        raise UserError("--runner=dataflow needs Google's libraries, too: pip install 'stem-tf[dataflow]'")
    with _one_line(runner):
        _pipeline(runner, arguments, tasks=1)  # Beam checks which options the runner requires
    if runner in ("flink", "spark"):
        _check_job_server(runner, PipelineOptions(words))


def _pipeline(runner: str, arguments: str, tasks: int) -> apache_beam.Pipeline:
    # What the direct runner has to say of a failure is in its exception.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL if runner == "direct" else logging.WARNING)
    options = PipelineOptions(shlex.split(arguments))
    # Beam's DirectRunner would first try to download another one.
    runs = _direct_runner(options, tasks) if runner == "direct" else create_runner(runner)
    return apache_beam.Pipeline(runs, options)


def _direct_runner(options: PipelineOptions, tasks: int) -> FnApiRunner:
    """Beam's runner on this machine: in this process, or in several if that many workers and tasks are there."""
    direct = options.view_as(DirectOptions)
    direct.direct_num_workers = min(direct.direct_num_workers or len(os.sched_getaffinity(0)), tasks)
    if direct.direct_running_mode == "multi_threading" or (
        direct.direct_running_mode == "in_memory" and direct.direct_num_workers == 1
    ):
        return FnApiRunner()
    direct.direct_running_mode = "in_memory"  # the mode multi_processing starts workers that outlive a killed process
    command = f"exec {shlex.quote(sys.executable)} -m pipelines.convert.beam_worker {os.getpid()}"
    return FnApiRunner(SubprocessSDKEnvironment.from_command_string(command))


@contextlib.contextmanager
def _showing_progress(name: str, tasks: int, step: str) -> Iterator[None]:
    """Shows how many results a step has, while its pipeline runs: not every runner says how far it is."""
    over = threading.Event()

    def show() -> None:
        with Progress(tasks, unit="tasks", desc=name) as progress:
            while not over.wait(_LOOKS_EVERY_SECONDS):
                done = sum(entry.startswith("result-") for entry in os.listdir(step))
                if done > progress.done:
                    progress.update(done - progress.done)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _noticing_deaths() -> Iterator[None]:
    """Ends the block if a process that the direct runner has started dies: Beam would wait for its answer forever.

    Beam's thread that waits for a process ends with an exception then. The block runs in the main thread, or goes on
    unwatched.

    Raises:
      JobError: a process died.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main = threading.get_ident()

    def notice(arguments: threading.ExceptHookArgs) -> None:
        if arguments.thread is not None and arguments.thread.name == "run_worker":
            signal.pthread_kill(main, signal.SIGUSR1)  # a real signal: only that ends a wait for a lock
        elif not isinstance(arguments.exc_value, grpc.RpcError):  # other threads lose their connections to the process
            hook(arguments)

    def fail(number: int, frame: FrameType | None) -> NoReturn:
        raise JobError("a worker process died: killed from outside, or out of memory (fewer of them need less)")

    handler, hook = signal.signal(signal.SIGUSR1, fail), threading.excepthook
    threading.excepthook = notice
    try:
        yield
    finally:
        threading.excepthook = hook
        signal.signal(signal.SIGUSR1, handler)


@contextlib.contextmanager
def _one_line(runner: str) -> Iterator[None]:
    """Turns what Beam says about its options, in exceptions or on stderr, into a UserError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit:
        raise UserError(f"--beam_args: {said.getvalue().strip().rpartition('error: ')[2]}") from None
    except Exception as error:  # of many kinds: options that do not go together, credentials that are not there
        problems = "; ".join(line.rstrip(".") for line in str(error).splitlines() if not line.endswith(": "))
        raise UserError(f"--runner={runner}: {problems}") from None


def _check_job_server(runner: str, options: PipelineOptions) -> None:
    """Refuses Flink and Spark if their job server does not answer, or none can be started: it is a Java program."""
    endpoint = options.view_as(PortableOptions).job_endpoint
    if endpoint:
        host, _, port = endpoint.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=_ANSWERS_IN_SECONDS).close()
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(f"--beam_args: --job_endpoint={endpoint}: no job server answers there ({error})") from None
    elif not (
        shutil.which("java")
        or options.view_as(FlinkRunnerOptions).flink_submit_uber_jar
        or options.view_as(SparkRunnerOptions).spark_submit_uber_jar
    ):
        raise UserError(
            f"--runner={runner} starts a job server, which needs Java: install it, or name one that runs with "
            "--beam_args=--job_endpoint=HOST:PORT"
        )


def _last_line(error: Exception) -> str:
    """The last line of an exception's text, which is what a worker raised if the text is its traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1].removeprefix("stem_util.errors.JobError: ") if lines else type(error).__name__


def _tasks_path(step: str) -> str:
    return os.path.join(step, "tasks")


def _result_path(step: str, number: int) -> str:
    return os.path.join(step, f"result-{number}")


def work(number: int, step: str) -> None:
    """Does one task and leaves its result, unless an earlier try has left it. Runs in a worker of Beam.

    Args:
      number: the task's number.
      step: directory of the step's tasks and results.
    """
    path = _result_path(step, number)
    if os.path.exists(path):
        return
    function, tasks = _tasks(step)
    try:
        result = function(*tasks[number])
    except (UserError, JobError) as error:  # Beam would try again, and fail again
        result = error
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        result = error
    with files.moved_into_place(path, step) as beside, open(beside, "wb") as file:
        pickle.dump(result, file)


@functools.lru_cache(maxsize=1)
def _tasks(step: str) -> tuple[Callable[..., Any], list[tuple]]:
    """The function of a step, and the arguments of its tasks. No two steps have directories of the same name."""
    forget_vocabularies()  # those of another conversion may have had the same paths
    host = socket.gethostname()
    try:
        file = open(_tasks_path(step), "rb")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        raise JobError(
            f"the worker on {host} does not see {step}: the directory of --output must have the same path on all "
            "workers, on a file system that they share"
        ) from None
    with file:
        version = pickle.load(file)
        if version != __version__:
            raise JobError(f"the worker on {host} has stem-tf {__version__}, this job {version}: install the same")
        return pickle.load(file)
