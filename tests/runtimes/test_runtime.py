"""One runtime without Ray: its port, its copies, its presence in the registry, from the outside."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import tritonclient.http
import uvloop

from raymesh.placement.cache import InstanceCache
from raymesh.registry.keys import Keys
from raymesh.registry.memory import MemoryStore
from raymesh.registry.records import GatewayRecord, InstanceRecord, ModelRecord
from raymesh.registry.store import Delete, Put, RegistryUnavailable
from raymesh.runtimes import grpc_http1, loading, oip, runtime
from raymesh.runtimes.errors import Code, InvalidInput, LoadFailed, Reason, RequestError
from raymesh.runtimes.frameworks.base import Array, LoadOptions, TensorSpec
from raymesh.runtimes.http1 import HttpServer, Request
from raymesh.runtimes.runtime import Runtime, RuntimeOptions
from raymesh.runtimes.upstream import RawAnswer, Upstreams

KEYS = Keys("test")
TOKEN = "secret"
GRPC = "/inference.GRPCInferenceService/ModelInfer"


async def until(condition: Callable[[], Any], deadline_s: float = 10.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        await asyncio.sleep(0.001)


class Scaler:
    """A model that multiplies by the number in its file."""

    inputs = (TensorSpec("x", "FP32", (-1, 2)),)
    outputs = (TensorSpec("y", "FP32", (-1, 2)),)
    platform = "scaler"
    is_batchable = True

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def predict(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        (x,) = inputs.values()
        if x.shape[1:] != (2,):
            raise InvalidInput("input 'x' must have two columns")
        return {"y": (x * self.factor).astype(np.float32)}

    def close(self) -> None:
        self.factor = float("nan")


class Framework:
    type = "scaler"

    def load(self, path: Path, options: LoadOptions) -> Scaler:
        try:
            return Scaler(float(path.read_text()))
        except ValueError:
            raise LoadFailed("not a number") from None


def framework_for(type: str) -> Framework:
    return Framework()


class Rig:
    def __init__(self, store: MemoryStore, runtime: Runtime, folder: Path) -> None:
        self.store, self.runtime, self.folder = store, runtime, folder
        self.upstreams = Upstreams(TOKEN)

    async def register(self, id: str, content: str = "2") -> int:
        path = self.folder / f"{id}.scaler"
        path.write_text(content)
        record = ModelRecord(tenant="t", id=id, type="scaler", path=str(path))
        await self.store.txn([], [Put(KEYS.model("t", id), record.encode())])
        kv = await self.store.get(KEYS.model("t", id))
        assert kv is not None
        return kv.create_revision

    async def control(self, path: str, body: Any = None) -> dict[str, Any]:
        method = "GET" if body is None else "POST"
        return await self.upstreams.call(self.runtime.address, method, path, body, timeout_s=5)

    async def load(self, id: str, generation: int) -> dict[str, Any]:
        path = str(self.folder / f"{id}.scaler")
        body = {"tenant": "t", "id": id, "type": "scaler", "path": path, "key": "", "generation": generation}
        return await self.control("/control/load", {**body, "size_hint": 0, "cause_id": "c"})

    async def registered_and_loaded(self, id: str) -> None:
        await self.load(id, await self.register(id))

    async def send(self, model: str, target: str, body: bytes, **headers: str) -> RawAnswer:
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        return await self.upstreams.send(
            self.runtime.address,
            b"POST",
            target.encode(),
            headers=f"x-raymesh-model: t/{model}\r\n{lines}".encode(),
            body=body,
        )

    async def rest(self, model: str, value: Any, **headers: str) -> RawAnswer:
        body = value if isinstance(value, bytes) else orjson.dumps(value)
        return await self.send(model, f"/v2/models/{model}/infer", body, **headers)

    async def grpc(self, model: str, message: Any, **headers: str) -> RawAnswer:
        return await self.send(model, GRPC, framed(message.SerializeToString()), **headers)

    async def gateway(self, address: str, id: str = "g") -> None:
        record = GatewayRecord(id=id, data_address=address)
        await self.store.txn([], [Put(KEYS.gateway(id), record.encode())])
        await until(lambda: self.runtime._gateway() == address)


def framed(message: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + len(message).to_bytes(4, "big") + message


def question(rows: int = 1) -> dict[str, Any]:
    return {"id": "7", "inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, 2], "data": [1.0, 2.0] * rows}]}


def grpc_question(width: int = 2) -> Any:
    message = oip.MESSAGES.ModelInferRequest(model_name="m", id="7")
    message.inputs.add(name="x", datatype="FP32", shape=[1, width])
    message.raw_input_contents.append(np.arange(1, width + 1, dtype=np.float32).tobytes())
    return message


def data_of(answer: RawAnswer) -> list[float]:
    assert answer.status == 200, answer.rest
    data: list[float] = orjson.loads(answer.rest)["outputs"][0]["data"]
    return data


def options_in(folder: Path, **more: Any) -> RuntimeOptions:
    return RuntimeOptions(
        instance="r1",
        mesh="test",
        pool="cpu",
        token=TOKEN,
        disk_cache_dir=folder / "cache",
        message_bytes_max=100_000,
        **more,
    )


@contextlib.asynccontextmanager
async def rigged(folder: Path, **options: Any) -> AsyncIterator[Rig]:
    store = MemoryStore()
    runtime = Runtime(options_in(folder, **options), store, InstanceCache(100_000))
    await runtime.start()
    rig = Rig(store, runtime, folder)
    try:
        yield rig
    finally:
        await rig.upstreams.close()
        await runtime.close()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(loading, "framework_for", framework_for)

    def run(work: Callable[[Rig], Awaitable[None]], **options: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(20), rigged(tmp_path, **options) as rig:
                await work(rig)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(bounded())

    return run


Run = Callable[..., None]


async def fails(work: Awaitable[Any]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await work
    return caught.value


# -- presence --------------------------------------------------------------------------------------------------------


def test_a_runtime_appears_in_the_registry_and_leaves_it(tmp_path: Path) -> None:
    async def work() -> None:
        store = MemoryStore()
        runtime = Runtime(options_in(tmp_path, node="n1", load_slots=3), store, InstanceCache(1000))
        await runtime.start()
        await until(lambda: KEYS.instance("r1") in store._kvs)
        kv = await store.get(KEYS.instance("r1"))
        assert kv is not None
        record = InstanceRecord.decode(kv.value)
        assert (record.address, record.pool, record.node) == (runtime.address, "cpu", "n1")
        assert (record.capacity_bytes, record.load_slots, record.draining) == (1000, 3, False)
        assert record.epoch == kv.lease != 0
        await runtime.close()
        assert await store.get(KEYS.instance("r1")) is None
        with pytest.raises(OSError):
            await asyncio.open_connection(*runtime.address.split(":"))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(work(), 20))


def test_a_runtime_without_a_registry_does_not_start_and_leaves_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        store = MemoryStore()
        store.is_down = True
        runtime = Runtime(options_in(tmp_path), store, InstanceCache(1000))
        with pytest.raises(RegistryUnavailable):
            await runtime.start(0.05)
        with pytest.raises(OSError):
            await asyncio.open_connection(*runtime.address.split(":"))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(work(), 20))


def test_the_record_follows_what_the_runtime_holds(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "PUBLISH_PERIOD_S", 0.01)

    async def work(rig: Rig) -> None:
        await rig.registered_and_loaded("m")

        def copies() -> int:
            kv = rig.store._kvs.get(KEYS.instance("r1"))
            return InstanceRecord.decode(kv.value).copies if kv else -1

        await until(lambda: copies() == 1)
        await rig.control("/control/unload", {"tenant": "t", "id": "m"})
        await until(lambda: copies() == 0)

    run(work)


# -- control and inference -------------------------------------------------------------------------------------------


def test_a_model_is_loaded_asked_and_unloaded(run: Run) -> None:
    async def work(rig: Rig) -> None:
        generation = await rig.register("m")
        loaded = await rig.load("m", generation)
        assert (loaded["instance"], loaded["generation"], loaded["evicted"]) == ("r1", generation, [])
        assert loaded["size_bytes"] >= 4096 and loaded["load_ms"] >= 1
        assert await rig.load("m", generation) == loaded
        assert await rig.store.get(KEYS.copy("t", "m", "r1")) is not None

        assert await rig.control("/control/metadata/t/m") == {
            "name": "m",
            "platform": "scaler",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
            "max_batch_size": 256,
        }
        answer = orjson.loads((await rig.rest("m", question())).rest)
        assert answer == {
            "model_name": "m",
            "model_version": "1",
            "id": "7",
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [2.0, 4.0]}],
        }
        raw = await rig.grpc("m", grpc_question())
        message = oip.MESSAGES.ModelInferResponse.FromString(_grpc_message(raw))
        assert message.id == "7" and message.model_name == "m"
        assert np.frombuffer(message.raw_output_contents[0], np.float32).tolist() == [2.0, 4.0]

        status = await rig.control("/control/status")
        assert (status["instance"], status["pool"], status["copies"], status["loads"]) == ("r1", "cpu", 1, 1)
        assert (status["requests"], status["unloads"], status["evictions"]) == (2, 0, 0)
        assert status["used_bytes"] == loaded["size_bytes"] and status["capacity_bytes"] == 100_000
        assert status["epoch"] == loaded["epoch"] and status["rss_bytes"] > 0 and status["lru_age_ms"] >= 0

        assert await rig.control("/control/unload", {"tenant": "t", "id": "m"}) == {"unloaded": True}
        assert await rig.control("/control/unload", {"tenant": "t", "id": "m"}) == {"unloaded": False}
        assert await rig.store.get(KEYS.copy("t", "m", "r1")) is None
        assert (await fails(rig.control("/control/metadata/t/m"))).code is Code.NOT_FOUND
        # Requests are counted on when their copy is gone.
        status = await rig.control("/control/status")
        assert (status["requests"], status["unloads"], status["copies"]) == (2, 1, 0)

    run(work)


def _grpc_message(answer: RawAnswer) -> bytes:
    size, _, rest = answer.rest.partition(b"\r\n")
    assert rest.endswith(b"\r\n0\r\ngrpc-status: 0\r\n\r\n")
    return rest[5 : int(size, 16)]


def test_many_at_once_get_their_own_answers(run: Run) -> None:
    async def work(rig: Rig) -> None:
        await rig.registered_and_loaded("m")
        await rig.load("n", await rig.register("n", "3"))

        async def ask(n: int) -> None:
            model, factor = ("m", 2.0) if n % 2 else ("n", 3.0)
            if n % 3:
                value = question()
                value["inputs"][0]["data"] = [n, n]
                assert data_of(await rig.rest(model, value)) == [n * factor, n * factor]
            else:
                raw = await rig.grpc(model, grpc_question())
                message = oip.MESSAGES.ModelInferResponse.FromString(_grpc_message(raw))
                assert np.frombuffer(message.raw_output_contents[0], np.float32).tolist() == [factor, 2 * factor]

        await asyncio.gather(*(ask(n) for n in range(120)))

    run(work)


def test_tritons_http_client_is_served(run: Run) -> None:
    def ask(address: str, compression: str | None) -> None:
        with tritonclient.http.InferenceServerClient(address) as client:
            x = np.array([[1, 2], [3, 4]], dtype=np.float32)
            tensor = tritonclient.http.InferInput("x", [2, 2], "FP32")
            for binary in (True, False):
                headers = {"x-raymesh-token": TOKEN, "x-raymesh-model": "t/m"}
                tensor.set_data_from_numpy(x, binary_data=binary)
                output = tritonclient.http.InferRequestedOutput("y", binary_data=binary)
                result = client.infer(
                    "m", [tensor], outputs=[output], headers=headers, request_compression_algorithm=compression
                )
                np.testing.assert_array_equal(result.as_numpy("y"), x * 2)

    async def work(rig: Rig) -> None:
        await rig.registered_and_loaded("m")
        for compression in (None, "gzip", "deflate"):
            await asyncio.to_thread(ask, rig.runtime.address, compression)

    run(work)


def test_bad_requests_are_answered_in_their_protocol(run: Run) -> None:
    async def work(rig: Rig) -> None:
        await rig.registered_and_loaded("m")
        for value in (b"{", b"[]", {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}):
            answer = await rig.rest("m", value)
            assert answer.status == 400 and orjson.loads(answer.rest)["error"]
            assert answer.header(b"x-raymesh-reason") == b"BAD_INPUT"
        answer = await rig.rest("m", {**question(), "outputs": [{"name": "z"}]})
        assert "unexpected inference output 'z'" in orjson.loads(answer.rest)["error"]
        answer = await rig.rest("m", question(), content_encoding="br")
        assert answer.status == 415
        bomb = gzip.compress(bytes(1_000_000))
        assert (await rig.rest("m", bomb, content_encoding="gzip")).status == 413
        assert (await rig.send("m", "/v1/models/m:predict", b"{}")).status == 400
        assert (await rig.send("m", "/v1/models/m:nothing", b"{}")).status == 404

        async def status(body: bytes, **headers: str) -> int:
            answer = await rig.send("m", GRPC, body, **headers)
            assert answer.status == 200 and answer.rest == b"" and answer.header(b"grpc-message")
            return int(answer.header(b"grpc-status") or b"-1")

        good = grpc_question().SerializeToString()
        assert await status(b"junk") == Code.INVALID_ARGUMENT
        assert await status(framed(b"\xff\xff\xff")) == Code.INVALID_ARGUMENT
        assert await status(framed(good, 1)) == Code.UNIMPLEMENTED
        assert await status(framed(bomb, 1), grpc_encoding="gzip") == Code.RESOURCE_EXHAUSTED
        assert await status(framed(grpc_question(3).SerializeToString())) == Code.INVALID_ARGUMENT
        answer = await rig.send("m", GRPC, framed(gzip.compress(good), 1), grpc_encoding="gzip")
        assert _grpc_message(answer)
        answer = await rig.rest("m", b"x" * 400_000)
        assert answer.status == 413
        # After all of that, as before.
        assert data_of(await rig.rest("m", question())) == [2.0, 4.0]
        assert rig.runtime.loader.copies[b"t/m"].in_flight == 0

    run(work)


def test_only_who_shows_the_token_is_served(run: Run) -> None:
    async def work(rig: Rig) -> None:
        await rig.registered_and_loaded("m")
        for token in ("", "wrong", TOKEN + "x", TOKEN[:-1]):
            stranger = Upstreams(token)
            with pytest.raises(RequestError) as caught:
                await stranger.call(rig.runtime.address, "GET", "/control/status", timeout_s=5)
            assert (caught.value.code, caught.value.reason) == (Code.UNAUTHENTICATED, Reason.DENIED)
            answer = await stranger.send(
                rig.runtime.address,
                b"POST",
                b"/v2/models/m/infer",
                headers=b"x-raymesh-model: t/m\r\n",
                body=orjson.dumps(question()),
            )
            assert answer.status == 401
            await stranger.close()

    run(work)


def test_control_calls_that_make_no_sense(run: Run) -> None:
    async def work(rig: Rig) -> None:
        good = {"tenant": "t", "id": "m", "type": "scaler", "path": "/x", "generation": 1}
        for wrong in (
            [],
            {},
            {**good, "tenant": 5},
            {**good, "generation": "1"},
            {**good, "generation": True},
            {**good, "generation": -1},
            {**good, "size_hint": 1.5},
            {**good, "key": {}},
            {**good, "path": None},
        ):
            error = await fails(rig.control("/control/load", wrong))
            assert error.code is Code.INVALID_ARGUMENT, wrong
        error = await fails(rig.control("/control/unload", {"tenant": "t"}))
        assert error.code is Code.INVALID_ARGUMENT and "'id'" in error.message
        assert (await fails(rig.control("/control/nothing"))).code is Code.NOT_FOUND
        answer = await rig.upstreams.send(rig.runtime.address, b"POST", b"/control/load", body=b"{")
        assert answer.status == 400

    run(work)


def test_load_failures_reach_the_caller_as_they_are(run: Run) -> None:
    async def work(rig: Rig) -> None:
        generation = await rig.register("bad", "no number")
        error = await fails(rig.load("bad", generation))
        assert (error.code, error.reason, error.message) == (
            Code.FAILED_PRECONDITION,
            Reason.LOAD_FAILED,
            "not a number",
        )
        error = await fails(rig.load("missing", 1))
        assert error.reason == Reason.LOAD_FAILED
        await rig.store.txn([], [Delete(KEYS.model("t", "bad"))])
        (rig.folder / "bad.scaler").write_text("1")
        assert (await fails(rig.load("bad", generation))).reason == Reason.NOT_REGISTERED
        assert (await rig.control("/control/status"))["load_failures"] == 3

    run(work)


# -- stale routes, fencing -------------------------------------------------------------------------------------------


class Gateway:
    """Takes note of what is passed on to it."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.is_silent = False

    def __call__(self, request: Request) -> None:
        self.requests.append(request)
        if self.is_silent:
            return
        if request.target == GRPC.encode():
            request.respond_raw(grpc_http1.answer(b"from the gateway", b"x-raymesh-cold: 1\r\n"))
        else:
            request.respond(200, b"from the gateway", headers=b"x-raymesh-cold: 1\r\n")

    @contextlib.asynccontextmanager
    async def serving(self, rig: Rig) -> AsyncIterator[None]:
        server = HttpServer(self, body_bytes_max=1 << 20)
        await rig.gateway(f"127.0.0.1:{await server.start('127.0.0.1')}")
        try:
            yield
        finally:
            await server.close()


