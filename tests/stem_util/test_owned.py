"""Every kind of directory against every job: only what is empty or of one's own kind is taken."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from export.publish import publishing
from pipelines.convert.staging import staged
from stem_tf.workdir import Workdir
from stem_util import owned
from stem_util.errors import UserError
from stem_util.owned import Kind

KINDS = (owned.DATA, owned.RUN, owned.VERSIONS, owned.VERSION, owned.EVALUATIONS, owned.INSPECTIONS)


def write(path: Path, value: object = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("" if value is None else json.dumps(value))


def data(path: Path) -> None:
    write(path / "manifest.json", {"format": 1, "splits": {}, "vocabularies": {}})
    write(path / "schema.yaml")
    write(path / "raw" / "validation" / "part-00000.parquet")


def run(path: Path) -> None:
    """It holds a copy of its data's manifest."""
    data(path)
    write(path / "config.json", {"experiment": "mine", "data.dir": "data", "model.name": "stem_net"})
    write(path / "checkpoints" / "ckpt-1.index")


def version(path: Path) -> None:
    write(path / "manifest.json", {"format": 1, "model": "ranker", "version": 3, "signatures": []})
    write(path / "saved_model.pb")


def evaluations(path: Path) -> None:
    write(path / "test.json", {"split": "test", "checkpoint": "best/ckpt-1", "tasks": {}})
    write(path / "test.parquet")


BEFORE_MARKERS: dict[Kind, Callable[[Path], None]] = {
    owned.DATA: data,
    owned.RUN: run,
    owned.VERSIONS: lambda path: version(path / "3"),
    owned.VERSION: version,
    owned.EVALUATIONS: evaluations,
    owned.INSPECTIONS: lambda path: write(path / "gates-test.json"),
}


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("there", KINDS, ids=lambda kind: kind.name)
def test_a_job_takes_its_own_kind_alone(tmp_path: Path, there: Kind, marked: bool) -> None:
    directory = tmp_path / "p"
    if marked:
        owned.claim(directory, there)
        write(directory / "something")
    else:
        BEFORE_MARKERS[there](directory)
    before = sorted(directory.rglob("*"))
    for kind in KINDS:
        if kind == there:
            continue
        with pytest.raises(UserError, match=f"p holds {there.name}, not {kind.name}: choose another directory"):
            owned.claim(directory, kind)
    assert sorted(directory.rglob("*")) == before
    owned.claim(directory, there)
    assert sorted(directory.rglob("*")) == sorted({*before, directory / owned.MARKER})
    assert owned.kind_of(directory) == there


def train(path: Path) -> None:
    with Workdir(path).locked():
        pass


def convert(path: Path) -> None:
    with staged(str(path), kind=owned.DATA, overwrite=True):
        pass


def export(path: Path) -> None:
    with publishing(path):
        pass


JOBS: dict[Callable[[Path], None], Kind] = {train: owned.RUN, convert: owned.DATA, export: owned.VERSIONS}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_jobs_ask_before_they_write(tmp_path: Path, job: Callable[[Path], None]) -> None:
    for kind, make in BEFORE_MARKERS.items():
        make(tmp_path / kind.name)
    write(tmp_path / "foreign" / "checkpoints" / "mine.pt")
    (tmp_path / "link").symlink_to(tmp_path / "foreign")
    before = sorted(tmp_path.rglob("*"))
    for path in sorted(tmp_path.iterdir()):
        if path.name != JOBS[job].name:
            with pytest.raises(UserError, match="choose another directory"):
                job(path)
    assert sorted(tmp_path.rglob("*")) == before
    job(tmp_path / JOBS[job].name)
    assert owned.kind_of(tmp_path / JOBS[job].name) == JOBS[job]


