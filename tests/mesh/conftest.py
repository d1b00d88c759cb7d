"""A mesh in one event loop: real gateway and controllers, fake runtimes, a store in memory, a door that takes notes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest

from raymesh.mesh.config import Settings
from raymesh.mesh.controller import Controller
from raymesh.mesh.gateway import Gateway
from raymesh.registry.keys import Keys
from raymesh.registry.memory import MemoryStore
from raymesh.registry.protos import Messages
from raymesh.registry.records import CopyRecord, CopyState, InstanceRecord
from raymesh.registry.session import Session
from raymesh.registry.store import Compare
from raymesh.runtimes import grpc_http1
from raymesh.runtimes.errors import Code, LoadFailed, Reason, RequestError, Unavailable
from raymesh.runtimes.http1 import HttpServer, Request
from raymesh.runtimes.statistics import Statistics
from raymesh.runtimes.upstream import RawAnswer, Upstreams

MMESH = Messages("raymesh.mesh", "mmesh")
RAYMESH = Messages("raymesh.mesh", "raymesh")
OIP = Messages("raymesh.runtimes", "oip")
TOKEN = "secret"


async def until(condition: Callable[[], Any], deadline_s: float = 5.0) -> None:
    """Return as soon as `condition()` is true; fail after `deadline_s`."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        await asyncio.sleep(0.002)


