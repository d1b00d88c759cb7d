"""gRPC services from plain coroutines, on messages of private descriptor pools.

Rule of the file: a handler takes a request and its context and returns a message (streaming ones: takes and yields
them) or raises a `RequestError`; what that means on the wire is decided here. Kept lean: this is on the path of mass
registration.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import grpc

from raymesh.runtimes.errors import Code, Reason, RequestError

log = logging.getLogger(__name__)

#: Takes (request, `grpc.aio.ServicerContext`), returns the response message.
UnaryHandler = Callable[[Any, Any], Awaitable[Any]]
#: Takes (request or iterator of requests, context), yields response messages.
StreamHandler = Callable[[Any, Any], AsyncIterator[Any]]

_STATUS = {code.value[0]: code for code in grpc.StatusCode}


class Method(NamedTuple):
    """One RPC: its coroutine and the classes of its messages."""

    handler: UnaryHandler
    request_class: Any
    response_class: Any


class AnswerStream(NamedTuple):
    """An RPC with one request and a stream of responses."""

    handler: StreamHandler
    request_class: Any
    response_class: Any


class BothStreams(NamedTuple):
    """An RPC with a stream of requests and a stream of responses. Without classes the messages are bytes."""

    handler: StreamHandler
    request_class: Any = None
    response_class: Any = None


AnyMethod = Method | AnswerStream | BothStreams


class Services(grpc.GenericRpcHandler):  # type: ignore[misc]
    """All methods of a server, by full path (``/package.Service/Method``), behind the mesh's internal token."""

    def __init__(self, methods: Mapping[str, AnyMethod], *, token: str) -> None:
        self._token = token.encode()
        self._handlers = {path: _rpc_handler(path, method) for path, method in methods.items()}

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a call; None (UNIMPLEMENTED) for an unknown method or a caller from outside the mesh."""
        if self._token:
            for name, value in handler_call_details.invocation_metadata or ():
                if name == "x-raymesh-token" and hmac.compare_digest(str(value).encode(), self._token):
                    break
            else:
                return None
        return self._handlers.get(handler_call_details.method)


def _rpc_handler(path: str, method: AnyMethod) -> Any:
    from_bytes = method.request_class.FromString if method.request_class is not None else None
    to_bytes = method.response_class.SerializeToString if method.response_class is not None else None
    if isinstance(method, Method):
        return grpc.unary_unary_rpc_method_handler(_guarded(path, method.handler), from_bytes, to_bytes)
    stream = _guarded_stream(path, method.handler)
    if isinstance(method, AnswerStream):
        return grpc.unary_stream_rpc_method_handler(stream, from_bytes, to_bytes)
    return grpc.stream_stream_rpc_method_handler(stream, from_bytes, to_bytes)


def _guarded(path: str, handler: UnaryHandler) -> UnaryHandler:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await handler(request, context)
        except Exception as error:
            return await _abort(path, error, context)

    return call


def _guarded_stream(path: str, handler: StreamHandler) -> StreamHandler:
    async def call(requests: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for answer in handler(requests, context):
                yield answer
        except Exception as error:
            await _abort(path, error, context)

    return call


async def _abort(path: str, error: Exception, context: Any) -> Any:
    """End the call with what `error` means on the wire. Raises, always."""
    failure: RequestError
    if isinstance(error, RequestError):
        failure = error
    elif isinstance(error, TimeoutError):
        failure = RequestError(
            Code.DEADLINE_EXCEEDED, "the call's deadline passed before it was done", reason=Reason.DEADLINE
        )
    else:
        log.error("%s failed", path, exc_info=error)
        failure = RequestError(Code.INTERNAL, "internal error")
    trailers = [("x-raymesh-reason", failure.reason)] if failure.reason else []
    if failure.retry_after_s:
        trailers.append(("retry-after", str(max(1, round(failure.retry_after_s)))))
    return await context.abort(_STATUS[int(failure.code)], failure.message, tuple(trailers))


def until_s(context: Any, *, default_s: float) -> float:
    """The call's deadline in loop time; `default_s` from now when the client set none."""
    remaining_s = context.time_remaining()
    return asyncio.get_running_loop().time() + (default_s if remaining_s is None else min(remaining_s, 1e6))
