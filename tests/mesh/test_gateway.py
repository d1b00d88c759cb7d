"""The gateway as a member of the mesh: its listeners, its record, the routes it keeps true."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest

from raymesh.mesh.front_door import FrontDoor
from raymesh.mesh.front_door_config import FrontDoorConfig
from raymesh.mesh.front_door_table import FrontDoorTable
from raymesh.registry.records import GatewayRecord, InstanceRecord
from raymesh.registry.store import Put, RegistryUnavailable


def test_it_appears_in_the_registry_and_in_the_door(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            gateway = mesh.gateway
            kv = await mesh.store.get(mesh.keys.gateway(gateway.id))
            assert GatewayRecord.decode(kv.value).data_address == gateway.data_address
            assert mesh.door.gateway == (gateway.data_address, gateway.grpc_address, gateway.rest_address)
            assert mesh.door.resyncs == 1
            await gateway.close()
            assert await mesh.store.get(mesh.keys.gateway(gateway.id)) is None
            assert not mesh.door.is_open

    asyncio.run(body())


def test_a_model_is_routed_by_the_time_its_first_answer_is_there(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            await mesh.infer_rest("m")
            assert mesh.door.routes == {"default/m": ("r0",)}
            # The watch brings nothing new.
            await poll(lambda: mesh.gateway.view.loaded_on("default/m"))
            assert mesh.door.changes == 1

    asyncio.run(body())


def test_routes_follow_instances_and_copies(shell_mesh, poll):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            await mesh.register("m")
            await mesh.infer_rest("m")
            await poll(lambda: set(mesh.door.instances) == {"r0", "r1"})
            (holder,) = mesh.door.routes["default/m"]
            runtime = next(r for r in mesh.runtimes if r.id == holder)
            runtime.draining = True
            await runtime.publish()
            await poll(lambda: "default/m" not in mesh.door.routes)
            await poll(lambda: mesh.leader.view.instances[holder].record.draining)
            # The next request goes to the other one.
            assert (await mesh.infer_rest("m")).status == 200
            await poll(lambda: mesh.door.routes.get("default/m") not in {None, (holder,)})
            await runtime.close()
            await poll(lambda: holder not in mesh.door.instances)
            mesh.runtimes.remove(runtime)

    asyncio.run(body())


def test_a_second_gateway_begins_with_all_routes(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m", loadNow=True, sync=True)
            door = type(mesh.door)()
            second = type(mesh.gateway)(mesh.settings, mesh.store, door=door)
            await second.start()
            assert door.routes == {"default/m": ("r0",)}
            assert set(door.instances) == {"r0"}
            await second.close()

    asyncio.run(body())


def test_what_one_gateway_unregisters_another_does_not_answer(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m", loadNow=True, sync=True)
            second = type(mesh.gateway)(mesh.settings, mesh.store, door=type(mesh.door)())
            await second.start()
            await mesh.unregister("m")
            headers = b"x-raymesh-model: default/m\r\n"
            answer = await mesh.upstreams.send(second.data_address, b"POST", b"/v2/models/m/infer", headers=headers)
            assert answer.status == 404
            await second.close()

    asyncio.run(body())


def test_an_odd_record_does_not_cost_the_news_that_follows(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            mesh.gateway._routes._door = door = FrontDoorTable(8)
            mesh.gateway._routes.resync()
            odd = InstanceRecord(id="odd", address="a-host-name:1", pool="cpu", epoch=1)
            await mesh.store.txn([], [Put(mesh.keys.instance("odd"), odd.encode())])
            await mesh.register("m")
            await mesh.infer_rest("m")
            await poll(lambda: mesh.gateway.view.loaded_on("default/m"))
            assert door.routes == 1
            # A gateway that starts now does not stumble either.
            mesh.gateway._routes.resync()
            assert door.routes == 1

    asyncio.run(body())


def test_a_defect_in_one_listener_does_not_stop_the_view(shell_mesh, poll, monkeypatch):
    async def body():
        async with shell_mesh() as mesh:
            monkeypatch.setattr(mesh.gateway._vmodels, "see", lambda _: 1 / 0)
            await mesh.register("m")
            await mesh.infer_rest("m")
            await poll(lambda: mesh.gateway.view.loaded_on("default/m"))
            assert mesh.door.routes == {"default/m": ("r0",)}

    asyncio.run(body())


def test_it_does_not_start_without_a_registry(shell_mesh, monkeypatch):
    async def body():
        mesh = shell_mesh()
        mesh.store.is_down = True
        start = mesh.gateway._session.start
        monkeypatch.setattr(mesh.gateway._session, "start", lambda: start(0.1))
        with pytest.raises(RegistryUnavailable):
            await mesh.gateway.start()
        assert not mesh.door.is_open

    asyncio.run(body())


def test_through_the_real_front_door(shell_mesh, poll, tmp_path):
    """One port for everything: management and inference over gRPC, both kinds of REST, cold and then warm."""

    async def body():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        mesh = shell_mesh(runtimes=2, port=port, state_dir=tmp_path)
        door = FrontDoor(FrontDoorConfig.from_settings(mesh.settings, fds_max=1000), tmp_path)
        mesh.gateway = type(mesh.gateway)(mesh.settings, mesh.store, door=door)
        try:
            async with mesh:
                await door.flushed()
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as mesh.channel:
                    assert (await mesh.register("m")).status == 1
                    assert (await mesh.oip("ServerReady")).ready
                    answer = await mesh.oip("ModelInfer", model_name="m")
                    holder = answer.id
                    await door.flushed()
                    assert door.routes == 1
                    assert (await mesh.oip("ModelInfer", model_name="m")).id == holder
                    assert mesh.loads == ["default/m"]
                    target = f"127.0.0.1:{port}"
                    rest = await mesh.upstreams.send(target, b"POST", b"/v2/models/m/infer", body=b"{}")
                    assert (rest.status, rest.header(b"x-raymesh-cold")) == (200, None)
                    # The warm ones did not come through the gateway.
                    runtime = next(r for r in mesh.runtimes if r.id == holder)
                    assert [b"x-raymesh-hops" in headers for _, headers in runtime.requests] == [True, False, False]
                    rest = await mesh.upstreams.send(target, b"GET", b"/v2/models")
                    assert (rest.status, b'"LOADED"' in rest.rest) == (200, True)
                    code, message = await mesh.code_of(mesh.oip("ModelInfer", model_name="nobody"))
                    assert code is grpc.StatusCode.NOT_FOUND
                    assert "unknown model" in message
                    await mesh.unregister("m")
                    assert (await mesh.code_of(mesh.oip("ModelInfer", model_name="m")))[0] is grpc.StatusCode.NOT_FOUND
        finally:
            await door.stop()

    asyncio.run(body())
