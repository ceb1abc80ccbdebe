"""The client's wheel: what is in it, what it needs, and that importing it is cheap and loads nothing else."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stem_util.version import __version__

ROOT = Path(__file__).resolve().parents[2]
NEEDS = ("numpy", "grpc", "google.protobuf")


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command without this repository on its path and returns its stdout."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy, because a build leaves files behind and reuses what an earlier one left.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("LICENSE", "NOTICE", "stem_util", "stem_client"):
        run("cp", "-r", ROOT / name, source / name, cwd=ROOT)
    shutil.rmtree(source / "stem_client/build", ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source / "stem_client", cwd=out)
    return next(out.glob("stem_tf_client-*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import from: the wheel, and the three packages it needs and nothing else of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    for name in NEEDS:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        package = Path(spec.origin).parent
        link = folder / name.replace(".", "/")
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(package)
        libraries = package.parent / f"{name}.libs"  # shared libraries, found by a path relative to the extensions
        if libraries.exists():
            (folder / libraries.name).symlink_to(libraries)
    # What grpcio itself needs.
    typing_extensions = importlib.util.find_spec("typing_extensions")
    if typing_extensions is not None and typing_extensions.origin is not None:
        (folder / "typing_extensions.py").symlink_to(typing_extensions.origin)
    return folder


def isolated(folder: Path, code: str) -> str:
    """Runs code with the standard library and ``folder`` to import from: no site-packages, no working directory."""
    return run(sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(folder)!r})\n{code}", cwd=folder)


def test_wheel_holds_the_package_and_its_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = f"stem_tf_client-{__version__}.dist-info"
    modules = {f"stem_client/{path.name}" for path in (ROOT / "stem_client").glob("*.py") if path.name != "setup.py"}
    assert {name for name in names if not name.startswith(metadata)} == modules | {"stem_client/py.typed"}
    assert {f"{metadata}/licenses/LICENSE", f"{metadata}/licenses/NOTICE"} <= names
    assert zipfile.ZipFile(wheel).read("stem_client/version.py") == (ROOT / "stem_util/version.py").read_bytes()


def test_wheel_needs_three_packages(wheel: Path) -> None:
    metadata = zipfile.ZipFile(wheel).read(f"stem_tf_client-{__version__}.dist-info/METADATA").decode()
    required = re.findall(r"^Requires-Dist: ([\w-]+)", metadata, re.MULTILINE)
    assert sorted(required) == ["grpcio", "numpy", "protobuf"]


def test_loads_no_other_package(unpacked: Path) -> None:
    code = """
import json, stem_client
paths = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
print(json.dumps([path for path in paths if path]))
"""
    paths = map(Path, json.loads(isolated(unpacked, code)))
    names = {path.relative_to(unpacked).parts[0] for path in paths if path.is_relative_to(unpacked)}
    assert names <= {"stem_client", "numpy", "grpc", "google", "typing_extensions.py"}
    assert "stem_client" in names


def test_speaks_the_protocol_in_isolation(unpacked: Path) -> None:
    code = """
from stem_client import protocol
request = protocol.PredictRequest()
request.inputs["a"].int64_val.append(7)
assert protocol.PredictRequest.FromString(request.SerializeToString()) == request
from stem_client import RankingClient, RankingError
with RankingClient("127.0.0.1:1") as client:
    try:
        client.rank({}, {})
    except RankingError as error:
        print(error.code.name)
"""
    assert isolated(unpacked, code).strip() == "UNAVAILABLE"


def test_importing_takes_less_than_half_a_second_and_loads_no_tensorflow(tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path.append({str(ROOT)!r})
start = time.process_time()
import stem_client
print(time.process_time() - start, any("tensorflow" in name for name in sys.modules), "pandas" in sys.modules)
"""
    # Processor time, and the best of some: others use the machine too. On an idle one it is what the clock says.
    answers = [run(sys.executable, "-c", code, cwd=tmp_path).split() for _ in range(5)]
    assert min(float(seconds) for seconds, *_ in answers) < 0.5
    assert all(loaded == ["False", "False"] for _, *loaded in answers)


@pytest.mark.parametrize("first", ["stem_client", "tensorflow"])
def test_works_beside_tensorflow_in_either_order(tmp_path: Path, first: str) -> None:
    modules = ["stem_client", "tensorflow"] if first == "stem_client" else ["tensorflow", "stem_client"]
    code = f"""
import sys
sys.path.append({str(ROOT)!r})
import {modules[0]}
import {modules[1]}
from tensorflow_serving.apis import predict_pb2
from stem_client import protocol
theirs = predict_pb2.PredictRequest()
theirs.inputs["a"].CopyFrom(tensorflow.make_tensor_proto([1, 2], tensorflow.int64))
ours = protocol.PredictRequest.FromString(theirs.SerializeToString())
print(ours.SerializeToString() == theirs.SerializeToString())
"""
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "True"
