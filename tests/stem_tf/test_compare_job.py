"""The job: cells are trained, evaluated, measured and compared; a killed job goes on; mistakes are one sentence."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stem_util import files

RunJob = Callable[..., subprocess.CompletedProcess[str]]

PLAN = """
name: a & b <tiny>
config: small
set: {data.batch_size: 64, model.dim: 4, model.expert_units: [8], model.tower_units: [4], train.epochs: 2}
seeds: 1
arms:
  single_task:
  "clicks | only <b>": {model.name: shared_bottom, tasks: [click]}
  broken: {model.name: ple, model.expert: fwfm, model.dim: 4, optimizer.learning_rate: 1.0e+30}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "tiny.yaml"
    path.write_text(PLAN)
    return path


@pytest.fixture(scope="module")
def compared(plan: Path, tiny_data: Path, run_job: RunJob) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A comparison whose job was killed once, and what the job said that went on."""
    output = plan.parent / "out put"
    command = [sys.executable, "-m", "stem_tf.jobs.compare", str(plan), f"--data={tiny_data}", f"--output={output}"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(output.glob("runs/*/*/*/metrics.jsonl")) and time.monotonic() < until:
        time.sleep(0.1)
    job.send_signal(signal.SIGKILL)
    job.wait()
    return output, run_job("stem_tf.jobs.compare", *command[3:])


def test_a_killed_comparison_goes_on_to_its_report(
    compared: tuple[Path, subprocess.CompletedProcess[str]], tiny_data: Path
) -> None:
    output, job = compared
    assert job.returncode == 0, job.stderr
    assert "written to" in job.stdout and "report.html" in job.stdout
    assert "broken" in job.stderr
    told = json.loads((output / "report.json").read_text())["sections"]["provenance"]
    states = {cell["arm"]: cell["state"] for cell in told["cells"]}
    assert states == {"single_task": "done", "clicks | only <b>": "done", "broken": "failed"}
    assert list(told["arms"]) == ["single_task", "clicks | only <b>"] and told["without_runs"].keys() == {"broken"}
    failed = next(cell for cell in told["cells"] if cell["state"] == "failed")
    assert "not finite" in failed["why"] or "diverged" in failed["why"]
    assert "<tiny>" not in (output / "report.html").read_text()


def test_a_run_can_be_repeated_by_its_command(compared: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    told = json.loads((compared[0] / "report.json").read_text())["sections"]["provenance"]
    cell = told["cells"][0]
    config = json.loads((Path(cell["workdir"]) / "config.json").read_text())
    assert f"--config.data.dir={config['data.dir']}" in cell["command"] and cell["command"].startswith("stem-train ")


def test_runs_that_exist_are_compared(
    compared: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, run_job: RunJob
) -> None:
    paths = sorted(path.parent for path in compared[0].glob("runs/*/*/*/report.json") if "broken" not in str(path))
    copies = [Path(shutil.copytree(path, tmp_path / f"run {number}")) for number, path in enumerate(paths)]
    (copies[0] / "evaluation" / "test.json").unlink()
    weights = {path: path.read_bytes() for path in copies[0].glob("best/*.data*")}
    job = run_job("stem_tf.jobs.compare", f"--runs={tmp_path}/run *", f"--output={tmp_path / 'out'}")
    assert job.returncode == 0, job.stderr
    assert "2 runs on" in job.stdout and "1 of them to be evaluated" in job.stdout
    known = files.read_json(tmp_path / "out" / "report.json", "")["sections"]["provenance"]["cells"]
    scores = [files.read_json(path / "report.json", "")["best"]["score"] for path in copies]
    assert [cell["score"] for cell in known] == scores
    assert weights == {path: path.read_bytes() for path in copies[0].glob("best/*.data*")}
    (copies[1] / "report.json").unlink()
    job = run_job("stem_tf.jobs.compare", f"--runs={','.join(map(str, copies))}", f"--output={tmp_path / 'out'}")
    assert job.returncode == 2 and "is not trained to its end" in job.stderr and "Traceback" not in job.stderr


def test_the_plan_alone(plan: Path, tiny_data: Path, tmp_path: Path, job_in_process: RunJob) -> None:
    output = tmp_path / "none"
    job = job_in_process(
        "stem_tf.jobs.compare", str(plan), f"--data={tiny_data}", "--dry_run", "--seeds=4,2", f"--output={output}"
    )
    assert job.returncode == 0, job.stderr
    assert "seed 4 of single_task, clicks | only <b>, broken" in job.stdout and "seed 2 of each arm" in job.stdout
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "one plan, --models or --runs says what to compare, but nothing is given"),
        (["a.yaml", "--models=ple"], "not a.yaml and --models together"),
        (["--models=ple"], "--output is required"),
        (["--models=ple,ple", "--output=OUT"], "names a model twice"),
        (["--models=pel", "--output=OUT"], "did you mean 'ple'"),
        (["--models=ple", "--output=OUT", "--seeds=a"], "--seeds=a should be whole numbers"),
        (["--models=ple", "--output=OUT", "--hours=0"], "--hours=0 should be more than 0"),
        (["--models=ple", "--output=OUT", "--incumbent=mmoe"], "incumbent: 'mmoe'"),
        (["--models=ple", "--output=OUT", "--config.model.dmi=3"], "did you mean 'model.dim'"),
        (["--models=ple", "--output=OUT", "--comparable=7"], "should be less than overwhelming"),
        (["--runs=nowhere", "--output=OUT"], "--runs: there is no nowhere"),
        (["--runs=nowhere/*", "--output=OUT"], "--runs: there is no nowhere/*"),
        (["--models=ple", "--output=OUT", "--tasks=clik"], "did you mean 'click'"),
        (["--runs=nowhere", "--output=OUT", "--seeds=3"], "--seeds says what to train"),
        (["--runs=nowhere", "--output=OUT", "--tasks=click"], "--tasks says what to train"),
        (["--runs=nowhere", "--output=OUT", "--config.model.dim=3"], "--config.KEY says what to train"),
        (["nowhere.yaml", "--output=OUT"], "no such plan"),
    ],
)
def test_mistakes_write_nothing(
    arguments: list[str], why: str, tiny_data: Path, tmp_path: Path, job_in_process: RunJob
) -> None:
    output = tmp_path / "out"
    given = [argument.replace("OUT", str(output)) for argument in arguments]
    job = job_in_process("stem_tf.jobs.compare", *given, f"--data={tiny_data}")
    assert job.returncode == 2 and why in job.stderr and job.stderr.count("\n") == 1, job.stderr
    assert not output.exists()


def test_an_output_in_use_of_other_data_or_of_something_else(
    tiny_data: Path, tmp_path: Path, job_in_process: RunJob
) -> None:
    def compare() -> str:
        job = job_in_process(
            "stem_tf.jobs.compare", "--models=ple", "--seeds=1", f"--data={tiny_data}", f"--output={tmp_path / 'out'}"
        )
        assert job.returncode == 2
        return job.stderr

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert "holds something else (mine)" in compare()
    (tmp_path / "out" / "mine").unlink()
    (tmp_path / "out" / ".stem-tf").write_text(json.dumps({"holds": "a comparison"}))
    with files.locked(tmp_path / "out" / ".lock", tmp_path / "out"):
        assert "another job is writing" in compare()
    files.write_json(tmp_path / "out" / "comparison.json", {"data": "/elsewhere", "data_sha256": "0"})
    assert "holds a comparison on other data (/elsewhere; now" in compare()