FOREIGN = {
    "a file": "notes.txt",
    "checkpoints of something else": "checkpoints/mine.pt",
    "hidden": ".git/config",
    "a run without its config": "checkpoints/ckpt-1.index",
    "scores": "test.parquet",
    "json": "test.json",
    "another marker": f"{owned.MARKER}/x",
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_directories_are_refused(tmp_path: Path, kind: Kind, what: str) -> None:
    write(tmp_path / "p" / FOREIGN[what])
    if what == "another marker":  # a directory of that name, beside a file
        write(tmp_path / "p" / "file")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"p holds something else .*nothing says that it is {kind.name}"):
        owned.claim(tmp_path / "p", kind)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("marker", ["", "{", "[]", '{"holds": "a kind of tomorrow"}', '{"holds": 3}', "\udcff"])
def test_a_damaged_marker_says_nothing(tmp_path: Path, marker: str) -> None:
    write(tmp_path / "p" / "file")
    (tmp_path / "p" / owned.MARKER).write_bytes(marker.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="holds something else"):
        owned.claim(tmp_path / "p", owned.RUN)
    run(tmp_path / "p")
    if "holds" not in marker:
        assert owned.kind_of(tmp_path / "p") == owned.RUN


def test_data_of_earlier_versions_with_something_more_in_it(tmp_path: Path) -> None:
    """It has no list of what was in it, but one knows how its files are called."""
    for more in ("runs/first/config.json", "raw/photo.png", "notes.txt"):
        data(tmp_path / "p")
        assert owned.kind_of(tmp_path / "p") == owned.DATA
        write(tmp_path / "p" / more)
        assert owned.kind_of(tmp_path / "p") is None
        (tmp_path / "p" / more).unlink()


def test_empty_directories_files_and_links(tmp_path: Path) -> None:
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    (tmp_path / "p").symlink_to(tmp_path / "elsewhere")
    for name in ("disk", "p", "new/er"):
        owned.claim(tmp_path / name, owned.RUN)
        owned.claim(tmp_path / name, owned.DATA)  # there is only the marker in it
        assert owned.kind_of(tmp_path / name) == owned.DATA
    assert (tmp_path / "elsewhere" / owned.MARKER).exists()
    write(tmp_path / "file")
    for name in ("file", "file/below"):
        with pytest.raises(UserError, match="is a file[,;] "):
            owned.claim(tmp_path / name, owned.RUN)


def test_scores_are_replaced_by_scores_alone(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    owned.check_scores(path)
    path.touch()
    owned.check_scores(path)
    for columns in ({"row": [1], "score_click": [0.5]}, {"row_id": [1], "user": [1], "score_click": [0.5]}):
        pq.write_table(pa.table(columns), path)
        owned.check_scores(path)
    pq.write_table(pa.table({"row": [1], "click": [1]}), path)
    foreign = tmp_path / "text.parquet"
    foreign.write_text("x")
    for other in (path, foreign, tmp_path):
        with pytest.raises(UserError, match="exists and does not hold scores"):
            owned.check_scores(other)


def test_an_evaluation_may_lie_among_other_files(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt")
    write(tmp_path / "validation.json", {"not": "ours"})
    (tmp_path / "validation.parquet").write_text("mine")
    before = sorted(tmp_path.iterdir())
    assert owned.claim_for_evaluation(tmp_path, "test") == tmp_path
    evaluations(tmp_path)
    assert not owned.check_for_evaluation(tmp_path, "test")  # again: these files are ours
    assert owned.kind_of(tmp_path) is None
    with pytest.raises(UserError, match="validation.json exists and is no evaluation"):
        owned.claim_for_evaluation(tmp_path, "validation")
    (tmp_path / "validation.json").unlink()
    with pytest.raises(UserError, match="validation.parquet exists and does not hold scores"):
        owned.claim_for_evaluation(tmp_path, "validation")
    assert set(before) - set(tmp_path.iterdir()) == {tmp_path / "validation.json"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_evaluation_does_not_go_into_what_other_jobs_wrote(tmp_path: Path, kind: Kind) -> None:
    BEFORE_MARKERS[kind](tmp_path / "p")
    if kind == owned.EVALUATIONS:
        owned.claim_for_evaluation(tmp_path / "p", "validation")
        return
    with pytest.raises(UserError, match=f"p holds {kind.name}, not evaluations"):
        owned.claim_for_evaluation(tmp_path / "p", "validation")
