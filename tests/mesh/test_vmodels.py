"""Vmodels: ModelMesh's calls and status codes, transitions by the controller, and which model answers."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import orjson
import pytest

from raymesh.registry.protos import Messages
from raymesh.registry.records import ModelRecord, VModelRecord
from raymesh.registry.store import Put

MMESH = Messages("raymesh.mesh", "mmesh")
SERVICE = "/mmesh.ModelMesh/"
NOT_FOUND, DEFINED, TRANSITIONING, TRANSITION_FAILED = range(4)
LOADED, LOADING_FAILED = 3, 4
Code = grpc.StatusCode


async def set_vmodel(mesh: Any, vmodel: str, target: str, *, path: str = "", **fields: Any) -> Any:
    """`path` given: the target is created."""
    request = MMESH.SetVModelRequest(vModelId=vmodel, targetModelId=target, **fields)
    if path:
        request.modelInfo.type, request.modelInfo.path = "fake", path
    return await mesh.call(SERVICE + "setVModel", request, MMESH.VModelStatusInfo)


async def delete_vmodel(mesh: Any, vmodel: str, owner: str = "") -> None:
    request = MMESH.DeleteVModelRequest(vModelId=vmodel, owner=owner)
    await mesh.call(SERVICE + "deleteVModel", request, MMESH.DeleteVModelResponse)


async def vmodel_status(mesh: Any, vmodel: str, owner: str = "") -> Any:
    request = MMESH.GetVModelStatusRequest(vModelId=vmodel, owner=owner)
    return await mesh.call(SERVICE + "getVModelStatus", request, MMESH.VModelStatusInfo)


async def read_vmodel(mesh: Any, vmodel: str) -> VModelRecord:
    return VModelRecord.decode((await mesh.store.get(mesh.keys.vmodel("default", vmodel))).value)


async def refs_of(mesh: Any, model: str) -> int:
    return ModelRecord.decode((await mesh.store.get(mesh.keys.model("default", model))).value).refs


async def answered_by(mesh: Any, vmodel: str, **headers: str) -> str:
    """The model that answers a request with that vmodel in its header."""
    answer = await mesh.infer_rest("any", x_raymesh_model="", **{"mm_vmodel_id": vmodel, **headers})
    assert answer.status == 200, answer.rest
    return str(orjson.loads(answer.rest)["model_name"])


def test_life_of_a_vmodel(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m", loadNow=True, sync=True)
            info = await set_vmodel(mesh, "v", "m")
            assert (info.status, info.activeModelId, info.targetModelId, info.owner) == (DEFINED, "m", "m", "")
            assert info.activeModelStatus.status == LOADED
            assert not info.HasField("targetModelStatus")
            code, message = await mesh.code_of(mesh.unregister("m"))
            assert code is Code.FAILED_PRECONDITION
            assert "vmodel" in message
            assert await answered_by(mesh, "v") == "default/m"
            # The target is loaded first, then it takes over.
            info = await set_vmodel(
                mesh, "v", "n", path="file:///n", autoDeleteTargetModel=True, updateOnly=True,
                expectedTargetModelId="m", sync=True,
            )  # fmt: skip
            assert (info.status, info.activeModelId, info.targetModelId) == (DEFINED, "n", "n")
            assert info.activeModelStatus.status == LOADED
            assert await answered_by(mesh, "v") == "default/n"
            assert (await refs_of(mesh, "m"), await refs_of(mesh, "n")) == (0, 1)
            await mesh.unregister("m")
            # The same again, then away from a model that goes with its last reference.
            info = await set_vmodel(mesh, "v", "n", path="file:///n", autoDeleteTargetModel=True, updateOnly=True)
            assert info.status == DEFINED
            info = await set_vmodel(mesh, "v", "o", path="file:///o", sync=True)
            assert info.activeModelId == "o"
            assert (await mesh.status("n")).status == NOT_FOUND
            await poll(lambda: "default/n" not in mesh.runtimes[0].copies)
            await delete_vmodel(mesh, "v")
            info = await vmodel_status(mesh, "v")
            assert (info.status, info.activeModelId, info.targetModelId) == (NOT_FOUND, "", "")
            assert info.activeModelStatus.status == NOT_FOUND
            assert (await mesh.infer_rest("any", x_raymesh_model="", mm_vmodel_id="v")).status == 404
            # `o` was not to be deleted with it.
            assert await refs_of(mesh, "o") == 0
            await mesh.unregister("o")
            await delete_vmodel(mesh, "v")

    asyncio.run(body())


@pytest.mark.parametrize(
    ("vmodel", "target", "fields", "code", "named"),
    [
        ("", "m", {}, Code.INVALID_ARGUMENT, "vModelId:"),
        ("a/b", "m", {}, Code.INVALID_ARGUMENT, "vModelId:"),
        ("@v", "m", {}, Code.INVALID_ARGUMENT, "vModelId:"),
        ("v", "", {}, Code.INVALID_ARGUMENT, "targetModelId:"),
        ("v", "none", {}, Code.NOT_FOUND, "target model 'none'"),
        ("v", "m", {"updateOnly": True}, Code.NOT_FOUND, "vmodel 'v'"),
        ("v", "m", {"expectedTargetModelId": "n"}, Code.FAILED_PRECONDITION, "vmodel 'v'"),
        ("v", "m", {"path": "file:///other"}, Code.ALREADY_EXISTS, "target model 'm'"),
        ("w", "n", {"expectedTargetModelId": "n"}, Code.FAILED_PRECONDITION, "vmodel 'w' has the target 'm'"),
        ("w", "n", {"owner": "me"}, Code.ALREADY_EXISTS, 'vmodel w already exists with different owner "you"'),
    ],
)
def test_refusals(shell_mesh, vmodel, target, fields, code, named):
    async def body():
        async with shell_mesh(runtimes=0, controllers=0) as mesh:
            await mesh.register("m")
            await mesh.register("n")
            await set_vmodel(mesh, "w", "m", owner="you")
            found, message = await mesh.code_of(set_vmodel(mesh, vmodel, target, **fields))
            assert found is code
            assert message.startswith(named)
            # Nothing was written.
            assert await mesh.store.get(mesh.keys.vmodel("default", "v")) is None
            assert (await read_vmodel(mesh, "w")).target == "m"
            assert (await refs_of(mesh, "m"), await refs_of(mesh, "n")) == (1, 0)

    asyncio.run(body())


def test_owners(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=0, controllers=0) as mesh:
            await mesh.register("m")
            assert (await set_vmodel(mesh, "v", "m", owner="me")).owner == "me"
            assert (await set_vmodel(mesh, "v", "m", owner="me")).owner == "me"
            assert (await set_vmodel(mesh, "v", "m")).owner == "me"
            assert (await vmodel_status(mesh, "v", "me")).status == DEFINED
            assert (await vmodel_status(mesh, "v")).owner == "me"
            stranger = await vmodel_status(mesh, "v", "you")
            assert (stranger.status, stranger.owner, stranger.activeModelId) == (NOT_FOUND, "", "")
            await delete_vmodel(mesh, "v", "you")
            assert (await vmodel_status(mesh, "v")).status == DEFINED
            await delete_vmodel(mesh, "v", "me")
            assert (await vmodel_status(mesh, "v")).status == NOT_FOUND
            for call in (delete_vmodel(mesh, ""), vmodel_status(mesh, "")):
                assert (await mesh.code_of(call))[0] is Code.INVALID_ARGUMENT

    asyncio.run(body())


def test_what_nobody_uses_is_replaced_at_once_and_nothing_is_loaded(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            await mesh.register("n")
            await set_vmodel(mesh, "v", "m")
            assert (await set_vmodel(mesh, "v", "n")).activeModelId == "n"
            assert mesh.loads == []
            # Unless the target is to be loaded.
            info = await set_vmodel(mesh, "v", "m", loadNow=True, sync=True)
            assert (info.activeModelId, info.activeModelStatus.status) == ("m", LOADED)
            info = await set_vmodel(mesh, "w", "n", loadNow=True, sync=True)
            assert (info.status, info.activeModelStatus.status) == (DEFINED, LOADED)

    asyncio.run(body())


def test_a_transition_waits_for_its_target_and_can_be_forced_or_taken_back(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            runtime = mesh.runtimes[0]
            await mesh.register("m", loadNow=True, sync=True)
            await mesh.register("n")
            await poll(lambda: mesh.gateway.view.loaded_on("default/m"))
            await set_vmodel(mesh, "v", "m")
            runtime.gate = asyncio.Event()
            waiting = asyncio.create_task(set_vmodel(mesh, "v", "n", sync=True))
            await poll(lambda: "default/n" in runtime.loads)
            info = await set_vmodel(mesh, "v", "n")
            assert (info.status, info.activeModelId, info.targetModelId) == (TRANSITIONING, "m", "n")
            assert await answered_by(mesh, "v") == "default/m"
            assert (await refs_of(mesh, "m"), await refs_of(mesh, "n")) == (1, 1)
            info = await set_vmodel(mesh, "v", "m")
            assert (info.status, info.activeModelId) == (DEFINED, "m")
            assert (await waiting).targetModelId == "m"
            assert (await refs_of(mesh, "m"), await refs_of(mesh, "n")) == (1, 0)
            info = await set_vmodel(mesh, "v", "n", force=True)
            assert (info.status, info.activeModelId) == (DEFINED, "n")
            runtime.gate.set()
            assert await answered_by(mesh, "v") == "default/n"

    asyncio.run(body())


def test_a_new_target_does_not_wait_for_the_one_before(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            runtime = mesh.runtimes[0]
            await mesh.register("m", loadNow=True, sync=True)
            await poll(lambda: mesh.gateway.view.loaded_on("default/m"))
            await set_vmodel(mesh, "v", "m")
            gate = runtime.gate = asyncio.Event()
            await set_vmodel(mesh, "v", "n", path="file:///n", autoDeleteTargetModel=True)
            await poll(lambda: "default/n" in runtime.loads)
            runtime.gate = None
            info = await set_vmodel(mesh, "v", "o", path="file:///o", sync=True)
            assert info.activeModelId == "o"
            # The one that was waited for in vain is gone, its late copy too.
            assert (await mesh.status("n")).status == NOT_FOUND
            gate.set()
            await poll(lambda: "default/n" not in runtime.copies)

    asyncio.run(body())


def test_a_broken_target_leaves_the_old_model_serving_until_it_can_be_loaded(shell_mesh, poll):
    async def body():
        async with shell_mesh(failure_expiry_s=1.0) as mesh:
            await mesh.register("m", loadNow=True, sync=True)
            await poll(lambda: mesh.gateway.view.loaded_on("default/m"))
            await set_vmodel(mesh, "v", "m")
            mesh.runtimes[0].broken["default/n"] = "not a booster"
            info = await set_vmodel(mesh, "v", "n", path="file:///n", sync=True)
            assert (info.status, info.activeModelId, info.targetModelId) == (TRANSITION_FAILED, "m", "n")
            assert info.targetModelStatus.status == LOADING_FAILED
            assert "not a booster" in info.targetModelStatus.errors
            assert (await vmodel_status(mesh, "v")).status == TRANSITION_FAILED
            assert await answered_by(mesh, "v") == "default/m"
            # Mended: tried again when the failure has expired.
            mesh.runtimes[0].broken.clear()
            await poll(lambda: mesh.gateway.view.vmodels["default/v"].record.active == "n")
            info = await vmodel_status(mesh, "v")
            assert (info.status, info.activeModelId) == (DEFINED, "n")
            assert await answered_by(mesh, "v") == "default/n"

    asyncio.run(body())


def test_asked_again_a_failed_target_is_tried_again(shell_mesh, poll):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            await mesh.register("m", loadNow=True, sync=True)
            await poll(lambda: mesh.gateway.view.loaded_on("default/m"))
            await set_vmodel(mesh, "v", "m")
            for runtime in mesh.runtimes:
                runtime.broken["default/n"] = "not a booster"
            assert (await set_vmodel(mesh, "v", "n", path="file:///n", sync=True)).status == TRANSITION_FAILED
            # Its failures are on record for long, so it fails fast, with the reason.
            began_s = time.monotonic()
            info = await set_vmodel(mesh, "v", "n", sync=True)
            assert info.status == TRANSITION_FAILED
            assert "not a booster" in info.targetModelStatus.errors
            assert time.monotonic() - began_s < 2
            assert mesh.loads.count("default/n") == 2
            # Another target heals it.
            info = await set_vmodel(mesh, "v", "o", path="file:///o", sync=True)
            assert (info.status, info.activeModelId) == (DEFINED, "o")

    asyncio.run(body())


def test_a_new_leader_goes_on_with_a_transition(shell_mesh, poll):
    async def body():
        async with shell_mesh(controllers=2) as mesh:
            await mesh.register("m", loadNow=True, sync=True)
            await poll(lambda: mesh.gateway.view.loaded_on("default/m"))
            await set_vmodel(mesh, "v", "m")
            gate = mesh.runtimes[0].gate = asyncio.Event()
            await set_vmodel(mesh, "v", "n", path="file:///n")
            await poll(lambda: "default/n" in mesh.runtimes[0].loads)
            old = mesh.leader
            await old.close()
            mesh.controllers.remove(old)
            await poll(lambda: any(controller.is_leader for controller in mesh.controllers))
            gate.set()
            await poll(lambda: mesh.gateway.view.vmodels["default/v"].record.active == "n")

    asyncio.run(body())


def test_a_vmodel_written_by_somebody_else_is_brought_to_its_target(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m", loadNow=True, sync=True)
            await mesh.register("n")
            record = VModelRecord(tenant="default", id="v", active="m", target="n", extra={"split": [1, 2]})
            await mesh.store.txn([], [Put(mesh.keys.vmodel("default", "v"), record.encode())])
            await poll(lambda: mesh.gateway.view.vmodels.get("default/v", None) is not None)
            await poll(lambda: mesh.gateway.view.vmodels["default/v"].record.active == "n")
            # What this version does not know is kept.
            assert (await read_vmodel(mesh, "v")).extra["split"] == [1, 2]

    asyncio.run(body())


def test_deleting_takes_the_models_that_were_to_go_with_it(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await set_vmodel(mesh, "v", "m", path="file:///m", autoDeleteTargetModel=True, loadNow=True, sync=True)
            await set_vmodel(mesh, "w", "m")
            await poll(lambda: mesh.door.models.get("default/@v") == "default/m")
            await delete_vmodel(mesh, "w")
            assert await answered_by(mesh, "v") == "default/m"
            await delete_vmodel(mesh, "v")
            assert mesh.door.routes == {}
            assert mesh.runtimes[0].copies == {}
            assert (await mesh.status("m")).status == NOT_FOUND

    asyncio.run(body())


def test_a_model_registered_by_itself_stays(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await set_vmodel(mesh, "v", "m", path="file:///m", autoDeleteTargetModel=True)
            await mesh.register("m")
            await delete_vmodel(mesh, "v")
            assert (await mesh.status("m")).status != NOT_FOUND
            assert await refs_of(mesh, "m") == 0

    asyncio.run(body())


def test_many_changes_at_once_leave_true_reference_counts(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            for model in ("a", "b", "c"):
                await mesh.register(model)
            await asyncio.gather(
                *(set_vmodel(mesh, f"v{n % 4}", "abc"[n % 3], force=n % 2 == 0) for n in range(24)),
                *(delete_vmodel(mesh, "v3") for _ in range(4)),
            )
            vmodels = mesh.gateway.view.vmodels.values()
            for model in ("a", "b", "c"):
                users = [v for v in vmodels if model in {v.record.active, v.record.target}]
                assert await refs_of(mesh, model) == len(users)

    asyncio.run(body())


def test_the_registry_away_is_said_at_once(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            await set_vmodel(mesh, "v", "m")
            assert await answered_by(mesh, "v") == "default/m"
            mesh.store.is_down = True
            for call in (set_vmodel(mesh, "v", "m"), delete_vmodel(mesh, "v"), vmodel_status(mesh, "w")):
                code, message = await mesh.code_of(asyncio.wait_for(call, 5))
                assert code is Code.UNAVAILABLE
                assert "registry" in message
            # What is loaded goes on answering.
            assert await answered_by(mesh, "v") == "default/m"
            assert (await vmodel_status(mesh, "v")).status == DEFINED

    asyncio.run(body())


# -- names ---------------------------------------------------------------------------------------------------------


def test_a_name_is_a_models_first_and_then_a_vmodels(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            await set_vmodel(mesh, "v", "m")
            rest = await mesh.infer_rest("v")
            assert orjson.loads(rest.rest)["model_name"] == "default/m"
            headers = mesh.runtimes[0].requests[-1][1]
            # What the runtime is told, so that it answers by the name that the client used.
            assert (headers[b"x-raymesh-model"], headers[b"x-raymesh-vmodel"]) == (b"default/m", b"default/v")
            assert b"default/m" in (await mesh.infer_grpc("v")).rest
            assert (await mesh.oip("ModelReady", name="v")).ready
            metadata = await mesh.oip("ModelMetadata", name="v")
            assert (metadata.name, metadata.inputs[0].name) == ("v", "input-0")
            assert (await mesh.rest("/v2/models/v"))[1]["name"] == "v"
            assert await mesh.rest("/v2/models/v/ready") == (200, {"name": "v", "ready": True})
            assert mesh.door.models["default/v"] == mesh.door.models["default/@v"] == "default/m"
            # A model of that name comes first.
            await mesh.register("v", path="file:///v")
            await poll(lambda: "default/v" not in mesh.door.routes)
            assert orjson.loads((await mesh.infer_rest("v")).rest)["model_name"] == "default/v"
            assert b"x-raymesh-vmodel" not in mesh.runtimes[0].requests[-1][1]
            assert await answered_by(mesh, "v") == "default/m"
            assert mesh.door.models["default/@v"] == "default/m"
            await mesh.unregister("v")
            assert orjson.loads((await mesh.infer_rest("v")).rest)["model_name"] == "default/m"

    asyncio.run(body())


def test_headers(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            await set_vmodel(mesh, "v", "m")
            assert await answered_by(mesh, "", mm_vmodel_id_bin="dg") == "default/m"
            assert b"default/m" in (await mesh.infer_grpc("any", mm_vmodel_id="v")).rest
            both = {"x_raymesh_model": "", "mm_vmodel_id": "v", "mm_model_id": "m"}
            assert (await mesh.infer_rest("m", **both)).status == 400
            answer = await mesh.infer_grpc("m", mm_vmodel_id="v", tas_model_id="m")
            assert answer.header(b"grpc-status") == b"3"
            answer = await mesh.infer_grpc("m", mm_vmodel_id="none")
            assert answer.header(b"grpc-status") == b"5"
            assert b"vmodel" in answer.header(b"grpc-message")

    asyncio.run(body())


def test_a_stale_route_finds_the_model_that_answers_now(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await set_vmodel(mesh, "v", "m", path="file:///m", autoDeleteTargetModel=True, loadNow=True, sync=True)
            await poll(lambda: mesh.gateway.view.loaded_on("default/m"))
            await set_vmodel(mesh, "v", "n", path="file:///n", sync=True)
            assert (await mesh.status("m")).status == NOT_FOUND
            # As a runtime passes on what the front door sent it before it knew.
            answer = await mesh.infer_rest("any", x_raymesh_model="default/m", x_raymesh_vmodel="default/v")
            assert orjson.loads(answer.rest)["model_name"] == "default/n"

    asyncio.run(body())


def test_flips_under_traffic_fail_nobody(shell_mesh, poll):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            await set_vmodel(mesh, "v", "m0", path="file:///m0", autoDeleteTargetModel=True, loadNow=True, sync=True)
            active, is_over, answers = 0, False, 0

            async def ask() -> None:
                nonlocal answers
                while not is_over:
                    oldest = active
                    answer = await mesh.infer_rest("any", x_raymesh_model="", mm_vmodel_id="v")
                    assert answer.status == 200, answer.rest
                    answers += 1
                    number = int(orjson.loads(answer.rest)["model_name"].removeprefix("default/m"))
                    # Never older than what was acknowledged before it was asked.
                    assert oldest <= number <= active + 1

            async with asyncio.TaskGroup() as group:
                for _ in range(8):
                    group.create_task(ask())
                for number in range(1, 11):
                    info = await set_vmodel(
                        mesh, "v", f"m{number}", path=f"file:///m{number}", autoDeleteTargetModel=True, sync=True
                    )
                    assert info.activeModelId == f"m{number}"
                    active = number
                is_over = True
            assert answers > 50
            await poll(lambda: sum(len(runtime.copies) for runtime in mesh.runtimes) == 1)

    asyncio.run(body())
