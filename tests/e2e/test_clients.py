"""Everything the published clients can ask of a server, asked of a real mesh: loaded, cold and unloaded models."""

import asyncio
import gzip
import http.client
import json
import queue
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from catalogue import TrainedModel
from launching import Mesh
from raymesh.mesh.client import Client
from raymesh.registry.protos import Messages

Registered = Callable[..., TrainedModel]


def check(model: TrainedModel, output: Any, rows: int | None = None) -> None:
    assert model.explain_wrong(0, len(model.rows) if rows is None else rows, {"output-0": output}) == ""


def ask(mesh: Mesh, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    """Status, headers (lower case) and JSON value of a plain HTTP call."""
    connection = http.client.HTTPConnection(mesh.target, timeout=30)
    try:
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, content, {name.replace("_", "-"): text for name, text in headers.items()})
        answer = connection.getresponse()
        text = answer.read()
        fields = {name.lower(): value for name, value in answer.getheaders()}
        if fields.get("content-encoding") == "gzip":
            text = gzip.decompress(text)
        return answer.status, fields, json.loads(text)
    finally:
        connection.close()


def test_tritonclient_http(mesh: Mesh, registered: Registered) -> None:
    import tritonclient.http as triton

    model = registered()
    server = triton.InferenceServerClient(mesh.target)
    assert server.is_server_live() and server.is_server_ready()
    assert {"statistics", "model_repository", "model_configuration"} <= set(server.get_server_metadata()["extensions"])
    assert server.is_model_ready(model.name) and server.is_model_ready(model.name, "1")
    assert not server.is_model_ready(model.name, "2")
    assert not server.is_model_ready("no-such-model")
    states = {m["name"]: m["state"] for m in server.get_model_repository_index()}
    assert states[model.name] == "UNAVAILABLE"

    # Cold questions: each loads what it needs.
    config = server.get_model_config(model.name)
    assert config["max_batch_size"] > 0
    assert config["input"] == [{"name": "input-0", "data_type": "TYPE_FP32", "dims": [model.rows.shape[1]]}]
    assert server.get_model_metadata(model.name, "1")["inputs"][0]["shape"] == [-1, model.rows.shape[1]]
    before = server.get_inference_statistics(model.name)["model_stats"][0]

    tensor = triton.InferInput("input-0", list(model.rows.shape), "FP32")
    for is_binary in (True, False):
        tensor.set_data_from_numpy(model.rows, binary_data=is_binary)
        for way in (None, "gzip", "deflate"):
            answer = server.infer(
                model.name,
                [tensor],
                model_version="1",
                request_id="seven",
                request_compression_algorithm=way,
                response_compression_algorithm=way,
            )
            check(model, answer.as_numpy("output-0"))
            assert answer.get_response()["id"] == "seven"
    many = [server.async_infer(model.name, [tensor]) for _ in range(4)]
    for waiting in many:
        check(model, waiting.get_result().as_numpy("output-0"))
    after = server.get_inference_statistics(model.name, "1")["model_stats"][0]
    stats = after["inference_stats"]
    assert stats["success"]["count"] - before["inference_stats"]["success"]["count"] == 10
    counts = {stats[part]["count"] for part in ("queue", "compute_input", "compute_infer", "compute_output")}
    assert counts == {stats["success"]["count"]}
    assert after["version"] == "1" and after["memory_usage"][0]["byte_size"] > 0
    assert model.name in {m["name"] for m in server.get_inference_statistics()["model_stats"]}

    server.unload_model(model.name)
    assert {m["name"]: m["state"] for m in server.get_model_repository_index()}[model.name] == "UNAVAILABLE"
    server.load_model(model.name)
    assert {m["name"]: m["state"] for m in server.get_model_repository_index()}[model.name] == "READY"
    with pytest.raises(triton.InferenceServerException, match="failed to load 'no-such-model'"):
        server.load_model("no-such-model")
    with pytest.raises(triton.InferenceServerException, match="config"):
        server.load_model(model.name, config='{"max_batch_size": 1}')
    with pytest.raises(triton.InferenceServerException, match="Request for unknown model: 'no-such-model' is not"):
        server.infer("no-such-model", [tensor])
    with pytest.raises(triton.InferenceServerException, match="version 2 is not found"):
        server.infer(model.name, [tensor], model_version="2")
    with pytest.raises(triton.InferenceServerException, match="no such path"):
        server.get_log_settings()
    server.close()