def test_a_request_for_a_model_that_is_not_here_goes_to_a_gateway(run: Run) -> None:
    async def work(rig: Rig) -> None:
        gateway = Gateway()
        async with gateway.serving(rig):
            answer = await rig.rest("m", question(), x_custom="kept", expect="100-continue")
            assert answer.rest == b"from the gateway" and answer.header(b"x-raymesh-cold") == b"1"
            answer = await rig.grpc("m", grpc_question(), grpc_timeout="5S", te="trailers")
            assert _grpc_message(answer) == b"from the gateway"
            rest, grpc = gateway.requests
            assert rest.body == orjson.dumps(question()) and rest.target == b"/v2/models/m/infer"
            assert rest.headers[b"x-raymesh-hops"] == grpc.headers[b"x-raymesh-hops"] == b"1"
            assert rest.headers[b"x-raymesh-model"] == b"t/m" and rest.headers[b"x-custom"] == b"kept"
            assert rest.headers[b"x-raymesh-token"] == TOKEN.encode() and b"expect" not in rest.headers
            assert grpc.headers[b"grpc-timeout"] == b"5S" and b"te" not in grpc.headers
            # One that a gateway has sent is not sent back.
            answer = await rig.rest("m", question(), x_raymesh_hops="1")
            assert answer.status == 503 and answer.header(b"x-raymesh-reason") == b"NOT_LOADED"
            answer = await rig.grpc("m", grpc_question(), x_raymesh_hops="2")
            assert answer.header(b"grpc-status") == b"14" and answer.header(b"x-raymesh-reason") == b"NOT_LOADED"
            assert len(gateway.requests) == 2
        answer = await rig.rest("m", question())
        assert answer.status == 503 and answer.header(b"x-raymesh-reason") == b"NO_INSTANCE"

    run(work)


