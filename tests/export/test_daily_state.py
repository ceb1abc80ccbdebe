"""The days of stem-daily: what is done once, what goes on, what is refused and kept. Jobs are stand-ins here.

`test_daily.py` runs the jobs themselves. Here each leaves the files that the real one leaves, so that a kill before and
after every write can be tried.
"""

from __future__ import annotations

import ast
import csv
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from export.daily import cycle, process, table, watch
from export.daily.cycle import BadLog, Options
from export.daily.state import Day, State, check_day, day_of
from export.jobs import daily
from pipelines import manifest as manifests
from pipelines import schema_yaml
from pipelines.convert import conversion
from pipelines.convert import options as conversions
from stem_tf import configs
from stem_util import files, owned
from stem_util.errors import JobError, UserError

SCHEMA = """
name: small
features:
  user: {kind: categorical, side: user, dtype: int64}
tasks:
  click: {label: {column: clicked}}
"""


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs, but for ``finally``."""


class Jobs:
    """Stand-ins for the jobs.

    Attributes:
      data: what a conversion makes.
      commands: of the jobs that ran to their end.
      refuse: days that the gate refuses.
      fail: an exception by job and day, raised instead of the job's work.
    """

    def __init__(self, data: Path) -> None:
        self.data = data
        self.commands: list[list[str]] = []
        self.refuse: set[str] = set()
        self.fail: dict[tuple[str, str], list[BaseException]] = {}

    def __call__(
        self, name: str, module: str, arguments: Sequence[str], output: Path, accepted: Collection[int] = (0,)
    ) -> int:
        job, day = module.rpartition(".")[2], output.parent.name
        output.write_text("said\n")
        if self.fail.get((job, day)):
            raise self.fail[job, day].pop()
        flags = dict(word.removeprefix("--").partition("=")[::2] for word in arguments if word.startswith("--"))
        code = 0
        if job == "convert":
            if os.path.exists(flags["output"]):
                assert "overwrite" in flags
                shutil.rmtree(flags["output"])
            shutil.copytree(self.data, flags["output"])
        elif job == "train":
            owned.claim(flags["workdir"], owned.RUN)
        else:
            code = self._publish(flags, day)
        assert code in accepted
        self.commands.append([job, day, *arguments])
        return code

    def _publish(self, flags: dict[str, str], day: str) -> int:
        refused = day in self.refuse
        served = Path(flags["against"])
        newest = max((int(path.name) for path in served.glob("[0-9]*")), default=0)
        check = {"rule": "auc.margin", "of": "click", "candidate": 0.75, "served": 0.5 if newest else None}
        own = {"rule": "auc.at_least", "of": "click", "candidate": 0.75, "served": None}
        verdict = {"checks": [check, own], "reasons": ["the AUC of 'click' is .1 lower"] if refused else []}
        files.write_json(flags["verdict"], verdict)
        if refused:
            return 3
        partial = files.make_directory(served / ".partial")
        data = {"manifest_sha256": manifests.checksum(Path(flags["workdir"]).parent / "data")}
        run = {"workdir": os.path.realpath(flags["workdir"])}
        files.write_json(partial / "manifest.json", {"version": newest + 1, "run": run, "data": data})
        partial.rename(served / str(newest + 1))
        return 0

    def names(self) -> list[tuple[str, str]]:
        return [(job, day) for job, day, *_ in self.commands]


def converted(home: Path, clicked: list[int]) -> Path:
    """Converted data of a few rows."""
    pq.write_table(pa.table({"user": [1, 2, 3] * 50, "clicked": clicked * 50}), home / "log.parquet")
    (home / "schema.yaml").write_text(SCHEMA)
    options = conversions.Options(
        schema=schema_yaml.load(str(home / "schema.yaml")),
        output=str(home / "data"),
        log=str(home / "log.parquet"),
        split="random",
        processes=1,
    )
    conversion.convert(options)
    return home / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("data"), [0, 1, 1])


@pytest.fixture
def jobs(data: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    made = Jobs(data)
    monkeypatch.setattr(process, "run", made)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # takes most of the time here
    return made


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state")


@pytest.fixture
def options(tmp_path: Path) -> Options:
    (tmp_path / "small.yaml").write_text(SCHEMA)
    return Options(str(tmp_path / "small.yaml"), "small", ("seed=1",), str(tmp_path / "state" / "served"), keep=2)


DAYS = [f"2026-11-{number:02}" for number in range(20, 30)]


def do(state: State, options: Options, *days: str) -> Day:
    """Takes days to their end; returns the last one."""
    with state.locked():
        for day in days:
            done = cycle.run(state, day, f"/logs/{day}.parquet", options)
    return done


def test_the_day_stands_in_the_name_of_the_log() -> None:
    assert day_of("logs/day=2026-11-20/") == day_of("x/log-2026-11-20.parquet") == "2026-11-20"
    assert day_of("2026-11-20T14.csv") == "2026-11-20T14" and day_of("a_2026-11-20T14-30_b") == "2026-11-20T14-30"
    for name in ("log.parquet", "2026-11-20_2026-11-21.parquet", "12026-11-20", "2026-13-20", "2026-11-20T25"):
        with pytest.raises(UserError, match="has no single date|should be a date"):
            day_of(name)
    with pytest.raises(UserError, match="--day=yesterday: should be a date"):
        check_day("yesterday")


def test_each_day_goes_on_from_the_last_and_is_done_once(state: State, options: Options, jobs: Jobs) -> None:
    do(state, options, *DAYS[:2])
    home = state.path / "days"
    convert, train, publish = jobs.commands[3:]
    assert convert[2:4] == ["/logs/2026-11-21.parquet", f"--schema={options.schema}"]
    assert f"--extend={home}/2026-11-20/data" in convert and f"--from={home}/2026-11-20/run" in train
    assert "--config.seed=1" in train and f"--against={options.served}" in publish
    assert not any(word.startswith(("--extend", "--from")) for command in jobs.commands[:3] for word in command)
    before = len(jobs.commands)
    assert do(state, options, DAYS[1]).said() == "2026-11-21: published as version 2"
    assert len(jobs.commands) == before
    with pytest.raises(BadLog, match=r"2026-11-21 is done, with the log /logs/2026-11-21\.parquet"), state.locked():
        cycle.run(state, DAYS[1], "/logs/other.parquet", options)
    with pytest.raises(BadLog, match="2026-11-19 is older than 2026-11-21"):
        do(state, options, "2026-11-19")
    first, second = csv.DictReader(io.StringIO((state.path / "history.csv").read_text()))
    assert first["decision"] == "published" and first["served_auc"] == "" and first["auc"] == "0.75"
    assert second["from"] == "2026-11-20" and second["served_auc"] == "0.5" and second["version"] == "2"
    assert table.text(state.days()).splitlines()[2].split() == [
        "2026-11-21", "150", "3", ".5000", ".7500", "published", "version", "2",
    ]  # fmt: skip


@pytest.mark.parametrize("go_on_from", cycle.BASES)
def test_what_a_day_goes_on_from_after_a_refusal(state: State, options: Options, jobs: Jobs, go_on_from: str) -> None:
    jobs.refuse = {DAYS[1], DAYS[2]}
    options = Options(**{**vars(options), "go_on_from": go_on_from, "forget": "30d", "keep": 1})
    day = do(state, options, *DAYS[:3])
    assert day.said() == "2026-11-22: refused: the AUC of 'click' is .1 lower"
    assert sorted(path.name for path in (state.path / "served").iterdir()) == ["1"]
    do(state, options, DAYS[3])
    expected = {"published": DAYS[0], "last": DAYS[2], "nothing": None}[go_on_from]
    assert state.day(DAYS[3]).record["from"] == expected
    convert = jobs.commands[-3]
    assert ("--forget=30d" in convert) == (go_on_from != "nothing")
    # Of the days before, only the one that was published last was kept for the next one's sake.
    assert [day.name for day in state.days() if day.data.exists()] == [DAYS[3]]


def test_a_day_whose_version_was_rolled_back_is_passed_over(
    state: State, options: Options, jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    do(state, options, *DAYS[:2])
    (state.path / "served" / "2").rename(tmp_path / "2")
    assert do(state, options, DAYS[2]).record["from"] == DAYS[0]
    assert "version 2 is not served any more: goes on from 2026-11-20, not 2026-11-21" in capsys.readouterr().out
    for day in state.days():
        day.write(version=9)
    with pytest.raises(UserError, match="serves version 2, which is older than that of any day"):
        do(state, options, DAYS[3])


def test_the_data_that_the_next_day_needs_are_kept(state: State, options: Options, jobs: Jobs) -> None:
    jobs.refuse = {*DAYS[1:]}
    do(state, options, *DAYS[:5])
    kept = [day.name for day in state.days() if day.data.exists() and day.run.exists()]
    assert kept == [DAYS[0], DAYS[3], DAYS[4]]
    assert all(day.verdict.exists() and day.output.exists() for day in state.days())


def test_killed_at_any_moment_it_goes_on(
    state: State, options: Options, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A day that is killed before or after each of its writes and jobs ends as one that was not."""
    do(state, options, *DAYS[:2])
    moments = itertools.count()
    deadly = -1

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **keywords: object) -> object:
            if next(moments) == deadly:
                raise Killed
            found = function(*arguments, **keywords)
            if next(moments) == deadly:
                raise Killed
            return found

        return call

    monkeypatch.setattr(process, "run", dying(jobs))
    monkeypatch.setattr(files, "write_atomically", dying(files.write_atomically))
    monkeypatch.setattr(files, "remove_tree", dying(files.remove_tree))
    tried = 0
    for deadly in itertools.count():
        shutil.copytree(state.path, tmp_path / str(deadly))
        copy = State(tmp_path / str(deadly))
        served = copy.path / "served"
        here = Options(**{**vars(options), "served": str(served)})
        moments = itertools.count()
        try:
            do(copy, here, DAYS[2])
        except Killed:
            tried += 1
            moments = itertools.count(1_000_000)
            do(copy, here, DAYS[2])
        else:
            break
        assert copy.day(DAYS[2]).said() == "2026-11-22: published as version 3"
        assert len(list(served.glob("[0-9]*"))) == 3
        rows = list(csv.DictReader(io.StringIO((copy.path / "history.csv").read_text())))
        assert [row["decision"] for row in rows] == ["published"] * 3
        assert [day.data.exists() for day in copy.days()] == [False, True, True]
    assert tried > 20


