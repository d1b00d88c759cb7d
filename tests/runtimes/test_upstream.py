"""The HTTP/1.1 client against peers that answer in pieces, lie, die at every stage, or are our own server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import orjson
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from raymesh.runtimes import grpc_http1
from raymesh.runtimes.errors import Code, Reason, RequestError, Unavailable
from raymesh.runtimes.http1 import HttpServer, Request
from raymesh.runtimes.upstream import IDLE_MAX, RawAnswer, UpstreamLost, Upstreams, headers_to_pass_on, hops_of

GRPC = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/grpc\r\ntransfer-encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\nA\r\n0123456789\r\n0\r\ngrpc-status: 0\r\nx: y\r\n\r\n"
)
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n3\r\n\r\n\r\r\n0\r\n\r\n"
SIZED = b"HTTP/1.1 404 Not Found\r\nX-Raymesh-Reason:  NOT_LOADED \r\ncontent-length: 4\r\n\r\nbody"
EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"


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


class Peer:
    """Plays the other side. `scripts` gives, per request, the pieces to send; None hangs up, ... waits for ever."""

    def __init__(self, *scripts: Sequence[Any]) -> None:
        self.scripts = list(scripts)
        self.requests: list[bytes] = []
        self.connections = 0
        self.open = 0
        self._writers: list[asyncio.StreamWriter] = []

    @contextlib.asynccontextmanager
    async def playing(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1000)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for writer in self._writers:
                writer.transport.abort()
            await until(lambda: self.open == 0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self._writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                for piece in self.scripts.pop(0) if self.scripts else (None,):
                    if piece is None:
                        return
                    if piece is ...:
                        await reader.read()
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self.open -= 1


@contextlib.asynccontextmanager
async def calling(peer: Peer) -> AsyncIterator[tuple[Upstreams, str]]:
    upstreams = Upstreams("token")
    async with peer.playing() as address:
        yield upstreams, address
        await upstreams.close()


def send(upstreams: Upstreams, address: str, body: bytes = b"") -> Awaitable[RawAnswer]:
    return upstreams.send(address, b"POST", b"/x", headers=b"a: b\r\n", body=body)


@pytest.mark.parametrize("answer", [GRPC, CHUNKED, SIZED, EMPTY])
def test_an_answer_is_passed_on_as_it_came_wherever_it_was_split(answer: bytes) -> None:
    scripts = [(answer[:at], answer[at:]) for at in range(1, len(answer))] + [tuple(bytes([b]) for b in answer)]

    async def work() -> None:
        peer = Peer(*scripts)
        async with calling(peer) as (upstreams, address):
            for _ in scripts:
                assert (await send(upstreams, address)).whole() == answer
        # All over one connection: none was thought broken.
        assert peer.connections == 1

    run(work)


def test_status_headers_and_additions() -> None:
    async def work() -> None:
        async with calling(Peer((SIZED,))) as (upstreams, address):
            answer = await send(upstreams, address)
            assert answer.status == 404 and answer.header(b"x-raymesh-reason") == b"NOT_LOADED"
            assert answer.header(b"absent") is None
            added = answer.whole(b"x-raymesh-cold: 1\r\n")
            assert added == SIZED.replace(b"\r\n\r\n", b"\r\nx-raymesh-cold: 1\r\n\r\n", 1)

    run(work)


def test_a_request_carries_token_headers_and_body() -> None:
    async def work() -> None:
        peer = Peer((EMPTY,))
        async with calling(peer) as (upstreams, address):
            await send(upstreams, address, b"some body")
        (request,) = peer.requests
        head, _, body = request.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        assert lines[0] == b"POST /x HTTP/1.1" and body == b"some body"
        assert {b"x-raymesh-token: token", b"a: b", b"content-length: 9"} <= set(lines)

    run(work)


def test_interim_answers_are_skipped() -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
    whole = interim + SIZED

    async def work() -> None:
        scripts = [(whole[:at], whole[at:]) for at in range(1, len(whole))]
        async with calling(Peer(*scripts)) as (upstreams, address):
            for _ in scripts:
                assert (await send(upstreams, address)).whole() == SIZED

    run(work)


def test_a_peer_that_dies_at_any_stage_is_lost() -> None:
    async def work() -> None:
        for answer in (GRPC, CHUNKED, SIZED):
            scripts = [(answer[:at], None) for at in range(1, len(answer))]
            peer = Peer(*scripts)
            async with calling(peer) as (upstreams, address):
                for _ in scripts:
                    with pytest.raises(UpstreamLost):
                        await send(upstreams, address)
            assert len(peer.requests) == len(scripts)

    run(work)


def test_a_peer_that_is_not_there_is_lost() -> None:
    async def work() -> None:
        upstreams = Upstreams("token", connect_timeout_s=0.2)
        async with Peer().playing() as address:
            pass
        for nowhere in (address, "", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999", "127.0.0.1:-1"):
            with pytest.raises(UpstreamLost):
                await send(upstreams, nowhere)

    run(work)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-hello\r\n",
        b"\0" * 10,
        b"HTTP/1.1 abc OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nuntil I close",
        b"HTTP/1.1 200 OK\r\ncontent-length: -4\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1_0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0x5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"0" * 100,
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000,
    ],
)
def test_what_is_no_answer_of_ours_is_a_lost_peer(answer: bytes) -> None:
    async def work() -> None:
        peer = Peer((answer, ...), (SIZED,))
        async with calling(peer) as (upstreams, address):
            with pytest.raises(UpstreamLost):
                await send(upstreams, address)
            # And its connection is not used again.
            assert (await send(upstreams, address)).status == 404
            assert peer.connections == 2

    run(work)


def test_what_comes_after_an_answer_is_cut_off_and_ends_the_connection() -> None:
    async def work() -> None:
        for answer in (SIZED, GRPC, EMPTY):
            peer = Peer((answer + b"surplus", ...), (SIZED,))
            async with calling(peer) as (upstreams, address):
                assert (await send(upstreams, address)).whole() == answer
                assert (await send(upstreams, address)).whole() == SIZED
                assert peer.connections == 2

    run(work)


def test_what_an_idle_peer_says_never_meets_the_next_request() -> None:
    async def work() -> None:
        peer = Peer((SIZED, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", ...), (SIZED,))
        async with calling(peer) as (upstreams, address):
            assert (await send(upstreams, address)).status == 404
            await until(lambda: peer.open == 0)
            assert (await send(upstreams, address)).status == 404

    run(work)


def test_a_kept_connection_that_died_is_tried_once_more_on_a_fresh_one() -> None:
    async def work() -> None:
        peer = Peer((SIZED,), (None,), (SIZED,))
        async with calling(peer) as (upstreams, address):
            await send(upstreams, address)
            assert (await send(upstreams, address, b"again")).whole() == SIZED
        assert peer.connections == 2 and peer.requests[1] == peer.requests[2]

    run(work)


def test_it_is_tried_only_once_more_however_many_connections_are_kept() -> None:
    async def work() -> None:
        count = 5
        peer = Peer(*[(SIZED,)] * count)
        async with calling(peer) as (upstreams, address):
            await asyncio.gather(*(send(upstreams, address) for _ in range(count)))
            assert peer.connections == count
            # From here on it hangs up on every request: it may be this request that it cannot bear.
            with pytest.raises(UpstreamLost):
                await send(upstreams, address)
        assert len(peer.requests) == count + 2

    run(work)


def test_an_answer_cut_short_is_not_asked_for_again() -> None:
    async def work() -> None:
        peer = Peer((SIZED,), (SIZED[:-1], None), (SIZED,))
        async with calling(peer) as (upstreams, address):
            await send(upstreams, address)
            with pytest.raises(UpstreamLost):
                await send(upstreams, address)
        assert len(peer.requests) == 2

    run(work)


def test_a_caller_who_gives_up_closes_the_connection() -> None:
    async def work() -> None:
        peer = Peer((...,), (SIZED[:10], ...), (SIZED,))
        async with calling(peer) as (upstreams, address):
            for begun in (1, 2):
                task = asyncio.ensure_future(send(upstreams, address))
                await until(lambda begun=begun: len(peer.requests) == begun)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await until(lambda: peer.open == 0)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    peer.scripts.insert(0, (...,))
                    await send(upstreams, address)
            assert (await send(upstreams, address)).whole() == SIZED
            await until(lambda: peer.open == 1)

    run(work)


def test_a_caller_who_gives_up_just_as_the_answer_comes_leaks_no_connection() -> None:
    async def work() -> None:
        peer = Peer(*[(SIZED,)] * 200)
        async with calling(peer) as (upstreams, address):
            for turns in range(100):
                task = asyncio.ensure_future(send(upstreams, address))
                for _ in range(turns % 20):
                    await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await until(lambda: peer.open <= len(upstreams._idle[address]))

    run(work)


def test_kept_connections_are_bounded_and_forgotten_when_they_end() -> None:
    async def work() -> None:
        count = IDLE_MAX + 20
        peer = Peer(*[(SIZED,)] * count)
        async with calling(peer) as (upstreams, address):
            await asyncio.gather(*(send(upstreams, address) for _ in range(count)))
            assert len(upstreams._idle[address]) == IDLE_MAX
            await until(lambda: peer.open == IDLE_MAX)
            for writer in peer._writers:
                writer.transport.abort()
            await until(lambda: not upstreams._idle[address])

    run(work)


def test_many_at_once_each_get_their_own_answer() -> None:
    def handler(request: Request) -> None:
        if request.body.endswith(b"7"):
            request.respond_raw(grpc_http1.answer(request.body))
        else:
            request.respond(200, request.body)

    async def work() -> None:
        server = HttpServer(handler, body_bytes_max=100)
        address = f"127.0.0.1:{await server.start('127.0.0.1')}"
        upstreams = Upstreams("token")
        for _ in range(3):
            answers = await asyncio.gather(*(send(upstreams, address, b"n%d" % n) for n in range(200)))
            assert all(b"n%d" % n in a.rest for n, a in enumerate(answers))
        # Refused by a close: the next request finds out and is answered all the same.
        assert (await send(upstreams, address, b"x" * 200)).status == 413
        assert (await send(upstreams, address, b"y")).rest == b"y"
        await upstreams.close()
        await server.close()

    run(work)


# -- control calls ---------------------------------------------------------------------------------------------------


def json_answer(body: bytes, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


def call(upstreams: Upstreams, address: str, timeout_s: float = 5.0) -> Awaitable[dict[str, Any]]:
    return upstreams.call(address, "POST", "/control/x", {"a": 1}, timeout_s=timeout_s)


def test_a_control_call_is_json_in_and_out() -> None:
    async def work() -> None:
        peer = Peer((json_answer(b'{"b":2}'),), (json_answer(b""),))
        async with calling(peer) as (upstreams, address):
            assert await call(upstreams, address) == {"b": 2}
            assert await call(upstreams, address) == {}
        assert orjson.loads(peer.requests[0].partition(b"\r\n\r\n")[2]) == {"a": 1}

    run(work)


def test_a_control_error_is_raised_as_the_peer_meant_it() -> None:
    body = b'{"error":"no room","reason":"NO_CAPACITY","code":8,"retry_after_s":2.5}'

    async def work() -> None:
        async with calling(Peer((json_answer(body, 429),))) as (upstreams, address):
            with pytest.raises(RequestError) as caught:
                await call(upstreams, address)
            error = caught.value
            assert (error.code, error.message, error.reason, error.retry_after_s) == (
                Code.RESOURCE_EXHAUSTED,
                "no room",
                "NO_CAPACITY",
                2.5,
            )

    run(work)


@pytest.mark.parametrize("status", [200, 503])
@pytest.mark.parametrize(
    "body", [b"<html>", b"[1]", b'"text"', b"5", b'{"code":', b"\xff", b'{"code":99}', b'{"retry_after_s":"soon"}']
)
def test_nonsense_from_a_peer_is_a_request_error(status: int, body: bytes) -> None:
    async def work() -> None:
        async with calling(Peer((json_answer(body, status),))) as (upstreams, address):
            if status == 200 and body.startswith(b'{"') and body.endswith(b"}"):
                assert await call(upstreams, address) == orjson.loads(body)
                return
            with pytest.raises(Unavailable) as caught:
                await call(upstreams, address)
            assert caught.value.reason == Reason.NO_INSTANCE

    run(work)


def test_an_error_without_a_code_is_internal() -> None:
    async def work() -> None:
        peer = Peer((json_answer(b'{"error":"too large"}', 413),), (json_answer(b'{"code":0}', 500),))
        async with calling(peer) as (upstreams, address):
            for _ in range(2):
                with pytest.raises(RequestError) as caught:
                    await call(upstreams, address)
                assert caught.value.code is Code.INTERNAL

    run(work)


def test_a_control_call_has_a_deadline_and_needs_a_peer() -> None:
    async def work() -> None:
        async with calling(Peer((...,))) as (upstreams, address):
            with pytest.raises(RequestError) as caught:
                await call(upstreams, address, timeout_s=0.05)
            assert caught.value.code is Code.DEADLINE_EXCEEDED and caught.value.reason == Reason.DEADLINE
        with pytest.raises(Unavailable):
            await call(upstreams, address)

    run(work)


def test_hop_headers_stay_behind() -> None:
    headers = {
        b"host": b"h",
        b"connection": b"close",
        b"content-length": b"3",
        b"expect": b"100-continue",
        b"te": b"trailers",
        b"trailer": b"x",
        b"x-raymesh-token": b"t",
        b"x-raymesh-hops": b"4",
        b"x-raymesh-model": b"a/b",
        b"content-type": b"application/grpc",
    }
    assert headers_to_pass_on(headers, hops=1).split(b"\r\n") == [
        b"x-raymesh-model: a/b",
        b"content-type: application/grpc",
        b"x-raymesh-hops: 1",
        b"",
    ]


@pytest.mark.parametrize(
    ("text", "hops"), [(None, 0), (b"3", 3), (b"-1", 0), (b"x", 0), (b"", 0), (b"9" * 5000, 0), (b"\xb2", 0)]
)
def test_hops(text: bytes | None, hops: int) -> None:
    assert hops_of({} if text is None else {b"x-raymesh-hops": text}) == hops


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                [GRPC, CHUNKED, SIZED, EMPTY, GRPC[:60], SIZED[:40], b"HTTP/1.1 100 C\r\n\r\n", b"\r\n\r\n"]
            ),
            st.binary(min_size=1, max_size=8),
        ),
        max_size=4,
    ),
    st.integers(1, 60),
)
def test_any_bytes_are_an_answer_or_a_lost_peer(pieces: list[bytes], step: int) -> None:
    data = b"".join(pieces)

    async def work() -> None:
        script = [data[at : at + step] for at in range(0, len(data), step)]
        async with calling(Peer([*script, None])) as (upstreams, address):
            try:
                answer = await send(upstreams, address)
            except UpstreamLost:
                return
            assert answer.whole() in data

    run(work)


@pytest.mark.parametrize("is_kept_alive", [False, True])
def test_a_peer_that_is_given_up_is_waited_for_no_longer(is_kept_alive: bool) -> None:
    async def work() -> None:
        peer = Peer([SIZED], [...]) if is_kept_alive else Peer([...])
        async with peer.playing() as address:
            upstreams = Upstreams("t")
            if is_kept_alive:
                await upstreams.send(address, b"GET", b"/")
            waiting = asyncio.create_task(upstreams.send(address, b"GET", b"/"))
            await until(lambda: len(peer.requests) == 1 + is_kept_alive)
            upstreams.give_up(address)
            with pytest.raises(UpstreamLost):
                await waiting
            assert peer.connections == 1
            upstreams.give_up(address)
            await upstreams.close()

    run(work)