class FakeRuntime:
    """Keeps the control contract of a runtime, and "infers" by saying who it is. Its copies are only names."""

    def __init__(self, store: MemoryStore, instance: str, *, types: tuple[str, ...] = ()) -> None:
        self.id = instance
        self.types = types
        self.keys = Keys()
        self.session = Session(store, ttl_s=2)
        self.server = HttpServer(self._handle, body_bytes_max=1 << 20)
        #: By model name: the generation loaded.
        self.copies: dict[str, int] = {}
        self.loads: list[str] = []
        self.unloads: list[str] = []
        #: Every inference request, as (model name, headers).
        self.requests: list[tuple[str, dict[bytes, bytes]]] = []
        #: Models that fail to load here, with the message.
        self.broken: dict[str, str] = {}
        #: Loads wait for it when it is set.
        self.gate: asyncio.Event | None = None
        #: Every inference is refused for this reason.
        self.refusal = ""
        #: Inference connections are cut without an answer.
        self.is_mute = False
        self.size_bytes = 1000
        self.draining = False
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    async def start(self) -> None:
        await self.server.start("127.0.0.1")
        await self.session.start()
        await self.publish()

    async def publish(self) -> None:
        record = InstanceRecord(
            id=self.id,
            address=self.address,
            pool="cpu",
            epoch=self.session.epoch,
            capacity_bytes=1 << 30,
            load_slots=4,
            types=self.types,
            draining=self.draining,
        )
        await self.session.publish(self.keys.instance(self.id), record.encode())

    async def close(self) -> None:
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.session.close()
        await self.server.close()

    async def kill(self) -> None:
        """Vanish without telling the registry: the lease stays until it expires."""
        await self.server.close()

    def evict(self, name: str) -> None:
        """Drop a copy without the registry knowing (its record lags)."""
        self.copies.pop(name, None)

    def _handle(self, request: Request) -> None:
        assert request.headers.get(b"x-raymesh-token") == TOKEN.encode()
        path = request.path
        if path == "/control/load":
            self._spawn(self._load(request, orjson.loads(request.body)))
        elif path == "/control/unload":
            body = orjson.loads(request.body)
            self._spawn(self._unload(request, f"{body['tenant']}/{body['id']}"))
        elif path.startswith("/control/metadata/"):
            if path.removeprefix("/control/metadata/") not in self.copies:
                raise RequestError(Code.NOT_FOUND, "not here", reason=Reason.NOT_LOADED)
            tensor = {"name": "input-0", "datatype": "FP32", "shape": [-1, 4]}
            described = {"name": path.split("/")[-1], "platform": "fake", "inputs": [tensor], "outputs": []}
            request.respond_json({**described, "max_batch_size": 8})
        elif path.startswith("/control/statistics/"):
            asked = path.removeprefix("/control/statistics/")
            held = [name for name in self.copies if name == asked or (asked.endswith("/") and name.startswith(asked))]
            counted = Statistics()
            counted.add_batch(requests=2, failed=0, rows=2, waited_ns=2, input_ns=1, infer_ns=1, output_ns=1)
            request.respond_json({name: {**counted.as_json(), "bytes": self.size_bytes} for name in held})
        else:
            self._infer(request)

    async def _load(self, request: Request, body: dict[str, Any]) -> None:
        name = f"{body['tenant']}/{body['id']}"
        self.loads.append(name)
        if self.gate is not None:
            await self.gate.wait()
        if name in self.broken:
            request.respond_error(LoadFailed(self.broken[name]))
            return
        generation = body["generation"]
        record = CopyRecord(state=CopyState.LOADED, generation=generation, size_bytes=self.size_bytes)
        compare = Compare(self.keys.model(body["tenant"], body["id"]), create_revision=generation)
        key = self.keys.copy(body["tenant"], body["id"], self.id)
        if not await self.session.publish(key, record.encode(), compare=compare):
            request.respond_error(RequestError(Code.NOT_FOUND, "unregistered", reason=Reason.NOT_REGISTERED))
            return
        self.copies[name] = generation
        answer = {"instance": self.id, "epoch": 1, "generation": generation, "size_bytes": self.size_bytes}
        request.respond_json({**answer, "load_ms": 1, "evicted": []})

    async def _unload(self, request: Request, name: str) -> None:
        self.unloads.append(name)
        was_here = self.copies.pop(name, None) is not None
        self.session.unpublish(self.keys.copies + f"{name}/{self.id}")
        request.respond_json({"unloaded": was_here})

    def _infer(self, request: Request) -> None:
        name = request.headers[b"x-raymesh-model"].decode()
        self.requests.append((name, dict(request.headers)))
        if self.is_mute:
            request._connection.close()
            return
        is_grpc = request.target == grpc_http1.INFER_TARGET
        if self.refusal or name not in self.copies:
            error = Unavailable("not here", reason=self.refusal or Reason.NOT_LOADED)
            if is_grpc:
                request.respond_raw(grpc_http1.error_answer(error))
            else:
                request.respond_error(error)
        elif is_grpc:
            message = OIP.ModelInferResponse(model_name=name, id=self.id)
            request.respond_raw(grpc_http1.answer(message.SerializeToString()))
        else:
            request.respond_json({"model_name": name, "id": self.id, "body": request.body.decode()})

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class RecordingDoor:
    """The front door's methods, without HAProxy."""

    def __init__(self) -> None:
        self.gateway: tuple[str | None, ...] = ()
        self.instances: dict[str, str] = {}
        self.routes: dict[str, tuple[str, ...]] = {}
        #: The models that the routes of vmodels lead to; "" for those of models.
        self.models: dict[str, str] = {}
        self.is_open = False
        self.resyncs = 0
        self.changes = 0

    async def start(self) -> None:
        self.is_open = True

    async def close(self) -> None:
        self.is_open = False

    def set_gateway(self, data_addr: str | None, grpc_addr: str | None, rest_addr: str | None) -> None:
        self.gateway = (data_addr, grpc_addr, rest_addr)

    def set_instance(self, instance_id: str, address: str) -> None:
        self.instances[instance_id] = address

    def remove_instance(self, instance_id: str) -> None:
        self.instances.pop(instance_id, None)

    def set_route(self, name: str, instance_ids: Iterable[str], model: str = "") -> None:
        self.changes += 1
        self.routes[name] = tuple(instance_ids)
        self.models[name] = model

    def del_route(self, name: str) -> None:
        self.changes += 1
        self.routes.pop(name, None)
        self.models.pop(name, None)

    async def flushed(self) -> None:
        pass

    def resync(
        self, instances: Mapping[str, str], routes: Mapping[str, Iterable[str]], models: Mapping[str, str]
    ) -> None:
        self.resyncs += 1
        self.models = dict(models)
        self.instances = dict(instances)
        self.routes = {name: tuple(held) for name, held in routes.items()}