def test_without_a_gateway_the_caller_may_try_again(run: Run) -> None:
    async def work(rig: Rig) -> None:
        answer = await rig.rest("m", question())
        assert answer.status == 503 and answer.header(b"retry-after") == b"1"
        assert answer.header(b"x-raymesh-reason") == b"NOT_LOADED"

    run(work)


def test_a_caller_who_leaves_takes_the_request_back(run: Run) -> None:
    async def work(rig: Rig) -> None:
        gateway = Gateway()
        gateway.is_silent = True
        async with gateway.serving(rig):
            task = asyncio.create_task(rig.rest("m", question()))
            await until(lambda: gateway.requests)
            assert not gateway.requests[0].has_left
            task.cancel()
            await until(lambda: gateway.requests[0].has_left)
            handler = rig.runtime._handler
            assert handler is not None
            await until(lambda: not handler._tasks)

    run(work)


def test_a_fenced_runtime_neither_answers_nor_loads(run: Run) -> None:
    async def work(rig: Rig) -> None:
        await rig.registered_and_loaded("m")
        rig.store.is_down = True
        rig.runtime._session._fence("a test")
        answer = await rig.rest("m", question(), x_raymesh_hops="1")
        assert answer.status == 503 and answer.header(b"x-raymesh-reason") == b"FENCED"
        assert (await fails(rig.load("m", 2))).reason == Reason.FENCED
        assert (await rig.control("/control/status"))["is_fenced"] is True
        rig.store.is_down = False
        gateway = Gateway()
        async with gateway.serving(rig):
            pass
        # A new lease, and all is as before, under a new epoch.
        await until(lambda: not rig.runtime._session.is_fenced)
        assert data_of(await rig.rest("m", question())) == [2.0, 4.0]
        await until(lambda: _lease(rig, KEYS.copy("t", "m", "r1")) == rig.runtime._session.epoch)
        await until(lambda: _lease(rig, KEYS.instance("r1")) == rig.runtime._session.epoch)

    run(work)


