"""`raymesh.v1.Mesh`, over a real grpc.aio connection: what each of many models would have been told alone."""

from __future__ import annotations

import asyncio

import grpc

from raymesh.mesh.mesh_api import MODELS_MAX
from raymesh.registry.records import ModelRecord
from raymesh.registry.store import Put
from raymesh.runtimes.errors import Code

CREATED, EXISTED, REFUSED = 1, 2, 3


def outcomes(results):
    return [result.outcome for result in results]


def test_each_model_has_its_outcome(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=0, controllers=0) as mesh:
            await mesh.register("old")
            results = await mesh.register_models(
                {"model_id": "new", "type": "xgboost", "path": "file:///n", "key": "{}"},
                {"model_id": "old"},
                {"model_id": "old", "path": "file:///other"},
                {"model_id": "a/b"},
                {"model_id": "untyped", "type": ""},
                {"model_id": "last"},
            )
            assert [result.model_id for result in results] == ["new", "old", "old", "a/b", "untyped", "last"]
            assert outcomes(results) == [CREATED, EXISTED, REFUSED, REFUSED, REFUSED, CREATED]
            assert [result.code for result in results] == [
                0, 0, Code.ALREADY_EXISTS, Code.INVALID_ARGUMENT, Code.INVALID_ARGUMENT, 0,
            ]  # fmt: skip
            # What `registerModel` says.
            code, message = await mesh.code_of(mesh.register("old", path="file:///other"))
            assert (code, message) == (grpc.StatusCode.ALREADY_EXISTS, results[2].message)
            assert results[3].message.startswith("model_id:")
            assert results[4].message == "type: must not be empty"
            assert results[4].reason == "BAD_INPUT"
            kv = await mesh.store.get(mesh.keys.model("default", "new"))
            record = ModelRecord.decode(kv.value)
            assert (record.type, record.path, record.key) == ("xgboost", "file:///n", "{}")
            assert record.last_used_ms > 0
            listing = await mesh.store.list(mesh.keys.models)
            assert [kv.key.rpartition("/")[2] for kv in listing.items] == ["last", "new", "old"]

    asyncio.run(body())


def test_the_same_request_again_changes_nothing(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=0, controllers=0) as mesh:
            specs = [{"model_id": f"m{n}"} for n in range(300)]
            assert outcomes(await mesh.register_models(*specs)) == [CREATED] * 300
            before = await mesh.store.list(mesh.keys.models)
            assert outcomes(await mesh.register_models(*specs)) == [EXISTED] * 300
            assert (await mesh.store.list(mesh.keys.models)).items == before.items
            # As the metrics see it.
            _, page = await mesh.rest("/metrics")
            assert b'raymesh_registrations_total{outcome="created"} 300.0' in page
            assert b'raymesh_registrations_total{outcome="present"} 300.0' in page

    asyncio.run(body())


def test_of_several_with_one_id_the_first_wins(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=0, controllers=0) as mesh:
            first, other = {"model_id": "m"}, {"model_id": "m", "path": "file:///other"}
            bad = {"model_id": "m", "type": ""}
            results = await mesh.register_models(bad, first, other, first)
            assert outcomes(results) == [REFUSED, CREATED, REFUSED, EXISTED]
            assert results[2].code == Code.ALREADY_EXISTS
            # What is there decides, also about those that come after one that is refused.
            assert outcomes(await mesh.register_models(other, first)) == [REFUSED, EXISTED]

    asyncio.run(body())


def test_two_requests_at_once_agree_on_who_was_first(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=0, controllers=0) as mesh:
            mine = [{"model_id": f"m{n}", "path": "file:///mine"} for n in range(200)]
            yours = [{"model_id": f"m{n}", "path": "file:///yours"} for n in reversed(range(200))]
            a, b = await asyncio.gather(mesh.register_models(*mine), mesh.register_models(*yours))
            told = {result.model_id: result.outcome for result in b}
            for result in a:
                assert {result.outcome, told[result.model_id]} == {CREATED, REFUSED}
                kv = await mesh.store.get(mesh.keys.model("default", result.model_id))
                path = "file:///mine" if result.outcome == CREATED else "file:///yours"
                assert ModelRecord.decode(kv.value).path == path

    asyncio.run(body())


def test_too_many_are_refused_as_a_whole(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=0, controllers=0) as mesh:
            specs = [{"model_id": f"m{n}"} for n in range(MODELS_MAX + 1)]
            code, message = await mesh.code_of(mesh.register_models(*specs))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert message == "models: 1001 in one request, at most 1000 are allowed"
            assert (await mesh.store.list(mesh.keys.models)).items == ()
            assert outcomes(await mesh.register_models(*specs[:-1])) == [CREATED] * MODELS_MAX
            assert await mesh.register_models() == []

    asyncio.run(body())


def test_load_now_begins_loads_and_does_not_wait(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            runtime = mesh.runtimes[0]
            runtime.gate = asyncio.Event()
            specs = [{"model_id": f"m{n}", "load_now": n % 2 == 0} for n in range(6)]
            results = await mesh.register_models(*specs, {"model_id": "bad", "type": "", "load_now": True})
            assert outcomes(results) == [CREATED] * 6 + [REFUSED]
            assert runtime.copies == {}
            runtime.gate.set()
            await poll(lambda: len(runtime.copies) == 3)
            assert sorted(mesh.loads) == ["default/m0", "default/m2", "default/m4"]
            await poll(lambda: mesh.gateway.view.loaded_on("default/m4"))
            # A copy is there: none is asked for again.
            assert outcomes(await mesh.register_models(*specs)) == [EXISTED] * 6
            assert len(mesh.loads) == 3

    asyncio.run(body())


def test_the_registry_away_is_said_for_each_model(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=0, controllers=0) as mesh:
            mesh.store.is_down = True
            results = await mesh.register_models({"model_id": "a"}, {"model_id": "a/b"}, {"model_id": "a"})
            assert [result.code for result in results] == [Code.UNAVAILABLE, Code.INVALID_ARGUMENT, Code.UNAVAILABLE]
            assert results[0].reason == "REGISTRY_UNAVAILABLE"
            assert results[0].retry_after_s == 1.0

    asyncio.run(body())


def test_a_record_nobody_can_read_is_no_reason_to_fail_the_others(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=0, controllers=0) as mesh:
            await mesh.store.txn([], [Put(mesh.keys.model("default", "odd"), b"garbage")])
            results = await mesh.register_models({"model_id": "odd"}, {"model_id": "m"})
            assert outcomes(results) == [REFUSED, CREATED]
            assert results[0].code == Code.INTERNAL

    asyncio.run(body())


def test_large_models_fit_into_etcds_requests(shell_mesh, monkeypatch):
    async def body():
        async with shell_mesh(runtimes=0, controllers=0) as mesh:
            sizes = []
            txn = mesh.store.txn

            async def measured(compares, success, failure=()):
                sizes.append(sum(len(op.value) for op in success if isinstance(op, Put)))
                return await txn(compares, success, failure)

            monkeypatch.setattr(mesh.store, "txn", measured)
            # In JSON each of these characters takes six bytes.
            specs = [{"model_id": f"m{n}", "key": "\x01" * 32_000} for n in range(40)]
            assert outcomes(await mesh.register_models(*specs)) == [CREATED] * 40
            assert max(sizes) < 1_000_000

    asyncio.run(body())


def test_a_stranger_is_not_served(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=0, controllers=0) as mesh:
            rpc = mesh.channel.unary_unary("/raymesh.v1.Mesh/RegisterModels")
            assert (await mesh.code_of(rpc(b"")))[0] is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(body())
