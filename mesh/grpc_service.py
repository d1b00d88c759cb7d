"""Unary gRPC services from plain coroutines, on messages of private descriptor pools.

Rule of the file: a handler takes a request and its context and returns a message or raises a `RequestError`; what that
means on the wire is decided here. Kept lean: this is on the path of mass registration.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import grpc

from raymesh.runtimes.errors import Code, Reason, RequestError

log = logging.getLogger(__name__)

#: Takes (request, `grpc.aio.ServicerContext`), returns the response message.
UnaryHandler = Callable[[Any, Any], Awaitable[Any]]

_STATUS = {code.value[0]: code for code in grpc.StatusCode}


class Method(NamedTuple):
    """One RPC: its coroutine and the classes of its messages."""

    handler: UnaryHandler
    request_class: Any
    response_class: Any


class Services(grpc.GenericRpcHandler):  # type: ignore[misc]
    """All unary methods of a server, by full path (``/package.Service/Method``), behind the mesh's internal token."""

    def __init__(self, methods: Mapping[str, Method], *, token: str) -> None:
        self._token = token
        self._handlers = {
            path: grpc.unary_unary_rpc_method_handler(
                _guarded(path, method.handler),
                request_deserializer=method.request_class.FromString,
                response_serializer=method.response_class.SerializeToString,
            )
            for path, method in methods.items()
        }

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a call; None (UNIMPLEMENTED) for an unknown method or a caller from outside the mesh."""
        if self._token:
            for name, value in handler_call_details.invocation_metadata or ():
                if name == "x-raymesh-token" and hmac.compare_digest(str(value), self._token):
                    break
            else:
                return None
        return self._handlers.get(handler_call_details.method)


def _guarded(path: str, handler: UnaryHandler) -> UnaryHandler:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await handler(request, context)
        except RequestError as error:
            failure = error
        except TimeoutError:
            failure = RequestError(
                Code.DEADLINE_EXCEEDED, "the call's deadline passed before it was done", reason=Reason.DEADLINE
            )
        except Exception:
            log.exception("%s failed", path)
            failure = RequestError(Code.INTERNAL, "internal error")
        trailers = [("x-raymesh-reason", failure.reason)] if failure.reason else []
        if failure.retry_after_s:
            trailers.append(("retry-after", str(max(1, round(failure.retry_after_s)))))
        # `abort` raises, always.
        return await context.abort(_STATUS[int(failure.code)], failure.message, tuple(trailers))

    return call


def until_s(context: Any, *, default_s: float) -> float:
    """The call's deadline in loop time; `default_s` from now when the client set none."""
    remaining_s = context.time_remaining()
    return asyncio.get_running_loop().time() + (default_s if remaining_s is None else min(remaining_s, 1e6))
