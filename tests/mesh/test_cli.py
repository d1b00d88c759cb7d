"""The command line against a fake client: words, JSON and exit codes."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raymesh.mesh.client
from raymesh.mesh import cli
from raymesh.mesh.client import CopyInfo, MeshError, ModelSpec, ModelStatus, Prediction, RegisterSummary
from raymesh.runtimes.errors import Code


class FakeClient:
    """Notes what it is asked and answers from class attributes; an exception there is raised."""

    asked: list[tuple[Any, ...]]
    answer: Any

    def __init__(self, target: str, *, protocol: str, timeout_s: float) -> None:
        if ":" not in target:
            raise ValueError(f"target {target!r}: use host:port")
        self.asked.append((target, protocol, timeout_s))

    def __enter__(self) -> "FakeClient":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.asked.append((name, args, kwargs))
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

        return call

    def register_many(self, specs: Iterable[ModelSpec], **kwargs: Any) -> Any:
        self.asked.append(("register_many", tuple(specs), kwargs))
        return self.answer


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    monkeypatch.delenv("RAYMESH_TARGET", raising=False)
    monkeypatch.delenv("RAYMESH_DEBUG", raising=False)
    monkeypatch.setattr(raymesh.mesh.client, "Client", FakeClient)
    FakeClient.asked = []
    FakeClient.answer = ModelStatus("NOT_LOADED")
    return FakeClient


class Result:
    def __init__(self, exit_code: int, out: str, err: str) -> None:
        self.exit_code, self.out, self.err = exit_code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*arguments: str) -> Result:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, captured.out, captured.err)

    return run


Run = Callable[..., Result]


def test_register_sends_a_path_as_a_uri(client: type[FakeClient], run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a model.ubj"
    result = run("register", "m", str(file), "--type", "xgboost", "--load", "--key", "{}", "--target", "h:1")
    assert result.exit_code == 0
    assert result.out == "m: NOT_LOADED\n"
    assert client.asked[0] == ("h:1", "grpc", 60.0)
    assert client.asked[1] == ("register", ("m", file.as_uri(), "xgboost"), {"key": "{}", "load": True})


def test_the_target_comes_from_the_environment(
    client: type[FakeClient], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYMESH_TARGET", "elsewhere:9")
    run("register", "m", "s3://b/m", "--type", "onnx")
    assert client.asked[0][0] == "elsewhere:9"
    assert client.asked[1][1][1] == "s3://b/m"


def test_a_model_that_does_not_load_is_exit_code_1(client: type[FakeClient], run: Run) -> None:
    client.answer = ModelStatus("LOADING_FAILED", ("not an xgboost file",))
    result = run("register", "m", "file:///m", "--type", "xgboost", "--load", "--json")
    assert result.exit_code == 1
    assert result.json == {"name": "m", "status": "LOADING_FAILED", "errors": ["not an xgboost file"], "copies": []}


def test_status(client: type[FakeClient], run: Run) -> None:
    client.answer = ModelStatus("LOADED", (), (CopyInfo("i1", "LOADED", 5),))
    assert run("status", "m").out == "m: LOADED\n  LOADED on i1\n"
    copies = [{"instance": "i1", "status": "LOADED", "time_ms": 5}]
    assert run("status", "m", "--json").json == {"name": "m", "status": "LOADED", "errors": [], "copies": copies}
    client.answer = ModelStatus("NOT_FOUND")
    assert run("status", "m").exit_code == 1


@pytest.mark.parametrize(
    ("code", "exit_code"), [(Code.NOT_FOUND, 1), (Code.INVALID_ARGUMENT, 1), (Code.UNAVAILABLE, 3)]
)
def test_what_the_mesh_says_decides_the_exit_code(
    client: type[FakeClient], run: Run, code: Code, exit_code: int
) -> None:
    client.answer = MeshError(code, "because", "WHY")
    result = run("unregister", "m")
    assert (result.exit_code, result.out, result.err) == (exit_code, "", "raymesh: because\n")
    result = run("unregister", "m", "--json")
    assert result.exit_code == exit_code
    assert result.json == {"error": "because", "exit_code": exit_code, "code": code.name, "reason": "WHY"}
    assert result.err == ""


def test_list(client: type[FakeClient], run: Run) -> None:
    models = [
        {"name": "a", "type": "onnx", "state": "LOADED", "size_bytes": 2048, "instances": ["i1", "i2"]},
        {"name": "longer", "type": "xgboost", "state": "NOT_LOADED", "size_bytes": 0, "instances": []},
    ]
    client.answer = models
    assert run("list").out.splitlines() == [
        "NAME    TYPE     STATE       SIZE     INSTANCES",
        "a       onnx     LOADED      2.0 KiB  i1, i2",
        "longer  xgboost  NOT_LOADED  -        -",
    ]
    assert run("list", "--json").json == {"models": models}


def test_predict_takes_a_plain_list_from_standard_input(
    client: type[FakeClient], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("[[1, 2.5]]"))
    client.answer = Prediction({"y": np.array([0.25, 0.75], np.float32)}, cold=True, id="abc")
    result = run("predict", "m", "--input", "-", "--json", "--protocol", "rest")
    assert result.json == {
        "model_name": "m", "id": "abc", "cold": True,
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "data": [0.25, 0.75]}],
    }  # fmt: skip
    assert client.asked[0][1] == "rest"
    _, (name, inputs), options = client.asked[1]
    assert (name, inputs.dtype, inputs.tolist(), options) == ("m", np.float32, [[1.0, 2.5]], {"outputs": []})


def test_predict_takes_a_protocol_request_from_a_file(client: type[FakeClient], run: Run, tmp_path: Path) -> None:
    client.answer = Prediction({"label": np.array([b"cat", b"\xff"], object)}, cold=False, id="")
    tensors = [
        {"name": "x", "datatype": "INT64", "shape": [2, 1], "data": [1, 2]},
        {"name": "s", "datatype": "BYTES", "shape": [1], "data": ["a"]},
    ]
    file = tmp_path / "in.json"
    file.write_text(json.dumps({"inputs": tensors, "outputs": [{"name": "label"}]}))
    result = run("predict", "m", "--input", str(file))
    assert result.exit_code == 0
    assert "label  BYTES [2]" in result.out
    _, (_, inputs), options = client.asked[1]
    assert {name: array.tolist() for name, array in inputs.items()} == {"x": [[1], [2]], "s": [b"a"]}
    assert options == {"outputs": ["label"]}
    data = run("predict", "m", "--input", str(file), "--json").json["outputs"][0]["data"]
    assert data == ["cat", "\\xff"]


@pytest.mark.parametrize(
    "text",
    [
        "", "nonsense", "3", "{}", '{"inputs": 1}', '{"inputs": [3]}', '{"inputs": [{"name": "x"}]}', "[[1], [2, 3]]",
        '["a"]', '{"inputs": [{"name": "x", "datatype": "FP99", "shape": [1], "data": [1]}]}',
        '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [3], "data": [1]}]}',
    ],
)  # fmt: skip
def test_input_that_is_none(client: type[FakeClient], run: Run, tmp_path: Path, text: str) -> None:
    file = tmp_path / "in.json"
    file.write_text(text)
    result = run("predict", "m", "--input", str(file))
    assert result.exit_code == 2
    assert "in.json" in result.err
    assert client.asked == []


def test_register_many_reports_and_fails_when_some_fail(client: type[FakeClient], run: Run, tmp_path: Path) -> None:
    file = tmp_path / "models.jsonl"
    file.write_text(
        '{"name": "a", "uri": "file:///a", "type": "onnx"}\n\n'
        '{"name": "b", "uri": "file:///b", "type": "xgboost", "key": {"threads": 1}}\n'
    )
    client.answer = RegisterSummary(2, [])
    result = run("register-many", str(file), "--concurrency", "8")
    assert result.exit_code == 0
    assert result.out.startswith("registered 2 of 2 models in ")
    _, specs, options = client.asked[1]
    assert specs == (ModelSpec("a", "file:///a", "onnx"), ModelSpec("b", "file:///b", "xgboost", '{"threads": 1}'))
    assert options["concurrency"] == 8
    client.answer = RegisterSummary(1, [("b", "another model has this name")])
    result = run("register-many", str(file), "--json")
    assert result.exit_code == 1
    assert result.json["failed"] == [{"name": "b", "error": "another model has this name"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "Expecting value"),
        ("[]", "not a JSON object"),
        ('{"name": "b"}', "missing uri, type"),
        ('{"name": "b", "uri": "u", "type": "t", "tpye": 1}', "unknown field tpye"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_sent(
    client: type[FakeClient], run: Run, tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "models.jsonl"
    file.write_text('{"name": "a", "uri": "file:///a", "type": "onnx"}\n' + line + "\n")
    result = run("register-many", str(file))
    assert result.exit_code == 2
    assert "line 2" in result.err
    assert message in result.err
    assert client.asked == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("nonsense",),
        ("status", "m", "--nonsense"),
        ("status", "m", "--target", "nonsense"),
        ("predict", "m", "--input", "/does/not/exist"),
        ("predict", "m", "--input", "-", "--protocol", "http"),
        ("up", "--memory", "much"),
        ("up", "--port", "port"),
    ],
)
def test_wrong_usage_is_exit_code_2(client: type[FakeClient], run: Run, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.err.startswith("raymesh: ")
    result = run(*arguments, "--json")
    assert result.exit_code == 2
    assert result.json["exit_code"] == 2


def test_an_unexpected_error_is_one_line_unless_debugging(client: type[FakeClient], run: Run) -> None:
    client.answer = RuntimeError("a bug")
    result = run("status", "m")
    assert (result.exit_code, result.err) == (1, "raymesh: RuntimeError: a bug (more with --debug)\n")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["--debug", "status", "m"])


def test_help_and_version(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "Exit codes" in result.out
    commands = ["up", "down", "register", "register-many", "list", "status", "predict", "unregister"]
    assert all(f"  {command} " in result.out for command in commands)
    assert run("--version").out.startswith("raymesh 0")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from raymesh.mesh import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'ray', 'grpc', 'numpy', 'aiohttp', 'google.protobuf', 'psutil'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "raymesh.mesh.cli", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == ""
    process.wait(30)


def test_down_without_a_mesh_is_fine(run: Run, tmp_path: Path) -> None:
    assert run("down", "--state-dir", str(tmp_path / "none")).exit_code == 0
    assert run("down", "--state-dir", str(tmp_path), "--json").json == {"stopped": False, "pid": 0, "leftovers": []}
