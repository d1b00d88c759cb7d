"""Inference through the gateway: who gets an answer, from whom, after how many loads."""

from __future__ import annotations

import asyncio
import gzip
import socket

import orjson
import pytest

from raymesh.registry.records import ModelRecord
from raymesh.registry.store import Put
from raymesh.runtimes import grpc_http1
from raymesh.runtimes.errors import Reason


def trailer(rest: bytes, name: bytes) -> bytes:
    return rest.partition(name + b": ")[2].partition(b"\r\n")[0]


def test_first_rest_request_loads_and_is_cold_the_second_is_not(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            await mesh.register("m")
            first = await mesh.infer_rest("m", b'{"inputs": []}')
            assert first.status == 200
            assert first.header(b"x-raymesh-cold") == b"1"
            assert orjson.loads(first.rest)["body"] == '{"inputs": []}'
            second = await mesh.infer_rest("m")
            assert second.status == 200
            assert second.header(b"x-raymesh-cold") is None
            assert len(mesh.loads) == 1

    asyncio.run(body())


def test_first_grpc_request_loads_and_answers_with_trailers(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            answer = await mesh.infer_grpc("m")
            assert answer.header(b"x-raymesh-cold") == b"1"
            assert trailer(answer.rest, b"grpc-status") == b"0"
            assert b"default/m" in answer.rest

    asyncio.run(body())


def test_the_model_is_found_in_header_path_and_compressed_body(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            assert (await mesh.infer_rest("m", x_raymesh_model="")).status == 200
            assert (await mesh.infer_rest("other", x_raymesh_model="", mm_model_id="m")).status == 200
            message = gzip.compress(b"\x0a\x01m")
            framed = b"\1" + len(message).to_bytes(4, "big") + message
            headers = b"content-type: application/grpc\r\ngrpc-encoding: gzip\r\n"
            answer = await mesh.upstreams.send(
                mesh.gateway.data_address, b"POST", grpc_http1.INFER_TARGET, headers=headers, body=framed
            )
            assert trailer(answer.rest, b"grpc-status") == b"0"
            assert {name for name, _ in mesh.runtimes[0].requests} == {"default/m"}

    asyncio.run(body())


def test_what_is_passed_on(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            await mesh.infer_rest("m", inference_header_content_length="2", x_raymesh_hops="1", mm_model_id="m")
            await mesh.infer_grpc("m", grpc_timeout="5S")
            (_, rest), (_, rpc) = mesh.runtimes[0].requests
            assert rest[b"inference-header-content-length"] == b"2"
            assert rest[b"x-raymesh-hops"] == b"2"
            assert rest[b"mm-model-id"] == b"m"
            # What is left of the five seconds, in milliseconds.
            assert 3000 < int(rpc[b"grpc-timeout"].removesuffix(b"m")) <= 5000

    asyncio.run(body())


def test_five_hundred_first_requests_are_one_load_and_one_question(shell_mesh, poll):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            await mesh.register("m")
            for runtime in mesh.runtimes:
                runtime.gate = asyncio.Event()
            herd = [asyncio.create_task(mesh.infer_rest("m")) for _ in range(250)]
            herd += [asyncio.create_task(mesh.infer_grpc("m")) for _ in range(250)]
            await poll(lambda: len(mesh.loads) == 1)
            for runtime in mesh.runtimes:
                runtime.gate.set()
            answers = await asyncio.gather(*herd)
            assert [answer.status for answer in answers] == [200] * 500
            assert all(answer.header(b"grpc-status") is None for answer in answers)
            assert mesh.loads == ["default/m"]
            page = mesh.gateway.metrics.page().decode()
            assert 'raymesh_placements_total{outcome="placed"} 1.0' in page

    asyncio.run(body())


def test_unknown_model_on_both_protocols(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            rest = await mesh.infer_rest("nobody")
            assert rest.status == 404
            assert orjson.loads(rest.rest)["error"] == "Request for unknown model: 'nobody' is not found"
            rpc = await mesh.infer_grpc("nobody")
            assert (rpc.status, rpc.header(b"grpc-status")) == (200, b"5")
            assert b"unknown model" in rpc.header(b"grpc-message")
            # Not even a possible id, and no way out of the model's own keys.
            assert (await mesh.infer_rest("m", x_raymesh_model="default/../leader")).status == 404

    asyncio.run(body())


def test_a_model_registered_elsewhere_a_moment_ago_is_found(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            # Nothing was awaited in between: the view cannot know it yet.
            record = ModelRecord(tenant="default", id="m", type="fake", path="file:///m")
            await mesh.store.txn([], [Put(mesh.keys.model("default", "m"), record.encode())])
            assert (await mesh.infer_rest("m")).status == 200

    asyncio.run(body())


def test_a_load_failure_is_tried_elsewhere(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            await mesh.register("m")
            mesh.runtimes[0].broken["default/m"] = "no such file"
            assert (await mesh.infer_rest("m")).status == 200
            assert "default/m" in mesh.runtimes[1].copies
            # A model that loads has no failures on record.
            status = await mesh.status("m")
            assert (status.status, list(status.errors)) == (3, [])

    asyncio.run(body())


def test_a_broken_model_gives_its_reason_and_fails_fast_afterwards(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=4) as mesh:
            await mesh.register("m")
            for runtime in mesh.runtimes:
                runtime.broken["default/m"] = "not a booster"
            rest = await mesh.infer_rest("m")
            assert rest.status == 400
            assert orjson.loads(rest.rest)["error"] == "not a booster"
            assert rest.header(b"x-raymesh-reason") == Reason.LOAD_FAILED.encode()
            assert len(mesh.loads) == 3
            rpc = await mesh.infer_grpc("m")
            assert (rpc.header(b"grpc-status"), rpc.header(b"grpc-message")) == (b"9", b"not a booster")
            assert len(mesh.loads) == 3
            status = await mesh.status("m")
            assert status.status == 4
            assert set(status.errors) == {"not a booster"}
            assert (await mesh.oip("ModelReady", name="m")).ready is False

    asyncio.run(body())


def test_an_evicted_copy_is_loaded_again_on_the_same_instance(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            await mesh.infer_rest("m")
            await poll(lambda: mesh.gateway.view.loaded_on("default/m"))
            mesh.runtimes[0].evict("default/m")
            answer = await mesh.infer_rest("m")
            assert answer.status == 200
            assert answer.header(b"x-raymesh-cold") == b"1"
            assert len(mesh.loads) == 2

    asyncio.run(body())


@pytest.mark.parametrize("reason", [Reason.FENCED, Reason.DRAINING])
def test_an_instance_that_will_not_serve_is_left_out(shell_mesh, reason):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            await mesh.register("m")
            await mesh.infer_rest("m")
            first, second = sorted(mesh.runtimes, key=lambda r: "default/m" not in r.copies)
            first.refusal = reason
            assert orjson.loads((await mesh.infer_rest("m")).rest)["id"] == second.id

    asyncio.run(body())


@pytest.mark.parametrize("how", ["mute", "killed"])
def test_a_dead_instance_costs_no_request(shell_mesh, how):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            await mesh.register("m")
            await mesh.infer_rest("m")
            first, second = sorted(mesh.runtimes, key=lambda r: "default/m" not in r.copies)
            if how == "mute":
                first.is_mute = True
            else:
                await first.kill()
            assert orjson.loads((await mesh.infer_rest("m")).rest)["id"] == second.id

    asyncio.run(body())


def test_attempts_end(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            # It loads and never has it.
            mesh.runtimes[0].refusal = Reason.NOT_LOADED
            answer = await mesh.infer_rest("m")
            assert answer.status == 503
            assert answer.header(b"x-raymesh-reason") == Reason.NOT_LOADED.encode()
            assert len(mesh.runtimes[0].requests) == 8

    asyncio.run(body())


def test_hops_end(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            assert (await mesh.infer_rest("m", x_raymesh_hops="7")).status == 200
            refused = await mesh.infer_rest("m", x_raymesh_hops="8")
            assert refused.status == 503
            assert len(mesh.runtimes[0].requests) == 1

    asyncio.run(body())


def test_the_callers_deadline_holds_and_the_load_goes_on(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            runtime = mesh.runtimes[0]
            runtime.gate = asyncio.Event()
            answer = await mesh.infer_grpc("m", grpc_timeout="100m")
            assert answer.header(b"grpc-status") == b"4"
            runtime.gate.set()
            await poll(lambda: "default/m" in runtime.copies)
            assert (await mesh.infer_grpc("m")).header(b"grpc-status") is None
            assert len(mesh.loads) == 1

    asyncio.run(body())


def test_a_request_without_a_deadline_gets_the_meshs(shell_mesh):
    async def body():
        async with shell_mesh(request_timeout_s=0.2) as mesh:
            await mesh.register("m")
            mesh.runtimes[0].gate = asyncio.Event()
            answer = await mesh.infer_rest("m")
            assert answer.status == 504
            assert answer.header(b"x-raymesh-reason") == Reason.DEADLINE.encode()

    asyncio.run(body())


def test_a_caller_that_left_is_not_forwarded(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            runtime = mesh.runtimes[0]
            runtime.gate = asyncio.Event()
            host, _, port = mesh.gateway.data_address.partition(":")
            with socket.create_connection((host, int(port))) as caller:
                head = b"POST /v2/models/m/infer HTTP/1.1\r\nx-raymesh-token: secret\r\ncontent-length: 0\r\n\r\n"
                caller.sendall(head)
                await poll(lambda: runtime.loads)
            await poll(lambda: not mesh.gateway._data.connections)
            runtime.gate.set()
            await poll(lambda: not mesh.gateway._cold._tasks)
            assert "default/m" in runtime.copies
            assert runtime.requests == []

    asyncio.run(body())


def test_only_the_mesh_itself_gets_in(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            stranger = type(mesh.upstreams)("wrong")
            answer = await stranger.send(mesh.gateway.data_address, b"POST", b"/v2/models/m/infer")
            assert answer.status == 403
            answer = await stranger.send(mesh.gateway.rest_address, b"GET", b"/v2")
            assert answer.status == 403
            answer = await stranger.send(mesh.leader.address, b"POST", b"/control/place")
            assert answer.status == 403
            await stranger.close()

    asyncio.run(body())


def test_no_leader_is_waited_out(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            old = mesh.controllers[0]
            await old.close()
            await poll(lambda: mesh.gateway.view.leader is None)
            waiting = asyncio.create_task(mesh.infer_rest("m"))
            new = type(old)(mesh.settings, mesh.store)
            mesh.controllers[0] = new
            await new.start()
            assert (await waiting).status == 200

    asyncio.run(body())


def test_warm_requests_are_answered_while_the_registry_is_away(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            await mesh.infer_rest("m")
            mesh.store.is_down = True
            assert (await mesh.infer_rest("m")).status == 200
            unknown = await mesh.infer_rest("nobody")
            assert unknown.status == 503
            assert unknown.header(b"x-raymesh-reason") == Reason.REGISTRY_UNAVAILABLE.encode()

    asyncio.run(body())


def test_other_paths_and_methods_on_the_data_listener(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            answer = await mesh.upstreams.send(mesh.gateway.data_address, b"GET", b"/nowhere")
            assert answer.status == 404
            headers = b"content-type: application/grpc\r\n"
            answer = await mesh.upstreams.send(mesh.gateway.data_address, b"POST", b"/a.B/C", headers=headers)
            assert (answer.status, answer.header(b"grpc-status")) == (200, b"12")
            answer = await mesh.upstreams.send(
                mesh.gateway.data_address, b"POST", grpc_http1.INFER_TARGET, headers=headers, body=b"junk"
            )
            assert answer.header(b"grpc-status") == b"3"

    asyncio.run(body())


def test_an_instance_that_comes_in_time_is_waited_for(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=1) as mesh:
            await mesh.register("m")
            late = mesh.runtimes.pop()
            await late.close()
            waiting = asyncio.create_task(mesh.infer_rest("m"))
            new = type(late)(mesh.store, "r9")
            mesh.runtimes.append(new)
            await new.start()
            assert (await waiting).status == 200

    asyncio.run(body())


def test_no_instance_at_all_is_said_after_a_while(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=0) as mesh:
            mesh.gateway._placing._no_instance_patience_s = 0.1
            await mesh.register("m")
            answer = await mesh.infer_rest("m")
            assert answer.status == 503
            assert answer.header(b"x-raymesh-reason") == Reason.NO_INSTANCE.encode()
            assert answer.header(b"retry-after") == b"1"

    asyncio.run(body())
