"""The gate: what it measures, what its rules refuse, and that what is served stays as it is."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from export import exporter, publish, stored
from export.gate import checks, held_back, measures, preconditions, rules
from export.gate.checks import Check, Scored
from export.gate.measures import Rows
from pipelines import manifest as manifests
from pipelines import schema_yaml
from pipelines.schema import Label, Schema, Task
from stem_tf.evaluation.calibration import calibration
from stem_tf.evaluation.intervals import Resamples
from stem_util import stores
from stem_util.errors import JobError, UserError


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Schema:
    path = tmp_path_factory.mktemp("schema") / "s.yaml"
    path.write_text(
        "name: s\nfeatures:\n  item: {kind: categorical, side: item, dtype: int64}\n"
        "tasks:\n  click: {label: {column: c}}\n  watched: {type: regression, label: {column: w}}\n"
    )
    return schema_yaml.load(path)


def made_up(users: int = 400) -> tuple[Rows, np.ndarray]:
    """Rows of a binary task with ten rows a user, and calibrated scores."""
    random = np.random.default_rng(0)
    scores = random.uniform(0.05, 0.95, 10 * users).astype(np.float32)
    labels = (random.random(len(scores)) < scores).astype(np.float32)
    weights = np.ones(len(scores))
    weights[::17], labels[::17] = 0, np.nan
    return Rows(Task("click", Label("c")), labels, weights, Resamples(np.repeat(np.arange(users), 10), 200, 0)), scores


def judged(text: str, schema: Schema, tmp_path: Path, candidate: Scored, served: Scored | None) -> dict[str, Check]:
    """The checks of a binary task under the rules ``text``, by rule."""
    (tmp_path / "rules.yaml").write_text(text)
    found = rules.load(str(tmp_path / "rules.yaml"), schema)
    return {check.rule: check for check in checks.judge(found, {"click": made_up()[0]}, candidate, served)}


def scored(scores: np.ndarray, unknown: float = 0.1, megabytes: float = 10.0, ms: float = 4.0) -> Scored:
    return Scored({"click": scores}, {"item": unknown}, megabytes, ms)


def test_losses_are_positive_where_the_candidate_is_worse() -> None:
    assert measures.loss("auc", 0.7, 0.75) == pytest.approx(0.05)
    assert measures.loss("calibration_error", 0.03, 0.01) == pytest.approx(0.02)
    assert float(measures.loss("logloss", 0.6, 0.5)) == pytest.approx(0.2)
    assert float(measures.loss("mse", 0.0, 0.0)) == 0
    assert measures.loss("predicted_over_observed", 0.8, 1.1) == pytest.approx(0.1)


def test_each_resample_is_measured_as_its_rows_would_be() -> None:
    rows, scores = made_up(users=20)
    worse = np.clip(scores + 0.1, 0, 1)
    for metric in ("auc", "logloss", "mse", "predicted_over_observed"):
        drawn = rows.drawn(metric, worse)
        for resample in range(0, 200, 50):
            counts = rows.resamples._counts[resample][rows.resamples._units]
            again = Rows(rows.task, rows.labels, rows.weights * counts, rows.resamples)
            assert drawn[resample] == pytest.approx(again.value(metric, worse), rel=1e-6)
    # The error of a resample is over the buckets of all rows.
    counts = rows.resamples._counts[3][rows.resamples._units] * rows.weights
    order = np.argsort(np.argsort(worse[rows.weights > 0]))
    bucket = np.full(len(worse), -1)
    bucket[rows.weights > 0] = (2 * order + 1) * 10 // (2 * len(order))
    expected = sum(abs(np.sum((counts * (worse - rows.labels))[bucket == k])) for k in range(10)) / counts.sum()
    assert rows.drawn("calibration_error", worse)[3] == pytest.approx(expected, rel=0.02)  # scores of 1 are ties
    whole = calibration("binary", rows.labels, worse, rows.weights)
    assert rows.value("calibration_error", worse) == whole.error


def test_drift_by_hand() -> None:
    served = np.arange(1, 101) / 100
    rows = Resamples(None, 200, 0, rows=100)

    def drift(candidate: np.ndarray, served: np.ndarray, rows: Resamples = rows) -> dict[str, measures.Estimate]:
        return measures.drift(candidate, served, rows, 0.05)

    assert set(drift(served, served).values()) == {measures.Estimate(0, 0, 0)}
    found = drift(served / 10, served)  # all in the lowest tenth of the served scores, and the others empty
    shares = [(1.0, 0.1), *[(0.005, 0.1)] * 9]
    assert found["psi"].estimate == pytest.approx(sum((c - s) * math.log(c / s) for c, s in shares))
    assert found["mean"].estimate == pytest.approx((0.505 - 0.0505) / served.std())
    assert found["quantiles"].estimate == pytest.approx(0.9 * np.quantile(served, 0.95) / served.std(), rel=0.01)
    assert all(one.low < one.estimate < one.high for one in found.values())
    # Of the difference of two means, the interval is the textbook's: 1.96 standard errors either way.
    error = (served - served / 10).std() / 10 / served.std()
    assert found["mean"].high - found["mean"].low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert math.isnan(drift(served, np.full(100, 0.5))["mean"].estimate)
    few = drift(served, served / 10, Resamples(np.arange(100) // 12, 200, 0))["psi"]
    assert few.estimate > 1 and math.isnan(few.low)


def test_few_rows_do_not_look_like_drift() -> None:
    """Of 60 days, each of 12 users with 5 rows: how many are refused by the estimate alone, and by its interval."""
    random = np.random.default_rng(0)
    counts = np.zeros((2, 2))
    for _ in range(60):
        common = np.repeat(random.normal(size=12), 5) + random.normal(size=60)
        served, candidate = (1 / (1 + np.exp(-common - random.normal(0, 0.5, 60))) for _ in range(2))
        resamples = Resamples(np.arange(60) // 5, 100, 0)
        for place, scores in enumerate((candidate, candidate**4)):
            found = measures.drift(scores, served, resamples, 0.05)
            counts[place] += [
                any(getattr(found[key], end) > bound for key, bound in (("psi", 0.5), ("mean", 0.5), ("quantiles", 1)))
                for end in ("estimate", "low")
            ]
    same, moved = counts / 60
    assert same[0] > 0.03 and same[1] == 0
    assert moved[0] == 1 and moved[1] > 0.8


def test_in_doubt_the_candidate_has_to_prove_it_or_not(schema: Schema, tmp_path: Path) -> None:
    scores = made_up()[1]
    noisy = np.random.default_rng(1).normal(scores, 0.05).clip(0.01, 0.99)
    ours, theirs = scored(noisy), scored(scores)
    found = judged("auc: {margin: 0}", schema, tmp_path, ours, theirs)["auc.margin"]
    assert found.value is not None and found.low is not None and found.high is not None
    margin = (found.value + found.high) / 2
    refusing = judged(f"auc: {{margin: {margin}}}", schema, tmp_path, ours, theirs)["auc.margin"]
    assert refusing.outcome == "fails" and f"may be worse by {found.high:.4g}" in refusing.why
    trusting = judged(f"auc: {{margin: {margin}, in_doubt: publish}}", schema, tmp_path, ours, theirs)["auc.margin"]
    assert trusting.outcome == "holds"
    for doubt in ("refuse", "publish"):
        useless = judged(f"auc: {{in_doubt: {doubt}}}", schema, tmp_path, scored(1 - scores), theirs)
        assert useless["auc.margin"].outcome == useless["auc.at_least"].outcome == "fails"
        assert "worse by" in useless["auc.margin"].why


def test_the_same_model_holds_every_rule(schema: Schema, tmp_path: Path) -> None:
    scores = made_up()[1]
    found = judged("{}", schema, tmp_path, scored(scores), scored(scores))
    assert {check.outcome for check in found.values()} == {"holds"}
    assert found["logloss.margin"].value == found["logloss.margin"].high == 0


def test_first_publication_has_only_bounds_of_its_own(schema: Schema, tmp_path: Path) -> None:
    found = judged("size: {at_most_mb: 5}", schema, tmp_path, scored(made_up()[1]), None)
    outcomes = {rule: check.outcome for rule, check in found.items()}
    assert outcomes["auc.margin"] == outcomes["score_drift.psi"] == outcomes["latency.times"] == "not judged"
    assert outcomes["auc.at_least"] == outcomes["unknown_ids.at_most"] == "holds"
    assert found["size.at_most_mb"].why == "the size in MB is 10, more than 5"


def test_size_latency_unknown_ids_and_drift(schema: Schema, tmp_path: Path) -> None:
    scores = made_up()[1]
    found = judged("score_drift: {psi: .5}", schema, tmp_path, scored(scores**4, 0.3, 30, 12), scored(scores))
    assert {"size.times", "latency.times", "unknown_ids.margin", "score_drift.psi"} <= {
        rule for rule, check in found.items() if check.outcome == "fails"
    }
    assert found["latency.times"].why == "the latency is 12 ms, 3 times the served version's 4 ms (at most 2 times)"
    assert "have moved: their population stability index is" in found["score_drift.psi"].why
    unknown = judged("{}", schema, tmp_path, scored(scores), scored(scores, 0.995))["unknown_ids.served_at_most"]
    assert unknown.outcome == "fails" and unknown.why.startswith(
        "the share of unknown ids of 'item' in the served version is 0.995, more than 0.99: "
    )
    own = judged("auc: off\ntasks: {click: {auc: {margin: 0}}}", schema, tmp_path, scored(1 - scores), scored(scores))
    assert own["auc.margin"].outcome == "fails" and "auc.at_least" not in own
    off = "tasks: {click: off}\nfeatures: {item: off}\nsize: off\nlatency: off"
    assert not judged(off, schema, tmp_path, scored(scores**4, 0.3, 30, 12), scored(scores))


def test_too_few_users_are_a_doubt(schema: Schema, tmp_path: Path) -> None:
    rows, scores = made_up(users=5)
    found = rules.load(None, schema)
    [refused] = [
        c for c in checks.judge(found, {"click": rows}, scored(scores), scored(scores)) if c.outcome == "fails"
    ][:1]
    assert "too few users" in refused.why


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("aux: {margin: 0}", "unknown key 'aux' of the rules; did you mean 'auc'"),
        ("auc: {margin: -0.1}", "auc.margin: should be a finite number of at least 0; got -0.1"),
        ("auc: {margni: 0.1}", "auc: unknown key 'margni' of the rule 'auc'; did you mean 'margin'"),
        ("auc: {in_doubt: off}", "auc.in_doubt: should be 'refuse' or 'publish'"),
        ("tasks: {clik: {auc: off}}", "tasks: 'clik' is not in the data, or no rule is about it; did you mean 'click'"),
        ("tasks: {click: {size: off}}", "tasks.click: unknown key 'size' of 'click'"),
        ("features: {shop: off}", "features: 'shop' is not in the data, or no rule is about it; allowed: item"),
        ("tasks: {watched: {auc: off}}", "tasks.watched: unknown key 'auc' of 'watched'"),
        ("level: .7", "level: should be between 0 and .5"),
        ("resamples: 3", "resamples: should be a whole number of at least 100"),
        ("auc: [1", "line 1"),
    ],
)
def test_rules_that_are_wrong(text: str, message: str, schema: Schema, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        rules.load(str(tmp_path / "rules.yaml"), schema)
    assert message in str(error.value) and "rules.yaml" in str(error.value)


def test_rules_over_the_defaults(schema: Schema, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("auc: {margin: .5, at_least: off}\ntasks: {click: {auc: {margin: .25}}}")
    found, default = rules.load(str(tmp_path / "rules.yaml"), schema), rules.load(None, schema)
    click, watched = schema.tasks
    assert found.of_task(click)["auc"] == {"margin": 0.25, "in_doubt": "refuse", "at_least": None}
    assert [*found.of_task(watched)] == ["mse", "predicted_over_observed", "score_drift"]
    assert found.bounds["auc"]["margin"] == 0.5
    assert found.bounds["logloss"] == default.bounds["logloss"] and found.level == 0.05
    with pytest.raises(UserError, match="No such file"):
        rules.load(str(tmp_path / "gone.yaml"), schema)


def test_publishes_refuses_and_leaves_what_is_served(
    nasty_run: Callable[[str], Any],
    nasty_export: Path,
    job_in_process: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, served = nasty_run("float32"), tmp_path / "served"
    shutil.copytree(nasty_export, served)
    _without_ranking(served / "1")  # a candidate may have more outputs

    def publish_it(rule: str, against: Path = served) -> tuple[int, str, dict[str, Any]]:
        text = f"calibration_error: off\npredicted_over_observed: off\n{rule}\nfeatures:\n  never_twice: off\n"
        (tmp_path / "rules.yaml").write_text(text + "  never_again: {unknown_ids: {at_most: 1, served_at_most: off}}")
        flags = [f"--{name}={tmp_path / name}.{end}" for name, end in (("verdict", "json"), ("rules", "yaml"))]
        job = job_in_process("export.jobs.publish", f"--workdir={run.workdir.path}", f"--against={against}", *flags)
        return job.returncode, job.stdout + job.stderr, json.loads((tmp_path / "verdict.json").read_text())

    code, said, verdict = publish_it("auc: {margin: 0}\nlatency: off")
    assert code == 0 and "nasty version 2" in said, said
    assert verdict == json.loads((served / "2" / "verdict.json").read_text())
    assert verdict["decision"] == "published" and verdict["served"]["version"] == 1
    outputs = [json.loads((served / version / "manifest.json").read_text())["outputs"] for version in "12"]
    assert [[output["name"] for output in one] for one in outputs] == [[], ["ranking_score"]]
    assert not publish.damage(served / "2")
    assert "verdict.json" in json.loads((served / "2" / "manifest.json").read_text())["files"]
    by_rule = {(check["rule"], check["of"]): check for check in verdict["checks"]}
    # The same weights, through raw values: no score differs.
    for rule, task in (("auc.margin", "click"), ("mse.margin", "watched")):
        assert [by_rule[rule, task][key] for key in ("value", "low", "high")] == [0, 0, 0]
    assert by_rule["score_drift.psi", "watched"]["value"] == 0
    assert by_rule["unknown_ids.at_most", "user"]["candidate"] < 0.05
    assert by_rule["unknown_ids.at_most", "never_again"]["candidate"] == 1  # too rare for a vocabulary

    def exported_before(export: Any, directory: Path, scratch: Path) -> dict[str, Any]:
        shutil.copytree(nasty_export / "1", directory, dirs_exist_ok=True)
        return dict(json.loads((directory / "manifest.json").read_text()))

    monkeypatch.setattr(exporter._Export, "build", exported_before)
    before = sorted(path for path in served.rglob("*"))
    code, said, verdict = publish_it("size: {at_most_mb: .001}")
    [line] = [line for line in said.splitlines() if line.startswith("refused: ")]
    assert code == 3 and "the size in MB is" in line and "more than 0.001" in line and "auc" not in line
    assert verdict["decision"] == "refused" and verdict["served"]["version"] == 2
    assert before == sorted(path for path in served.rglob("*"))
    code, said, verdict = publish_it("latency: off", against=tmp_path / "first")
    assert code == 0 and "nothing is served yet" in said and verdict["served"] is None
    assert publish.versions(tmp_path / "first") == [1]


def test_what_is_served_may_be_in_a_store(
    s3: str, nasty_run: Callable[[str], Any], nasty_export: Path, job_in_process: Callable[..., Any], tmp_path: Path
) -> None:
    base = f"{s3}/models/nasty"
    assert stored.upload(nasty_export / "1", base) == f"{base}/1"
    rules_file = tmp_path / "rules.yaml"
    rules_file.write_text("latency: off\ncalibration_error: off\npredicted_over_observed: off\nunknown_ids: off")
    flags = [f"--verdict={tmp_path}/verdict.json", f"--rules={rules_file}"]
    job = job_in_process(
        "export.jobs.publish", f"--workdir={nasty_run('float32').workdir.path}", f"--against={base}", *flags
    )
    assert job.returncode == 0 and f"published: {base}/2, nasty version 2" in job.stdout, job.stdout + job.stderr
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["served"]["version"] == 1
    assert json.loads((stored.fetched(base) / "verdict.json").read_text()) == verdict
    stores.write(f"{base}/2/manifest.json", b"{}")
    job = job_in_process("export.jobs.publish", f"--workdir={nasty_run('float32').workdir.path}", f"--against={base}")
    assert job.returncode == 2 and f"{base}/2/manifest.json is no manifest of stem-export" in job.stderr


def _without_ranking(version: Path) -> None:
    """Makes a version look as one that was exported without a ranking."""
    schema = (version / "schema.yaml").read_text().partition("\nranking:")[0] + "\n"
    (version / "schema.yaml").write_text(schema)
    tree = json.loads((version / "manifest.json").read_text()) | {"outputs": []}
    tree["files"]["schema.yaml"] = hashlib.sha256(schema.encode()).hexdigest()
    (version / "manifest.json").write_text(json.dumps(tree))


def test_a_candidate_of_nan(
    nasty_run: Callable[[str], Any], nasty_export: Path, job_in_process: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(nasty_run("float32").workdir.path, tmp_path / "run")
    shutil.copytree(nasty_export, tmp_path / "served")
    [index] = (tmp_path / "run" / "best").glob("*.index")
    reader = tf.train.load_checkpoint(str(index.with_suffix("")))
    names = sorted(reader.get_variable_to_shape_map())
    weights = [reader.get_tensor(name) for name in names]
    weights = [np.full_like(w, np.nan) if "kernel" in name else w for name, w in zip(names, weights, strict=True)]
    tf.raw_ops.SaveV2(
        prefix=str(index.with_suffix("")), tensor_names=names, shape_and_slices=[""] * len(names), tensors=weights
    )
    job = job_in_process("export.jobs.publish", f"--workdir={tmp_path}/run", f"--against={tmp_path}/served")
    assert job.returncode == 1 and "the model's scores of task 'click' are not finite" in job.stderr
    assert publish.versions(tmp_path / "served") == [1]


def test_bad_input_is_one_sentence_and_changes_nothing(
    nasty_run: Callable[[str], Any], nasty_export: Path, job_in_process: Callable[..., Any], tmp_path: Path
) -> None:
    run, served = nasty_run("float32"), tmp_path / "served"
    shutil.copytree(nasty_export, served)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")

    def error(*flags: str, against: Path = served) -> str:
        job = job_in_process("export.jobs.publish", f"--workdir={run.workdir.path}", f"--against={against}", *flags)
        assert job.returncode == 2 and job.stderr.count("\n") == 1, job.stderr
        return str(job.stderr)

    assert "nothing says that it is exported versions" in error(against=tmp_path / "other")
    assert "holds an exported version, not exported versions" in error(against=served / "1")
    without = dataclasses.replace(run.manifest)
    vars(without)["schema"] = dataclasses.replace(run.manifest.schema, ranking=None)
    with pytest.raises(UserError, match=r"makes no ranking_score, which callers of .*/1 may read: .* --ranking"):
        preconditions.check_served(served / "1", without)
    assert "--split" in error("--split=train")
    moved = shutil.copytree(run.workdir.path, tmp_path / "moved")
    text = (moved / "config.json").read_text()
    (moved / "config.json").write_text(text.replace(str(run.manifest.data_dir), str(tmp_path / "gone")))
    assert "if the data of the run has moved, give --data=DIR" in error(f"--workdir={moved}")
    assert "is a directory: name a file" in error(f"--verdict={tmp_path}")
    assert "is no directory" in error(f"--verdict={tmp_path}/none/verdict.json", "--nocalibrated")
    with open(run.workdir.path / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is still being trained" in error()
    schema = (served / "1" / "schema.yaml").read_text()
    (served / "1" / "manifest.json").rename(tmp_path / "manifest.json")
    assert "was not published by stem-export (no manifest.json)" in error()
    (tmp_path / "manifest.json").rename(served / "1" / "manifest.json")
    (served / "1" / "schema.yaml").write_text(schema + "\n")
    assert "is not the version that was published: schema.yaml" in error()
    tree = json.loads((served / "1" / "manifest.json").read_text())
    del tree["files"]["schema.yaml"]
    (served / "1" / "manifest.json").write_text(json.dumps(tree))
    changed = schema.replace("  age:", "  shop: {kind: categorical, side: user, dtype: int64}\n  age:")
    changed = (
        changed.replace("click", "buy")
        .replace("column: buyed", "column: clicked")
        .replace("max_length: 3", "max_length: 4")
    )
    (served / "1" / "schema.yaml").write_text(changed)
    sentence = error()
    for part in ("does not take the input 'shop'", "shape of the input 'history'", "does not score the task 'buy'"):
        assert part in sentence
    assert [path.name for path in served.iterdir() if path.name.isdigit()] == ["1"]

    def judged_on(**counts: manifests.TaskCounts) -> str:
        test = dataclasses.replace(run.manifest.splits["test"], tasks=run.manifest.splits["test"].tasks | counts)
        changed = dataclasses.replace(run.manifest, splits=run.manifest.splits | {"test": test})
        with pytest.raises(UserError) as error:
            preconditions.judged_tasks(changed, "test", rules.load(None, changed.schema))
        return str(error.value)

    assert "no labels of task 'watched'" in judged_on(watched=manifests.TaskCounts(0, None))
    assert "all 60 labels of task 'click' in the test split" in judged_on(click=manifests.TaskCounts(60, 1.0))
    with pytest.raises(JobError, match="the candidate: 1 of 2 scores of task 'click' are not finite"):
        held_back.check_finite(scored(np.array([0.5, np.nan])), "the candidate")
