"""The management API: ModelMesh's semantics and status codes, over a real grpc.aio connection."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from raymesh.registry.records import ModelRecord

NOT_FOUND, NOT_LOADED, LOADING, LOADED, LOADING_FAILED = range(5)
Code = grpc.StatusCode


def test_registering_downloads_nothing_and_is_idempotent(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            assert (await mesh.register("m")).status == NOT_LOADED
            assert (await mesh.register("m")).status == NOT_LOADED
            assert mesh.loads == []
            record = ModelRecord.decode((await mesh.store.get(mesh.keys.model("default", "m"))).value)
            assert (record.type, record.path) == ("fake", "file:///m")
            assert abs(record.last_used_ms - time.time() * 1000) < 60_000

    asyncio.run(body())


def test_another_spec_under_the_same_id_is_refused(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            code, message = await mesh.code_of(mesh.register("m", path="file:///other"))
            assert code is Code.ALREADY_EXISTS
            assert "'m'" in message

    asyncio.run(body())


def test_last_used_time_is_kept(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m", lastUsedTime=123)
            record = ModelRecord.decode((await mesh.store.get(mesh.keys.model("default", "m"))).value)
            assert record.last_used_ms == 123

    asyncio.run(body())


@pytest.mark.parametrize(
    ("model", "fields", "named"),
    [
        ("", {}, "modelId"),
        ("a/b", {}, "modelId"),
        ("x" * 129, {}, "modelId"),
        ("m", {"type": ""}, "modelInfo.type"),
        ("m", {"path": "x" * 5000}, "modelInfo.path"),
    ],
)
def test_a_bad_registration_names_the_field(shell_mesh, model, fields, named):
    async def body():
        async with shell_mesh(runtimes=0, controllers=0) as mesh:
            code, message = await mesh.code_of(mesh.register(model, **fields))
            assert code is Code.INVALID_ARGUMENT
            assert message.startswith(named + ":")

    asyncio.run(body())


def test_load_now(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            done = await mesh.register("m", loadNow=True, sync=True)
            assert done.status == LOADED
            assert [copy.location for copy in done.modelCopyInfos] == ["r0"]
            mesh.runtimes[0].gate = asyncio.Event()
            begun = await mesh.register("n", loadNow=True)
            assert begun.status == LOADING
            assert (await mesh.status("n")).status == LOADING
            mesh.runtimes[0].gate.set()
            await poll(lambda: "default/n" in mesh.runtimes[0].copies)
            await poll(lambda: mesh.gateway.view.loaded_on("default/n"))
            assert (await mesh.status("n")).status == LOADED

    asyncio.run(body())


def test_a_failed_load_is_an_ok_call_with_the_reason(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            mesh.runtimes[0].broken["default/m"] = "not a booster"
            status = await mesh.register("m", loadNow=True, sync=True)
            assert (status.status, list(status.errors)) == (LOADING_FAILED, ["not a booster"])
            status = await mesh.ensure_loaded("m")
            assert (status.status, list(status.errors)) == (LOADING_FAILED, ["not a booster"])

    asyncio.run(body())


def test_a_type_nobody_serves_is_registered_and_says_so_when_loaded(shell_mesh):
    async def body():
        async with shell_mesh(types=("xgboost",)) as mesh:
            assert (await mesh.register("m", type="exotic")).status == NOT_LOADED
            status = await mesh.ensure_loaded("m")
            assert status.status == LOADING_FAILED
            assert "exotic" in status.errors[0]

    asyncio.run(body())


def test_ensure_loaded(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            assert (await mesh.code_of(mesh.ensure_loaded("m")))[0] is Code.NOT_FOUND
            await mesh.register("m")
            assert (await mesh.ensure_loaded("m")).status == LOADED
            # At least one copy: a second call adds none.
            assert (await mesh.ensure_loaded("m")).status == LOADED
            assert len(mesh.loads) == 1

    asyncio.run(body())


def test_ensure_loaded_keeps_its_deadline(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            mesh.runtimes[0].gate = asyncio.Event()
            code, _ = await mesh.code_of(mesh.ensure_loaded("m", timeout_s=0.2))
            assert code is Code.DEADLINE_EXCEEDED

    asyncio.run(body())


def test_status_of_an_unknown_model(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=0, controllers=0) as mesh:
            assert (await mesh.status("m")).status == NOT_FOUND

    asyncio.run(body())


def test_nobody_answers_after_unregistering(shell_mesh, poll):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            await mesh.register("m", loadNow=True, sync=True)
            await poll(lambda: "default/m" in mesh.door.routes)
            await mesh.unregister("m")
            assert all("default/m" not in runtime.copies for runtime in mesh.runtimes)
            assert "default/m" not in mesh.door.routes
            assert (await mesh.infer_rest("m")).status == 404
            assert (await mesh.status("m")).status == NOT_FOUND
            # Absent is fine, and the id is free.
            await mesh.unregister("m")
            assert (await mesh.register("m", path="file:///other")).status == NOT_LOADED
            assert (await mesh.infer_rest("m")).status == 200

    asyncio.run(body())


def test_unregistering_in_the_middle_of_a_load_leaves_no_copy(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            runtime = mesh.runtimes[0]
            runtime.gate = asyncio.Event()
            request = asyncio.create_task(mesh.infer_rest("m"))
            await poll(lambda: runtime.loads)
            await mesh.unregister("m")
            runtime.gate.set()
            assert (await request).status == 404
            assert runtime.copies == {}
            assert not mesh.gateway.view.copies_of("default/m")

    asyncio.run(body())


def test_registered_anew_in_the_middle_of_a_load_the_new_one_is_served(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            runtime = mesh.runtimes[0]
            runtime.gate = asyncio.Event()
            request = asyncio.create_task(mesh.infer_rest("m"))
            await poll(lambda: runtime.loads)
            await mesh.unregister("m")
            await mesh.register("m", path="file:///new")
            runtime.gate.set()
            assert (await request).status == 200
            assert runtime.copies["default/m"] == mesh.gateway.view.generation("default/m")

    asyncio.run(body())


def test_a_runtime_that_does_not_answer_does_not_hold_up_unregistering_for_long(shell_mesh, monkeypatch):
    async def body():
        monkeypatch.setattr("raymesh.mesh.catalog.UNLOAD_TIMEOUT_S", 0.2)
        async with shell_mesh() as mesh:
            await mesh.register("m", loadNow=True, sync=True)
            await mesh.runtimes[0].kill()
            await mesh.unregister("m")
            assert await mesh.store.get(mesh.keys.model("default", "m")) is None

    asyncio.run(body())


def test_the_registry_away_is_said_at_once(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            await asyncio.wait_for(mesh.ensure_loaded("m"), 5)
            mesh.store.is_down = True
            for call in (mesh.register("n"), mesh.unregister("m"), mesh.status("n")):
                code, message = await mesh.code_of(asyncio.wait_for(call, 5))
                assert code is Code.UNAVAILABLE
                assert "registry" in message
            assert (await mesh.status("m")).status == LOADED

    asyncio.run(body())


def test_a_stranger_is_not_served(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=0, controllers=0) as mesh:
            rpc = mesh.channel.unary_unary("/mmesh.ModelMesh/getModelStatus")
            assert (await mesh.code_of(rpc(b"")))[0] is Code.UNIMPLEMENTED

    asyncio.run(body())
