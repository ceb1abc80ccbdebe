"""The Python API: the page's examples, and that it does what the jobs do."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import stem_tf
from pipelines import schema_yaml
from stem_tf import configs, inspection
from stem_util.errors import UserError

ROOT = Path(stem_tf.__file__).parent.parent
RunJob = Callable[..., subprocess.CompletedProcess[str]]


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pq.read_table(ROOT / "datasets" / "kuairand_sample" / "log.parquet").sort_by("time_ms")
    pq.write_table(table.slice(0, 3000), tmp_path / "log.parquet")
    pq.write_table(table.slice(3000, 1000), tmp_path / "log2.parquet")
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(block, names)
    assert "features  user_id" in printed.getvalue() and "gates on test, 300 rows" in printed.getvalue()
    assert names["version"] == Path("runs/first/export/1") and (names["version"] / "saved_model.pb").exists()
    assert names["data2"].generation == 2 and names["run2"].workdir.path.name == "second"
    assert list(names["scores"].columns) == list(names["run"].schema.task_names)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.fixture(scope="module")
def run(tiny_data: Path, tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> stem_tf.Run:
    """A run of one epoch, trained in a thread of its own, as some notebooks run cells."""
    runs: list[stem_tf.Run] = []
    config = configs.checked(tiny_settings | {"train.epochs": 1})
    workdir = tmp_path_factory.mktemp("run")
    thread = threading.Thread(target=lambda: runs.append(stem_tf.train(config, tiny_data, workdir, say=None)))
    thread.start()
    thread.join()
    return runs[0]


def raw_log(data: Path) -> pd.DataFrame:
    return pd.read_parquet(data.parent / "log.parquet")


def test_training_again_goes_on(run: stem_tf.Run, tiny_data: Path, tiny_settings: dict[str, Any]) -> None:
    said: list[str] = []
    more = stem_tf.train(tiny_settings, tiny_data, run.workdir.path, overrides={"train.epochs": 2}, say=said.append)
    assert list(more.history()["epoch"]) == [1, 2] and [line.split()[0] for line in said[1:]] == ["epoch", "2/2"]
    assert stem_tf.train(tiny_settings, tiny_data, run.workdir.path, say=None).history().equals(more.history())
    with pytest.raises(UserError, match="holds a run with another config"):
        stem_tf.train(tiny_settings, tiny_data, run.workdir.path, overrides={"model.dim": 6})


def test_scores_of_raw_rows_are_those_of_the_evaluation(run: stem_tf.Run, tiny_data: Path) -> None:
    metrics = run.evaluate("test")
    assert metrics == json.loads((run.workdir.evaluation / "test.json").read_text())
    log = raw_log(tiny_data)
    evaluated = pd.read_parquet(run.workdir.evaluation / "test.parquet").set_index("row_id")
    rows = log.loc[evaluated.index].set_index(evaluated.index + 1000)
    scores = run.predict(rows)
    assert scores.index.equals(rows.index) and list(scores.columns) == ["click", "watched"]
    for task in scores.columns:
        np.testing.assert_allclose(scores[task], evaluated[f"score_{task}"], rtol=1e-6)
    unseen = rows.head(3).drop(columns=["clicked", "share"]).assign(user="nobody", tags=["", "t2", "t1|new"])
    assert np.isfinite(run.predict(unseen).to_numpy()).all()
    with pytest.raises(UserError, match="'length' is not in the table. Columns: user, item"):
        run.predict(rows.drop(columns="length"))


def test_inspection(run: stem_tf.Run) -> None:
    seen = run.inspect("validation")
    assert isinstance(seen, inspection.Inspection) and list(seen.gates) == ["click", "watched"]
    assert sum(seen.gates["click"]["mean"]) == pytest.approx(1, abs=1e-6)
    assert not run.workdir.inspection.exists()


def test_data_of_a_frame_are_those_of_its_file(tiny_data: Path, tmp_path: Path) -> None:
    log, schema = raw_log(tiny_data), tiny_data.parent / "tiny.yaml"
    data = stem_tf.convert(log, schema, tmp_path / "data", split="time", split_column="time")
    for name in ("vocabulary/user.parquet", "schema.yaml"):
        assert (Path(data.data_dir) / name).read_bytes() == (tiny_data / name).read_bytes()
    assert [data.rows(split) for split in ("train", "validation", "test")] == [1200, 150, 150]
    parts = {"train": log[:1000], "validation": log[1000:1200], "test": log[1200:]}
    data = stem_tf.convert(parts, schema_yaml.load(schema), tmp_path / "parts")
    assert [data.rows(split) for split in parts] == [1000, 200, 300]
    more = stem_tf.convert({"train": log[1200:]}, schema, tmp_path / "more", validation_share=0, extend=data, forget=2)
    assert more.ancestor is not None and more.ancestor.directory == data.data_dir
    with pytest.raises(UserError, match="as train rows: each log can be added once"):
        stem_tf.convert({"train": log[1200:]}, schema, tmp_path / "none", validation_share=0, extend=more)
    with pytest.raises(UserError, match="--split=time needs --split_column"):
        stem_tf.convert(log, schema, tmp_path / "none", split="time")


def test_a_draft_of_a_frame_converts_it(tiny_data: Path, tmp_path: Path) -> None:
    log = raw_log(tiny_data)
    draft = stem_tf.describe(log, labels=["clicked"])
    assert draft.text.startswith("# Drafted by stem-describe from 1,500 rows of a table.\n")
    data = stem_tf.convert(log, draft, tmp_path / "data", split="random")
    assert data.schema.task_names == ("clicked",) and data.rows("train") > 1000
    with pytest.raises(UserError, match="the table cannot be written as Parquet"):
        stem_tf.describe(log.assign(user=[1, *log["user"][1:]]))


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        stem_tf.Run(tmp_path)
    with pytest.raises(AttributeError, match="has no attribute 'fit'"):
        _ = stem_tf.fit
    assert {"Run", "train", "__version__"} <= {*dir(stem_tf)}


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs code as a notebook in ``folder`` does: the folder is first on the path."""
    code = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]; {code}"
    return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.parametrize("name", ["pipelines", "export", "stem_util"])
