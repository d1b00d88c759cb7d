"""A small HTTP/1.1 server for the data path and the control calls, over uvloop and httptools.

Rule of the file: it knows HTTP, not models. A handler is called with each whole request in the turn of the event loop
in which its last byte arrived, and answers then or later through the request itself; there is no task per request.
Answers leave a connection in the order of its requests (pipelining), and a request whose caller has gone says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import unquote

import httptools
import orjson

from raymesh.runtimes.errors import Code, RequestError

log = logging.getLogger(__name__)

#: Requests one connection may have waiting before we stop reading from it.
PIPELINE_MAX = 64
#: Bytes of one request's line and headers. The front door's own limit is far lower.
HEAD_BYTES_MAX = 64 * 1024
#: Pieces of a body kept apart.
CHUNKS_MAX = 1024
#: How long a connection we hang up on is still read from: closing with unread bytes would reset it, and the reset may
#: overtake the answer that says why.
LINGER_S = 1.0
#: Longest error message in an answer; a client may name its input anything.
_MESSAGE_MAX = 4096

Handler = Callable[["Request"], None]

_STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}
_STATUS_LINES[499] = b"HTTP/1.1 499 Client Closed Request\r\n"


class Request:
    """One request: what came, and the means to answer it exactly once."""

    __slots__ = ("_answered", "_connection", "body", "has_left", "headers", "is_last", "method", "on_left", "target")

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._answered = False
        self.method = b""
        #: Path and query as sent.
        self.target = b""
        #: Names in lower case; of a repeated header the last one.
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        #: The connection closes after this request's answer.
        self.is_last = False
        #: The caller hung up: nobody will read an answer.
        self.has_left = False
        #: Called when the caller hangs up before the answer; set by who can stop working then.
        self.on_left: Callable[[], object] | None = None

    @property
    def path(self) -> str:
        """The decoded path, without the query."""
        return unquote(self.target.partition(b"?")[0].decode("ascii", "replace"))

    def respond_raw(self, answer: bytes) -> None:
        """Send a whole HTTP answer, head and body. A second answer is ignored."""
        if not self._answered:
            self._answered = True
            self._connection.answer(self, answer)

    def respond(
        self, status: int, body: bytes = b"", *, content_type: bytes = b"application/json", headers: bytes = b""
    ) -> None:
        """Send an answer with a body. `headers` are extra header lines, each ending in CRLF."""
        self.respond_raw(
            b"%bcontent-type: %b\r\n%bcontent-length: %d\r\n\r\n%b"
            % (_STATUS_LINES.get(status) or b"HTTP/1.1 %d Error\r\n" % status, content_type, headers, len(body), body)
        )

    def respond_json(self, value: Any, *, status: int = 200, headers: bytes = b"") -> None:
        """Send `value` as JSON."""
        self.respond(status, orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), headers=headers)

    def respond_error(self, error: RequestError) -> None:
        """Send an error as the protocol's ``{"error": …}`` with our machine-readable fields beside it."""
        body = {
            "error": error.message[:_MESSAGE_MAX],
            "reason": error.reason,
            "code": int(error.code),
            "retry_after_s": error.retry_after_s,
        }
        headers = b"x-raymesh-reason: %b\r\n" % error.reason.encode() if error.reason else b""
        if error.retry_after_s:
            headers += b"retry-after: %d\r\n" % max(1, round(error.retry_after_s))
        self.respond_json(body, status=error.http_status, headers=headers)


