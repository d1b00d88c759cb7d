"""REST other than inference, and the OIP questions over gRPC."""

from __future__ import annotations

import asyncio

import grpc

from raymesh.mesh.inference_api import EXTENSIONS, server_version


def test_server_and_health(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            server = {"name": "raymesh", "version": server_version(), "extensions": list(EXTENSIONS)}
            assert await mesh.rest("/v2") == (200, server)
            assert await mesh.rest("/v2/") == (200, server)
            assert await mesh.rest("/v2/health/live") == (200, {"live": True})
            assert await mesh.rest("/v2/health/ready") == (200, {"ready": True, "live": True})
            assert (await mesh.oip("ServerLive")).live
            assert (await mesh.oip("ServerReady")).ready
            metadata = await mesh.oip("ServerMetadata")
            assert (metadata.name, list(metadata.extensions)) == ("raymesh", list(EXTENSIONS))

    asyncio.run(body())


def test_a_mesh_without_instances_is_not_ready(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=0) as mesh:
            assert (await mesh.rest("/v2/health/ready"))[0] == 503
            assert (await mesh.oip("ServerReady")).ready is False

    asyncio.run(body())


def test_listing_in_pages(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            for name in ("c", "a", "b"):
                await mesh.register(name)
            await mesh.ensure_loaded("b")
            await poll(lambda: len(mesh.gateway.view.models) == 3)
            await poll(lambda: mesh.gateway.view.models["default/b"].record.size_bytes)
            status, page = await mesh.rest("/v2/models?limit=2")
            assert status == 200
            assert [m["name"] for m in page["models"]] == ["a", "b"]
            assert page["models"][1] == {
                "name": "b",
                "type": "fake",
                "state": "LOADED",
                "size_bytes": 1000,
                "instances": ["r0"],
            }
            _, last = await mesh.rest(f"/v2/models?limit=2&after={page['next']}")
            assert [m["name"] for m in last["models"]] == ["c"]
            assert "next" not in last
            assert (await mesh.rest("/v2/models?limit=0"))[0] == 400
            assert (await mesh.rest("/v2/models?limit=many"))[0] == 400

    asyncio.run(body())


def test_the_repository_index(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("a")
            await mesh.register("b", loadNow=True, sync=True)
            await poll(lambda: len(mesh.gateway.view.models) == 2)
            status, index = await mesh.rest("/v2/repository/index", method=b"POST")
            assert status == 200
            assert [(m["name"], m["state"]) for m in index] == [("a", "UNAVAILABLE"), ("b", "READY")]
            _, index = await mesh.rest("/v2/repository/index", method=b"POST", body=b'{"ready": true}')
            assert [m["name"] for m in index] == ["b"]
            assert (await mesh.rest("/v2/repository/index", method=b"POST", body=b"[]"))[0] == 400

    asyncio.run(body())


def test_model_metadata_loads_the_model_once(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            status, metadata = await mesh.rest("/v2/models/m")
            assert status == 200
            assert metadata == {
                "name": "m",
                "versions": ["1"],
                "platform": "fake",
                "inputs": [{"name": "input-0", "datatype": "FP32", "shape": [-1, 4]}],
                "outputs": [],
            }
            answer = await mesh.oip("ModelMetadata", name="m", version="1")
            assert (answer.name, list(answer.versions), answer.platform) == ("m", ["1"], "fake")
            assert list(answer.inputs[0].shape) == [-1, 4]
            mesh.runtimes[0].evict("default/m")
            assert (await mesh.rest("/v2/models/m/versions/1"))[0] == 200
            assert len(mesh.loads) == 1
            status, error = await mesh.rest("/v2/models/m/versions/2")
            assert status == 404
            assert "version 2" in error["error"]
            code, _ = await mesh.code_of(mesh.oip("ModelMetadata", name="nobody"))
            assert code is grpc.StatusCode.NOT_FOUND

    asyncio.run(body())


def test_ready_means_may_be_asked(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            assert await mesh.rest("/v2/models/m/ready") == (200, {"name": "m", "ready": True})
            assert (await mesh.rest("/v2/models/m/ready?strict=true"))[0] == 503
            assert (await mesh.oip("ModelReady", name="m")).ready
            assert not (await mesh.oip("ModelReady", name="m", version="2")).ready
            await mesh.ensure_loaded("m")
            assert (await mesh.rest("/v2/models/m/versions/1/ready?strict=true"))[0] == 200
            assert (await mesh.rest("/v2/models/nobody/ready"))[0] == 404
            assert not (await mesh.oip("ModelReady", name="nobody")).ready
            assert not (await mesh.oip("ModelReady", name="../x")).ready

    asyncio.run(body())


def test_every_error_is_json(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=0, controllers=0) as mesh:
            for path, method, expected in (
                ("/nowhere", b"GET", 404),
                ("/v2/models/a%2Fb", b"GET", 404),
                ("/v2/models/-x", b"GET", 404),
                ("/v2/models", b"DELETE", 405),
                ("/v2/models/m", b"GET", 404),
            ):
                status, answer = await mesh.rest(path, method=method)
                assert status == expected
                assert isinstance(answer["error"], str)

    asyncio.run(body())


def test_metrics(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            await mesh.register("m")
            await mesh.infer_rest("m")
            status, page = await mesh.rest("/metrics")
            text = page.decode()
            assert status == 200
            assert 'raymesh_registrations_total{outcome="created"} 1.0' in text
            assert 'raymesh_registrations_total{outcome="present"} 1.0' in text
            assert 'raymesh_cold_requests_total{outcome="loaded"} 1.0' in text
            assert "raymesh_routes 1.0" in text

    asyncio.run(body())
