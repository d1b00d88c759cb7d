"""Triton's repository, configuration and statistics, over REST and gRPC."""

from __future__ import annotations

import asyncio
import gzip

import grpc
import orjson
import pytest


def test_load_and_unload_over_rest(shell_mesh, poll):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            await mesh.register("m")
            path = "/v2/repository/models/m"
            for content in (b"", b'{"parameters": {}}'):
                assert await mesh.rest(path + "/load", method=b"POST", body=content) == (
                    200,
                    {"name": "m", "load": True},
                )
            assert mesh.loads == ["default/m"]
            (listed,) = (await mesh.rest("/v2/repository/index", method=b"POST"))[1]
            assert listed == {"name": "m", "version": "1", "state": "READY", "reason": ""}
            assert await mesh.rest(path + "/unload", method=b"POST") == (200, {"name": "m", "unload": True})
            # It is gone when the answer is there, and may still be asked for.
            assert not any(runtime.copies for runtime in mesh.runtimes)
            (listed,) = (await mesh.rest("/v2/repository/index", method=b"POST"))[1]
            assert (listed["state"], "loads it" in listed["reason"]) == ("UNAVAILABLE", True)
            assert (await mesh.rest("/v2/models/m/ready"))[0] == 200
            assert (await mesh.infer_rest("m")).status == 200
            await poll(lambda: mesh.loads == ["default/m", "default/m"])

    asyncio.run(body())


@pytest.mark.parametrize(
    ("path", "content", "status", "complaint"),
    [
        ("/v2/repository/models/nobody/load", b"", 404, "failed to load 'nobody', Request for unknown model"),
        ("/v2/repository/models/nobody/unload", b"", 404, "Request for unknown model: 'nobody' is not found"),
        ("/v2/repository/models/m/load", b'{"parameters": {"config": "{}"}}', 400, "failed to load 'm'"),
        ("/v2/repository/models/m/load", b'{"parameters": 1}', 400, "parameters"),
        ("/v2/repository/models/m/load", b"{", 400, "not valid JSON"),
        ("/v2/repository/index", b'{"ready": 1}', 400, "ready"),
        ("/v2/repository/index", b"[]", 400, "JSON object"),
        ("/v2/repository/index", b" " * 2000, 413, "message_bytes_max"),
        ("/v1/models/m:explain", b"{}", 501, "explainer"),
        ("/v1/models/nobody:explain", b"{}", 404, "unknown model"),
    ],
)
def test_what_cannot_be_done_says_why(shell_mesh, path, content, status, complaint):
    async def body():
        async with shell_mesh(message_bytes_max=1000) as mesh:
            await mesh.register("m")
            have, answer = await mesh.rest(path, method=b"POST", body=content)
            assert (have, complaint in answer["error"]) == (status, True), answer

    asyncio.run(body())


