"""A model's whole life on a real mesh, seen through every client there is."""

import asyncio
import http.client
import json
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from catalogue import TrainedModel
from launching import Mesh
from raymesh.mesh.client import AsyncClient, Client, MeshError
from raymesh.runtimes.errors import Code, Reason

KINDS = ("xgboost", "sklearn", "onnx")


def loads(mesh: Mesh) -> int:
    """Loads of all runtimes since they started."""
    return sum(status["loads"] for status in mesh.runtime_statuses())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_a_model_lives_and_dies(mesh: Mesh, new_model: Callable[..., TrainedModel], kind: str, protocol: str) -> None:
    model = new_model(kind)
    with Client(mesh.target, protocol=protocol) as client:
        assert client.register(model.name, model.uri, model.type, key=model.key).status == "NOT_LOADED"
        asked = {model.input_name: model.rows}
        first = client.predict(model.name, asked)
        assert first.cold
        assert model.explain_wrong(0, len(model.rows), first.outputs) == ""
        assert client.status(model.name).status == "LOADED"
        second = client.predict(model.name, asked)
        assert not second.cold
        assert model.explain_wrong(0, len(model.rows), second.outputs) == ""
        assert {tensor["name"] for tensor in client.metadata(model.name)["outputs"]} >= set(model.expected)
        client.unregister(model.name)
        # After the acknowledgement no copy answers any more, whatever a route table still says.
        with pytest.raises(MeshError) as gone:
            client.predict(model.name, asked)
        assert gone.value.code is Code.NOT_FOUND
        assert client.status(model.name).status == "NOT_FOUND"


def test_a_name_used_again_serves_the_new_model(client: Client, new_model: Callable[..., TrainedModel]) -> None:
    old, new = new_model(), new_model()
    client.register("reused", old.uri, old.type)
    assert old.explain_wrong(0, 4, client.predict("reused", old.rows[:4]).outputs) == ""
    with pytest.raises(MeshError) as taken:
        client.register("reused", new.uri, new.type)
    assert taken.value.code is Code.ALREADY_EXISTS
    client.unregister("reused")
    client.register("reused", new.uri, new.type)
    assert new.explain_wrong(0, 4, client.predict("reused", new.rows[:4]).outputs) == ""
    client.unregister("reused")


def test_tritonclient_over_grpc(mesh: Mesh, registered: Callable[..., TrainedModel]) -> None:
    import tritonclient.grpc as triton

    model = registered()
    server = triton.InferenceServerClient(mesh.target)
    assert server.is_server_live()
    assert server.is_server_ready()
    tensor = triton.InferInput(model.input_name, list(model.rows.shape), "FP32")
    tensor.set_data_from_numpy(model.rows)
    answer = server.infer(model.name, [tensor], outputs=[triton.InferRequestedOutput("output-0")], request_id="7")
    assert model.explain_wrong(0, len(model.rows), {"output-0": answer.as_numpy("output-0")}) == ""
    assert answer.get_response().id == "7"
    assert server.is_model_ready(model.name)
    assert server.get_model_metadata(model.name).inputs[0].datatype == "FP32"
    with pytest.raises(triton.InferenceServerException, match="is not found") as unknown:
        server.infer("no-such-model", [tensor])
    assert unknown.value.status() == "StatusCode.NOT_FOUND"
    server.close()


def test_tritonclient_over_http(mesh: Mesh, registered: Callable[..., TrainedModel]) -> None:
    import tritonclient.http as triton

    model = registered()
    server = triton.InferenceServerClient(mesh.target)
    assert server.is_server_ready()
    for is_binary in (True, False):
        tensor = triton.InferInput(model.input_name, list(model.rows.shape), "FP32")
        tensor.set_data_from_numpy(model.rows, binary_data=is_binary)
        wanted = [triton.InferRequestedOutput("output-0", binary_data=is_binary)]
        answer = server.infer(model.name, [tensor], outputs=wanted)
        assert model.explain_wrong(0, len(model.rows), {"output-0": answer.as_numpy("output-0")}) == ""
    assert server.is_model_ready(model.name)
    assert server.get_model_metadata(model.name)["name"] == model.name
    with pytest.raises(triton.InferenceServerException, match="is not found"):
        server.infer("no-such-model", [tensor])
    server.close()


KSERVE_SCRIPT = """
import asyncio, json, sys
import kserve, numpy as np

async def main(target, model, input_name, rows):
    tensor = kserve.InferInput(input_name, list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows, binary_data=False)
    request = kserve.InferRequest(model, [tensor])
    rest = kserve.InferenceRESTClient(kserve.inference_client.RESTConfig(protocol="v2"))
    over_rest = await rest.infer(f"http://{target}", request, model_name=model)
    assert await rest.is_server_ready(f"http://{target}") and await rest.is_model_ready(f"http://{target}", model)
    await rest.close()
    grpc = kserve.InferenceGRPCClient(target)
    over_grpc = await grpc.infer(request)
    assert await grpc.is_server_ready() and await grpc.is_model_ready(model)
    await grpc.close()
    print(json.dumps([answer.outputs[0].as_numpy().tolist() for answer in (over_rest, over_grpc)]))

asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], np.array(json.loads(sys.argv[4]), np.float32)))
"""