def test_tritonclient_asyncio(mesh: Mesh, registered: Registered) -> None:
    import tritonclient.grpc.aio
    import tritonclient.http.aio

    model = registered()
    rows = np.repeat(model.rows, 1000, axis=0)

    async def ask_all(triton: Any) -> None:
        async with triton.InferenceServerClient(mesh.target) as server:
            tensor = triton.InferInput("input-0", list(rows.shape), "FP32")
            tensor.set_data_from_numpy(rows)
            wanted = [triton.InferRequestedOutput("output-0", *([False] if triton is tritonclient.http.aio else []))]
            answer = await server.infer(model.name, [tensor], outputs=wanted)
            assert len(answer.as_numpy("output-0")) == len(rows)
            assert await server.is_model_ready(model.name)
            await server.get_model_config(model.name)
            await server.get_inference_statistics(model.name)
            await server.unload_model(model.name)
            await server.load_model(model.name)
            await server.get_model_repository_index()

    asyncio.run(ask_all(tritonclient.http.aio))
    asyncio.run(ask_all(tritonclient.grpc.aio))


def test_tritonclient_grpc(mesh: Mesh, registered: Registered) -> None:
    import tritonclient.grpc as triton

    model = registered()
    keepalive = triton.KeepAliveOptions(
        keepalive_time_ms=200, keepalive_permit_without_calls=True, http2_max_pings_without_data=0
    )
    server = triton.InferenceServerClient(mesh.target, keepalive_options=keepalive)
    assert server.is_server_live() and server.is_server_ready()
    assert "model_repository" in server.get_server_metadata().extensions
    assert server.is_model_ready(model.name) and server.is_model_ready(model.name, "1")
    assert not server.is_model_ready("no-such-model")
    config = server.get_model_config(model.name).config
    assert (config.name, list(config.input[0].dims)) == (model.name, [model.rows.shape[1]])
    assert config.HasField("dynamic_batching") and config.max_batch_size > 0
    assert list(server.get_model_metadata(model.name).outputs[0].shape)[:1] == [-1]

    tensor = triton.InferInput("input-0", list(model.rows.shape), "FP32").set_data_from_numpy(model.rows)
    for way in (None, "gzip", "deflate"):
        answer = server.infer(model.name, [tensor], compression_algorithm=way, request_id="7", model_version="1")
        check(model, answer.as_numpy("output-0"))
        assert answer.get_response().id == "7"
    stats = server.get_inference_statistics(model.name).model_stats[0]
    assert stats.inference_stats.queue.count == stats.inference_stats.compute_infer.count >= 3
    assert stats.version == "1"

    server.unload_model(model.name)
    index = {m.name: m for m in server.get_model_repository_index().models}
    assert index[model.name].state == "UNAVAILABLE" and index[model.name].reason
    assert server.is_model_ready(model.name)
    server.load_model(model.name)
    assert {m.name: m.state for m in server.get_model_repository_index().models}[model.name] == "READY"
    for call, complaint in (
        (lambda: server.load_model("no-such-model"), "failed to load 'no-such-model'"),
        (lambda: server.unload_model("no-such-model"), "unknown model"),
        (lambda: server.load_model(model.name, files={"file:1/m": b"x"}, config="{}"), "not supported"),
        (lambda: server.infer("no-such-model", [tensor]), "Request for unknown model: 'no-such-model' is not found"),
        (lambda: server.infer(model.name, [tensor], model_version="2"), "version 2 is not found"),
        (server.get_log_settings, "UNIMPLEMENTED"),
    ):
        with pytest.raises(triton.InferenceServerException, match=complaint):
            call()
    server.close()