class _Connection(asyncio.Protocol):
    """One client connection: bytes to requests, answers to bytes, in order."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._request = Request(self)
        self._is_in_head = True
        self._head_bytes = 0
        #: The body so far: what came last in `_chunks`, before that what was in too many of them.
        self._chunks: list[bytes] = []
        self._body = bytearray()
        self._size_bytes = 0
        #: Whole requests not answered yet, oldest first; only the first one is being handled.
        self._waiting: deque[Request] = deque()
        #: Our answer to what was no request, after those to the requests before it.
        self._refusal = b""
        #: What still comes is not read any more: the last request is here, or it was not HTTP.
        self._is_deaf = False
        #: Too many requests wait: no reading until some are answered.
        self._is_full = False
        #: The peer does not read our answers: no reading either.
        self._is_clogged = False

    # -- asyncio ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast: uvloop's transports are asyncio transports in all but ancestry.
        self._transport = cast(asyncio.Transport, transport)
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._transport = None
        for request in self._waiting:
            request.has_left = True
            if request.on_left is not None:
                request.on_left()
        self._waiting.clear()

    def pause_writing(self) -> None:
        self._is_clogged = True
        self._set_reading()

    def resume_writing(self) -> None:
        self._is_clogged = False
        self._set_reading()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        before = self._request
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # a wish we may ignore; the request that had it is the connection's last
        except httptools.HttpParserError:
            self._refuse(RequestError(Code.INVALID_ARGUMENT, "malformed HTTP request"))
        if self._is_in_head and self._request is before:
            # Only whole reads of an unfinished head count, which is near enough.
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self._refuse(RequestError(Code.INVALID_ARGUMENT, "the request's head is too long"), status=431)

    # -- httptools -------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._request = Request(self)
        self._is_in_head = True
        self._head_bytes = 0
        self._chunks = []
        self._body = bytearray()
        self._size_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers come here too. They must not pass for headers: the front door strips ours from the head only.
        if self._is_in_head:
            self._request.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        headers = self._request.headers
        length = headers.get(b"content-length")
        if length is not None and int(length) > self._server.body_bytes_max:
            self._refuse_size()
        elif b"expect" in headers and not self._waiting and self._transport is not None:
            # With answers outstanding it would be taken for part of them; a client must not wait for it for ever.
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._size_bytes += len(body)
        if self._size_bytes > self._server.body_bytes_max:
            self._refuse_size()
        elif not self._is_deaf:
            chunks = self._chunks
            chunks.append(body)
            if len(chunks) == CHUNKS_MAX:
                # An object for each of a million tiny chunks would take many times the memory of what they hold.
                self._body += b"".join(chunks)
                chunks.clear()

    def on_message_complete(self) -> None:
        if self._is_deaf:
            return
        request = self._request
        parser = self._parser
        is_upgrade = parser.should_upgrade()
        if is_upgrade and (b"content-length" in request.headers or b"transfer-encoding" in request.headers):
            # The parser takes the body for the other protocol's bytes.
            self._refuse(RequestError(Code.UNIMPLEMENTED, "protocol upgrades are not supported"))
            return
        request.method = parser.get_method()
        chunks = self._chunks
        request.body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        if self._body:
            request.body = bytes(self._body + request.body)
            self._body = bytearray()
        self._chunks = []
        if is_upgrade or not parser.should_keep_alive():
            request.is_last = self._is_deaf = True
        waiting = self._waiting
        waiting.append(request)
        if len(waiting) == 1:
            self._server.handle(request)
        elif not self._is_full and self._has_enough():
            self._is_full = True
            self._set_reading()

    # -- answers ---------------------------------------------------------------------------------------------------

    def answer(self, request: Request, answer: bytes) -> None:
        """Write the answer of the oldest waiting request and start the next one."""
        transport = self._transport
        if transport is None:
            return
        if request.method == b"HEAD":
            answer = answer[: answer.index(b"\r\n\r\n") + 4]
        transport.write(answer)
        self._waiting.popleft()
        if request.is_last:
            self._hang_up()
        elif self._waiting:
            if self._is_full and len(self._waiting) < PIPELINE_MAX // 2:
                self._is_full = False
                self._set_reading()
            # Not a direct call: a long pipeline answered at once would otherwise recurse.
            asyncio.get_running_loop().call_soon(self._handle_next)

    def _handle_next(self) -> None:
        if not self._waiting:
            return  # hung up meanwhile
        request = self._waiting[0]
        if self._refusal and len(self._waiting) == 1:
            request.respond_raw(self._refusal)
        else:
            self._server.handle(request)

    def _has_enough(self) -> bool:
        waiting = self._waiting
        return len(waiting) >= PIPELINE_MAX or sum(len(r.body) for r in waiting) > self._server.body_bytes_max

    def _set_reading(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._is_full or self._is_clogged:
            transport.pause_reading()
        else:
            transport.resume_reading()

    def _refuse_size(self) -> None:
        limit = self._server.body_bytes_max
        self._refuse(
            RequestError(
                Code.RESOURCE_EXHAUSTED,
                f"the request body is larger than {limit} bytes; raise message_bytes_max to accept it",
            ),
            status=413,
        )

    def _refuse(self, error: RequestError, status: int | None = None) -> None:
        """Answer what is not a request, in its turn, and hang up: where the next one begins is unknown."""
        if self._is_deaf:
            return
        self._is_deaf = True
        self._chunks = []
        self._body = bytearray()
        body = orjson.dumps({"error": error.message})
        self._refusal = b"%bcontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (
            _STATUS_LINES[status or error.http_status],
            len(body),
            body,
        )
        stand_in = Request(self)
        stand_in.is_last = True
        self._waiting.append(stand_in)
        if len(self._waiting) == 1:
            self._handle_next()

    def _hang_up(self) -> None:
        """Close after the last answer, but not before the peer had time to read it."""
        transport = self._transport
        if transport is None:
            return
        self._is_full = self._is_clogged = False
        self._set_reading()
        # The peer's own close ends the connection sooner.
        transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_S, self.close)

    def close(self) -> None:
        """Hang up now."""
        if self._transport is not None:
            self._transport.close()


class HttpServer:
    """Listens on one address and hands each request to `handler`.

    `body_bytes_max` bounds a request's body before it is buffered. The handler runs on the event loop and must not
    block; an exception it raises is answered with 500 and logged.
    """

    def __init__(self, handler: Handler, *, body_bytes_max: int) -> None:
        self._handler = handler
        self.body_bytes_max = body_bytes_max
        self.connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self, host: str, port: int = 0) -> int:
        """Listen; returns the port (useful with port 0). Raises `OSError` when the address cannot be had."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), host, port, family=socket.AF_INET, backlog=4096
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self.port

    async def close(self) -> None:
        """Stop listening and hang up on everyone."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.close()
        if self._server is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._server.wait_closed(), 1.0)

    def handle(self, request: Request) -> None:
        """Hand one request to the handler, turning whatever it raises into an answer."""
        try:
            self._handler(request)
        except RequestError as error:
            request.respond_error(error)
        except Exception:
            log.exception("handler failed on %s", request.path)
            request.respond_error(RequestError(Code.INTERNAL, "internal error"))