class Mesh:
    """`async with Mesh(runtimes=2) as mesh`: everything started, everything ended at the end."""

    def __init__(
        self, *, runtimes: int = 1, controllers: int = 1, types: tuple[str, ...] = (), **settings: Any
    ) -> None:
        values = {"internal_token": TOKEN, "lease_ttl_s": 2, "request_timeout_s": 10.0, "state_dir": Path("unused")}
        self.settings = Settings(**{**values, **settings})
        self.store = MemoryStore()
        self.keys = Keys()
        self.runtimes = [FakeRuntime(self.store, f"r{n}", types=types) for n in range(runtimes)]
        self.controllers = [Controller(self.settings, self.store) for _ in range(controllers)]
        self.door = RecordingDoor()
        self.gateway = Gateway(self.settings, self.store, door=self.door)
        self.upstreams = Upstreams(TOKEN)
        self.channel: grpc.aio.Channel

    async def __aenter__(self) -> Mesh:
        for part in (*self.runtimes, *self.controllers, self.gateway):
            await part.start()
        self.channel = grpc.aio.insecure_channel(self.gateway.grpc_address)
        await until(lambda: not self.controllers or self.gateway.view.leader is not None)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.store.is_down = False
        for runtime in self.runtimes:
            if runtime.gate is not None:
                runtime.gate.set()
        await self.channel.close()
        await self.upstreams.close()
        for part in (self.gateway, *self.controllers, *self.runtimes):
            await part.close()
        await self.store.close()

    @property
    def leader(self) -> Controller:
        return next(controller for controller in self.controllers if controller.is_leader)

    @property
    def loads(self) -> list[str]:
        return [name for runtime in self.runtimes for name in runtime.loads]

    # -- management --

    async def call(self, method: str, request: Any, answer_class: Any, timeout_s: float = 10.0) -> Any:
        rpc = self.channel.unary_unary(
            method, request_serializer=type(request).SerializeToString, response_deserializer=answer_class.FromString
        )
        return await rpc(request, timeout=timeout_s, metadata=(("x-raymesh-token", TOKEN),))

    async def register(self, model: str, *, type: str = "fake", path: str = "file:///m", **flags: Any) -> Any:
        request = MMESH.RegisterModelRequest(modelId=model, **flags)
        request.modelInfo.type, request.modelInfo.path = type, path
        return await self.call("/mmesh.ModelMesh/registerModel", request, MMESH.ModelStatusInfo)

    async def register_models(self, *specs: Mapping[str, Any]) -> list[Any]:
        """The results of `RegisterModels`; type and path are those of `register` unless given."""
        request = RAYMESH.RegisterModelsRequest()
        for spec in specs:
            request.models.add(**{"type": "fake", "path": "file:///m", **spec})
        method = "/raymesh.v1.Mesh/RegisterModels"
        return list((await self.call(method, request, RAYMESH.RegisterModelsResponse)).results)

    async def unregister(self, model: str) -> None:
        request = MMESH.UnregisterModelRequest(modelId=model)
        await self.call("/mmesh.ModelMesh/unregisterModel", request, MMESH.UnregisterModelResponse)

    async def status(self, model: str) -> Any:
        request = MMESH.GetStatusRequest(modelId=model)
        return await self.call("/mmesh.ModelMesh/getModelStatus", request, MMESH.ModelStatusInfo)

    async def ensure_loaded(self, model: str, *, sync: bool = True, timeout_s: float = 10.0) -> Any:
        request = MMESH.EnsureLoadedRequest(modelId=model, sync=sync)
        return await self.call("/mmesh.ModelMesh/ensureLoaded", request, MMESH.ModelStatusInfo, timeout_s)

    async def oip(self, method: str, **fields: Any) -> Any:
        request = getattr(OIP, f"{method}Request")(**fields)
        path = f"/inference.GRPCInferenceService/{method}"
        return await self.call(path, request, getattr(OIP, f"{method}Response"))

    async def code_of(self, awaitable: Any) -> tuple[grpc.StatusCode, str]:
        """The status and the message of a call that must fail."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await awaitable
        return caught.value.code(), caught.value.details() or ""

    # -- inference, as the front door sends it --

    async def infer_rest(self, model: str, body: bytes = b"{}", **headers: str) -> RawAnswer:
        lines = {"x-raymesh-model": f"default/{model}", **{k.replace("_", "-"): v for k, v in headers.items()}}
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value).encode()
        target = f"/v2/models/{model}/infer".encode()
        return await self.upstreams.send(self.gateway.data_address, b"POST", target, headers=text, body=body)

    async def infer_grpc(self, model: str, **headers: str) -> RawAnswer:
        message = OIP.ModelInferRequest(model_name=model).SerializeToString()
        lines = {"content-type": "application/grpc", **{k.replace("_", "-"): v for k, v in headers.items()}}
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode()
        body = b"\0" + len(message).to_bytes(4, "big") + message
        address = self.gateway.data_address
        return await self.upstreams.send(address, b"POST", grpc_http1.INFER_TARGET, headers=text, body=body)

    async def rest(self, path: str, *, method: bytes = b"GET", body: bytes = b"") -> tuple[int, Any]:
        answer = await self.upstreams.send(self.gateway.rest_address, method, path.encode(), body=body)
        with contextlib.suppress(orjson.JSONDecodeError):
            return answer.status, orjson.loads(answer.rest)
        return answer.status, answer.rest


@pytest.fixture
def shell_mesh() -> type[Mesh]:
    return Mesh


@pytest.fixture
def poll() -> Callable[..., Any]:
    return until