def test_a_failed_day_is_repeated_or_left_out(state: State, options: Options, jobs: Jobs) -> None:
    do(state, options, DAYS[0])
    jobs.fail["train", DAYS[1]] = [JobError("the training: NaN loss"), JobError("the training: NaN loss")]
    for _ in range(2):
        with pytest.raises(JobError, match="NaN loss"):
            do(state, options, DAYS[1])
    assert "failed: the training: NaN loss" in table.text(state.days())
    assert [job for job, day in jobs.names() if day == DAYS[1]] == ["convert"]
    with pytest.raises(UserError, match=r"step 'convert' was done with other arguments \(.*--processes=1.* differ\)"):
        do(state, Options(**{**vars(options), "convert": ("--processes=1",)}), DAYS[1])
    do(state, options, DAYS[2])
    assert state.day(DAYS[2]).record["from"] == DAYS[0]
    assert state.day(DAYS[1]).said().startswith("2026-11-21: left out: ")
    assert not state.day(DAYS[1]).data.exists()
    with pytest.raises(BadLog, match="2026-11-21 is older than 2026-11-22"):
        do(state, options, DAYS[1])


def test_what_is_gone_or_another(state: State, options: Options, jobs: Jobs, tmp_path: Path) -> None:
    do(state, options, DAYS[0])
    data, run = state.day(DAYS[0]).data, state.day(DAYS[0]).run
    for directory in (run, data):
        directory.rename(tmp_path / "gone")
        with pytest.raises(UserError, match=f"{directory} is gone, from which 2026-11-21 g.*--go_on_from=nothing"):
            do(state, options, DAYS[1])
        (tmp_path / "gone").rename(directory)
        shutil.rmtree(state.day(DAYS[1]).path)
    shutil.move(options.served, tmp_path / "gone")
    with pytest.raises(UserError, match=r"serves no version, and 2026-11-20 was published as version 1: restore it"):
        do(state, options, DAYS[1])
    shutil.move(tmp_path / "gone", options.served)
    (state.day(DAYS[0]).path / "day.json").write_text("{")
    with pytest.raises(UserError, match=r"day\.json is damaged"):
        do(state, options, DAYS[1])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds something else"):
        State(tmp_path / "mine")


