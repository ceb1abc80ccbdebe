"""Exports of trained runs: what they score, what is in them, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from export import card, check, exporter, preconditions, tables
from pipelines import manifest as manifests
from pipelines import schema_yaml
from stem_tf import configs, report, trained
from stem_tf.evaluation import predictions, scoring
from stem_tf.training.trainer import Trainer
from stem_tf.workdir import Workdir
from stem_util import owned
from stem_util.errors import JobError, UserError

Exported = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def exported(nasty_run: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A published version of the float32 run, moved since, and its manifest."""
    directory = tmp_path_factory.mktemp("models")
    version, tree = nasty_run("float32").export(directory / "first")
    assert version == directory / "first" / "1"
    shutil.move(directory / "first", directory / "moved")
    return directory / "moved" / "1", tree


def test_every_signature_reproduces_the_trainer(exported: Exported) -> None:
    checked = exported[1]["check"]
    assert checked["rows"] == checked["rows_of_split"] > 100
    assert sorted(checked["worst"]) == ["examples", "rank", "serving_default"]
    assert max(checked["worst"].values()) < checked["tolerance"] == 1e-5


def test_calibrators_are_in_the_graph(
    nasty_run: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = nasty_run("float32")
    workdir = Workdir(shutil.copytree(run.workdir.path, tmp_path / "run"))
    more = {"train.calibration": "isotonic", "train.epochs": 3, "train.patience": 0}
    config = configs.checked(configs.flat(run.config) | more)
    monkeypatch.setattr("stem_tf.training.calibration._LEAST_ROWS", {"isotonic": 10})
    with workdir.locked():
        workdir.prepare(config, run.manifest)
        Trainer(config, run.manifest, workdir, say=lambda line: None).run()
    arguments = (workdir, config, run.manifest, "best", tmp_path / "models", "nasty")
    version, tree = exporter.export(*arguments)
    fitted = tree["calibration"]["click"]
    assert fitted["method"] == "isotonic" and sorted(tree["check"]["worst"]) == ["examples", "rank", "serving_default"]
    text = (version / "card.md").read_text(encoding="utf-8")
    assert "## Calibration" in text and f"{report.number(fitted['before']['logloss'])} -> " in text
    served = check.load(str(version))["serving_default"]
    found = trained.load(workdir, config, run.manifest, "best")
    columns = list(dict.fromkeys(feature["column"] for feature in exporter.features(run.manifest.schema)))
    rows = pq.read_table(preconditions.validation_rows(run.manifest), columns=columns).combine_chunks().to_batches()[0]
    scored = scoring.predict(found.model, run.manifest, "validation", config.data, desc="")
    answer = served(check.request(exporter.features(run.manifest.schema), rows))
    scores = answer["click"]
    np.testing.assert_allclose(scores, scored.scores["click"], rtol=0, atol=1e-5)
    calibrated = found.model.calibrators["click"](scored.logits["click"])
    np.testing.assert_allclose(scored.scores["click"], calibrated, atol=1e-6)
    assert np.abs(scores - scored.uncalibrated("click")).max() > 1e-3
    # A ranking is computed of them.
    length, temperature = (
        np.where(np.isfinite(values := rows[name].to_numpy(zero_copy_only=False).astype(float)), values, default)
        for name, default in (("length", 10), ("temperature", 20))
    )
    by_hand = calibrated.numpy() ** 2 * np.log1p(length) + 0.001 * temperature * scored.scores["watched"]
    np.testing.assert_allclose(answer["ranking_score"], by_hand, rtol=1e-4, atol=1e-5)


def test_a_moved_directory_scores_the_test_rows(exported: Exported, nasty_run: Callable[[str], Any]) -> None:
    run = nasty_run("float32")
    trained = scoring.predict(run.model(), run.manifest, "test", run.config.data, desc="")
    features = exporter.features(run.manifest.schema)
    columns = list(dict.fromkeys(feature["column"] for feature in features))
    rows = pq.read_table(Path(run.manifest.data_dir) / "raw" / "test", columns=columns).combine_chunks().to_batches()[0]
    served = check.load(str(exported[0]))["serving_default"](check.request(features, rows))
    for task, scores in trained.scores.items():
        assert np.std(scores) > 1e-3
        np.testing.assert_allclose(served[task], scores, rtol=1e-5)


def test_weights_are_float32_variables_and_all_that_is_saved(
    exported: Exported, nasty_run: Callable[[str], Any]
) -> None:
    model = nasty_run("float32").model()
    weights = [tuple(weight.shape) for part in model.weight_parts.values() for weight in part.weights]
    # The first layers' weights once more: the request's rows of them and the candidates', for `rank`.
    first = [shape for shape in weights if shape[-2:-1] == (model.embeddings.flat_width,)]
    schema = nasty_run("float32").manifest.schema
    sides = [{f.name for f in schema.features if (f.side == "item") == item} for item in (False, True)]
    halves = [len(model.embeddings.columns(side)) for side in sides]
    shares = [(*shape[:-2], half, shape[-1]) for shape in first for half in halves]
    assert len(first) == 3 + 2  # experts of both tasks and shared ones, a gate a task
    expected = sorted([*weights, *shares])
    reader = tf.train.load_checkpoint(str(exported[0] / "variables" / "variables"))
    saved = reader.get_variable_to_shape_map()
    saved.pop("_CHECKPOINTABLE_OBJECT_GRAPH")
    assert sorted(tuple(shape) for shape in saved.values()) == expected
    assert {reader.get_variable_to_dtype_map()[name] for name in saved} == {tf.float32}


def test_manifest_and_card(exported: Exported, nasty_run: Callable[[str], Any]) -> None:
    directory, tree = exported
    assert json.loads((directory / "manifest.json").read_text()) == tree
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert found == {*tree["files"], "manifest.json", owned.MARKER}
    assert {"saved_model.pb", "schema.yaml", "card.md", "assets.extra/tf_serving_warmup_requests"} < found
    for name, digest in tree["files"].items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest
    run = nasty_run("float32")
    assert tree["run"]["config"] == json.loads(json.dumps(configs.flat(run.config)))
    assert tree["vocabularies"]["never_twice"]["size"] == 0 and tree["vocabularies"]["user"]["size"] == 19
    assert tree["vocabularies"]["user"]["sha256"] == tree["files"]["assets/user.vocabulary"]
    assert (tree["model"], tree["version"], tree["test_metrics"]) == ("nasty", 1, None)
    assert schema_yaml.load(directory / "schema.yaml") == run.manifest.schema
    card = (directory / "card.md").read_text()
    for feature in run.manifest.schema.features:
        assert f"| `{feature.name}` | {feature.side} | {feature.dtype} |" in card
    for words in ("`click`", "`watched`", "client.rank(user=", "| `rank` |", "The worst differences"):
        assert words in card
    assert all(line.count("|") == 0 or line.startswith(("|", "scores")) for line in card.splitlines())


def test_warm_up_requests_run(exported: Exported) -> None:
    calls = check.load(str(exported[0]))
    path = exported[0] / "assets.extra" / "tf_serving_warmup_requests"
    seen = []
    for record in tf.data.TFRecordDataset(str(path)):
        request = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
        signature = request.model_spec.signature_name
        scores = calls[signature]({name: tf.make_ndarray(value) for name, value in request.inputs.items()})
        seen.append((request.model_spec.name, signature, scores["click"].shape))
    assert seen == [
        *(("nasty", "serving_default", (n,)) for n in (1, 50, 200)),
        *(("nasty", "rank", (1, n)) for n in (1, 50, 200)),
        *(("nasty", "examples", (n,)) for n in (1, 50, 200)),
    ]


def test_bfloat16_runs_give_float32_scores_near_the_trainers(
    nasty_run: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "CHECKED_ROWS", 70)  # of larger validation splits the first rows are checked
    directory, tree = nasty_run("mixed_bfloat16").export(tmp_path)
    assert tree["check"]["rows"] == 70 < tree["check"]["rows_of_split"]
    assert "the first 70 of" in (directory / "card.md").read_text()
    assert tree["check"]["worst"]["serving_default"] < 1e-2
    assert tree["check"]["worst"]["rank"] < tree["check"]["tolerance"] == 3e-2
    reader = tf.train.load_checkpoint(str(directory / "variables" / "variables"))
    types = reader.get_variable_to_dtype_map()
    # Of the weights that `rank` reads apart, what the layers compute with; everything else as it was trained.
    assert {types[name] for name in types if "shares" not in name} - {tf.string} == {tf.float32}
    assert {types[name] for name in types if "shares" in name} == {tf.bfloat16}


def test_a_model_that_does_not_reproduce_the_trainer_is_not_published(
    nasty_run: Callable[[str], Any], tmp_path: Path
) -> None:
    run = nasty_run("float32")
    shutil.copytree(run.workdir.path, tmp_path / "run")
    path = tmp_path / "run" / "vocabulary" / "user.parquet"
    values = pq.read_table(path)
    pq.write_table(values.take(pa.array([*range(1, len(values)), 0])), path)
    with pytest.raises(JobError) as caught:
        run._replace(workdir=Workdir(tmp_path / "run")).export(tmp_path / "models")
    message = str(caught.value)
    assert "nothing was published: signature serving_default, row_id " in message
    for words in ("task '", "trained ", "served ", "features: user=b'"):
        assert words in message
    assert [path.name for path in (tmp_path / "models").iterdir()] == [owned.MARKER]


def test_test_metrics_are_of_the_same_weights(nasty_run: Callable[[str], Any], tmp_path: Path) -> None:
    run = nasty_run("float32")
    workdir = Workdir(shutil.copytree(run.workdir.path, tmp_path / "run"))
    found = trained.load(workdir, run.config, run.manifest, "best")
    path = workdir.path / "evaluation" / "test.json"
    path.parent.mkdir()

    def metrics() -> Any:
        return exporter.test_metrics(workdir, run.manifest.schema, found.fingerprint())

    assert metrics() is None
    tasks = {"click": {"auc": 0.7}, "watched": {"mse": 1.0}}
    tree = {"epoch": 1, "step": 0, "rows": 60, "mean_auc": 0.7, "tasks": tasks}
    path.write_text(json.dumps(tree))
    assert metrics() is None  # of an earlier version: the same epoch and step are another run's, too
    path.write_text(json.dumps(tree | {"weights": found.fingerprint()}))
    assert metrics() == {"rows": 60, "mean_auc": 0.7, "tasks": tasks}
    same = trained.load(run.workdir, run.config, run.manifest, "latest")
    assert same.fingerprint() == found.fingerprint()
    for damaged in ("", "[]", "null", json.dumps({"weights": found.fingerprint(), "tasks": []})):
        path.write_text(damaged)
        with pytest.raises(UserError, match="evaluation/test.json is damaged .*; run stem-evaluate again"):
            metrics()
    path.write_text(json.dumps(tree | {"weights": found.fingerprint()}))
    weight = found.model.weight_parts["network"].weights[0]
    weight.assign_add(tf.ones_like(weight) * 1e-6)
    assert metrics() is None


def test_a_full_disk_publishes_nothing(nasty_run: Callable[[str], Any], tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises((JobError, OSError), match="could not be written|File too large"):
            nasty_run("float32").export(tmp_path / "models")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "models").iterdir()] == [owned.MARKER]


