"""The HTTP/1.1 client between the mesh's own processes: passing requests on whole, and control calls.

Rule of the file: an answer is passed on as the bytes that came, trailers and all; nothing is decoded that need not be.
Connections are kept alive and reused. The peers are our own servers, so the parser takes what they send
(``content-length`` or ``chunked``) and treats anything else as a broken peer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from typing import Any, NamedTuple, cast

import orjson

from raymesh.runtimes.errors import Code, Reason, RequestError, Unavailable

#: Idle connections kept per peer.
IDLE_MAX = 256
#: A peer's answer head is a few hundred bytes; more means it is not ours.
HEAD_BYTES_MAX = 64 * 1024


class UpstreamLost(Exception):
    """The peer could not be reached or hung up before its answer was whole. It may have done the work."""


class RawAnswer(NamedTuple):
    """A whole HTTP answer as it came: status, head (status line and headers, without the empty line), rest."""

    status: int
    head: bytes
    rest: bytes

    def header(self, name: bytes) -> bytes | None:
        """The value of a header, by its lower-case name."""
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.lower() == name:
                return value.strip()
        return None

    def whole(self, extra_headers: bytes = b"") -> bytes:
        """The answer's bytes, with header lines (each ending in CRLF) added."""
        return b"%b\r\n%b\r\n%b" % (self.head, extra_headers, self.rest)


