"""The HTTP/1.1 client between the mesh's own processes: passing requests on whole, and control calls.

Rule of the file: an answer is passed on as the bytes that came, trailers and all; nothing is decoded that need not be.
Connections are kept alive and reused. The peers are our own servers, so the parser takes what they send
(``content-length`` or ``chunked``) and treats anything else as a broken peer: its connection is given up.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from typing import Any, NamedTuple, cast

import orjson

from raymesh.runtimes.errors import Code, Reason, RequestError, Unavailable

#: Idle connections kept per peer.
IDLE_MAX = 256
#: A peer's answer head is a few hundred bytes; more means it is not ours.
HEAD_BYTES_MAX = 64 * 1024
#: A chunk's size in hex; ``int`` alone would take signs and underscores. Extensions are not ours.
_CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,15}\Z")
_CHUNK_LINE_MAX = 17


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
    """One connection: one request at a time. It is in `idle` exactly while it is open and unused."""

    def __init__(self, idle: list[_Peer], everyone: set[_Peer]) -> None:
        self._idle = idle
        #: All connections to this peer, busy ones included.
        self._everyone = everyone
        #: The peer is said to be gone: asking it on another connection makes no sense either.
        self.is_given_up = False
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._answer: asyncio.Future[RawAnswer] | None = None
        self._head_end = -1
        #: Where the answer ends, by its content-length; -1 when it is chunked.
        self._end = -1
        #: Where the next chunk begins.
        self._scan = 0

    # -- asyncio -----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast: uvloop's transports are asyncio transports in all but ancestry.
        self._transport = cast(asyncio.Transport, transport)
        self._everyone.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._everyone.discard(self)
        if self in self._idle:
            self._idle.remove(self)
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(UpstreamLost("the peer hung up"))

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None or answer.done():
            # Nothing was asked: whatever this is must not meet the next request.
            self.close()
            return
        self._buffer += data
        try:
            end = self._find_end()
            if end < 0:
                return
            head = bytes(self._buffer[: self._head_end])
            answer.set_result(RawAnswer(int(head[9:12]), head, bytes(self._buffer[self._head_end + 4 : end])))
            if len(self._buffer) > end:
                self.close()
        except ValueError:
            answer.set_exception(UpstreamLost("the peer did not answer in HTTP/1.1"))
            self.close()

    # -- requests ----------------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def has_begun(self) -> bool:
        """Whether any of the present answer has come."""
        return bool(self._buffer)

    async def send(self, request: bytes) -> RawAnswer:
        """The answer to `request`. However it ends but well, the connection is closed."""
        self._buffer.clear()
        self._head_end = self._end = -1
        if self._transport is None:
            raise UpstreamLost("the peer hung up")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            answer = await self._answer
        except BaseException:
            # Given up on: the answer that may still come must not meet the next request.
            self.close()
            raise
        if self.is_open and len(self._idle) < IDLE_MAX:
            self._idle.append(self)
        else:
            self.close()
        return answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- answers -----------------------------------------------------------------------------------------------------

    def _find_end(self) -> int:
        """Where the answer ends in the buffer; -1 until that has come. Raises `ValueError` when it is none of ours."""
        if self._head_end < 0 and not self._read_head():
            return -1
        if self._end < 0:
            return self._find_last_chunk()
        return self._end if len(self._buffer) >= self._end else -1

    def _read_head(self) -> bool:
        buffer = self._buffer
        while True:
            if not buffer.startswith(b"HTTP/1."[: len(buffer)]):
                raise ValueError("not HTTP")
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(buffer) > HEAD_BYTES_MAX:
                    raise ValueError("head too long")
                return False
            if buffer[9:10] != b"1":
                break
            # 100 Continue and the like come before the answer.
            del buffer[: end + 4]
        self._head_end = end
        body = end + 4
        status = bytes(buffer[9:12])
        if not status.isdigit():
            raise ValueError("no status")
        if status in (b"204", b"304"):
            self._end = body
            return True
        for line in bytes(buffer[:end]).split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            name, value = name.lower(), value.strip()
            if name == b"content-length" and len(value) < 16 and value.isdigit():
                self._end = body + int(value)
                return True
            if name == b"transfer-encoding" and value.lower() == b"chunked":
                self._scan = body
                return True
        raise ValueError("neither content-length nor chunked")

    def _find_last_chunk(self) -> int:
        buffer = self._buffer
        while True:
            line_end = buffer.find(b"\r\n", self._scan, self._scan + _CHUNK_LINE_MAX)
            if line_end < 0:
                if len(buffer) - self._scan >= _CHUNK_LINE_MAX:
                    raise ValueError("no chunk")
                return -1
            line = bytes(buffer[self._scan : line_end])
            if _CHUNK_SIZE.match(line) is None:
                raise ValueError("no chunk")
            size = int(line, 16)
            if size == 0:
                # Trailers end with an empty line; without any, that line follows at once.
                end = buffer.find(b"\r\n\r\n", line_end)
                if end < 0 and len(buffer) - line_end > HEAD_BYTES_MAX:
                    raise ValueError("trailers too long")
                return end + 4 if end >= 0 else -1
            data_end = line_end + 2 + size
            if len(buffer) < data_end + 2:
                return -1
            if buffer[data_end : data_end + 2] != b"\r\n":
                raise ValueError("a chunk of another size")
            self._scan = data_end + 2


class Upstreams:
    """Kept-alive connections to peers, by ``host:port``. Belongs to one event loop."""

    def __init__(self, token: str, *, connect_timeout_s: float = 1.0) -> None:
        self._token = token.encode()
        self._connect_timeout_s = connect_timeout_s
        self._idle: dict[str, list[_Peer]] = defaultdict(list)
        self._open: dict[str, set[_Peer]] = defaultdict(set)

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
                return await peer.send(request)
            except UpstreamLost:
                if peer.has_begun or peer.is_given_up:
                    raise
                # A kept-alive connection may have died unseen; only a fresh one proves the peer gone.
                break
        return await (await self._connect(address, idle)).send(request)

    async def call(self, address: str, method: str, path: str, body: Any = None, *, timeout_s: float) -> dict[str, Any]:
        """A control call with JSON in and out.

        Raises the `RequestError` the peer answered with, `Unavailable` when the peer is gone or talks nonsense, and a
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
        try:
            value = orjson.loads(answer.rest) if answer.rest else {}
            if answer.status != 200:
                error = _read_error(value)
            elif isinstance(value, dict):
                return value
            else:
                raise ValueError("not an object")
        except (ValueError, TypeError, KeyError):
            raise Unavailable("a part of the mesh did not answer sensibly", reason=Reason.NO_INSTANCE) from None
        raise error

    def give_up(self, address: str) -> None:
        """Hang up on a peer that is said to be gone; who waits for it gets `UpstreamLost`.

        A frozen machine closes no connection: without this its silence would be waited out.
        """
        self._idle.pop(address, None)
        for peer in self._open.pop(address, ()):
            peer.is_given_up = True
            peer.close()

    async def close(self) -> None:
        """Hang up on every idle peer; requests under way end as their callers want."""
        for idle in self._idle.values():
            for peer in list(idle):
                peer.close()
        self._idle.clear()

    async def _connect(self, address: str, idle: list[_Peer]) -> _Peer:
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, peer = await loop.create_connection(lambda: _Peer(idle, self._open[address]), host, int(port))
        except (OSError, TimeoutError, ValueError, OverflowError):
            raise UpstreamLost(f"no connection to {address}") from None
        return peer


