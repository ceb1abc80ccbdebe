"""Several models, versions and labels, and lists that replace one another while calls go on."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import text_format
from tensorflow_serving.apis import model_pb2, predict_pb2
from tensorflow_serving.config import model_server_config_pb2

from export.server import configuration
from export.server.config_file import ConfigFile
from export.server.configuration import ConfigError, Model
from export.server.models import Models
from export.server.policy import Policy
from export.server.servable import Servable
from export.server.status import StatusError
from export.server.versions import Versions

Spec = model_pb2.ModelSpec
NEVER = threading.Event()


class Served:
    """Models without a port, what they said, and which version answers."""

    def __init__(self, *models: Model) -> None:
        self.lines: list[str] = []
        self.models = Models(models, self._make, self.say, reloads=True)

    def say(self, model: str, line: str) -> None:
        self.lines.append(f"{model}: {line}")

    def _make(self, model: Model) -> Versions:
        return Versions(
            model, Servable, poll_seconds=0.02, report=self.say, on_serving=lambda servable, before, seconds: None
        )

    def version(self, **spec: Any) -> int:
        request = Spec(name=spec.pop("name", "ranker"), **{k: v for k, v in spec.items() if k != "version"})
        if "version" in spec:
            request.version.value = spec["version"]
        with self.models.use(request) as servable:
            assert servable.name == request.name
            return servable.version

    def refused(self, **spec: Any) -> str:
        with pytest.raises(StatusError) as caught:
            self.version(**spec)
        return f"{caught.value.code.name} {caught.value.text}"

    def reload(self, config: str) -> None:
        self.models.reload(text_format.Parse(config, model_server_config_pb2.ModelServerConfig()))


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """``serve(*models)``: models that are started, after a look at all there is."""
    started: list[Served] = []

    def start(*models: Model) -> Served:
        started.append(Served(*models))
        started[-1].models.start()
        started[-1].models.wait(NEVER, until_ready=False)
        return started[-1]

    yield start
    for served in started:
        assert served.models.stop(20)


def bases(tmp_path: Path, *names: str) -> list[Path]:
    for name in names:
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in names]


def config(*models: str) -> str:
    return f"model_config_list {{ {' '.join(f'config {{ {model} }}' for model in models)} }}"


def listed(name: str, base: Path, more: str = "") -> str:
    return f'name: "{name}" base_path: "{base}" model_platform: "tensorflow" {more}'


def test_models_versions_and_labels(serve: Callable[..., Served], publish: Any, tmp_path: Path) -> None:
    feed, shop, empty = bases(tmp_path, "feed", "shop", "empty")
    for version in (1, 2, 3):
        publish(feed, version)
    publish(shop, 7)
    served = serve(Model("feed", feed, Policy(latest=2), {"stable": 2, "canary": 3, "gone": 1}), Model("shop", shop))
    assert served.version(name="feed") == served.version(name="feed", version_label="canary") == 3
    assert served.version(name="feed", version_label="stable") == served.version(name="feed", version=2) == 2
    assert served.version(name="shop") == 7
    assert served.models.loaded() == {"feed": [3, 2], "shop": [7]}
    unknown = "INVALID_ARGUMENT Unrecognized servable version label: "
    assert served.refused(name="feed", version_label="beta") == unknown + "beta"
    assert served.refused(name="nope", version_label="stable") == unknown + "stable"
    not_found = "NOT_FOUND Servable not found for request: "
    assert served.refused(name="feed", version_label="gone") == not_found + "Specific(feed, 1)"
    assert served.refused(name="nope") == not_found + "Latest(nope)"
    assert served.refused(name="nope", version=4) == not_found + "Specific(nope, 4)"
    assert served.models.statuses("nope") == {} and set(served.models.statuses("shop")) == {7}


def test_waiting_for_first_versions(serve: Callable[..., Served], publish: Any, tmp_path: Path) -> None:
    good, empty = bases(tmp_path, "good", "empty")
    publish(good, 1)
    served = serve(Model("a", good), Model("b", empty))
    assert served.models.wait(NEVER, until_ready=False) == [Model("b", empty)]
    stopped = threading.Event()
    stopped.set()
    assert served.models.wait(stopped, until_ready=True) == [Model("b", empty)]
    publish(empty, 4)
    assert served.models.wait(NEVER, until_ready=True) == [] and served.version(name="b") == 4


def test_a_reload_adds_and_removes(serve: Callable[..., Served], publish: Any, tmp_path: Path) -> None:
    a, b, c = bases(tmp_path, "a", "b", "c")
    for base, version in ((a, 1), (b, 2), (c, 3)):
        publish(base, version)
    served = serve(Model("a", a), Model("b", b))
    with served.models.use(Spec(name="a")) as held:
        served.reload(config(listed("b", b), listed("c", c)))
        assert served.refused(name="a") == "NOT_FOUND Servable not found for request: Latest(a)"
        assert held._session.run([]) == []  # is there until the last call has ended
    assert served.version(name="b") == 2 and served.version(name="c") == 3
    assert served.lines == ["a: is served no more"]
    publish(c, 4)
    with futures.ThreadPoolExecutor() as pool:
        assert pool.submit(lambda: _until(lambda: served.version(name="c") == 4)).result()


def _until(condition: Callable[[], bool]) -> bool:
    while not condition():
        NEVER.wait(0.01)
    return True


def test_a_reload_changes_policy_and_labels(serve: Callable[..., Served], publish: Any, tmp_path: Path) -> None:
    (base,) = bases(tmp_path, "base")
    for version in (1, 2):
        publish(base, version)
    served = serve(Model("ranker", base))
    specific = "model_version_policy { specific { versions: 1 versions: 2 } }"
    canary = 'version_labels { key: "canary" value: 2 } version_labels { key: "stable" value: 1 }'
    with pytest.raises(StatusError) as caught:
        served.reload(config(listed("ranker", base, specific + canary)))
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.text == (
        "Request to assign label to version 1 of model ranker, which is not currently available for inference"
    )
    assert served.refused(version=1).startswith("NOT_FOUND")
    served.reload(config(listed("ranker", base, specific)))
    assert served.version(version=1) == 1
    served.reload(config(listed("ranker", base, specific + canary)))
    assert served.version(version_label="canary") == 2 and served.version(version_label="stable") == 1
    served.reload(config(listed("ranker", base, "model_version_policy { specific { versions: 1 } }")))
    assert served.version() == 1 and served.refused(version_label="stable").startswith("INVALID_ARGUMENT")
    assert served.refused(version=2).startswith("NOT_FOUND")


def test_another_base_path_takes_over_without_a_lost_call(
    serve: Callable[..., Served], publish: Any, tmp_path: Path
) -> None:
    old, new = bases(tmp_path, "old", "new")
    publish(old, 5)
    publish(new, 3)
    served = serve(Model("ranker", old))
    stop = threading.Event()

    def ask() -> set[int]:
        seen = set()
        while not stop.is_set():
            seen.add(served.version())
        return seen

    with futures.ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for base in (new, old, new):
            served.reload(config(listed("ranker", base)))
        stop.set()
        assert set().union(*(future.result() for future in asking)) == {3, 5}
    assert served.version() == 3 and not served.lines


def test_a_label_moves_without_a_lost_call(serve: Callable[..., Served], publish: Any, tmp_path: Path) -> None:
    (base,) = bases(tmp_path, "base")
    for version in (1, 2):
        publish(base, version)
    served = serve(Model("ranker", base, Policy(None), {"stable": 1}))
    stop = threading.Event()

    def ask() -> set[int]:
        seen = set()
        while not stop.is_set():
            seen.add(served.version(version_label="stable"))
        return seen

    def only(*versions: int) -> str:
        return f"model_version_policy {{ specific {{ {' '.join(f'versions: {version}' for version in versions)} }} }}"

    with futures.ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for versions, stable in (((2,), 2), ((1, 2), 2), ((1,), 1)):
            label = f' version_labels {{ key: "stable" value: {stable} }}'
            served.reload(config(listed("ranker", base, only(*versions) + label)))
        stop.set()
        assert set().union(*(future.result() for future in asking)) == {1, 2}


def test_a_list_that_cannot_be_served_changes_nothing(
    serve: Callable[..., Served], publish: Any, tmp_path: Path
) -> None:
    good, bad, empty = bases(tmp_path, "good", "bad", "empty")
    publish(good, 1)
    (bad / "4").mkdir()
    served = serve(Model("ranker", good))
    threads = threading.active_count()
    for base, why in (
        (bad, "version: 4 due to error: saved_model.pb is missing"),
        (empty, f"base_path: {empty} holds no version"),
        (tmp_path / "none", f"base_path: {tmp_path}/none holds no version"),
    ):
        for models in ((listed("ranker", base),), (listed("other", good), listed("new", base))):
            with pytest.raises(StatusError) as caught:
                served.reload(config(*models))
            assert caught.value.code is grpc.StatusCode.UNKNOWN and why in caught.value.text
            assert caught.value.text.startswith("1 model(s) did not become available: {{name: ")
    assert served.models.loaded() == {"ranker": [1]}
    assert _until(lambda: threading.active_count() == threads)


def test_a_server_of_one_model_takes_no_lists(tmp_path: Path) -> None:
    models = Models([], lambda model: pytest.fail("loads"), lambda model, line: None)
    with pytest.raises(StatusError, match="started with one model") as caught:
        models.reload(configuration.parse(config(listed("ranker", tmp_path))))
    assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED


def test_two_reloads_at_once(serve: Callable[..., Served], publish: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (base,) = bases(tmp_path, "base")
    publish(base, 1)
    served = serve(Model("ranker", base))
    load, entered, goes_on = served.models._load, threading.Event(), threading.Event()

    def slowly(*args: Any) -> None:
        entered.set()
        goes_on.wait(20)
        load(*args)

    monkeypatch.setattr(served.models, "_load", slowly)
    with futures.ThreadPoolExecutor() as pool:
        first = pool.submit(served.reload, config(listed("other", base)))
        entered.wait(20)
        with pytest.raises(StatusError, match="another list of models is being loaded"):
            served.reload(config(listed("ranker", base)))
        goes_on.set()
        first.result()
    assert served.version(name="other") == 1


GOOD = 'name: "a" base_path: "/a" model_platform: "tensorflow"'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it holds no model_config_list"),
        ("custom_model_config {}", "it holds no model_config_list"),
        ("model_config_list {}", "it lists no model"),
        ("model_config_list {", 'line 1, column 19: Expected "}".'),
        (config('nam: "a"'), 'no field named "nam"'),
        (config('base_path: "/a" model_platform: "tensorflow"'), "a model has no name"),
        (config('name: "a\\nb" base_path: "/a"'), "a model's name is 'a\\nb', which does not fit in a line"),
        (config('name: "a" base_path: "/a\\nb"'), "a: base_path is '/a\\nb', which does not fit in a line"),
        (config(GOOD, GOOD), "Illegal to list model a multiple times in config list"),
        (config('name: "a" base_path: "a"'), "Expected model a to have an absolute path or URI; got base_path()=a"),
        (config('name: "a"'), "got base_path()=(none)"),
        (config('name: "a" base_path: "/a"'), "a: model_platform is missing; it is 'tensorflow'"),
        (config('name: "a" base_path: "/a" model_platform: "onnx"'), "a: model_platform 'onnx' is not served"),
        (config(GOOD + " model_version_policy { specific {} }"), "a: the policy names no version"),
        (config(GOOD + " model_version_policy { specific { versions: -1 } }"), "a: negative version"),
        (
            config(GOOD + ' model_version_policy { specific { versions: 1 } } version_labels { key: "c" value: 2 }'),
            "a: label c is for version 2, which the policy does not serve",
        ),
        (config(GOOD + ' version_labels { key: "" value: 2 }'), "a: a label of version 2 is empty"),
    ],
)
def test_bad_lists(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.models(configuration.parse(text))
    assert message in str(caught.value) and str(caught.value).isprintable()


def test_good_lists() -> None:
    def policy(text: str) -> Policy:
        return configuration.models(configuration.parse(config(f"{GOOD} {text}")))[0].policy

    assert policy("") == policy("model_version_policy { latest {} }") == Policy(1)
    assert policy("model_version_policy { latest { num_versions: 3 } }") == Policy(3)
    assert policy("model_version_policy { all {} }") == Policy(None)
    old = config('name: "a" base_path: "/a" model_type: TENSORFLOW logging_config {}')
    assert configuration.models(configuration.parse(old)) == [Model("a", Path("/a"))]
    (line,) = configuration.remarks(configuration.parse(old))
    assert line == "a: logging_config is ignored: requests are not logged"


@pytest.mark.parametrize("content", [b"\xff\xfe", b" " * ((16 << 20) + 1)])
def test_unreadable_files(tmp_path: Path, content: bytes) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            configuration.read(path)
    (tmp_path / "models.config").write_bytes(content)
    with pytest.raises(ConfigError, match="not UTF-8|more than"):
        configuration.read(tmp_path / "models.config")


def test_the_file_is_followed(serve: Callable[..., Served], publish: Any, tmp_path: Path) -> None:
    a, b = bases(tmp_path, "a", "b")
    publish(a, 1)
    publish(b, 2)
    path, lines = tmp_path / "models.config", list[str]()
    path.write_text(config(listed("a", a)))
    file = ConfigFile(path, lines.append)
    served = serve(*file.models())
    file.follow(served.models.replace, 0.01)

    def write(text: str) -> None:
        (tmp_path / "beside").write_text(text)
        (tmp_path / "beside").replace(path)

    try:
        for text, line in (
            ("model_config_list {", "line 1, column 19"),
            (
                config(listed("b", b, 'version_labels { key: "canary" value: 9 }')),
                "Request to assign label to version 9",
            ),
        ):
            write(text)
            assert _until(lambda line=line: any(line in said for said in lines))  # type: ignore[misc]
            assert lines.pop().endswith("; the models before go on serving") and served.version(name="a") == 1
        write(config(listed("b", b, "logging_config {}")))
        assert _until(lambda: len(lines) >= 2) and served.version(name="b") == 2
        assert lines[0] == f"{path} has changed: its models serve" and "logging_config is ignored" in lines[1]
        path.unlink()
        assert _until(lambda: len(lines) == 3) and "cannot be read: No such file" in lines[2]
    finally:
        file.stop()


def test_the_export_names_the_model(serve: Callable[..., Served], publish: Any, tmp_path: Path) -> None:
    named, foreign, other, none = bases(tmp_path, "named", "foreign", "other", "none")
    (stage,) = bases(tmp_path, "stage")

    def export(base: Path, version: int, name: str) -> None:
        staged = publish(stage, version)
        (staged / "manifest.json").write_text(json.dumps({"model": name, "files": {}}))
        staged.rename(base / str(version))

    export(named, 1, "feed")
    publish(named, 2)
    served = serve(Model(None, named))
    assert served.version(name="feed") == 2 and served.refused(name="ranker").startswith("NOT_FOUND")
    publish(foreign, 1)
    assert serve(Model(None, foreign)).version(name="ranker") == 1
    export(other, 1, "feed")
    served = serve(Model("shop", other))
    export(other, 2, "feed")
    assert _until(lambda: served.version(name="shop") == 2)
    assert served.lines == ["shop: version 1 was exported as 'feed', and is served as 'shop'"]
    served = serve(Model(None, none))
    assert served.models.loaded() == {} and served.refused(name="ranker").startswith("NOT_FOUND")
    export(none, 3, "late")
    assert served.models.wait(NEVER, until_ready=True) == [] and served.version(name="late") == 3


def test_over_the_wire(start_server: Any, publish: Any, tmp_path: Path, request_for: Callable[..., Any]) -> None:
    from tensorflow_serving.apis import model_management_pb2

    base, other = bases(tmp_path, "base", "other")
    publish(base, 1)
    publish(base, 2)
    running = start_server(base)
    running.versions.start()
    running.versions.wait(NEVER, until_ready=True)
    request = model_management_pb2.ReloadConfigRequest()
    text = config(listed("ranker", base, "model_version_policy { all {} }"))
    text_format.Parse(text, request.config)
    running.model.HandleReloadConfigRequest(request, timeout=20)
    asked: predict_pb2.PredictRequest = request_for(user=[1], item=[0])
    asked.model_spec.version.value = 1
    assert running.prediction.Predict(asked, timeout=20).model_spec.version.value == 1
    request.config.model_config_list.config[0].base_path = str(other)
    with pytest.raises(grpc.RpcError, match=f"base_path: {other} holds no version"):
        running.model.HandleReloadConfigRequest(request, timeout=20)
    request.config.model_config_list.config[0].base_path = "other"
    with pytest.raises(grpc.RpcError, match="to have an absolute path or URI") as caught:
        running.model.HandleReloadConfigRequest(request, timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