def test_a_load_that_fails_says_why(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            mesh.runtimes[0].broken["default/m"] = "it is no model"
            await mesh.register("m")
            status, answer = await mesh.rest("/v2/repository/models/m/load", method=b"POST")
            assert (status, answer["error"]) == (400, "failed to load 'm', it is no model")
            (listed,) = (await mesh.rest("/v2/repository/index", method=b"POST"))[1]
            assert (listed["state"], listed["reason"]) == ("UNAVAILABLE", "it is no model")
            status, answer = await mesh.rest("/v1/models/m")
            assert (status, answer["ready"], "not ready" in answer["error"]) == (503, False, True)

    asyncio.run(body())


def test_configuration_of_a_cold_model(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            config = {
                "name": "m",
                "platform": "fake",
                "backend": "fake",
                "version_policy": {"latest": {"num_versions": 1}},
                "max_batch_size": 8,
                "input": [{"name": "input-0", "data_type": "TYPE_FP32", "dims": [4]}],
                "output": [],
                "dynamic_batching": {},
            }
            assert await mesh.rest("/v2/models/m/config") == (200, config)
            assert await mesh.rest("/v2/models/m/versions/1/config") == (200, config)
            assert (await mesh.rest("/v2/models/m/versions/2/config"))[0] == 404
            message = (await mesh.oip("ModelConfig", name="m")).config
            assert (message.name, message.max_batch_size, list(message.input[0].dims)) == ("m", 8, [4])
            assert message.HasField("dynamic_batching")
            assert (await mesh.code_of(mesh.oip("ModelConfig", name="no")))[0] is grpc.StatusCode.NOT_FOUND

    asyncio.run(body())


def test_statistics_of_loaded_and_cold_models(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            for model in ("a", "b"):
                await mesh.register(model)
            await mesh.ensure_loaded("b")
            (cold,) = (await mesh.rest("/v2/models/a/stats"))[1]["model_stats"]
            assert (cold["name"], cold["version"], cold["inference_count"]) == ("a", "1", 0)
            assert (cold["memory_usage"], cold["batch_stats"]) == ([], [])
            (warm,) = (await mesh.rest("/v2/models/stats"))[1]["model_stats"]
            assert (warm["name"], warm["inference_count"]) == ("b", 2)
            assert warm["inference_stats"]["success"] == {"count": 2, "ns": 8}
            assert warm["memory_usage"] == [{"type": "CPU", "id": 0, "byte_size": 1000}]
            assert mesh.loads == ["default/b"]
            (message,) = (await mesh.oip("ModelStatistics", name="b", version="1")).model_stats
            assert (message.name, message.inference_stats.queue.count) == ("b", 2)
            assert [m.name for m in (await mesh.oip("ModelStatistics")).model_stats] == ["b"]
            assert (await mesh.rest("/v2/models/nobody/stats"))[0] == 404
            # A runtime that does not answer has no say.
            await mesh.runtimes[0].kill()
            await mesh.runtimes[1].kill()
            assert (await mesh.rest("/v2/models/stats")) == (200, {"model_stats": []})

    asyncio.run(body())


@pytest.mark.parametrize("field", ["model_name", "repository_name"])
def test_both_layouts_of_load_and_unload(shell_mesh, field):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            loaded = await mesh.oip("RepositoryModelLoad", **{field: "m"})
            assert (loaded.model_name, loaded.isLoaded) == ("m", True)
            (listed,) = (await mesh.oip("RepositoryIndex", ready=True)).models
            assert (listed.name, listed.version, listed.state) == ("m", "1", "READY")
            unloaded = await mesh.oip("RepositoryModelUnload", **{field: "m"})
            assert (unloaded.model_name, unloaded.isUnloaded) == ("m", True)
            assert not (await mesh.oip("RepositoryIndex", ready=True)).models
            for method in ("RepositoryModelLoad", "RepositoryModelUnload"):
                code, _ = await mesh.code_of(mesh.oip(method))
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                code, message = await mesh.code_of(mesh.oip(method, **{field: "nobody"}))
                assert (code, "unknown model" in message) == (grpc.StatusCode.NOT_FOUND, True)
            code, message = await mesh.code_of(
                mesh.oip("RepositoryModelLoad", model_name="m", parameters={"config": {"string_param": "{}"}})
            )
            assert (code, "config" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)

    asyncio.run(body())


def test_v1_questions(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            for model in ("b", "a"):
                await mesh.register(model)
            assert await mesh.rest("/") == (200, {"status": "alive"})
            assert await mesh.rest("/v1/models") == (200, {"models": ["a", "b"]})
            assert await mesh.rest("/v1/models/a") == (200, {"name": "a", "ready": True})
            assert (await mesh.rest("/v1/models/nobody"))[0] == 404
            for path in ("/v1/models/a:predict", "/v2/models/a/infer", "/v2/models/a/versions/1/infer"):
                status, answer = await mesh.rest(path)
                assert (status, "GET" in answer["error"]) == (405, True)

    asyncio.run(body())


def test_large_answers_may_be_compressed(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            for number in range(20):
                await mesh.register(f"{number:03}-{'x' * 100}")
            whole = await mesh.rest("/v2/models")
            address = mesh.gateway.rest_address
            accept = b"accept-encoding: gzip\r\n"
            small = await mesh.upstreams.send(address, b"GET", b"/v2/models", headers=accept)
            assert (small.header(b"content-encoding"), orjson.loads(small.rest)) == (None, whole[1])
            for number in range(200):
                await mesh.register(f"{number:03}-{'y' * 120}")
            large = await mesh.upstreams.send(address, b"GET", b"/v1/models", headers=accept)
            assert large.header(b"content-encoding") is None
            large = await mesh.upstreams.send(address, b"GET", b"/v2/models?limit=1000", headers=accept)
            assert large.header(b"content-encoding") == b"gzip"
            end = large.rest.index(b"\r\n") if large.header(b"transfer-encoding") else -2
            assert len(orjson.loads(gzip.decompress(large.rest[end + 2 :]))["models"]) == 220
            # Triton's asyncio client could not read this one.
            index = await mesh.upstreams.send(address, b"POST", b"/v2/repository/index", headers=accept)
            assert (index.header(b"content-encoding"), len(orjson.loads(index.rest))) == (None, 220)
            packed = gzip.compress(b'{"ready": true}')
            found = await mesh.upstreams.send(
                address, b"POST", b"/v2/repository/index", headers=b"content-encoding: gzip\r\n", body=packed
            )
            assert (found.status, found.rest) == (200, b"[]")

    asyncio.run(body())