@pytest.mark.parametrize("is_cold", [True, False])
def test_tritonclient_streams(mesh: Mesh, client: Client, registered: Registered, is_cold: bool) -> None:
    import tritonclient.grpc as triton

    model = registered()
    if not is_cold:
        client.ensure_loaded(model.name)
    server = triton.InferenceServerClient(mesh.target)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    server.start_stream(lambda result, error: answers.put((result, error)))
    asked = 100
    for number in range(asked):
        row = number % len(model.rows)
        tensor = triton.InferInput("input-0", [1, model.rows.shape[1]], "FP32")
        tensor.set_data_from_numpy(model.rows[row : row + 1])
        name = "no-such-model" if number == 50 else model.name
        server.async_stream_infer(name, [tensor], request_id=str(number), enable_empty_final_response=number == 7)
    for number in range(asked):
        result, error = answers.get(timeout=30)
        if number == 50:
            assert "unknown model" in error.message()
            continue
        assert error is None
        assert result.get_response().id == str(number)
        row = number % len(model.rows)
        assert model.explain_wrong(row, 1, {"output-0": result.as_numpy("output-0")}) == ""
        assert ("triton_final_response" in result.get_response().parameters) == (number == 7)
    server.stop_stream()
    server.close()


KSERVE_SCRIPT = """
import asyncio, json, sys
import grpc, kserve, numpy as np
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb

async def main(target, model, input_name, rows):
    url = f"http://{target}"
    v1 = kserve.InferenceRESTClient(kserve.inference_client.RESTConfig(protocol="v1"))
    assert await v1.is_server_live(url)
    assert await v1.is_model_ready(url, model)
    cold = await v1.infer(url, {"instances": rows.tolist()}, model_name=model)
    warm = await v1.infer(url, {"inputs": rows.tolist()}, model_name=model)
    await v1.close()
    v2 = kserve.InferenceRESTClient(kserve.inference_client.RESTConfig(protocol="v2"))
    assert await v2.is_server_live(url) and await v2.is_server_ready(url) and await v2.is_model_ready(url, model)
    tensor = kserve.InferInput(input_name, list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows, binary_data=True)
    rest = await v2.infer(url, kserve.InferRequest(model, [tensor]), model_name=model)
    await v2.close()
    client = kserve.InferenceGRPCClient(target)
    assert await client.is_server_live() and await client.is_server_ready() and await client.is_model_ready(model)
    over_grpc = await client.infer(kserve.InferRequest(model, [tensor]))
    await client.close()
    async with grpc.aio.insecure_channel(target) as channel:
        call = "/inference.GRPCInferenceService/RepositoryModel"
        unload = channel.unary_unary(call + "Unload", pb.RepositoryModelUnloadRequest.SerializeToString,
                                     pb.RepositoryModelUnloadResponse.FromString)
        unloaded = await unload(pb.RepositoryModelUnloadRequest(model_name=model))
        load = channel.unary_unary(call + "Load", pb.RepositoryModelLoadRequest.SerializeToString,
                                   pb.RepositoryModelLoadResponse.FromString)
        loaded = await load(pb.RepositoryModelLoadRequest(model_name=model))
        assert (unloaded.model_name, unloaded.isUnloaded) == (loaded.model_name, loaded.isLoaded) == (model, True)
    print(json.dumps([cold["predictions"], warm["predictions"]]
                     + [answer.outputs[0].as_numpy().tolist() for answer in (rest, over_grpc)]))

asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], np.array(json.loads(sys.argv[4]), np.float32)))
"""


