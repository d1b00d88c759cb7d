"""The HTTP/1.1 server against raw bytes: order, sizes, hang-ups, and whatever else a peer may send."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import orjson
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from raymesh.runtimes import http1
from raymesh.runtimes.errors import Code, RequestError
from raymesh.runtimes.http1 import PIPELINE_MAX, Handler, HttpServer, Request

BODY_MAX = 100_000


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` on the event loop of production, for at most 20 s."""

    async def bounded() -> None:
        async with asyncio.timeout(20):
            await work()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bounded())


async def until(condition: Callable[[], Any]) -> None:
    end_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        await asyncio.sleep(0.001)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Wire:
    """A client that sends exactly the bytes it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        pairs = [line.partition(":") for line in lines[1:] if line]
        return int(lines[0].split(" ")[1]), {name.lower(): value.strip() for name, _, value in pairs}

    async def answer(self) -> Answer:
        status, headers = await self.head()
        return Answer(status, headers, await self.reader.readexactly(int(headers.get("content-length", "0"))))

    async def has_ended(self) -> bool:
        """True when the server closed cleanly, without a reset and without another byte."""
        return await self.reader.read() == b""


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[HttpServer]:
    server = HttpServer(handler, body_bytes_max=BODY_MAX)
    await server.start("127.0.0.1")
    try:
        yield server
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def connected(server: HttpServer) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def echo(request: Request) -> None:
    request.respond(200, b"%b %b %b" % (request.method, request.target, request.body))


def post(path: str, body: bytes = b"", *headers: str) -> bytes:
    lines = "".join(f"{line}\r\n" for line in headers)
    return f"POST {path} HTTP/1.1\r\nhost: x\r\n{lines}content-length: {len(body)}\r\n\r\n".encode() + body


class Later:
    """A handler that keeps its requests; the test answers them."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> None:
        self.requests.append(request)


def test_requests_on_one_connection_are_answered_one_after_the_other() -> None:
    async def work() -> None:
        async with serving(echo) as server, connected(server) as wire:
            for n in range(3):
                wire.send(post(f"/a%20{n}", b"hi"))
                answer = await wire.answer()
                assert (answer.status, answer.body) == (200, f"POST /a%20{n} hi".encode())

    run(work)


def test_a_request_is_the_same_however_its_bytes_arrive() -> None:
    data = post("/p?q=1", b"body", "X-Some: Thing") + (
        b"POST /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;ext=1\r\nde\r\n0\r\nx-trailer: no\r\n\r\n"
    )
    seen: list[tuple[bytes, bytes, dict[bytes, bytes]]] = []

    def handler(request: Request) -> None:
        seen.append((request.target, request.body, request.headers))
        request.respond(200)

    async def work() -> None:
        async with serving(handler) as server:
            for at in range(1, len(data)):
                async with connected(server) as wire:
                    wire.send(data[:at])
                    await asyncio.sleep(0)
                    wire.send(data[at:])
                    assert (await wire.answer()).status == (await wire.answer()).status == 200
        first = (b"/p?q=1", b"body", {b"host": b"x", b"x-some": b"Thing", b"content-length": b"4"})
        second = (b"/c", b"abcde", {b"transfer-encoding": b"chunked"})
        assert all(pair == first for pair in seen[::2]) and all(pair == second for pair in seen[1::2])

    run(work)


def test_the_path_is_decoded_and_without_its_query() -> None:
    async def work() -> None:
        later = Later()
        async with serving(later) as server, connected(server) as wire:
            wire.send(post("/m%C3%BC%2Fx%ff?a=b"))
            await until(lambda: later.requests)
            assert later.requests[0].path == "/mü/x�"

    run(work)


def test_trailers_are_not_taken_for_headers() -> None:
    """The front door strips our internal headers from heads; a trailer must not smuggle one in."""

    async def work() -> None:
        later = Later()
        async with serving(later) as server, connected(server) as wire:
            wire.send(b"POST / HTTP/1.1\r\nx-raymesh-model: a/mine\r\ntransfer-encoding: chunked\r\n\r\n")
            wire.send(b"1\r\nx\r\n0\r\nx-raymesh-model: b/theirs\r\nx-raymesh-token: t\r\n\r\n")
            await until(lambda: later.requests)
            headers = later.requests[0].headers
            assert headers[b"x-raymesh-model"] == b"a/mine" and b"x-raymesh-token" not in headers

    run(work)


