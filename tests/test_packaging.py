"""The wheel: what is in it, and that it works where the repository is not.

A complete installation downloads 600 MB, so here the wheel goes without its dependencies into a fresh environment that
sees this one's packages. BUILD.md's release checklist has the complete installation.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
JOBS = (
    "describe",
    "convert",
    "recipe",
    "train",
    "evaluate",
    "inspect",
    "export",
    "publish",
    "daily",
    "versions",
    "predict",
    "serve",
    "deploy",
    "load",
    "submit",
    "launch",
    "compare",
)
SCRIPTS = [f"stem-{job}" for job in JOBS]


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command without this repository on its path and returns its stdout."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # A build reuses what lies in build/, also files that were deleted since: build from a copy of what matters.
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "NOTICE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("stem_util", "pipelines", "stem_tf", "export", "tests"):
        run("cp", "-r", ROOT / name, source / name, cwd=ROOT)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=out)
    return next(out.glob("stem_tf-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of an environment with the wheel in it, and the running environment's packages behind it."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False)
    packages = next(home.glob("lib/python3*/site-packages"))
    # Plain paths only: addsitedir would run this environment's .pth files, and with them its editable stem-tf.
    (packages / "running.pth").write_text("\n".join(site.getsitepackages()))
    pip = [sys.executable, "-m", "pip", f"--python={home}/bin/python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", str(wheel), cwd=home)
    return home / "bin"


def test_wheel_holds_packages_schemas_and_configs_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "pipelines/schemas").glob("*.yaml")}
    tracked |= {str(path.relative_to(ROOT)) for path in (ROOT / "stem_tf/configs").glob("*.py")}
    tracked |= {str(path.relative_to(ROOT)) for path in (ROOT / "stem_tf/compare/templates").iterdir()}
    tracked |= {str(path.relative_to(ROOT)) for path in (ROOT / "stem_tf/submission/templates").iterdir()}
    tracked |= {str(path.relative_to(ROOT)) for path in (ROOT / "export/deployment/templates").rglob("*.j2")}
    tracked.add("export/gate/rules.yaml")
    assert "pipelines/schemas/kuairand_sample.yaml" in tracked and "stem_tf/configs/kuairand_sample.py" in tracked
    assert tracked <= names
    metadata = f"{wheel.name.rsplit('-py3', 1)[0]}.dist-info"
    assert {name.split("/")[0] for name in names} == {"stem_util", "pipelines", "stem_tf", "export", metadata}
    assert {f"{metadata}/licenses/LICENSE", f"{metadata}/licenses/NOTICE"} <= names


def test_requires_the_client_at_its_own_version(wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"stem_tf-{version}.dist-info/METADATA").decode()
    assert f"Requires-Dist: stem-tf-client=={version}" in metadata.splitlines()


def test_the_installed_copy_is_the_one_imported(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import pipelines; print(pipelines.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed.parent))


@pytest.mark.parametrize("script", SCRIPTS)
def test_console_scripts_run_from_any_directory(installed: Path, tmp_path: Path, script: str) -> None:
    assert f"usage: {script}" in run(installed / script, "--help", cwd=tmp_path)


def test_shipped_schema_is_found_by_name_from_any_directory(installed: Path, tmp_path: Path) -> None:
    code = "from pipelines import schema_yaml; print(schema_yaml.load('kuairand_sample').name)"
    assert run(installed / "python", "-c", code, cwd=tmp_path).strip() == "kuairand_sample"


def test_version_is_that_of_the_file(installed: Path, tmp_path: Path) -> None:
    recorded = "from importlib.metadata import version; print(version('stem-tf'))"
    written = "from stem_util.version import __version__; print(__version__)"
    recorded, written = (run(installed / "python", "-c", code, cwd=tmp_path) for code in (recorded, written))
    assert recorded == written
