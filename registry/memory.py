"""`MemoryStore`: etcd's semantics in one process, for tests and the simulator.

Rule of the file: same calls, same answers, every time. No randomness, no clock but the one passed in.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from raymesh.registry.store import (
    Compare,
    Event,
    Get,
    KeyValue,
    LeaseGone,
    Listing,
    Op,
    Put,
    RegistryUnavailable,
    RevisionCompacted,
    TxnResult,
    WatchBatch,
    check_txn,
)

#: How often a waiting watch looks whether leases expired, when the clock passed in is not the loop's.
_EXPIRY_CHECK_MIN_S = 0.02


class _Step(NamedTuple):
    """One event with what the key held before, so that old revisions can be read by undoing."""

    event: Event
    before: KeyValue | None


class _Commit(NamedTuple):
    revision: int
    steps: tuple[_Step, ...]


@dataclass(slots=True)
class _Lease:
    ttl_s: int
    expires_at: float
    # A dict as an ordered set: deterministic, unlike a set of strings.
    keys: dict[str, None] = field(default_factory=dict)


class MemoryStore:
    """A `Store` that lives in this process and one event loop.

    `now` gives seconds on any steady clock; leases live by it. Call `expire()` after moving a clock by hand. Revisions
    begin at 1 as in etcd. While `is_down` is True every call raises `RegistryUnavailable` and watches fall silent,
    but leases keep ageing.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._revision = 1
        self._compacted = 0
        self._kvs: dict[str, KeyValue] = {}
        #: Every transaction that changed something since the last compaction, by ascending revision.
        self._history: list[_Commit] = []
        self._leases: dict[int, _Lease] = {}
        self._last_lease = 0
        self._watchers: set[asyncio.Event] = set()
        self._is_down = False

    # ---- for tests and the simulator ----

    @property
    def is_down(self) -> bool:
        """Whether the store plays dead."""
        return self._is_down

    @is_down.setter
    def is_down(self, value: bool) -> None:
        self._is_down = value
        self._wake()

    @property
    def revision(self) -> int:
        """The revision of the last change."""
        return self._revision

    def expire(self) -> None:
        """Delete the keys of leases whose time is over, oldest expiry first. Done before every call too."""
        now = self._now()
        due = sorted((lease.expires_at, number) for number, lease in self._leases.items() if lease.expires_at <= now)
        for _, number in due:
            self._end(number)

    def compact(self, revision: int) -> None:
        """Forget the history before `revision`."""
        self._compacted = max(self._compacted, min(revision, self._revision))
        del self._history[: self._index(self._compacted)]
        self._wake()

    def lose_data(self) -> None:
        """Become an empty, new store at revision 1: the disk was lost."""
        self._revision, self._compacted = 1, 0
        self._kvs.clear()
        self._history.clear()
        self._leases.clear()
        self._wake()

    # ---- Store ----

    async def get(self, key: str) -> KeyValue | None:
        """See `Store.get`."""
        self._begin()
        return self._kvs.get(key)

    async def list(self, prefix: str, *, revision: int = 0) -> Listing:
        """See `Store.list`."""
        self._begin()
        if revision and (revision < self._compacted or revision > self._revision):
            raise RevisionCompacted(self._compacted)
        kvs = self._kvs_at(revision) if revision else self._kvs
        items = tuple(kvs[key] for key in sorted(kvs) if key.startswith(prefix))
        return Listing(items, revision or self._revision)

    async def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        """See `Store.txn`."""
        self._begin()
        check_txn(compares, success, failure)
        succeeded = all(self._holds(compare) for compare in compares)
        ops = success if succeeded else failure
        for op in ops:
            if isinstance(op, Put) and op.lease and op.lease not in self._leases:
                raise LeaseGone(f"lease {op.lease:x} does not exist")
        gets: list[KeyValue | None] = []
        steps: list[_Step] = []
        for op in ops:
            if isinstance(op, Get):
                gets.append(self._kvs.get(op.key))
            elif isinstance(op, Put):
                steps.append(self._put(op))
            elif op.key in self._kvs:
                steps.append(self._delete(op.key))
        self._commit(steps)
        return TxnResult(succeeded, self._revision, tuple(gets))

    async def grant(self, ttl_s: int) -> int:
        """See `Store.grant`."""
        self._begin()
        self._last_lease += 1
        self._leases[self._last_lease] = _Lease(ttl_s, self._now() + ttl_s)
        self._wake()
        return self._last_lease

    async def keep_alive(self, lease: int) -> int:
        """See `Store.keep_alive`."""
        self._begin()
        held = self._leases.get(lease)
        if held is None:
            return 0
        held.expires_at = self._now() + held.ttl_s
        return held.ttl_s

    async def revoke(self, lease: int) -> None:
        """See `Store.revoke`."""
        self._begin()
        if lease in self._leases:
            self._end(lease)

    async def watch(self, prefix: str, *, from_revision: int) -> AsyncGenerator[WatchBatch, None]:
        """See `Store.watch`."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        next_revision = from_revision or self._revision + 1
        try:
            while True:
                self.expire()
                changed.clear()
                if not self._is_down:
                    if next_revision < self._compacted or next_revision > self._revision + 1:
                        raise RevisionCompacted(self._compacted)
                    commits = self._history[self._index(next_revision) :]
                    next_revision = self._revision + 1
                    events = [s.event for c in commits for s in c.steps if s.event.kv.key.startswith(prefix)]
                    if events:
                        yield WatchBatch(tuple(events), next_revision - 1)
                        continue
                await self._wait(changed)
        finally:
            self._watchers.discard(changed)

    async def close(self) -> None:
        """See `Store.close`."""

    # ---- inside ----

    def _begin(self) -> None:
        self.expire()
        if self._is_down:
            raise RegistryUnavailable("the store is down")

    async def _wait(self, changed: asyncio.Event) -> None:
        """Until something changed or a lease may have expired."""
        if not self._leases:
            await changed.wait()
            return
        due_in_s = min(lease.expires_at for lease in self._leases.values()) - self._now()
        try:
            async with asyncio.timeout(max(due_in_s, _EXPIRY_CHECK_MIN_S)):
                await changed.wait()
        except TimeoutError:
            pass

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    def _index(self, revision: int) -> int:
        """Where in the history the commits of `revision` and later begin."""
        return bisect.bisect_left(self._history, revision, key=lambda commit: commit.revision)

    def _kvs_at(self, revision: int) -> dict[str, KeyValue]:
        kvs = dict(self._kvs)
        for commit in reversed(self._history[self._index(revision + 1) :]):
            for event, before in reversed(commit.steps):
                if before is None:
                    del kvs[event.kv.key]
                else:
                    kvs[event.kv.key] = before
        return kvs

    def _holds(self, compare: Compare) -> bool:
        kv = self._kvs.get(compare.key)
        mod_revision, create_revision = (kv.mod_revision, kv.create_revision) if kv else (0, 0)
        return compare.mod_revision in (None, mod_revision) and compare.create_revision in (None, create_revision)

    def _put(self, op: Put) -> _Step:
        before = self._kvs.get(op.key)
        revision = self._revision + 1
        kv = KeyValue(op.key, op.value, before.create_revision if before else revision, revision, op.lease)
        if before and before.lease and before.lease in self._leases:
            self._leases[before.lease].keys.pop(op.key, None)
        if op.lease:
            self._leases[op.lease].keys[op.key] = None
        self._kvs[op.key] = kv
        return _Step(Event(False, kv), before)

    def _delete(self, key: str) -> _Step:
        before = self._kvs.pop(key)
        if before.lease in self._leases:
            self._leases[before.lease].keys.pop(key, None)
        return _Step(Event(True, KeyValue(key, b"", 0, self._revision + 1)), before)

    def _end(self, lease: int) -> None:
        keys = sorted(self._leases.pop(lease).keys)
        self._commit([self._delete(key) for key in keys])

    def _commit(self, steps: Sequence[_Step]) -> None:
        if steps:
            self._revision += 1
            self._history.append(_Commit(self._revision, tuple(steps)))
            self._wake()