def _lease(rig: Rig, key: str) -> int:
    kv = rig.store._kvs.get(key)
    return kv.lease if kv else 0


def test_a_model_that_vanished_with_the_lease_is_dropped_and_others_stay(run: Run) -> None:
    async def work(rig: Rig) -> None:
        await rig.registered_and_loaded("kept")
        await rig.registered_and_loaded("gone")
        await rig.store.txn([], [Delete(KEYS.model("t", "gone"))])
        epoch = rig.runtime._session.epoch
        await rig.store.revoke(epoch)
        rig.runtime._session._fence("a test")
        await until(lambda: set(rig.runtime.loader.copies) == {b"t/kept"})
        await until(lambda: _lease(rig, KEYS.copy("t", "kept", "r1")) not in (0, epoch))
        assert (await rig.rest("gone", question())).header(b"x-raymesh-reason") == b"NOT_LOADED"
        assert data_of(await rig.rest("kept", question())) == [2.0, 4.0]

    run(work)


def test_warm_requests_go_on_without_the_registry(run: Run) -> None:
    async def work(rig: Rig) -> None:
        await rig.registered_and_loaded("m")
        rig.store.is_down = True
        assert data_of(await rig.rest("m", question())) == [2.0, 4.0]
        generation = 2  # of "n", had it been registered
        with contextlib.suppress(RequestError):
            (rig.folder / "n.scaler").write_text("3")
            await rig.load("n", generation)
        # Nobody can say whether it exists: it is served until somebody can.
        assert data_of(await rig.rest("n", question())) == [3.0, 6.0]
        rig.store.is_down = False
        await until(lambda: b"t/n" not in rig.runtime.loader.copies)
        assert data_of(await rig.rest("m", question())) == [2.0, 4.0]

    run(work)