def test_two_at_once(state: State) -> None:
    code = f"from export.daily.state import State; import time\nwith State({str(state.path)!r}).locked():\n"
    other = subprocess.Popen(
        [sys.executable, "-c", f"{code} print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=rf"another stem-daily \(process {other.pid}\)"), state.locked():
            pass
    finally:
        other.kill()
        other.wait()
    with state.locked():
        pass


def follow(state: State, folder: Path, options: Options, settle: float = 0.0) -> list[str]:
    said: list[str] = []
    with state.locked():
        watch.follow(
            state,
            folder,
            options,
            settle_seconds=settle,
            poll_seconds=0.01,
            drain=True,
            say=lambda day: said.append(day.said()),
        )
    return said


def test_logs_that_arrive_in_a_folder(state: State, options: Options, jobs: Jobs, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "2026-11-20.parquet").touch()
    jobs.fail["convert", DAYS[0]] = [UserError("no column 'user'")]
    with pytest.raises(UserError, match="no column 'user'"):  # before a first day, the flags may be at fault
        follow(state, folder, options)
    assert not (folder / "set_aside").exists()
    for name in ("2026-11-22.parquet", ".2026-11-21.parquet", "2026-11-21.parquet.tmp", "_2026-11-21", "notes.txt"):
        (folder / name).touch()
    (folder / "day=2026-11-21").mkdir()
    jobs.fail["convert", DAYS[2]] = [UserError("no rows")]
    jobs.refuse = {DAYS[1]}
    assert follow(state, folder, options) == [
        "2026-11-20: published as version 1",
        "2026-11-21: refused: the AUC of 'click' is .1 lower",
    ]
    aside = folder / "set_aside"
    assert sorted(path.name for path in aside.iterdir()) == [
        "2026-11-22.parquet", "2026-11-22.parquet.reason.txt", "notes.txt", "notes.txt.reason.txt",
    ]  # fmt: skip
    assert (aside / "2026-11-22.parquet.reason.txt").read_text() == "no rows\n"
    assert follow(state, folder, options) == []
    (folder / "again-2026-11-20.parquet").touch()  # a day twice
    (folder / "2026-11-22.parquet").touch()  # the same day, repaired
    assert follow(state, folder, options) == ["2026-11-22: published as version 2"]
    assert "2026-11-20 is done" in (aside / "again-2026-11-20.parquet.reason.txt").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return files.make_directory(tmp_path / "logs")


def test_a_log_that_is_being_written_is_waited_for(state: State, options: Options, jobs: Jobs, folder: Path) -> None:
    (folder / "2026-11-20").mkdir()
    (folder / "2026-11-20" / "part-0.parquet").touch()
    (folder / "2026-11-21.parquet").touch()
    os.utime(folder / "2026-11-21.parquet", (0, 0))
    # The later day is complete, and does not overtake the one before it.
    assert follow(state, folder, options, settle=60) == []
    (folder / "2026-11-20" / "_SUCCESS").touch()
    assert follow(state, folder, options, settle=60) == [
        "2026-11-20: published as version 1",
        "2026-11-21: published as version 2",
    ]


def test_a_log_for_which_a_job_fails_is_tried_twice(state: State, options: Options, jobs: Jobs, folder: Path) -> None:
    (folder / "2026-11-20.parquet").touch()
    jobs.fail["train", DAYS[0]] = [JobError("killed by SIGKILL")]
    assert follow(state, folder, options) == ["2026-11-20: published as version 1"]
    (folder / "2026-11-21.parquet").touch()
    jobs.fail["train", DAYS[1]] = [JobError("NaN loss")] * 2
    with pytest.raises(JobError, match="NaN loss; that was try 2"):
        follow(state, folder, options)
    assert (folder / "set_aside" / "2026-11-21.parquet").exists()
    (folder / "2026-11-22.parquet").touch()
    jobs.fail["publish", DAYS[2]] = [UserError("the served version is damaged")]
    with pytest.raises(UserError, match="the served version is damaged"):  # not the log's fault
        follow(state, folder, options)
    assert (folder / "2026-11-22.parquet").exists()
    (folder / "2026-11-22.parquet").rename(folder / "2026-11-23.parquet")
    Path(options.schema).write_text(SCHEMA.replace("int64", "string"))
    with pytest.raises(
        UserError, match=r"the schema does not extend that of .*: features\.user\.dtype is string and was"
    ):
        follow(state, folder, options)
    Path(options.schema).write_text(SCHEMA)
    rare = state.day(DAYS[0]).data / "history" / "rare" / "user.parquet"
    rare.write_bytes(b"")
    with pytest.raises(UserError, match=r"rare/user\.parquet has changed since the conversion"):
        follow(state, folder, options)
    assert (folder / "2026-11-23.parquet").exists()


def test_a_log_that_cannot_be_judged_by_is_not_trained_on(
    state: State, options: Options, jobs: Jobs, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (folder / "2026-11-20.parquet").touch()
    follow(state, folder, options)
    (folder / "2026-11-21.parquet").touch()
    jobs.data = converted(tmp_path_factory.mktemp("one_class"), [1, 1, 1])
    assert follow(state, folder, options) == []
    reason = (folder / "set_aside" / "2026-11-21.parquet.reason.txt").read_text()
    assert "labels of task 'click' in the test split" in reason and "are 1: nothing can be judged on them" in reason
    assert jobs.names()[3:] == [("convert", DAYS[1])]


def test_mistakes_in_the_arguments_of_jobs_are_told_at_once(
    tmp_path: Path, job_in_process: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    common = [f"--state={tmp_path}/state", "--config=small", "--schema=kuairand_sample", "--log=2026-11-20.parquet"]
    for argument, why in (
        ("--convert_args=--splt=time", "--convert_args: Unknown command line flag 'splt'. Did you mean: split"),
        ("--publish_args=--split=train", "--publish_args: flag --split=train: value should be one of"),
        ("--publish_args=nothing", "--publish_args: unexpected argument 'nothing'"),
    ):
        done = job_in_process("export.jobs.daily", *common, argument)
        assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "state").exists()


def test_what_a_job_says_and_how_it_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Real processes: output, errors by exit code, and a job that ends with this one."""
    (tmp_path / "job.py").write_text(
        "import os, signal, sys, time\n"
        "print('rows: 3'); print('next: more')\n"
        "if sys.argv[1] == 'dies': os.kill(os.getpid(), signal.SIGKILL)\n"
        "if sys.argv[1] == 'hangs': print(os.getpid(), flush=True); time.sleep(60)\n"
        "print('error: no such column', file=sys.stderr); sys.exit(int(sys.argv[1]))\n"
    )
    code = "import sys; from pathlib import Path; from export.daily import process\n"
    call = "process.run('the job', 'job', [sys.argv[1]], Path('output.txt'), (0, 3))"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    command = [sys.executable, "-c", f"{code}{call}"]

    def end(argument: str) -> tuple[str, str]:
        done = subprocess.run([*command, argument], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.stdout, done.stderr.strip().rpartition("\n")[2]

    assert end("3") == ("  rows: 3\n", "")
    assert end("2")[1] == "stem_util.errors.UserError: the job: no such column"
    assert end("1")[1] == "stem_util.errors.JobError: the job: no such column"
    assert end("dies")[1] == "stem_util.errors.JobError: the job: killed by SIGKILL"
    assert (tmp_path / "output.txt").read_text().count("next: more") == 4
    parent = subprocess.Popen([*command, "hangs"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "  rows: 3\n"
    job = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not os.path.exists(f"/proc/{job}") or "\nState:\tZ" in Path(f"/proc/{job}/status").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the job outlives stem-daily")


def test_the_command_lines_of_the_page_are_those_of_the_job() -> None:
    """Each `stem-daily` of docs/every_day.md, also in the crontab and in the DAG, has flags that the job takes."""
    page = (Path(__file__).parents[2] / "docs/every_day.md").read_text()
    (dag,) = re.findall(r"^```python\n(import datetime\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (crontab,) = re.findall(r"^```crontab\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(dag)) if isinstance(node, ast.keyword) and node.arg == "bash_command"]
    in_dag = ast.literal_eval(calls[0].value).replace("{{ ds }}", "2026-11-20")
    time_of_day, in_cron = crontab.split("* * * ", 1)
    assert time_of_day.split() == ["0", "3"] and "%" not in in_cron.replace(r"\%", "")
    in_cron = in_cron.replace(r"\%", "%").split("&& ")[-1].split(" >>")[0].replace("$D", "2026-11-20")
    lines = [in_dag, in_cron, *re.findall(r"^    (stem-daily .*)$", page, re.MULTILINE)]
    assert len(lines) == 5
    for words in map(shlex.split, lines):
        rest = daily.flags.parse(words, configs.override_flags)
        assert words[0] == "stem-daily" and len(rest) == 1
        daily.flags.reset()
