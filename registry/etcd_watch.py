"""Watches on etcd that survive lost connections, restarts and frozen servers.

Rule of the file: the resume revision moves only past what was handed on: after a whole response to its last event, or
after a progress notification to the header's revision. Never by the header of the answer that creates a watch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

import grpc

from raymesh.registry.backoff import Backoff
from raymesh.registry.etcd_connection import RANGE, WATCH, Endpoint, EtcdConnection, error_of
from raymesh.registry.etcd_wire import Failure, pb, read_events, read_failure, write_watch
from raymesh.registry.store import (
    Event,
    RegistryDenied,
    RegistryError,
    RegistryUnavailable,
    RevisionCompacted,
    WatchBatch,
)

log = logging.getLogger(__name__)

#: A watch silent for this long is asked for a sign of life; without one within the call deadline it is resumed.
_SILENCE_MAX_S = 10.0


class _WatchBroken(Exception):
    """The stream ended or fell silent; resume on another."""


async def watch(connection: EtcdConnection, prefix: str, from_revision: int) -> AsyncGenerator[WatchBatch, None]:
    """See `Store.watch`."""
    next_revision = from_revision or await _store_revision(connection) + 1
    backoff, denials = Backoff(), 0
    while True:
        endpoint, token = connection.endpoint, connection.token
        try:
            async with contextlib.aclosing(_watch_once(connection, endpoint, prefix, next_revision)) as batches:
                async for batch in batches:
                    backoff.reset()
                    denials = 0
                    next_revision = batch.revision + 1
                    yield batch
        except RegistryDenied:
            # etcd 3.4 and 3.5 say "permission denied" to a watch with a token they forgot: try once with a new one.
            denials += 1
            if not connection.address.user or denials > 1:
                raise
            connection.drop_token(token)
        except (_WatchBroken, RegistryUnavailable) as error:
            log.info("watch of %s resumes at revision %d: %s", prefix, next_revision, error)
            connection.drop_token(token)
            connection.fail_over(endpoint)
        connection.stats.watch_resumes += 1
        await asyncio.sleep(backoff.next_s())


async def _watch_once(
    connection: EtcdConnection, endpoint: Endpoint, prefix: str, next_revision: int
) -> AsyncGenerator[WatchBatch, None]:
    """The batches of one stream, until it breaks (`_WatchBroken`)."""
    pending: list[Event] = []
    async with contextlib.aclosing(_responses(connection, endpoint, write_watch(prefix, next_revision))) as responses:
        async for response in responses:
            if response.canceled:
                _raise_cancel(response)
            elif response.created:
                await _check_history(connection, response.header.revision, next_revision)
            elif response.events:
                # A large response comes in pieces, which may cut a transaction in two: hand on the whole.
                pending += read_events(response.events)
                if not response.fragment:
                    batch = WatchBatch(tuple(pending), pending[-1].kv.mod_revision)
                    pending = []
                    yield batch
            elif response.watch_id >= 0 and response.header.revision >= next_revision:
                # The server's own notification, sent in order with the events. Answers to our signs of life have
                # watch id -1 and, before etcd 3.4.25 and 3.5.8, could overtake events: those never count.
                yield WatchBatch((), response.header.revision)


async def _responses(connection: EtcdConnection, endpoint: Endpoint, request: Any) -> AsyncGenerator[Any, None]:
    """The responses of one watch stream; asks for a sign of life after a silence."""
    timeout_s = connection.timeout_s
    stream: Any = None
    reading: asyncio.Task[Any] | None = None
    try:
        stream = endpoint.callable(WATCH)(metadata=await connection.metadata(timeout_s))
        async with asyncio.timeout(timeout_s):
            await stream.write(request)
        is_asked = True
        while True:
            # Not `wait_for`: a cancelled read ends the whole stream.
            reading = asyncio.ensure_future(stream.read())
            while not (await asyncio.wait({reading}, timeout=timeout_s if is_asked else _SILENCE_MAX_S))[0]:
                if is_asked:
                    raise _WatchBroken(f"{endpoint.address} fell silent")
                is_asked = True
                async with asyncio.timeout(timeout_s):
                    await stream.write(pb.WatchRequest(progress_request=pb.WatchProgressRequest()))
            response = reading.result()
            if response is grpc.aio.EOF:
                raise await error_of(stream)
            is_asked = False
            yield response
    except (TimeoutError, asyncio.InvalidStateError) as error:
        # gRPC says InvalidStateError to a write on a stream that has just failed.
        raise _WatchBroken(f"{endpoint.address} does not answer") from error
    except grpc.aio.AioRpcError as error:
        failure = read_failure(error.code(), error.details() or error.code().name)
        if isinstance(failure, RegistryError):
            raise failure from error
        raise _WatchBroken(error.details()) from error
    finally:
        if stream is not None:
            stream.cancel()
        if reading is not None and not reading.done():
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                await reading


async def _check_history(connection: EtcdConnection, seen_revision: int, next_revision: int) -> None:
    """Raise `RevisionCompacted` when the store has gone back behind what we have seen: its data was lost or restored.

    etcd would silently wait for the future. A member that merely lags behind is no reason: ask the whole cluster.
    """
    if seen_revision + 1 < next_revision and await _store_revision(connection) + 1 < next_revision:
        raise RevisionCompacted(next_revision)


async def _store_revision(connection: EtcdConnection) -> int:
    answer = await connection.call(RANGE, pb.RangeRequest(key=b"\0", count_only=True), is_repeatable=True)
    return int(answer.response.header.revision)


def _raise_cancel(response: Any) -> None:
    """The server ended the watch: say why."""
    if response.compact_revision:
        raise RevisionCompacted(response.compact_revision)
    failure = read_failure(grpc.StatusCode.UNAVAILABLE, response.cancel_reason)
    if isinstance(failure, RegistryError):
        raise failure
    if failure is Failure.TOKEN:
        raise RegistryDenied(response.cancel_reason)
    raise _WatchBroken(response.cancel_reason or "canceled by the server")
