"""`raymesh vmodel` against a fake client: words, JSON and exit codes."""

from __future__ import annotations

import json
from typing import Any

import pytest

import raymesh.mesh.client
from raymesh.mesh import cli
from raymesh.mesh.client import ModelSpec, ModelStatus, VModelStatus

FAILED = VModelStatus(
    "TRANSITION_FAILED",
    active="a",
    target="b",
    owner="me",
    active_status=ModelStatus("LOADED"),
    target_status=ModelStatus("LOADING_FAILED", ("no such file",)),
)
DEFINED = VModelStatus("DEFINED", active="b", target="b", active_status=ModelStatus("LOADED"))


class FakeClient:
    """Notes what it is asked; answers `status` to everything."""

    asked: list[tuple[Any, ...]]
    status: VModelStatus

    def __init__(self, target: str, **_options: Any) -> None:
        pass

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def set_vmodel(self, *arguments: Any, **options: Any) -> VModelStatus:
        self.asked.append((*arguments, {name: value for name, value in options.items() if value}))
        return self.status

    def vmodel_status(self, *arguments: Any, **options: Any) -> VModelStatus:
        self.asked.append((*arguments, options))
        return self.status

    def delete_vmodel(self, *arguments: Any, **options: Any) -> None:
        self.asked.append((*arguments, options))


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    monkeypatch.setattr(raymesh.mesh.client, "Client", FakeClient)
    FakeClient.asked = []
    FakeClient.status = DEFINED
    return FakeClient


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["vmodel", *arguments])
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return run


def test_set(client, run):
    assert run("set", "v", "b") == (0, "v: DEFINED\n  active b: LOADED\n", "")
    assert client.asked == [("v", "b", {"sync": True})]
    client.asked = []
    options = ["--auto-delete", "--load", "--force", "--update-only", "--expect", "a", "--no-wait", "--owner", "me"]
    assert run("set", "v", "b", "--uri", "s3://b/m", "--type", "onnx", *options)[0] == 0
    flags = {"owner": "me", "load": True, "update_only": True, "force": True, "auto_delete": True}
    assert client.asked == [("v", ModelSpec("b", "s3://b/m", "onnx"), {**flags, "expected_target": "a"})]


def test_a_uri_needs_a_type(client, run):
    code, _, err = run("set", "v", "b", "--uri", "s3://b/m")
    assert code == 2
    assert "--type" in err
    assert client.asked == []


def test_a_failed_transition_is_exit_code_1_and_says_why(client, run):
    client.status = FAILED
    code, out, _ = run("set", "v", "b")
    assert code == 1
    assert out == (
        "v: TRANSITION_FAILED (owner me)\n  active a: LOADED\n  target b: LOADING_FAILED\n    error: no such file\n"
    )
    code, out, _ = run("status", "v", "--json")
    assert code == 0
    assert json.loads(out) == {
        "name": "v",
        "status": "TRANSITION_FAILED",
        "owner": "me",
        "active": "a",
        "target": "b",
        "active_status": {"status": "LOADED", "errors": []},
        "target_status": {"status": "LOADING_FAILED", "errors": ["no such file"]},
    }


def test_status_of_none(client, run):
    client.status = VModelStatus("NOT_FOUND")
    assert run("status", "v") == (1, "v: NOT_FOUND\n", "")


def test_delete(client, run):
    assert run("delete", "v") == (0, "there is no vmodel v any more\n", "")
    assert run("delete", "v", "--owner", "you") == (0, "v is another owner's and stays\n", "")
    code, out, _ = run("delete", "v", "--owner", "you", "--json")
    assert (code, json.loads(out)) == (0, {"name": "v", "deleted": False})
