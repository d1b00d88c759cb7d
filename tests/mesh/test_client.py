"""`Client` and `AsyncClient` against a small real server of both protocols, in this process."""

import asyncio
import itertools
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import grpc
import grpc.aio
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from raymesh.mesh import client_tensors
from raymesh.mesh.client import AsyncClient, Client, CopyInfo, MeshError, ModelSpec, ModelStatus
from raymesh.registry.protos import Messages
from raymesh.runtimes import oip as server_codec
from raymesh.runtimes.errors import Code, Reason

oip = Messages("raymesh.runtimes", "oip")
mmesh = Messages("raymesh.mesh", "mmesh")
raymesh = Messages("raymesh.mesh", "raymesh")


class FakeMesh:
    """Registers in a dict, echoes tensors, and fails on command."""

    def __init__(self) -> None:
        self.models: dict[str, tuple[str, str, str]] = {}
        self.calls: list[str] = []
        #: Failures to answer next calls with: (gRPC code, message, metadata).
        self.faults: list[tuple[grpc.StatusCode, str, dict[str, str]]] = []
        #: By model: what to refuse it with in a bulk registration, the first time and so on.
        self.refusals: dict[str, list[tuple[Code, str]]] = {}
        self.has_bulk = True
        self.is_forgetful = False
        self.hang_s = 0.0
        self.grpc_port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._http_thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> "FakeMesh":
        self._thread.start()
        self._http_thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(None), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._http.shutdown()
        self._http.server_close()
        self._http_thread.join()

    def target(self, protocol: str) -> str:
        return f"127.0.0.1:{self.grpc_port if protocol == 'grpc' else self._http.server_port}"

    async def _start(self) -> None:
        self._server = grpc.aio.server()

        def handlers(behaviors: dict[str, tuple[Any, Any]]) -> dict[str, grpc.RpcMethodHandler]:
            return {
                name: grpc.unary_unary_rpc_method_handler(
                    self._guard(name, behavior), request.FromString, lambda answer: answer.SerializeToString()
                )
                for name, (behavior, request) in behaviors.items()
            }

        management = {
            "registerModel": (self.register, mmesh.RegisterModelRequest),
            "unregisterModel": (self.unregister, mmesh.UnregisterModelRequest),
            "getModelStatus": (self.status, mmesh.GetStatusRequest),
            "ensureLoaded": (self.status, mmesh.EnsureLoadedRequest),
        }
        beside = {"RegisterModels": (self.register_models, raymesh.RegisterModelsRequest)}
        inference = {
            "ModelInfer": (self.infer, oip.ModelInferRequest),
            "ModelMetadata": (self.metadata, oip.ModelMetadataRequest),
            "ServerReady": (lambda _request: oip.ServerReadyResponse(ready=True), oip.ServerReadyRequest),
        }
        self._server.add_generic_rpc_handlers((
            grpc.method_handlers_generic_handler("mmesh.ModelMesh", handlers(management)),
            grpc.method_handlers_generic_handler("raymesh.v1.Mesh", handlers(beside)),
            grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers(inference)),
        ))  # fmt: skip
        self.grpc_port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()

    def _guard(self, name: str, behavior: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
        async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
            self.calls.append(name)
            if name == "RegisterModels" and not self.has_bulk:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
            if self.hang_s:
                await asyncio.sleep(self.hang_s)
            if self.faults:
                code, message, metadata = self.faults.pop(0)
                await context.abort(code, message, tuple(metadata.items()))
            if name == "ModelInfer" and request.model_name == "cold":
                await context.send_initial_metadata((("x-raymesh-cold", "1"),))
            return behavior(request)

        return answer

    def register(self, request: Any) -> Any:
        info = request.modelInfo
        self.models[request.modelId] = (info.type, info.path, info.key)
        return mmesh.ModelStatusInfo(status=3 if request.loadNow else 1)

    def register_models(self, request: Any) -> Any:
        answer = raymesh.RegisterModelsResponse()
        if self.is_forgetful:
            return answer
        for spec in request.models:
            if refusals := self.refusals.get(spec.model_id):
                code, message = refusals.pop(0)
                answer.results.add(model_id=spec.model_id, outcome=answer.REFUSED, code=code, message=message)
                continue
            outcome = answer.EXISTED if spec.model_id in self.models else answer.CREATED
            self.models[spec.model_id] = (spec.type, spec.path, spec.key)
            answer.results.add(model_id=spec.model_id, outcome=outcome)
        return answer

    def unregister(self, request: Any) -> Any:
        self.models.pop(request.modelId, None)
        return mmesh.UnregisterModelResponse()

    def status(self, request: Any) -> Any:
        if request.modelId not in self.models:
            return mmesh.ModelStatusInfo(status=0, errors=["no such model"])
        answer = mmesh.ModelStatusInfo(status=3)
        answer.modelCopyInfos.add(location="i1", copyStatus=3, time=1_700_000_000_000)
        return answer

    def infer(self, request: Any) -> Any:
        answer = oip.ModelInferResponse(model_name=request.model_name, id=request.id)
        wanted = {output.name for output in request.outputs}
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            if wanted and tensor.name not in wanted:
                continue
            answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            answer.raw_output_contents.append(raw)
        return answer

    def metadata(self, request: Any) -> Any:
        answer = oip.ModelMetadataResponse(name=request.name, platform="xgboost")
        answer.inputs.add(name="input-0", datatype="FP32", shape=[-1, 4])
        return answer


def _handler(mesh: FakeMesh) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Without it every answer waits for the client's delayed ACK.
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            mesh.calls.append(f"{parts.path} {self.client_address[1]}")
            if parts.path == "/v2/health/ready":
                self.answer(200, b"")
            elif parts.path == "/v2/models":
                query = parse_qs(parts.query)
                names = sorted(n for n in mesh.models if n > query.get("after", [""])[0])[:2]
                is_more = bool(names) and names[-1] < max(mesh.models)
                listing = {"models": [{"name": n} for n in names], "next": names[-1] if is_more else ""}
                self.answer(200, json.dumps(listing).encode())
            else:
                name = unquote(parts.path.split("/")[3])
                self.answer(200, json.dumps({"name": name, "platform": "sklearn"}).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            mesh.calls.append(f"{self.path} {self.client_address[1]}")
            if mesh.faults:
                code, message, headers = mesh.faults.pop(0)
                if message == "hang up":
                    self.close_connection = True
                    return
                status = {grpc.StatusCode.UNAVAILABLE: 503, grpc.StatusCode.NOT_FOUND: 404}.get(code, 400)
                self.answer(status, json.dumps({"error": message}).encode(), headers)
                return
            length = int(self.headers["inference-header-content-length"])
            asked = json.loads(body[:length])
            # The server's own codec must read what the client writes.
            server_codec.decode_rest("m", body, self.headers["inference-header-content-length"].encode())
            header = json.dumps({"id": asked["id"], "outputs": asked["inputs"]}).encode()
            headers = {"Inference-Header-Content-Length": str(len(header))}
            if unquote(self.path.split("/")[3]) == "cold":
                headers["X-Raymesh-Cold"] = "1"
            self.answer(200, header + body[length:], headers)

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


@pytest.fixture
def mesh() -> Iterator[FakeMesh]:
    with FakeMesh() as mesh:
        yield mesh


class Both:
    """One interface over both clients, so that every test below runs against each."""

    def __init__(self, kind: str, target: str, **options: Any) -> None:
        self.kind, self.target, self.options = kind, target, options

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self.kind == "sync":
            with Client(self.target, **self.options) as client:
                return getattr(client, method)(*args, **kwargs)

        async def call() -> Any:
            async with AsyncClient(self.target, **self.options) as client:
                return await getattr(client, method)(*args, **kwargs)

        return asyncio.run(call())


KINDS = pytest.mark.parametrize("kind", ["sync", "async"])
PROTOCOLS = pytest.mark.parametrize("protocol", ["grpc", "rest"])

TENSORS = {
    "bool": np.array([[True, False]]),
    "fp16": np.array([1.5, -2.0], np.float16),
    "bf16": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "fp32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fp64_f_order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "int64_big_endian": np.array([1, -2, 2**40], ">i8"),
    "uint64": np.array([2**64 - 1], np.uint64),
    "empty": np.empty((0, 4), np.float32),
    "scalar": np.array(7, np.int32),
    "bytes": np.array([[b"a", b""], [b"\xff\x00", "\u00fc".encode()]], dtype=object),
    "text": np.array(["x", "yz"]),
}


@KINDS
def test_management_round_trip(mesh: FakeMesh, kind: str) -> None:
    call = Both(kind, mesh.target("grpc"))
    assert call("register", "m", "file:///m.json", "xgboost", key='{"a":1}') == ModelStatus("NOT_LOADED")
    assert mesh.models["m"] == ("xgboost", "file:///m.json", '{"a":1}')
    assert call("register", "m", "file:///m.json", "xgboost", load=True).status == "LOADED"
    assert call("status", "m") == ModelStatus("LOADED", (), (CopyInfo("i1", "LOADED", 1_700_000_000_000),))
    assert call("ensure_loaded", "m").status == "LOADED"
    call("unregister", "m")
    assert call("status", "m") == ModelStatus("NOT_FOUND", ("no such model",))


@KINDS
@PROTOCOLS
def test_every_dtype_travels_both_ways(mesh: FakeMesh, kind: str, protocol: str) -> None:
    prediction = Both(kind, mesh.target(protocol), protocol=protocol)("predict", "m", TENSORS)
    assert list(prediction.outputs) == list(TENSORS)
    for name, sent in TENSORS.items():
        got = prediction.outputs[name]
        assert got.shape == sent.shape, name
        expected = np.array([v.encode() for v in sent], dtype=object) if sent.dtype.kind == "U" else sent
        assert got.dtype == expected.dtype.newbyteorder("="), name
        assert got.tolist() == expected.tolist(), name
    assert not prediction.cold
    assert prediction.id
    prediction.outputs["fp32"][0, 0] = 5.0  # the caller's own memory


@KINDS
@PROTOCOLS
def test_one_array_is_the_single_input_and_cold_is_told(mesh: FakeMesh, kind: str, protocol: str) -> None:
    prediction = Both(kind, mesh.target(protocol), protocol=protocol)("predict", "cold", [[1.0, 2.0]])
    assert prediction.outputs["input-0"].tolist() == [[1.0, 2.0]]
    assert prediction.cold


@KINDS
@PROTOCOLS
def test_metadata_and_ready(mesh: FakeMesh, kind: str, protocol: str) -> None:
    call = Both(kind, mesh.target(protocol), protocol=protocol)
    assert call("metadata", "a/b")["name"] == "a/b"
    assert call("ready") is True


@KINDS
@PROTOCOLS
def test_nobody_there_is_unavailable_and_not_ready(kind: str, protocol: str) -> None:
    with socket.socket() as reserved:  # bound but not listening: connections are refused
        reserved.bind(("127.0.0.1", 0))
        call = Both(kind, f"127.0.0.1:{reserved.getsockname()[1]}", protocol=protocol, timeout_s=5, retries=0)
        assert call("ready") is False
        with pytest.raises(MeshError) as caught:
            call("predict", "m", np.zeros(1))
    assert caught.value.code is Code.UNAVAILABLE


@KINDS
def test_list_follows_the_pages(mesh: FakeMesh, kind: str) -> None:
    mesh.models = dict.fromkeys("abcde", ("t", "p", ""))
    assert [m["name"] for m in Both(kind, mesh.target("rest"), protocol="rest")("list")] == list("abcde")


@KINDS
@PROTOCOLS
def test_errors_carry_code_reason_and_hint(mesh: FakeMesh, kind: str, protocol: str) -> None:
    metadata = {"x-raymesh-reason": Reason.NOT_REGISTERED, "retry-after": "3"}
    mesh.faults.append((grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'm' is not found", metadata))
    with pytest.raises(MeshError, match="unknown model") as caught:
        Both(kind, mesh.target(protocol), protocol=protocol)("predict", "m", np.zeros(1))
    error = caught.value
    assert (error.code, error.reason, error.retry_after_s) == (Code.NOT_FOUND, Reason.NOT_REGISTERED, 3.0)


@KINDS
@PROTOCOLS
def test_unavailable_is_tried_again_as_often_as_asked(mesh: FakeMesh, kind: str, protocol: str) -> None:
    fault = (grpc.StatusCode.UNAVAILABLE, "draining", {})
    call = Both(kind, mesh.target(protocol), protocol=protocol, retries=2)
    mesh.faults = [fault] * 2
    assert call("predict", "m", np.zeros(1)).outputs["input-0"].tolist() == [0.0]
    mesh.faults = [fault] * 3
    with pytest.raises(MeshError, match="draining"):
        call("predict", "m", np.zeros(1))
    assert mesh.faults == []


@KINDS
def test_a_deadline_holds(mesh: FakeMesh, kind: str) -> None:
    mesh.hang_s = 20
    with pytest.raises(MeshError) as caught:
        Both(kind, mesh.target("grpc"))("predict", "m", np.zeros(1), timeout_s=0.2)
    assert caught.value.code is Code.DEADLINE_EXCEEDED


@KINDS
@PROTOCOLS
@pytest.mark.parametrize(
    ("inputs", "message"),
    [({}, "no inputs"), (np.array([1j]), "complex"), ([[1.0], [1.0, 2.0]], "inhomogeneous"), ([object()], "object")],
)
def test_inputs_that_cannot_be_sent(kind: str, protocol: str, inputs: Any, message: str) -> None:
    with pytest.raises(MeshError, match=message) as caught:
        Both(kind, "127.0.0.1:1", protocol=protocol)("predict", "m", inputs)
    assert (caught.value.code, caught.value.reason) == (Code.INVALID_ARGUMENT, Reason.BAD_INPUT)


def test_rest_keeps_its_connection_and_replaces_one_the_mesh_closed(mesh: FakeMesh) -> None:
    with Client(mesh.target("rest"), protocol="rest", retries=0) as client:
        client.predict("m", np.zeros(1))
        client.predict("m", np.zeros(1))
        assert len(set(mesh.calls)) == 1  # path and the client's port
        mesh.faults.append((grpc.StatusCode.UNAVAILABLE, "hang up", {}))
        client.predict("m", np.zeros(1))
        assert len(set(mesh.calls)) == 2


def test_one_client_serves_many_threads(mesh: FakeMesh) -> None:
    wrong: list[Any] = []
    with Client(mesh.target("rest"), protocol="rest") as rest, Client(mesh.target("grpc")) as rpc:

        def ask(number: int) -> None:
            for client in (rest, rpc):
                got = client.predict("m", np.full(3, number)).outputs["input-0"].tolist()
                if got != [number] * 3:
                    wrong.append(got)

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@KINDS
@pytest.mark.parametrize(("has_bulk", "options"), [(False, {}), (True, {"batch": 1})])
def test_register_many_one_call_each_reports_each_failure_and_retries_what_may_succeed(
    mesh: FakeMesh, kind: str, has_bulk: bool, options: dict[str, int]
) -> None:
    mesh.has_bulk = has_bulk
    mesh.faults = [
        (grpc.StatusCode.UNAVAILABLE, "registry away", {}),
        (grpc.StatusCode.ALREADY_EXISTS, "another model has this name", {}),
    ]
    specs = (ModelSpec(f"m{n}", f"file:///m{n}", "xgboost") for n in range(50))
    seen: list[int] = []
    summary = Both(kind, mesh.target("grpc"))("register_many", specs, concurrency=4, progress=seen.append, **options)
    assert summary.registered == 49 == len(mesh.models)
    assert [message for _, message in summary.failed] == ["another model has this name"]
    assert {name for name, _ in summary.failed} | mesh.models.keys() == {f"m{n}" for n in range(50)}
    assert seen == list(range(1, 51))
    assert mesh.calls.count("registerModel") == 51
    assert mesh.calls.count("RegisterModels") <= (0 if has_bulk else 1)


@KINDS
def test_register_many_in_bulk_reports_each_failure_and_retries_what_may_succeed(mesh: FakeMesh, kind: str) -> None:
    mesh.faults = [(grpc.StatusCode.UNAVAILABLE, "the gateway is away", {})]
    mesh.refusals = {
        "m3": [(Code.ALREADY_EXISTS, "another model has this name")],
        # Once is retried, twice is not.
        "m15": [(Code.UNAVAILABLE, "registry away")],
        "m16": [(Code.UNAVAILABLE, "registry away")] * 2,
        "m48": [(Code.INVALID_ARGUMENT, "type: must not be empty")],
    }
    specs = (ModelSpec(f"m{n}", f"file:///m{n}", "xgboost", "{}") for n in range(50))
    seen: list[int] = []
    # One at a time, so that the call that fails is the first.
    summary = Both(kind, mesh.target("grpc"))("register_many", specs, batch=10, concurrency=1, progress=seen.append)
    assert summary.registered == 47 == len(mesh.models)
    assert summary.failed == [
        ("m3", "another model has this name"), ("m16", "registry away"), ("m48", "type: must not be empty"),
    ]  # fmt: skip
    assert mesh.models["m7"] == ("xgboost", "file:///m7", "{}")
    # Round 1: m0-m9 fail together, m15 and m16 alone. Round 2: those twelve, ten and two.
    assert seen == [8, 18, 28, 38, 48, 50]
    assert mesh.calls == ["RegisterModels"] * 7


@KINDS
def test_register_many_sends_large_models_in_smaller_batches(mesh: FakeMesh, kind: str) -> None:
    specs = [ModelSpec(f"m{n}", "file:///m", "xgboost", "x" * 200_000) for n in range(5)]
    assert Both(kind, mesh.target("grpc"))("register_many", specs).registered == 5
    assert mesh.calls == ["RegisterModels"] * 3


@KINDS
def test_register_many_does_not_believe_an_answer_about_other_models(mesh: FakeMesh, kind: str) -> None:
    mesh.is_forgetful = True
    summary = Both(kind, mesh.target("grpc"))("register_many", [ModelSpec("a", "b", "c")])
    assert summary.registered == 0
    assert summary.failed == [("a", "the answer is about other models than the request")]


@KINDS
def test_register_many_of_nothing_and_with_a_senseless_concurrency(mesh: FakeMesh, kind: str) -> None:
    call = Both(kind, mesh.target("grpc"))
    assert call("register_many", []).registered == 0
    with pytest.raises(ValueError, match="concurrency"):
        call("register_many", [ModelSpec("a", "b", "c")], concurrency=0)
    with pytest.raises(ValueError, match="batch"):
        call("register_many", [ModelSpec("a", "b", "c")], batch=0)


@pytest.mark.parametrize(
    "arguments", [{"target": "host"}, {"target": ":80"}, {"protocol": "http"}, {"timeout_s": 0}, {"target": "a:b"}]
)
def test_arguments_that_cannot_be_meant(arguments: dict[str, Any]) -> None:
    for make in (Client, AsyncClient):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            make(**arguments)


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b'{"outputs": 3}', b'{"outputs":[{"name":"a"}]}'])
def test_an_answer_that_is_no_answer(body: bytes) -> None:
    with pytest.raises(client_tensors.TensorError):
        client_tensors.rest_answer(body, None)


def test_typed_contents_are_read_too() -> None:
    answer = oip.ModelInferResponse()
    fields = {"INT8": "int_contents", "UINT64": "uint64_contents", "FP32": "fp32_contents", "BOOL": "bool_contents"}
    for datatype, field in fields.items():
        tensor = answer.outputs.add(name=datatype, datatype=datatype, shape=[2])
        getattr(tensor.contents, field).extend([1, 0])
    answer.outputs.add(name="BYTES", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"\xff")
    outputs = client_tensors.rpc_answer(answer)
    assert {name: array.tolist() for name, array in outputs.items()} == {
        "INT8": [1, 0], "UINT64": [1, 0], "FP32": [1.0, 0.0], "BOOL": [True, False], "BYTES": [b"\xff"],
    }  # fmt: skip


_DTYPES = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(),
    npst.unsigned_integer_dtypes(),
    npst.floating_dtypes(sizes=(16, 32, 64)),
)


@settings(max_examples=150, deadline=None)
@given(array=npst.arrays(_DTYPES, npst.array_shapes(min_dims=0, min_side=0, max_dims=4)))
def test_any_array_survives_the_wire(array: Any) -> None:
    datatype = client_tensors.datatype_of(array)
    got = client_tensors.decode("x", datatype, array.shape, client_tensors.encode(array))
    np.testing.assert_array_equal(got, array)
    assert got.dtype == array.dtype.newbyteorder("=")


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.binary(max_size=300)))
def test_any_bytes_survive_the_wire_and_match_tritonclient(values: list[bytes]) -> None:
    import tritonclient.utils

    array = np.empty(len(values), dtype=object)
    array[:] = values
    raw = client_tensors.encode(array)
    assert client_tensors.decode("x", "BYTES", (len(values),), raw).tolist() == values
    reference = tritonclient.utils.serialize_byte_tensor(array)
    assert raw == (reference.item() if reference.size else b"")


def test_importing_the_client_leaves_the_default_pool_alone() -> None:
    code = (
        "import raymesh.mesh.client\n"
        "from google.protobuf import descriptor_pool\n"
        "try: descriptor_pool.Default().FindMessageTypeByName('inference.ModelInferRequest')\n"
        "except KeyError: pass\n"
        "else: raise SystemExit('registered')\n"
        "import tritonclient.grpc\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_hundred_concurrent_async_predictions(mesh: FakeMesh) -> None:
    async def run() -> list[Any]:
        async with AsyncClient(mesh.target("grpc")) as rpc, AsyncClient(mesh.target("rest"), protocol="rest") as rest:
            clients = itertools.cycle((rpc, rest))
            return await asyncio.gather(*(next(clients).predict("m", np.array([n])) for n in range(100)))

    assert [p.outputs["input-0"].tolist() for p in asyncio.run(run())] == [[n] for n in range(100)]