def test_somebody_else_s_package_of_the_same_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    done = python("import stem_tf", tmp_path)  # a folder that is no package hides nothing
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / name / "__init__.py").touch()
    done = python("import stem_tf", tmp_path)
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"ImportError: the package {name} of stem-tf should lie beside {ROOT / 'stem_tf'}, but ")
    assert f"Python finds {tmp_path / name}: rename that folder" in line
    if name == "stem_util":
        assert f"Python finds {tmp_path / name}: rename" in python("import pipelines", tmp_path).stderr


def test_importing_imports_little(tmp_path: Path) -> None:
    code = "import stem_tf; print(stem_tf.__version__, {'tensorflow', 'pandas', 'absl'} & {*sys.modules})"
    assert python(code, tmp_path).stdout == f"{stem_tf.__version__} set()\n"
    done = python("import stem_tf; stem_tf.train, stem_tf.Run; print('tensorflow' in sys.modules)", tmp_path)
    assert done.stdout == "False\n", done.stderr


FRAME = pd.DataFrame({"user": [1, 2], "click": [0, 1]})


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (pd.DataFrame(), "the table has no columns"),
        (pd.concat([FRAME, FRAME["user"]], axis=1), "the table has more than one column 'user': drop or rename"),
        (
            FRAME.assign(user=pd.arrays.SparseArray(np.array([1, 2]))),
            "as Parquet: Sparse pandas data .column user",
        ),
        (FRAME.assign(user=[1, "2"]), "cannot be written as Parquet: .*; Conversion failed for column user"),
        ([FRAME, FRAME], "or paths, not a list; join several tables with pandas.concat"),
        (FRAME["user"], "or paths, not a pandas.Series"),
    ],
)
def test_what_is_no_log(log: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stem_tf.describe(log)


def test_arguments_of_python(tiny_data: Path, tmp_path: Path, run: stem_tf.Run) -> None:
    log, schema = raw_log(tiny_data), tiny_data.parent / "tiny.yaml"
    first = [log["time"].iloc[1200], log["time"].iloc[1350]]
    assert "tasks     clicked\n" in repr(stem_tf.describe(log, labels="clicked"))
    numbers: dict[str, Any] = {"validation_from": first[0], "test_from": first[1]}
    data = stem_tf.convert(log, schema, tmp_path / "data", split="time", split_column="time", **numbers)
    assert repr(data).endswith("tiny, 1,200 train, 150 validation, 150 test rows")
    dates: dict[str, Any] = {name: pd.Timestamp(value, unit="s") for name, value in numbers.items()}
    log["time"] = pd.to_datetime(log["time"], unit="s")
    data = stem_tf.convert(log, schema, tmp_path / "dates", split="time", split_column="time", **dates)
    assert data.rows("train") == 1200
    with pytest.raises(UserError, match="training reads the files of the log: write the table as Parquet"):
        stem_tf.convert(log, schema, tmp_path / "none", split="random", layouts=())
    with pytest.raises(UserError, match="--tables=int4: should be one of float32, bfloat16, int8"):
        run.export(tmp_path / "export", tables="int4")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--split=tim should be one of .*; did you mean 'time'"):
        stem_tf.convert(log, schema, tmp_path / "none", split="tim")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--fractions=0.5,0.5: should be three shares"):
        stem_tf.convert(log, schema, tmp_path / "none", split="random", fractions=(0.5, 0.5))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'tset' is no split of the log: .*; did you mean 'test'"):
        stem_tf.convert({"train": log, "validation": log, "tset": log}, schema, tmp_path / "none")
    assert configs.load("small", {"model.dim": np.int64(4), "loss.weights": {"a": np.float64(2)}}).model.dim == 4