def test_the_kserve_clients(mesh: Mesh, registered: Registered) -> None:
    model = registered()
    # In a process of its own: kserve and tritonclient.grpc cannot be imported together.
    arguments = [mesh.target, model.name, model.input_name, json.dumps(model.rows.tolist())]
    done = subprocess.run(
        [sys.executable, "-c", KSERVE_SCRIPT, *arguments], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    for answer in json.loads(done.stdout.splitlines()[-1]):
        check(model, np.array(answer, np.float32))


def test_v1_and_cloud_events(mesh: Mesh, registered: Registered) -> None:
    model = registered()
    path = f"/v1/models/{model.name}:predict"
    rows = {"instances": model.rows.tolist()}
    event = {"specversion": "1.0", "id": "36077800", "source": "https://example.com", "type": "com.example.sample"}
    for _ in ("cold", "warm"):
        status, headers, answer = ask(mesh, "POST", path, rows)
        assert (status, headers["content-type"]) == (200, "application/json")
        check(model, np.array(answer["predictions"], np.float32))
        binary = {f"ce_{name}": text for name, text in event.items()}
        status, headers, answer = ask(mesh, "POST", path, rows, content_type="application/json", **binary)
        assert (status, headers["ce-type"]) == (200, "io.kserve.inference.response")
        assert headers["ce-source"] == f"io.kserve.inference.{model.name}" and headers["ce-specversion"] == "1.0"
        check(model, np.array(answer["predictions"], np.float32))
        structured = "application/cloudevents+json"
        status, headers, answer = ask(mesh, "POST", path, {**event, "data": rows}, content_type=structured)
        assert (status, headers["content-type"], answer["type"]) == (200, structured, "io.kserve.inference.response")
        check(model, np.array(answer["data"]["predictions"], np.float32))
        ask(mesh, "POST", f"/v2/repository/models/{model.name}/unload")
    assert ask(mesh, "GET", "/")[2] == {"status": "alive"}
    assert model.name in ask(mesh, "GET", "/v1/models")[2]["models"]
    assert ask(mesh, "GET", f"/v1/models/{model.name}")[2] == {"name": model.name, "ready": True}
    for method, target, body, expected in (
        ("POST", f"/v1/models/{model.name}:explain", rows, 501),
        ("POST", "/v1/models/no-such-model:explain", rows, 404),
        ("POST", "/v1/models/no-such-model:predict", rows, 404),
        ("POST", path, b"{", 400),
        ("POST", path, {"instances": 1}, 400),
        ("GET", path, None, 405),
        ("GET", "/v1/models/no-such-model", None, 404),
        ("GET", f"/v2/models/{model.name}/infer", None, 405),
        ("POST", f"/v2/models/{model.name}/versions/2/infer", {"inputs": []}, 404),
        ("POST", f"/v2/models/{model.name}/nowhere/infer", {"inputs": []}, 404),
        ("GET", f"/v2/models/{model.name}/versions/2", None, 404),
    ):
        status, _, answer = ask(mesh, method, target, body)
        assert status == expected, (method, target, answer)
        assert isinstance(answer["error"], str)


def test_bodies_in_every_encoding(mesh: Mesh, registered: Registered) -> None:
    model = registered()
    rows = np.repeat(model.rows, 1000, axis=0)
    tensor = {"name": "input-0", "datatype": "FP32", "shape": list(rows.shape), "data": rows.tolist()}
    plain = json.dumps({"inputs": [tensor]}).encode()
    path = f"/v2/models/{model.name}/infer"
    for _ in ("cold", "warm"):
        status, headers, answer = ask(
            mesh, "POST", path, gzip.compress(plain), content_encoding="gzip", accept_encoding="gzip, deflate"
        )
        assert (status, headers["content-encoding"]) == (200, "gzip")
        assert answer["outputs"][0]["shape"][0] == len(rows)
    assert "content-encoding" not in ask(mesh, "POST", path, plain)[1]

    connection = http.client.HTTPConnection(mesh.target, timeout=30)
    pieces = [plain[at : at + 1000] for at in range(0, len(plain), 1000)]
    connection.request("POST", path, iter(pieces), {"transfer-encoding": "chunked"}, encode_chunked=True)
    answered = connection.getresponse()
    assert (answered.status, len(json.loads(answered.read())["outputs"])) == (200, 1)
    connection.close()

    status, _, answer = ask(mesh, "POST", path, gzip.compress(b" " * (65 << 20)), content_encoding="gzip")
    assert (status, "message_bytes_max" in answer["error"]) == (413, True)
    assert ask(mesh, "POST", path, plain, content_encoding="gzip")[0] == 400
    assert ask(mesh, "POST", path, plain, content_encoding="br")[0] == 415


def test_health_and_reflection(mesh: Mesh) -> None:
    health, reflection = Messages("raymesh.mesh", "health"), Messages("raymesh.mesh", "reflection")
    with grpc.insecure_channel(mesh.target) as channel:
        to_bytes, from_bytes = health.HealthCheckRequest.SerializeToString, health.HealthCheckResponse.FromString
        check_health = channel.unary_unary("/grpc.health.v1.Health/Check", to_bytes, from_bytes)
        for service in ("", "inference.GRPCInferenceService", "mmesh.ModelMesh"):
            assert check_health(health.HealthCheckRequest(service=service), timeout=10).status == 1
        with pytest.raises(grpc.RpcError) as caught:
            check_health(health.HealthCheckRequest(service="no.such.Service"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch", to_bytes, from_bytes)
        watching = watch(health.HealthCheckRequest(), timeout=10)
        assert next(watching).status == 1
        watching.cancel()
        info = channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            reflection.ServerReflectionRequest.SerializeToString,
            reflection.ServerReflectionResponse.FromString,
        )
        listed, found = info(
            iter(
                (
                    reflection.ServerReflectionRequest(list_services=""),
                    reflection.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService"),
                )
            ),
            timeout=10,
        )
        names = {service.name for service in listed.list_services_response.service}
        assert {"inference.GRPCInferenceService", "mmesh.ModelMesh", "grpc.health.v1.Health"} <= names
        assert b"ModelStreamInfer" in found.file_descriptor_response.file_descriptor_proto[0]


def test_large_messages(mesh: Mesh, registered: Registered) -> None:
    import tritonclient.grpc
    import tritonclient.http

    model = registered()
    # Above what gRPC, KServe and ModelMesh allow by default (4, 8, 16 MiB).
    rows = np.tile(model.rows, (20 * 2**20 // model.rows.nbytes + 1, 1))
    over = np.zeros((66 << 20, 1), np.uint8)
    for triton in (tritonclient.grpc, tritonclient.http):
        server = triton.InferenceServerClient(mesh.target)
        tensor = triton.InferInput("input-0", list(rows.shape), "FP32").set_data_from_numpy(rows)
        check(model, server.infer(model.name, [tensor]).as_numpy("output-0")[: len(model.rows)])
        tensor = triton.InferInput("input-0", list(over.shape), "UINT8").set_data_from_numpy(over)
        with pytest.raises(triton.InferenceServerException, match="message_bytes_max"):
            server.infer(model.name, [tensor])
        assert server.is_server_ready()
        server.close()


def test_keepalive_pings_without_calls(mesh: Mesh) -> None:
    oip = Messages("raymesh.runtimes", "oip")
    options = [
        ("grpc.keepalive_time_ms", 100),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_time_between_pings_ms", 100),
    ]
    with grpc.insecure_channel(mesh.target, options=options) as channel:
        live = channel.unary_unary(
            "/inference.GRPCInferenceService/ServerLive",
            oip.ServerLiveRequest.SerializeToString,
            oip.ServerLiveResponse.FromString,
        )
        changes: queue.Queue[grpc.ChannelConnectivity] = queue.Queue()
        assert live(oip.ServerLiveRequest(), timeout=10).live
        channel.subscribe(changes.put)
        # A server that minds sends GOAWAY after a few pings, and the connection goes.
        with pytest.raises(queue.Empty):
            while True:
                assert changes.get(timeout=3) is grpc.ChannelConnectivity.READY
        assert live(oip.ServerLiveRequest(), timeout=10).live
