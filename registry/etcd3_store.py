"""`Etcd3Store`: the registry through the `etcd3` package (extra ``raymesh[etcd3]``).

Rule of the file: `etcd3` makes the connections, logs in and watches; threads carry its blocking calls. What it lacks
(deadlines, resuming watches, other endpoints) is added here. `etcd.py` does all of that better; it is the default.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from raymesh.registry.backoff import Backoff
from raymesh.registry.etcd3_shim import load_etcd3, make_client
from raymesh.registry.etcd_connection import RECEIVE_BYTES_MAX, EtcdAddress
from raymesh.registry.etcd_wire import (
    Failure,
    pb,
    prefix_end,
    read_failure,
    read_kv,
    read_txn,
    write_txn,
)
from raymesh.registry.store import (
    Compare,
    Event,
    KeyValue,
    LeaseGone,
    Listing,
    Op,
    RegistryDenied,
    RegistryError,
    RegistryUnavailable,
    RevisionCompacted,
    TxnResult,
    WatchBatch,
    check_txn,
)

log = logging.getLogger(__name__)

_PAGE_KEYS = 1000
_THREADS = 16
_GRPC_OPTIONS = {
    "grpc.max_receive_message_length": RECEIVE_BYTES_MAX,
    "grpc.keepalive_time_ms": 10_000,
    "grpc.keepalive_timeout_ms": 3_000,
    "grpc.http2.max_pings_without_data": 0,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 1_000,
    "grpc.min_reconnect_backoff_ms": 3_000,
    "grpc.use_local_subchannel_pool": 1,
    "grpc.enable_http_proxy": 0,
}


class Etcd3Store:
    """A `Store` on etcd through `etcd3`.

    Raises `ImportError` without that package, `ValueError` for a user without TLS.

    `timeout_s` is the deadline of one try of a call; there are at most as many tries as endpoints.
    """

    def __init__(self, address: EtcdAddress, *, timeout_s: float = 3.0) -> None:
        if address.user and not address.is_tls:
            raise ValueError("the etcd3 package sends passwords over TLS only: use etcds://, or the etcd store")
        self._etcd3 = load_etcd3()
        self._address, self._timeout_s = address, timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="etcd3")
        self._client: Any = None
        self._client_lock = asyncio.Lock()
        self._current = 0

    @classmethod
    def from_url(cls, url: str, *, timeout_s: float = 3.0) -> Etcd3Store:
        """As `EtcdStore.from_url`."""
        return cls(EtcdAddress.from_url(url), timeout_s=timeout_s)

    async def get(self, key: str) -> KeyValue | None:
        """See `Store.get`."""
        request = pb.RangeRequest(key=key.encode())
        response = await self._call(lambda client: client.kvstub.Range, request)
        return read_kv(response.kvs[0]) if response.kvs else None

    async def list(self, prefix: str, *, revision: int = 0) -> Listing:
        """See `Store.list`."""
        items: Any = []
        key, end = prefix.encode() or b"\0", prefix_end(prefix)
        while True:
            request = pb.RangeRequest(key=key, range_end=end, limit=_PAGE_KEYS, revision=revision)
            try:
                page = await self._call(lambda client: client.kvstub.Range, request)
            except RevisionCompacted:
                raise RevisionCompacted(revision) from None
            revision = revision or page.header.revision
            items += [read_kv(kv) for kv in page.kvs]
            if not page.more:
                return Listing(tuple(items), revision)
            key = page.kvs[-1].key + b"\0"

    async def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        """See `Store.txn`. Never repeated after a lost answer."""
        check_txn(compares, success, failure)
        request = write_txn(compares, success, failure)
        return read_txn(await self._call(lambda client: client.kvstub.Txn, request, is_repeatable=False))

    async def grant(self, ttl_s: int) -> int:
        """See `Store.grant`."""
        request = pb.LeaseGrantRequest(TTL=ttl_s)
        return int((await self._call(lambda client: client.leasestub.LeaseGrant, request)).ID)

    async def keep_alive(self, lease: int) -> int:
        """See `Store.keep_alive`."""

        def refresh(client: Any) -> Callable[..., Any]:
            stub = client.leasestub.LeaseKeepAlive
            return lambda request, *args, **kwargs: next(stub(iter([request]), *args, **kwargs))

        return int((await self._call(refresh, pb.LeaseKeepAliveRequest(ID=lease))).TTL)

    async def revoke(self, lease: int) -> None:
        """See `Store.revoke`."""
        with contextlib.suppress(LeaseGone):
            await self._call(lambda client: client.leasestub.LeaseRevoke, pb.LeaseRevokeRequest(ID=lease))

    async def compact(self, revision: int) -> None:
        """As `EtcdStore.compact`."""
        request = pb.CompactionRequest(revision=revision, physical=True)
        await self._call(lambda client: client.kvstub.Compact, request)

    async def watch(self, prefix: str, *, from_revision: int) -> AsyncGenerator[WatchBatch, None]:
        """See `Store.watch`."""
        next_revision = from_revision or await self._revision() + 1
        backoff = Backoff()
        while True:
            try:
                if await self._revision() + 1 < next_revision:
                    raise RevisionCompacted(next_revision)
                async with contextlib.aclosing(self._watch_once(prefix, next_revision)) as batches:
                    async for batch in batches:
                        backoff.reset()
                        next_revision = batch.revision + 1
                        yield batch
            except RegistryUnavailable as error:
                log.info("watch of %s resumes at revision %d: %s", prefix, next_revision, error)
            await asyncio.sleep(backoff.next_s())

    async def close(self) -> None:
        """See `Store.close`."""
        client, self._client = self._client, None
        if client is not None:
            await asyncio.to_thread(client.close)
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ---- inside ----

    async def _watch_once(self, prefix: str, from_revision: int) -> AsyncGenerator[WatchBatch, None]:
        """The batches of one etcd3 watch, until its connection is lost.

        On a client of its own: closing that is the one way to stop etcd3's watcher thread, which would otherwise spin
        at half a core until the server is back.
        """
        loop = asyncio.get_running_loop()
        responses: asyncio.Queue[Any] = asyncio.Queue()

        def on_response(response: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(responses.put_nowait, response)

        client = await self._in_thread(self._connect)
        try:
            await self._in_thread(
                lambda: client.add_watch_callback(
                    prefix.encode() or b"\0",
                    on_response,
                    range_end=prefix_end(prefix),
                    start_revision=from_revision,
                    progress_notify=True,
                )
            )
            while True:
                response = await responses.get()
                if isinstance(response, Exception):
                    raise self._translate(response)
                events = tuple(self._read_event(event) for event in response.events)
                yield WatchBatch(events, events[-1].kv.mod_revision if events else response.header.revision)
        finally:
            client.close()

    async def _revision(self) -> int:
        request = pb.RangeRequest(key=b"\0", count_only=True)
        return int((await self._call(lambda client: client.kvstub.Range, request)).header.revision)

    def _connect(self) -> Any:
        """A new client to the endpoint in turn. Blocking."""
        host, _, port = self._address.endpoints[self._current].rpartition(":")
        address = self._address
        return make_client(
            self._etcd3,
            host=host,
            port=int(port),
            ca_cert=address.ca_file or None,
            cert_cert=address.cert_file or None,
            cert_key=address.key_file or None,
            timeout=self._timeout_s,
            user=address.user or None,
            password=address.password or None,
            grpc_options=tuple(_GRPC_OPTIONS.items()),
        )

    async def _in_thread(self, run: Callable[[], Any]) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, run)
        except (grpc.RpcError, self._etcd3.Etcd3Exception) as error:
            raise self._translate(error) from error
        except (RuntimeError, ValueError) as error:
            # The pool was shut down, or the channel closed under the call.
            raise RegistryUnavailable(str(error)) from error

    async def _call(
        self, stub_of: Callable[[Any], Callable[..., Any]], request: Any, *, is_repeatable: bool = True
    ) -> Any:
        """One request, on the next endpoint and with a new token if need be, while that does no harm."""
        tries, token_tries = 0, 0
        while True:
            client = await self._ready_client()
            try:
                return await self._in_thread(
                    lambda client=client: stub_of(client)(  # type: ignore[misc]
                        request, self._timeout_s, credentials=client.call_credentials, metadata=client.metadata
                    )
                )
            except RegistryDenied as error:
                token_tries += 1
                if not self._address.user or token_tries > 1:
                    raise
                log.info("logging in again: %s", error)
                await self._drop_client(client)
            except RegistryUnavailable as error:
                tries += 1
                await self._drop_client(client)
                if tries >= max(2, len(self._address.endpoints)) or not (is_repeatable or _was_not_sent(error)):
                    raise

    async def _ready_client(self) -> Any:
        async with self._client_lock:
            if self._client is None:
                self._client = await self._in_thread(self._connect)
            return self._client

    async def _drop_client(self, client: Any) -> None:
        """Let the next call connect anew, to the next endpoint."""
        if self._client is client:
            self._client = None
            self._current = (self._current + 1) % len(self._address.endpoints)
            await asyncio.to_thread(client.close)

    def _read_event(self, event: Any) -> Event:
        return Event(isinstance(event, self._etcd3.events.DeleteEvent), read_kv(event))

    def _translate(self, error: Exception) -> RegistryError:
        """What etcd3 raised, as ours."""
        if isinstance(error, grpc.RpcError):
            code, details = error.code(), error.details() or error.code().name
            failure = read_failure(code, details)
            if isinstance(failure, RegistryError):
                return failure
            return RegistryDenied(details) if failure is Failure.TOKEN else RegistryUnavailable(details)
        if isinstance(error, self._etcd3.exceptions.RevisionCompactedError):
            return RevisionCompacted(error.compacted_revision)
        return RegistryUnavailable(type(error).__name__)


def _was_not_sent(error: RegistryUnavailable) -> bool:
    return read_failure(grpc.StatusCode.UNAVAILABLE, str(error)) is Failure.NOT_DONE