def test_pipelined_requests_are_answered_in_order_though_the_first_answer_is_late() -> None:
    async def work() -> None:
        later = Later()
        async with serving(later) as server, connected(server) as wire:
            wire.send(b"".join(post(f"/{n}") for n in range(10)))
            for n in range(10):
                await until(lambda n=n: len(later.requests) == n + 1)
                # Only the oldest is being handled: answers cannot overtake.
                assert later.requests[n].target == b"/%d" % n
                later.requests[n].respond(200, b"%d" % n)
                assert (await wire.answer()).body == b"%d" % n

    run(work)


def test_a_long_pipeline_answered_at_once_does_not_recurse() -> None:
    async def work() -> None:
        async with serving(echo) as server, connected(server) as wire:
            count = 5000
            wire.send(post("/") * count)
            for _ in range(count):
                assert (await wire.answer()).status == 200

    run(work)


def test_a_full_pipeline_pauses_reading_and_resumes() -> None:
    async def work() -> None:
        later = Later()
        async with serving(later) as server, connected(server) as wire:
            total = PIPELINE_MAX * 40
            # Too much for the socket buffers: the client can only finish when the server goes on reading.
            request = post("/", b"x" * 10_000)
            sent = asyncio.create_task(_send_all(wire, request, total))
            await until(lambda: later.requests)
            (connection,) = server.connections
            await until(lambda: connection._is_full)
            held = len(connection._waiting)
            assert held <= PIPELINE_MAX * 2
            for n in range(total):
                await until(lambda n=n: len(later.requests) == n + 1)
                later.requests[n].respond(200)
                assert (await wire.answer()).status == 200
                assert len(connection._waiting) <= PIPELINE_MAX * 2
            await sent
            assert not connection._is_full
            wire.send(post("/after"))
            await until(lambda: later.requests[-1].target == b"/after")

    run(work)


async def _send_all(wire: Wire, request: bytes, total: int) -> None:
    for _ in range(total):
        wire.send(request)
        await wire.writer.drain()


def test_waiting_bodies_are_bounded_too() -> None:
    async def work() -> None:
        later = Later()
        async with serving(later) as server, connected(server) as wire:
            request = post("/", b"x" * BODY_MAX)
            sent = asyncio.create_task(_send_all(wire, request, 60))
            await until(lambda: later.requests)
            (connection,) = server.connections
            await until(lambda: connection._is_full)
            assert sum(len(r.body) for r in connection._waiting) <= 6 * BODY_MAX
            for n in range(60):
                await until(lambda n=n: len(later.requests) == n + 1)
                later.requests[n].respond(200)
                await wire.answer()
            await sent

    run(work)


def test_a_peer_that_does_not_read_its_answers_is_not_read_from() -> None:
    async def work() -> None:
        answer = b"x" * 50_000

        def handler(request: Request) -> None:
            request.respond(200, answer)

        async with serving(handler) as server, connected(server) as wire:
            wire.reader._transport.pause_reading()  # type: ignore[attr-defined]
            sent = asyncio.create_task(_send_all(wire, post("/", b"y" * 1000), 5000))
            await until(lambda: server.connections)
            (connection,) = server.connections
            await until(lambda: connection._is_clogged)
            transport = connection._transport
            assert transport is not None and transport.get_write_buffer_size() < 30_000_000
            wire.reader._transport.resume_reading()  # type: ignore[attr-defined]
            for _ in range(5000):
                assert len((await wire.answer()).body) == len(answer)
            await sent

    run(work)


def test_too_large_by_content_length_is_refused_before_the_body_is_sent() -> None:
    async def work() -> None:
        later = Later()
        async with serving(later) as server, connected(server) as wire:
            wire.send(b"POST / HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n" % (BODY_MAX + 1))
            answer = await wire.answer()
            assert answer.status == 413 and answer.headers["connection"] == "close"
            assert "message_bytes_max" in orjson.loads(answer.body)["error"]
            assert await wire.has_ended() and not later.requests

    run(work)


def test_too_large_while_the_body_is_on_its_way_is_answered_cleanly() -> None:
    """Closing with unread bytes resets the connection, and the reset may overtake the answer."""

    async def work() -> None:
        async with serving(echo) as server:
            for head in (b"content-length: 20000000", b"transfer-encoding: chunked"):
                async with connected(server) as wire:
                    wire.send(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % head)
                    for _ in range(200):
                        wire.send(b"186a0\r\n" + b"x" * 100_000 + b"\r\n")
                    assert (await wire.answer()).status == 413
                    assert await wire.has_ended()
            await until(lambda: not server.connections)

    run(work)


