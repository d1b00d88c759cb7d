"""The client's vmodel calls: what is sent, how the answer is read, and that both clients say the same."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest

from raymesh.mesh import client_calls as calls
from raymesh.mesh.client import AsyncClient, Client, ModelSpec, ModelStatus, VModelStatus
from raymesh.registry.protos import Messages

mmesh = Messages("raymesh.mesh", "mmesh")

CALLS = {
    "set_vmodel": (("v", ModelSpec("b", "s3://b", "onnx")), {"owner": "me", "sync": False, "auto_delete": True}),
    "delete_vmodel": (("v",), {"owner": "me"}),
    "vmodel_status": (("v",), {"owner": "me"}),
}


def test_a_target_that_is_registered():
    call = calls.set_vmodel("v", "b", sync=False, force=True, update_only=True, expected_target="a")
    assert call.path == "/mmesh.ModelMesh/setVModel"
    request = call.request
    assert (request.vModelId, request.targetModelId, request.expectedTargetModelId) == ("v", "b", "a")
    assert request.force and request.updateOnly
    assert not (request.sync or request.loadNow or request.autoDeleteTargetModel or request.HasField("modelInfo"))


def test_a_target_to_register():
    request = calls.set_vmodel("v", ModelSpec("b", "s3://b", "onnx", "{}"), owner="me", load=True).request
    info = request.modelInfo
    assert (request.targetModelId, info.type, info.path, info.key) == ("b", "onnx", "s3://b", "{}")
    assert request.owner == "me" and request.sync and request.loadNow


def test_answers():
    read = calls.vmodel_status("v").read
    absent = mmesh.VModelStatusInfo()
    absent.activeModelStatus.SetInParent()
    assert read(absent, {}) == VModelStatus("NOT_FOUND")
    failed = mmesh.VModelStatusInfo(status=3, activeModelId="a", targetModelId="b", owner="me")
    failed.activeModelStatus.status = 3
    failed.targetModelStatus.status = 4
    failed.targetModelStatus.errors.append("no such file")
    assert read(failed, {}) == VModelStatus(
        "TRANSITION_FAILED",
        active="a",
        target="b",
        owner="me",
        active_status=ModelStatus("LOADED"),
        target_status=ModelStatus("LOADING_FAILED", ("no such file",)),
    )
    assert read(mmesh.VModelStatusInfo(status=9), {}).status == "UNKNOWN"


@pytest.mark.parametrize("method", CALLS)
def test_both_clients_send_the_call(method, monkeypatch):
    args, options = CALLS[method]
    wanted = getattr(calls, method)(*args, **options)
    sent: list[Any] = []

    async def note_async(_self, call, timeout_s=None):
        sent.append(call)

    monkeypatch.setattr(Client, "_send", lambda _self, call, timeout_s=None: sent.append(call))
    monkeypatch.setattr(AsyncClient, "_send", note_async)
    with Client() as client:
        getattr(client, method)(*args, **options)

    async def call_async():
        async with AsyncClient() as client:
            await getattr(client, method)(*args, **options)

    asyncio.run(call_async())
    assert [(call.path, call.request) for call in sent] == [(wanted.path, wanted.request)] * 2
    sync, twin = getattr(Client, method), getattr(AsyncClient, method)
    assert inspect.signature(sync) == inspect.signature(twin)