class _Peer(asyncio.Protocol):
    """One connection: one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._answer: asyncio.Future[RawAnswer] | None = None
        self._head_end = -1
        self._needed = -1
        self._is_chunked = False
        self._scan = 0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast: uvloop's transports are asyncio transports in all but ancestry.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(UpstreamLost("the peer hung up"))

    async def send(self, request: bytes) -> RawAnswer:
        if self._transport is None:
            raise UpstreamLost("the peer hung up")
        self._buffer.clear()
        self._head_end, self._needed, self._is_chunked, self._scan = -1, -1, False, 0
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        finally:
            if not self._answer.done() or self._answer.cancelled():
                # Given up on: the answer that may still come must not meet the next request.
                self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        answer = self._answer
        if answer is None or answer.done():
            self.close()
            return
        try:
            if self._is_whole():
                end = self._head_end
                head = bytes(self._buffer[:end])
                answer.set_result(RawAnswer(int(head[9:12]), head, bytes(self._buffer[end + 4 :])))
        except ValueError:
            answer.set_exception(UpstreamLost("the peer did not answer in HTTP/1.1"))
            self.close()

    def _is_whole(self) -> bool:
        if self._head_end < 0 and not self._read_head():
            return False
        if self._is_chunked:
            return self._is_chunked_whole()
        return len(self._buffer) >= self._needed

    def _read_head(self) -> bool:
        buffer = self._buffer
        while True:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(buffer) > HEAD_BYTES_MAX:
                    raise ValueError("head too long")
                return False
            if not buffer.startswith(b"HTTP/1.1 100"):
                break
            del buffer[: end + 4]
        if not buffer.startswith(b"HTTP/1."):
            raise ValueError("not HTTP")
        self._head_end = end
        length = 0
        for line in bytes(buffer[:end]).split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            name = name.lower()
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                self._is_chunked = value.strip().lower() == b"chunked"
        self._needed = end + 4 + length
        self._scan = end + 4
        return True

    def _is_chunked_whole(self) -> bool:
        buffer = self._buffer
        while True:
            line_end = buffer.find(b"\r\n", self._scan)
            if line_end < 0:
                return False
            size = int(bytes(buffer[self._scan : line_end]).split(b";")[0], 16)
            if size == 0:
                # Trailers end with an empty line; without any, that line follows at once.
                return buffer.startswith(b"\r\n", line_end + 2) or buffer.find(b"\r\n\r\n", line_end) >= 0
            following = line_end + 2 + size + 2
            if len(buffer) < following:
                return False
            self._scan = following


class Upstreams:
    """Kept-alive connections to peers, by ``host:port``. Belongs to one event loop."""

    def __init__(self, token: str, *, connect_timeout_s: float = 1.0) -> None:
        self._token = token.encode()
        self._connect_timeout_s = connect_timeout_s
        self._idle: dict[str, list[_Peer]] = defaultdict(list)

    async def send(
        self, address: str, method: bytes, target: bytes, *, headers: bytes = b"", body: bytes = b""
    ) -> RawAnswer:
        """One request, one whole answer. `headers` are header lines, each ending in CRLF.

        Raises `UpstreamLost` when the peer is gone. The caller's cancellation drops the connection, which tells the
        peer that nobody waits any more; put a deadline around the call with `asyncio.timeout`.
        """
        request = b"%b %b HTTP/1.1\r\nhost: mesh\r\nx-raymesh-token: %b\r\n%bcontent-length: %d\r\n\r\n%b" % (
            method,
            target,
            self._token,
            headers,
            len(body),
            body,
        )
        idle = self._idle[address]
        while idle:
            peer = idle.pop()
            if not peer.is_open:
                continue
            try:
                answer = await peer.send(request)
            except UpstreamLost:
                # A kept-alive connection may have died unseen; only a fresh one proves the peer gone.
                continue
            self._keep(idle, peer)
            return answer
        peer = await self._connect(address)
        answer = await peer.send(request)
        self._keep(idle, peer)
        return answer

    async def call(self, address: str, method: str, path: str, body: Any = None, *, timeout_s: float) -> dict[str, Any]:
        """A control call with JSON in and out.

        Raises the `RequestError` the peer answered with, `Unavailable` when the peer is gone, and a
        DEADLINE_EXCEEDED `RequestError` after `timeout_s`.
        """
        content = b"" if body is None else orjson.dumps(body)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self.send(
                    address,
                    method.encode(),
                    path.encode(),
                    headers=b"content-type: application/json\r\n",
                    body=content,
                )
        except UpstreamLost:
            raise Unavailable("a part of the mesh is not reachable", reason=Reason.NO_INSTANCE) from None
        except TimeoutError:
            raise RequestError(
                Code.DEADLINE_EXCEEDED, f"no answer within {timeout_s:g} s", reason=Reason.DEADLINE
            ) from None
        value = orjson.loads(answer.rest) if answer.rest else {}
        if answer.status != 200:
            raise RequestError(
                Code(value.get("code", Code.INTERNAL)),
                str(value.get("error", "")),
                reason=str(value.get("reason", "")),
                retry_after_s=float(value.get("retry_after_s", 0.0)),
            )
        return dict(value)

    async def close(self) -> None:
        """Hang up on every peer."""
        for idle in self._idle.values():
            for peer in idle:
                peer.close()
        self._idle.clear()

    async def _connect(self, address: str) -> _Peer:
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, peer = await loop.create_connection(_Peer, host, int(port))
        except (OSError, TimeoutError):
            raise UpstreamLost(f"no connection to {address}") from None
        return peer

    def _keep(self, idle: list[_Peer], peer: _Peer) -> None:
        if peer.is_open and len(idle) < IDLE_MAX:
            idle.append(peer)
        else:
            with contextlib.suppress(Exception):
                peer.close()


#: Headers that belong to one connection or one hop and are never passed on.
_HOP_HEADERS = frozenset(
    {b"host", b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"expect", b"te", b"upgrade"}
)


def headers_to_pass_on(headers: dict[bytes, bytes], *, hops: int) -> bytes:
    """The header lines with which a request goes on to the next process, its hop count included."""
    lines = [
        b"%b: %b\r\n" % (name, value)
        for name, value in headers.items()
        if name not in _HOP_HEADERS and name not in {b"x-raymesh-token", b"x-raymesh-hops"}
    ]
    lines.append(b"x-raymesh-hops: %d\r\n" % hops)
    return b"".join(lines)


def hops_of(headers: dict[bytes, bytes]) -> int:
    """How many of our processes have passed this request on already."""
    text = headers.get(b"x-raymesh-hops", b"0")
    return int(text) if text.isdigit() else 0