def _read_error(value: Any) -> RequestError:
    """The error in a control answer. Raises what its conversions raise when there is none."""
    if not isinstance(value, dict):
        raise TypeError("not an object")
    return RequestError(
        Code(value.get("code", Code.INTERNAL)) or Code.INTERNAL,
        str(value.get("error", "")),
        reason=str(value.get("reason", "")),
        retry_after_s=float(value.get("retry_after_s", 0.0)),
    )


#: Headers that belong to one connection or one hop and are never passed on; some are set anew.
_HOP_HEADERS = frozenset(
    {b"host", b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"expect", b"te", b"trailer"}
    | {b"upgrade", b"x-raymesh-token", b"x-raymesh-hops"}
)


def headers_to_pass_on(headers: dict[bytes, bytes], *, hops: int) -> bytes:
    """The header lines with which a request goes on to the next process, its hop count included."""
    lines = [b"%b: %b\r\n" % (name, value) for name, value in headers.items() if name not in _HOP_HEADERS]
    lines.append(b"x-raymesh-hops: %d\r\n" % hops)
    return b"".join(lines)


def hops_of(headers: dict[bytes, bytes]) -> int:
    """How many of our processes have passed this request on already."""
    text = headers.get(b"x-raymesh-hops", b"0")
    return int(text) if len(text) < 10 and text.isdigit() else 0