def test_the_kserve_sdk(mesh: Mesh, registered: Callable[..., TrainedModel]) -> None:
    model = registered()
    # In a process of its own: kserve and tritonclient.grpc cannot be imported together.
    rows = json.dumps(model.rows.tolist())
    done = subprocess.run(
        [sys.executable, "-c", KSERVE_SCRIPT, mesh.target, model.name, model.input_name, rows],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    for answer in json.loads(done.stdout.splitlines()[-1]):
        assert model.explain_wrong(0, len(model.rows), {"output-0": np.array(answer, np.float32)}) == ""


def test_what_does_not_fit_is_evicted_and_comes_back(
    mesh: Mesh, client: Client, registered: Callable[..., TrainedModel]
) -> None:
    models = [registered() for _ in range(220)]
    before = sum(status["evictions"] for status in mesh.runtime_statuses())
    for model in models:
        assert model.explain_wrong(0, 1, client.predict(model.name, model.rows[:1]).outputs) == ""
    statuses = mesh.runtime_statuses()
    assert sum(status["evictions"] for status in statuses) > before
    assert sum(status["copies"] for status in statuses) < len(models)
    for status in statuses:
        assert status["used_bytes"] <= status["capacity_bytes"]
    # Which runtime had to evict is the placement's affair; who went was among those used longest ago.
    out = [at for at, model in enumerate(models) if client.status(model.name).status == "NOT_LOADED"]
    assert out
    assert out[0] < len(models) // 2
    # Asking again brings it back, with its own answers.
    gone = models[out[0]]
    again = client.predict(gone.name, gone.rows)
    assert again.cold
    assert gone.explain_wrong(0, len(gone.rows), again.outputs) == ""


def test_a_herd_causes_one_load(mesh: Mesh, registered: Callable[..., TrainedModel]) -> None:
    model = registered("sklearn")
    before = loads(mesh)

    async def ask_all() -> list[str]:
        async with AsyncClient(mesh.target, retries=0) as client:
            answers = await asyncio.gather(*(client.predict(model.name, model.rows[:1]) for _ in range(200)))
        return [model.explain_wrong(0, 1, answer.outputs) for answer in answers]

    assert set(asyncio.run(ask_all())) == {""}
    assert loads(mesh) == before + 1


def test_a_model_can_be_loaded_before_anyone_asks(client: Client, new_model: Callable[..., TrainedModel]) -> None:
    model = new_model()
    assert client.register(model.name, model.uri, model.type, load=True).status == "LOADED"
    assert not client.predict(model.name, model.rows[:1]).cold
    client.unregister(model.name)


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_an_unknown_model_is_not_found(mesh: Mesh, protocol: str) -> None:
    with Client(mesh.target, protocol=protocol) as client, pytest.raises(MeshError, match="no-such-model") as error:
        client.predict("no-such-model", np.zeros((1, 4), np.float32))
    assert error.value.code is Code.NOT_FOUND


def test_an_unknown_model_is_a_404_with_an_error(mesh: Mesh) -> None:
    status, body = post(mesh, "/v2/models/no-such-model/infer", {"inputs": []})
    assert status == 404
    assert "no-such-model" in body["error"]


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_a_malformed_tensor_is_named(mesh: Mesh, registered: Callable[..., TrainedModel], protocol: str) -> None:
    model = registered()
    for rows in (model.rows[:, :3], np.array([["a", "b"]])):
        with Client(mesh.target, protocol=protocol) as client, pytest.raises(MeshError, match="input-0") as error:
            client.predict(model.name, {"input-0": rows})
        assert error.value.code is Code.INVALID_ARGUMENT


def test_a_tensor_shorter_than_its_shape_is_named(mesh: Mesh, registered: Callable[..., TrainedModel]) -> None:
    model = registered()
    tensor = {"name": "input-0", "datatype": "FP32", "shape": [2, model.rows.shape[1]], "data": [1.0, 2.0]}
    status, body = post(mesh, f"/v2/models/{model.name}/infer", {"inputs": [tensor]})
    assert status == 400
    assert "input-0" in body["error"]


def test_a_corrupt_file_says_why(client: Client, new_model: Callable[..., TrainedModel]) -> None:
    model = new_model()
    model.path.write_bytes(b"this is no model")
    client.register("corrupt", model.uri, model.type)
    with pytest.raises(MeshError) as error:
        client.predict("corrupt", model.rows[:1])
    assert error.value.code is Code.FAILED_PRECONDITION
    assert error.value.reason == Reason.LOAD_FAILED
    status = client.status("corrupt")
    assert status.status == "LOADING_FAILED"
    assert status.errors
    assert status.errors[0]
    # The failure is remembered: the next caller hears the same at once, nothing is loaded again.
    with pytest.raises(MeshError) as again:
        client.predict("corrupt", model.rows[:1])
    assert again.value.code is Code.FAILED_PRECONDITION
    client.unregister("corrupt")


def test_a_missing_file_says_so(client: Client, new_model: Callable[..., TrainedModel]) -> None:
    model = new_model()
    model.path.unlink()
    client.register("missing", model.uri, model.type)
    with pytest.raises(MeshError) as error:
        client.predict("missing", model.rows[:1])
    assert error.value.code in (Code.FAILED_PRECONDITION, Code.NOT_FOUND)
    assert client.status("missing").status == "LOADING_FAILED"
    client.unregister("missing")


def post(mesh: Mesh, path: str, body: dict[str, object]) -> tuple[int, dict[str, str]]:
    connection = http.client.HTTPConnection(mesh.target, timeout=10)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()
