"""Vmodels on a real mesh: a flip under traffic, on every way a request may name a vmodel, with each answer checked."""

import http.client
import json
import threading
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

from catalogue import TrainedModel
from launching import Mesh
from raymesh.mesh.client import Client, MeshError, ModelSpec
from raymesh.registry.protos import Messages
from raymesh.runtimes.errors import Code

OIP = Messages("raymesh.runtimes", "oip")
INFER = "/inference.GRPCInferenceService/ModelInfer"


def spec_of(model: TrainedModel) -> ModelSpec:
    return ModelSpec(model.name, model.uri, model.type, model.key)


class Callers:
    """Ask one vmodel without a pause, each in its own way, and tell which model's answer every answer was."""

    def __init__(self, mesh: Mesh, vmodel: str, models: list[TrainedModel]) -> None:
        self._mesh, self._vmodel, self._models = mesh, vmodel, models
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(way,)) for way in self.ways()]
        #: Index of the oldest model that may answer what is asked from now on: its successor was acknowledged.
        self.oldest = 0
        self.answers = dict.fromkeys(range(len(models)), 0)
        self.cold = 0
        self.complaints: list[str] = []

    def ways(self) -> list[Callable[[], Iterator[tuple[str, np.ndarray]]]]:
        return [self.grpc_by_name, self.grpc_by_header, self.rest_by_name, self.rest_by_header]

    def __enter__(self) -> "Callers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def grpc_by_name(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from self._grpc(self._vmodel, ())

    def grpc_by_header(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from self._grpc("", (("mm-vmodel-id-bin", self._vmodel.encode()),))

    def _grpc(self, name: str, metadata: tuple[tuple[str, bytes], ...]) -> Iterator[tuple[str, np.ndarray]]:
        model = self._models[0]
        with grpc.insecure_channel(self._mesh.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = channel.unary_unary(INFER)
            request = OIP.ModelInferRequest(model_name=name, raw_input_contents=[model.rows[:1].tobytes()])
            request.inputs.add(name=model.input_name, datatype="FP32", shape=model.rows[:1].shape)
            while True:
                raw, done = call.with_call(request.SerializeToString(), timeout=30, metadata=metadata)
                self.cold += ("x-raymesh-cold", "1") in done.initial_metadata()
                answer = OIP.ModelInferResponse.FromString(raw)
                yield answer.model_name, np.frombuffer(answer.raw_output_contents[0], np.float32)

    def rest_by_name(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from self._rest(f"/v2/models/{self._vmodel}/infer", {})

    def rest_by_header(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from self._rest("/v2/models/whatever/infer", {"mm-vmodel-id": self._vmodel})

    def _rest(self, path: str, headers: dict[str, str]) -> Iterator[tuple[str, np.ndarray]]:
        model = self._models[0]
        connection = http.client.HTTPConnection(self._mesh.target, timeout=30)
        tensor = {"name": model.input_name, "datatype": "FP32", "shape": list(model.rows[:1].shape)}
        body = json.dumps({"inputs": [{**tensor, "data": model.rows[:1].ravel().tolist()}]})
        try:
            while True:
                connection.request("POST", path, body, headers)
                response = connection.getresponse()
                answer = json.loads(response.read())
                assert response.status == 200, answer
                self.cold += response.headers.get("x-raymesh-cold") == "1"
                yield answer["model_name"], np.array(answer["outputs"][0]["data"], np.float32)
        finally:
            connection.close()

    def _ask(self, way: Callable[[], Iterator[tuple[str, np.ndarray]]]) -> None:
        answers = way()
        try:
            while not self._is_over.is_set():
                oldest = self.oldest
                name, output = next(answers)
                who = [n for n, m in enumerate(self._models) if not m.explain_wrong(0, 1, {"output-0": output})]
                if name != self._vmodel or len(who) != 1 or who[0] < oldest:
                    self.complaints.append(f"{way.__name__}: {name!r} answered as {who}, {oldest} or later expected")
                for number in who:
                    self.answers[number] += 1
        except Exception as error:
            self.complaints.append(f"{way.__name__}: {error!r}")
        finally:
            answers.close()  # type: ignore[attr-defined]


def test_flips_under_traffic(
    mesh: Mesh, client: Client, new_model: Callable[..., TrainedModel], eventually: Callable[..., None]
) -> None:
    models = [new_model() for _ in range(4)]
    first, *others = models
    status = client.set_vmodel("flipping", spec_of(first), auto_delete=True, load=True)
    assert (status.status, status.active, status.active_status.status) == ("DEFINED", first.name, "LOADED")
    with Callers(mesh, "flipping", models) as callers:
        eventually(lambda: callers.answers[0] > 200, 30, f"answers of the first model: {callers.complaints}")
        for number, model in enumerate(others, start=1):
            status = client.set_vmodel("flipping", spec_of(model), auto_delete=True, expected_target=status.target)
            assert (status.status, status.active) == ("DEFINED", model.name)
            callers.oldest = number
            eventually(lambda n=number: callers.answers[n] > 200, 30, f"answers: {callers.complaints}")
    assert callers.complaints == []
    # The targets were loaded before they took over: nobody waited for a load.
    assert callers.cold == 0
    # Models that nobody refers to any more are gone, with their memory.
    assert client.status(first.name).status == "NOT_FOUND"
    with pytest.raises(MeshError) as refused:
        client.unregister(models[-1].name)
    assert refused.value.code is Code.FAILED_PRECONDITION
    client.delete_vmodel("flipping")
    assert client.status(models[-1].name).status == "NOT_FOUND"
    with pytest.raises(MeshError) as gone:
        client.predict("flipping", first.rows[:1])
    assert gone.value.code is Code.NOT_FOUND


def test_a_broken_target_leaves_the_old_model_serving(
    client: Client, registered: Callable[..., TrainedModel], new_model: Callable[..., TrainedModel]
) -> None:
    good, broken, better = registered(), new_model(), new_model()
    broken.path.write_bytes(b"this is no model")
    client.set_vmodel("careful", good.name, load=True)
    status = client.set_vmodel("careful", spec_of(broken), auto_delete=True)
    assert (status.status, status.active, status.target) == ("TRANSITION_FAILED", good.name, broken.name)
    assert status.target_status is not None
    assert status.target_status.errors
    assert good.explain_wrong(0, 1, client.predict("careful", good.rows[:1]).outputs) == ""
    status = client.set_vmodel("careful", spec_of(better), auto_delete=True)
    assert (status.status, status.active) == ("DEFINED", better.name)
    assert better.explain_wrong(0, 1, client.predict("careful", better.rows[:1]).outputs) == ""
    assert client.status(broken.name).status == "NOT_FOUND"
    client.delete_vmodel("careful")


def test_every_protocol_takes_a_vmodel_for_a_model(
    mesh: Mesh, client: Client, registered: Callable[..., TrainedModel]
) -> None:
    import tritonclient.grpc as triton

    model = registered()
    # Not loaded: the first request takes the cold path, the others the warm one.
    client.set_vmodel("alias", model.name)
    body = json.dumps({"instances": model.rows[:2].tolist()})
    for path in ("/v1/models/alias:predict", "/v1/models/alias:predict"):
        connection = http.client.HTTPConnection(mesh.target, timeout=30)
        connection.request("POST", path, body, {"content-type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
        assert model.explain_wrong(0, 2, {"output-0": np.array(answer["predictions"], np.float32)}) == ""
    with triton.InferenceServerClient(mesh.target) as server:
        assert server.is_model_ready("alias")
        assert server.get_model_metadata("alias").name == "alias"
        assert server.get_model_config("alias").config.name == "alias"
        tensor = triton.InferInput(model.input_name, list(model.rows[:1].shape), "FP32")
        tensor.set_data_from_numpy(model.rows[:1])
        for version in ("", "1"):
            answered = server.infer("alias", [tensor], model_version=version)
            assert answered.get_response().model_name == "alias"
            assert model.explain_wrong(0, 1, {"output-0": answered.as_numpy("output-0")}) == ""
    client.delete_vmodel("alias")
