"""`EtcdStore`: a thin client of etcd's v3 gRPC API on grpc.aio.

Rule of the file: one method of `Store`, one request of etcd. Connections, deadlines and repeats are
`etcd_connection.py`'s, messages and errors `etcd_wire.py`'s, watches `etcd_watch.py`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from raymesh.registry.etcd_connection import (
    COMPACT,
    GRANT,
    KEEP_ALIVE,
    RANGE,
    REVOKE,
    STATUS,
    TXN,
    EtcdAddress,
    EtcdConnection,
    EtcdStats,
)
from raymesh.registry.etcd_watch import watch
from raymesh.registry.etcd_wire import pb, prefix_end, read_kv, read_txn, write_txn
from raymesh.registry.store import (
    Compare,
    KeyValue,
    LeaseGone,
    Listing,
    Op,
    RegistryError,
    RegistryUnavailable,
    RevisionCompacted,
    TxnResult,
    WatchBatch,
    check_txn,
)

#: Keys per page of a listing: about 0.3 MB of the mesh's records, and etcd stays responsive to others meanwhile.
PAGE_KEYS = 1000


class EtcdStore:
    """A `Store` on etcd. Connects on first use, in the running loop; use one per event loop.

    `timeout_s` is the deadline of every call, tries at several endpoints included. During an outage calls fail sooner:
    once no endpoint has answered for a while, after one try of each.
    """

    def __init__(self, address: EtcdAddress, *, timeout_s: float = 3.0, page_keys: int = PAGE_KEYS) -> None:
        self._connection = EtcdConnection(address, timeout_s=timeout_s)
        self._page_keys = page_keys

    @classmethod
    def from_url(cls, url: str, *, timeout_s: float = 3.0) -> EtcdStore:
        """A store for ``etcd://[user:password@]host:port[,host:port]`` or ``etcds://…?ca=FILE&cert=FILE&key=FILE``.

        `timeout_s` is the deadline of each call. Raises `ValueError` on a malformed URL. Does not connect.
        """
        return cls(EtcdAddress.from_url(url), timeout_s=timeout_s)

    @property
    def stats(self) -> EtcdStats:
        """Counters and the round trip time, for metrics. Live: read, do not write."""
        return self._connection.stats

    async def get(self, key: str) -> KeyValue | None:
        """See `Store.get`."""
        response = await self._call(RANGE, pb.RangeRequest(key=key.encode()))
        return read_kv(response.kvs[0]) if response.kvs else None

    async def list(self, prefix: str, *, revision: int = 0) -> Listing:
        """See `Store.list`."""
        items = []
        key, end, limit = prefix.encode() or b"\0", prefix_end(prefix), self._page_keys
        try:
            while True:
                request = pb.RangeRequest(key=key, range_end=end, limit=limit, revision=revision)
                try:
                    page = await self._call(RANGE, request)
                except RegistryError as error:
                    # gRPC's words for a message over our receive limit: values far larger than the mesh's records.
                    if "larger than max" not in str(error) or limit == 1:
                        raise
                    limit = max(1, limit // 8)
                    continue
                # The first page fixes the revision of all.
                revision = revision or page.header.revision
                items += [read_kv(kv) for kv in page.kvs]
                if not page.more:
                    return Listing(tuple(items), revision)
                key = page.kvs[-1].key + b"\0"
        except RevisionCompacted:
            raise RevisionCompacted(revision) from None

    async def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        """See `Store.txn`. With compares it is repeated after a lost answer; without, only when surely not done."""
        check_txn(compares, success, failure)
        request = write_txn(compares, success, failure)
        response, was_repeated = await self._connection.call(TXN, request, is_repeatable=bool(compares))
        if was_repeated and not response.succeeded:
            # Perhaps it was our own first attempt that made the compare fail.
            raise RegistryUnavailable("the outcome of a repeated transaction is not known")
        return read_txn(response)

    async def grant(self, ttl_s: int) -> int:
        """See `Store.grant`. etcd lengthens a TTL below its election timeout (2 s by default)."""
        return int((await self._call(GRANT, pb.LeaseGrantRequest(TTL=ttl_s))).ID)

    async def keep_alive(self, lease: int) -> int:
        """See `Store.keep_alive`."""
        return int((await self._call(KEEP_ALIVE, pb.LeaseKeepAliveRequest(ID=lease))).TTL)

    async def revoke(self, lease: int) -> None:
        """See `Store.revoke`."""
        with contextlib.suppress(LeaseGone):
            await self._call(REVOKE, pb.LeaseRevokeRequest(ID=lease))

    def watch(self, prefix: str, *, from_revision: int) -> AsyncGenerator[WatchBatch, None]:
        """See `Store.watch`."""
        return watch(self._connection, prefix, from_revision)

    async def compact(self, revision: int) -> None:
        """Have etcd forget the history before `revision`. For tests; etcd does it by itself when told to at start."""
        await self._call(COMPACT, pb.CompactionRequest(revision=revision, physical=True))

    async def version(self) -> str:
        """The version of the etcd that answers; a cheap way to see whether one does."""
        return str((await self._call(STATUS, pb.StatusRequest())).version)

    async def close(self) -> None:
        """See `Store.close`."""
        await self._connection.close()

    async def _call(self, method: Any, request: Any) -> Any:
        """A call that does no harm when it is carried out twice."""
        return (await self._connection.call(method, request, is_repeatable=True)).response