RESERVED = """
name: reserved
features:
  class: {kind: categorical, side: user, dtype: string}
  class_: {kind: numeric, side: user}
  self: {kind: numeric, side: context}
  training: {kind: numeric, side: user}
  Training: {kind: numeric, side: user}
tasks:
  class: {label: {column: y}}
  from: {label: {column: y}}
"""


@pytest.fixture(scope="module")
def reserved(convert: Callable[..., Path], train: Callable[..., Any]) -> Any:
    """A run whose features and tasks are named like Python keywords and Keras arguments; none is an item's."""
    random, rows = np.random.default_rng(0), 300
    names = ("class_", "self", "training", "Training")
    columns = {name: random.normal(size=rows) for name in names} | {"y": np.arange(rows) % 2}
    return train(convert(RESERVED, pa.table(columns | {"class": [f"c{i % 7}" for i in range(rows)]})))


def test_the_job_says_what_it_did(
    reserved: Any, run_job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    moved = tmp_path / "moved data"
    shutil.copytree(reserved.manifest.data_dir, moved)
    output = tmp_path / "models"
    owned.claim(output, owned.VERSIONS)
    (output / "4").mkdir()
    job = run_job(
        "export.jobs.export",
        f"--workdir={reserved.workdir.path}",
        f"--output={output}",
        f"--data={moved}",
        "--name=a b",
    )
    assert job.returncode == 0 and not job.stderr, job.stderr
    lines = job.stdout.splitlines()
    assert lines[0] == f"a b version 5: {reserved.workdir.best}/ckpt-1"
    assert lines[1].startswith("checked in a fresh process on ") and "serving_default" in lines[1]
    assert lines[2].startswith("no signature 'rank': the schema has no item features")
    assert lines[-2] == f"next: stem-serve --model_base_path={output}  # under the name 'a b'"
    assert lines[-1].startswith(f"next: stem-deploy --model={output} --output=deploy  # ")
    calls = check.load(str(output / "5"))
    assert sorted(calls) == ["examples", "serving_default"]
    inputs = {name: np.zeros(2, np.float32) for name in ("class_", "self", "training", "Training")}
    scores = calls["serving_default"](inputs | {"class": np.array([b"c1", b"c2"], object)})
    assert sorted(scores) == ["class", "from"]


def test_a_card_says_which_task_was_not_trained(reserved: Any) -> None:
    tree = {"run": {"untrained": {"from": "its weight is 0"}}, "test_metrics": None}
    lines = card._tasks(tree, reserved.manifest.schema)
    assert [line[1] for line in lines if line[0] == "`from`"] == ["nothing: it was not trained, its weight is 0"]
    assert all("not trained" not in line[1] for line in lines if line[0] != "`from`")


def test_a_killed_export_leaves_nothing_numbered(reserved: Any, tmp_path: Path) -> None:
    output = tmp_path / "models"
    command = [sys.executable, "-m", "export.jobs.export", f"--workdir={reserved.workdir.path}", f"--output={output}"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as job:
        until = time.monotonic() + 120
        while not list(output.glob(".partial-*/*")):
            assert job.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        job.send_signal(signal.SIGKILL)
    assert job.returncode == -signal.SIGKILL
    assert [path.name for path in output.iterdir() if path.name.isdigit()] == []


@pytest.mark.parametrize(
    ("workdir", "flags", "message"),
    [
        ("nothing", [], "nothing holds no run"),
        ("run", [], "if the data of the run has moved, give --data=DIR"),
        ("run", ["--output=run"], "--output=run is the run or its data"),
        ("run", ["--name="], "--name is empty"),
    ],
)
def test_mistakes(
    reserved: Any,
    job_in_process: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    workdir: str,
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = reserved.manifest.data_dir if flags else "gone"
    (tmp_path / "run").mkdir()
    for name in ("config.json", "manifest.json", "schema.yaml"):
        text = (reserved.workdir.path / name).read_text()
        (tmp_path / "run" / name).write_text(text.replace(reserved.manifest.data_dir, data))
    shutil.copytree(reserved.workdir.path / "vocabulary", tmp_path / "run" / "vocabulary")
    arguments = [f"--workdir={workdir}", *([] if flags[:1] == ["--output=run"] else ["--output=models"]), *flags]
    job = job_in_process("export.jobs.export", *arguments)
    assert job.returncode == 2 and message in job.stderr and job.stderr.count("\n") == 1
    assert not (tmp_path / "models").exists()


def test_data_that_cannot_check_an_export(reserved: Any, tmp_path: Path) -> None:
    def check(workdir: Workdir) -> None:
        preconditions.check(workdir, reserved.config, str(tmp_path / "data"), tmp_path / "models", "ranker")

    shutil.copytree(reserved.manifest.data_dir, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "raw" / "validation")
    with pytest.raises(UserError, match="raw/validation is missing"):
        check(reserved.workdir)
    manifest = manifests.load(str(tmp_path / "data"))
    empty = dataclasses.replace(manifest.splits["validation"], rows=0)
    manifests.save(dataclasses.replace(manifest, splits=manifest.splits | {"validation": empty}))
    with pytest.raises(UserError, match="is other data than"):
        check(reserved.workdir)
    shutil.copytree(reserved.workdir.path, tmp_path / "run")
    shutil.copy(tmp_path / "data" / manifests.FILENAME, tmp_path / "run" / manifests.FILENAME)
    with pytest.raises(UserError, match="validation split of .* has no rows"):
        check(Workdir(tmp_path / "run"))


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_rounded_tables_score_as_the_trainer_with_the_same_tables(
    nasty_run: Callable[[str], Any], tmp_path: Path, kind: tables.Kind
) -> None:
    run = nasty_run("float32")
    directory, tree = exporter.export(run.workdir, run.config, run.manifest, "best", tmp_path, "nasty", kind)
    assert max(tree["check"]["worst"].values()) < tree["check"]["tolerance"] == 1e-5
    told, exact = tree["tables"], run.model()
    # Of embeddings 4 wide a scale is as large as the codes.
    assert told["stored"] == kind and told["float32_bytes"] / told["bytes"] == pytest.approx(2.0, rel=0.3)
    # What is in the directory is the model's tables rounded, nothing more, and what it costs is what was measured.
    reader = tf.train.load_checkpoint(str(directory / "variables" / "variables"))
    types = reader.get_variable_to_dtype_map()
    shapes = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
    saved = sorted(shape for name, shape in shapes.items() if types[name] == tf.as_dtype(kind))
    assert saved == sorted(tuple(group.table.shape) for group in tables.packed(exact))
    assert not set(saved) & {shape for name, shape in shapes.items() if types[name] == tf.float32}
    before = predictions.evaluate(scoring.predict(exact, run.manifest, "test", run.config.data, desc=""), run.manifest)
    tables.store(exact, kind)
    scored = scoring.predict(exact, run.manifest, "test", run.config.data, desc="")
    after = predictions.evaluate(scored, run.manifest)
    assert told["cost"]["rows"] == len(scored.row_id) and told["cost"]["split"] == "test"
    for task, metric in (("click", "auc"), ("watched", "mse")):
        expected = {"metric": metric, "float32": before[task][metric], kind: after[task][metric]}
        assert told["cost"]["tasks"][task] == pytest.approx(expected)
    text = (directory / "card.md").read_text()
    assert f"Tables in {kind}: " in text and f"| click | AUC | {report.number(before['click']['auc'])} |" in text