def test_a_body_in_very_many_tiny_chunks() -> None:
    async def work() -> None:
        body = bytes(i % 251 for i in range(BODY_MAX // 2))
        async with serving(echo) as server, connected(server) as wire:
            for _ in range(2):
                wire.send(b"POST /c HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n")
                wire.send(b"".join(b"3\r\n%b\r\n" % body[at : at + 3] for at in range(0, len(body) - 2, 3)))
                left = len(body) % 3
                wire.send((b"%x\r\n%b\r\n" % (left, body[-left:]) if left else b"") + b"0\r\n\r\n")
                assert (await wire.answer()).body == b"POST /c " + body
                # What was before must not be in what is next.
                wire.send(post("/d", b"hi"))
                assert (await wire.answer()).body == b"POST /d hi"

    run(work)


def test_exactly_the_limit_is_accepted() -> None:
    async def work() -> None:
        later = Later()
        async with serving(later) as server, connected(server) as wire:
            wire.send(post("/", b"x" * BODY_MAX))
            await until(lambda: later.requests)
            assert len(later.requests[0].body) == BODY_MAX

    run(work)


def test_a_peer_that_never_closes_is_hung_up_on(monkeypatch: Any) -> None:
    monkeypatch.setattr(http1, "LINGER_S", 0.05)

    async def work() -> None:
        async with serving(echo) as server, connected(server) as wire:
            wire.send(b"nonsense\r\n\r\n")
            assert (await wire.answer()).status == 400
            await until(lambda: not server.connections)

    run(work)


def test_malformed_requests_are_answered_and_hung_up_on() -> None:
    cases = [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 1_0\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 99999999999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        b"POST / HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
    ]

    async def work() -> None:
        later = Later()
        async with serving(later) as server:
            for case in cases:
                async with connected(server) as wire:
                    wire.send(case)
                    answer = await wire.answer()
                    assert (answer.status, await wire.has_ended()) == (400, True), case
            assert not later.requests

    run(work)


def test_a_head_without_end_is_refused() -> None:
    async def work() -> None:
        async with serving(echo) as server, connected(server) as wire:
            wire.send(b"GET / HTTP/1.1\r\n")
            sent = asyncio.create_task(_send_all(wire, b"x-filler: " + b"y" * 5000 + b"\r\n", 300))
            assert (await wire.answer()).status == 431
            await sent
            assert await wire.has_ended()

    run(work)


def test_what_follows_good_requests_is_refused_after_their_answers() -> None:
    async def work() -> None:
        later = Later()
        async with serving(later) as server, connected(server) as wire:
            wire.send(post("/a") + post("/b") + b"nonsense\r\n\r\n")
            await until(lambda: later.requests)
            later.requests[0].respond(200, b"a")
            assert (await wire.answer()).body == b"a"
            await until(lambda: len(later.requests) == 2)
            later.requests[1].respond(200, b"b")
            assert (await wire.answer()).body == b"b"
            assert (await wire.answer()).status == 400
            assert await wire.has_ended()
            assert not later.requests[1].has_left

    run(work)


def test_expect_continue_is_answered_at_once() -> None:
    async def work() -> None:
        async with serving(echo) as server, connected(server) as wire:
            for _ in range(2):
                wire.send(b"POST /x HTTP/1.1\r\nExpect: 100-continue\r\ncontent-length: 4\r\n\r\n")
                assert (await wire.head())[0] == 100
                wire.send(b"body")
                assert (await wire.answer()).body == b"POST /x body"

    run(work)


def test_a_continue_never_comes_between_another_requests_answers() -> None:
    async def work() -> None:
        later = Later()
        async with serving(later) as server, connected(server) as wire:
            wire.send(post("/a") + b"POST /b HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\nb")
            await until(lambda: later.requests)
            later.requests[0].respond(200)
            assert (await wire.answer()).status == 200
            await until(lambda: len(later.requests) == 2)
            later.requests[1].respond(200)
            assert (await wire.answer()).status == 200

    run(work)


def test_connection_close_and_http_1_0_end_after_the_answer() -> None:
    async def work() -> None:
        later = Later()
        async with serving(later) as server:
            for request in (post("/", b"x", "connection: close"), b"GET / HTTP/1.0\r\n\r\n"):
                async with connected(server) as wire:
                    # What follows a last request is nobody's.
                    wire.send(request + b"more of anything")
                    await until(lambda: later.requests)
                    assert later.requests[0].is_last
                    later.requests.pop().respond(200, b"last")
                    assert (await wire.answer()).body == b"last"
                    assert await wire.has_ended()
            assert not later.requests

    run(work)


def test_the_wish_to_upgrade_is_ignored() -> None:
    async def work() -> None:
        async with serving(echo) as server, connected(server) as wire:
            wire.send(b"GET /u HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
            assert (await wire.answer()).body == b"GET /u "
            assert await wire.has_ended()

    run(work)


def test_an_upgrade_with_a_body_is_refused() -> None:
    async def work() -> None:
        later = Later()
        async with serving(later) as server, connected(server) as wire:
            wire.send(post("/u", b"abc", "connection: upgrade", "upgrade: h2c"))
            assert (await wire.answer()).status == 501
            assert await wire.has_ended() and not later.requests

    run(work)


def test_head_is_answered_without_a_body() -> None:
    async def work() -> None:
        async with serving(echo) as server, connected(server) as wire:
            wire.send(b"HEAD /h HTTP/1.1\r\n\r\n")
            assert (await wire.head())[0] == 200
            wire.send(post("/p"))
            assert (await wire.answer()).body == b"POST /p "

    run(work)


def test_a_caller_who_hangs_up_has_left() -> None:
    async def work() -> None:
        later = Later()
        left: list[Request] = []
        async with serving(later) as server:
            async with connected(server) as wire:
                wire.send(post("/a") + post("/b"))
                await until(lambda: later.requests)
                (request,) = later.requests
                request.on_left = lambda: left.append(request)
                assert not request.has_left
            await until(lambda: request.has_left)
            assert left == [request] and not server.connections
            request.respond(200, b"to nobody")  # harmless
            async with connected(server) as wire:
                wire.send(post("/c"))
                await until(lambda: len(later.requests) == 2)
                # /b was never handled: its caller had gone.
                assert later.requests[1].target == b"/c"

    run(work)


def test_a_second_answer_is_ignored() -> None:
    def handler(request: Request) -> None:
        request.respond(200, b"first")
        request.respond(500, b"second")

    async def work() -> None:
        async with serving(handler) as server, connected(server) as wire:
            wire.send(post("/") * 2)
            assert [(await wire.answer()).body for _ in range(2)] == [b"first", b"first"]

    run(work)


def test_what_a_handler_raises_is_an_answer() -> None:
    def handler(request: Request) -> None:
        if request.path == "/known":
            raise RequestError(Code.UNAVAILABLE, "later", reason="BUSY", retry_after_s=1.4)
        raise ZeroDivisionError("secret")

    async def work() -> None:
        async with serving(handler) as server, connected(server) as wire:
            wire.send(post("/known") + post("/bug") + post("/known"))
            answer = await wire.answer()
            assert answer.status == 503
            assert answer.headers["x-raymesh-reason"] == "BUSY" and answer.headers["retry-after"] == "1"
            assert orjson.loads(answer.body) == {"error": "later", "reason": "BUSY", "code": 14, "retry_after_s": 1.4}
            answer = await wire.answer()
            assert answer.status == 500 and b"secret" not in answer.body
            assert (await wire.answer()).status == 503

    run(work)


def test_closing_the_server_ends_its_connections() -> None:
    async def work() -> None:
        later = Later()
        async with serving(later) as server, connected(server) as wire:
            wire.send(post("/"))
            await until(lambda: later.requests)
            await server.close()
            assert await wire.has_ended()
            assert later.requests[0].has_left

    run(work)


_PIECES = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\n",
        b"POST /x HTTP/1.1\r\n",
        b"content-length: 3\r\n",
        b"transfer-encoding: chunked\r\n",
        b"connection: close\r\n",
        b"connection: upgrade\r\nupgrade: x\r\n",
        b"expect: 100-continue\r\n",
        b"\r\n",
        b"abc",
        b"3\r\nabc\r\n",
        b"0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\n\r\n",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(_PIECES, st.binary(max_size=20)), max_size=12).map(b"".join), st.integers(1, 40))
def test_any_bytes_get_answers_or_a_close_and_the_server_lives(data: bytes, step: int) -> None:
    async def work() -> None:
        async with serving(echo) as server:
            async with connected(server) as wire:
                for at in range(0, len(data), step):
                    wire.send(data[at : at + step])
                    await asyncio.sleep(0)
                wire.writer.write_eof()
                received = await wire.reader.read()
                assert not received or received.startswith(b"HTTP/1.1 ")
            await until(lambda: not server.connections)
            async with connected(server) as wire:
                wire.send(post("/alive"))
                assert (await wire.answer()).body == b"POST /alive "

    run(work)
