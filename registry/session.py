"""`Session`: this process's presence in the registry, one lease and the keys on it.

Rule of the file: what was published stays published, across outages, restarts and data loss of the store, until it is
unpublished; and a process that may have been declared dead does not believe it is alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from raymesh.registry.backoff import Backoff
from raymesh.registry.for_ever import for_ever
from raymesh.registry.store import (
    TXN_OPS_MAX,
    VALUE_BYTES_MAX,
    Compare,
    Delete,
    Get,
    KeyValue,
    LeaseGone,
    Op,
    Put,
    RegistryDenied,
    RegistryError,
    RegistryUnavailable,
    RequestTooLarge,
    Store,
)

log = logging.getLogger(__name__)

#: Every so many renewals one published key is read back: etcd before 3.4.38 may renew a revoked lease without a word.
_READ_BACK_EVERY = 10


def steady_s() -> float:
    """Seconds on a clock that goes on while this process, or the whole machine, is frozen."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass(slots=True)
class _Key:
    """What should be in the store under one key, and what is known to be."""

    #: None: the key is to be deleted.
    value: bytes | None
    compare: Compare | None
    #: Grows with every publish and unpublish: tells a write in flight from what is wanted by now.
    version: int = 0
    #: Mod revision of our last write; 0 when not known. Guards deletes: the key may be another's by now.
    revision: int = 0
    waiters: list[asyncio.Future[bool]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Write:
    """One key's part of a transaction."""

    key: str
    version: int
    op: Put | Delete
    compare: Compare | None


class Session:
    """One lease, kept alive, and the keys this process publishes on it.

    Use: ``session = Session(store); await session.start(); ok = await session.publish(key, value)``. All of it in one
    event loop. `publish` and `unpublish` may be called before `start`.

    `on_epoch(epoch)` is awaited after each new lease, the first included, before the keys are published on it: the
    place to publish a record that carries the epoch. It has `ttl_s` seconds and must not await a publish.
    `on_dropped(key)` is called when a key was given up because its compare did not hold. `now` gives seconds on a
    steady clock that goes on while the process is frozen.
    """

    def __init__(
        self,
        store: Store,
        *,
        ttl_s: int = 5,
        on_epoch: Callable[[int], Awaitable[None]] | None = None,
        on_dropped: Callable[[str], None] | None = None,
        now: Callable[[], float] = steady_s,
    ) -> None:
        self._store, self._ttl_s, self._now = store, ttl_s, now
        self._on_epoch, self._on_dropped = on_epoch, on_dropped
        self._epoch = 0
        self._trouble = "no answer"
        self._is_fenced = True
        #: When the event loop was last seen turning.
        self._beat_at = now()
        self._keys: dict[str, _Key] = {}
        #: Keys whose store value may differ from the wanted one, in the order they were asked for.
        self._dirty: dict[str, None] = {}
        self._has_dirty = asyncio.Event()
        self._needs_renewal = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def epoch(self) -> int:
        """The id of the present lease; 0 before the first one."""
        return self._epoch

    @property
    def is_fenced(self) -> bool:
        """Whether this process must refuse work: it may have been declared dead and has no new lease yet.

        True from the moment the store says that the lease is gone, or this process finds that it was frozen for longer
        than the TTL, until a new lease is granted. A store that cannot be reached does not fence. True before `start`
        and after `close`.
        """
        # Asked here too, not only by the beat: after a freeze a request may be served before any timer runs.
        if not self._is_fenced and self._now() - self._beat_at > self._ttl_s:
            self._fence(f"this process was frozen for over {self._ttl_s} s")
        return self._is_fenced

    async def start(self, deadline_s: float = 10.0) -> None:
        """Get the first lease and begin to keep it alive.

        Raises `RegistryUnavailable` after `deadline_s` seconds, `RegistryDenied` at once.
        """
        try:
            async with asyncio.timeout(deadline_s):
                await self._renew()
        except TimeoutError:
            raise RegistryUnavailable(f"no lease from the registry in {deadline_s:g} s: {self._trouble}") from None
        runs = (self._beat, self._keep_lease, self._keep_keys)
        self._tasks = [asyncio.create_task(for_ever(run)) for run in runs]

    def publish(self, key: str, value: bytes, *, compare: Compare | None = None) -> Awaitable[bool]:
        """Keep `key` = `value` in the store on the session's lease, from now on and after every new lease.

        Takes effect without awaiting (sent in the next loop turn, many keys in one transaction). The awaitable gives
        True once the store has it, False when `compare` did not hold: then the key is dropped and nothing was written.
        While the store is away it waits. A newer `publish` or `unpublish` of the key overtakes an older one: the older
        awaitable gets the newer one's outcome. Awaiting is optional. Raises `RequestTooLarge` for a huge value.
        """
        if len(value) > VALUE_BYTES_MAX:
            raise RequestTooLarge(f"{key}: {len(value)} bytes, at most {VALUE_BYTES_MAX}")
        return self._want(key, value, compare)

    def unpublish(self, key: str) -> Awaitable[bool]:
        """Take `key` out of the store, now and for good. The awaitable gives True once it is known to be gone.

        A key that has become another session's meanwhile (the leader's, say) is left alone.
        """
        if key not in self._keys:
            done = asyncio.get_running_loop().create_future()
            done.set_result(True)
            return done
        return self._want(key, None, None)

    async def close(self) -> None:
        """End the lease (its keys go with it), if the store can be reached, and all tasks. Never raises."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._is_fenced = True
        for key in list(self._keys):
            self._settle(key, False)
        self._keys.clear()
        self._dirty.clear()
        if self._epoch:
            with contextlib.suppress(RegistryError):
                await self._store.revoke(self._epoch)

    # ---- the lease ----

    async def _beat(self) -> None:
        """Notice freezes of the process or its loop, within a tenth of the TTL of waking up."""
        self._beat_at = self._now()
        while True:
            await asyncio.sleep(self._ttl_s / 10)
            gap_s = self._now() - self._beat_at
            if gap_s > self._ttl_s:
                self._fence(f"this process was frozen for {gap_s:.1f} s")
            elif gap_s > self._ttl_s / 3:
                # Not long enough to know, but the lease may have ended: ask at once.
                self._needs_renewal.set()
            self._beat_at = self._now()

    async def _keep_lease(self) -> None:
        renewals = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._ttl_s / 3):
                    await self._needs_renewal.wait()
            self._needs_renewal.clear()
            try:
                if not self.is_fenced and await self._store.keep_alive(self._epoch) <= 0:
                    self._fence("the lease ended")
                if self.is_fenced:
                    await self._renew()
                    continue
                renewals += 1
                if renewals % _READ_BACK_EVERY == 0:
                    await self._read_back(renewals // _READ_BACK_EVERY)
            except RegistryError as error:
                # Away, not gone: the lease is renewed, or found to be gone, when the store is back.
                log.warning("the lease could not be renewed: %s", error)

    async def _renew(self) -> None:
        """Get a new lease, however long it takes, and have everything published on it."""
        backoff = Backoff()
        while True:
            try:
                epoch = await self._store.grant(self._ttl_s)
                break
            except RegistryDenied:
                if self._epoch == 0:
                    raise
                log.exception("no new lease")
            except RegistryError as error:
                self._trouble = str(error)
                log.info("no new lease yet: %s", error)
            await asyncio.sleep(backoff.next_s())
        self._epoch = epoch
        self._publish_all()
        if self._on_epoch:
            try:
                async with asyncio.timeout(self._ttl_s):
                    await self._on_epoch(epoch)
            except Exception:
                log.exception("on_epoch failed")
        self._beat_at = self._now()
        self._is_fenced = False
        self._has_dirty.set()
        log.info("lease %x", epoch)

    def _fence(self, why: str) -> None:
        if not self._is_fenced:
            log.warning("refusing work until there is a new lease: %s", why)
        self._is_fenced = True
        self._needs_renewal.set()

    async def _read_back(self, turn: int) -> None:
        """Look whether one of our keys is really there; if not, publish all again (which finds out about the lease)."""
        clean = [key for key, state in self._keys.items() if state.value is not None and key not in self._dirty]
        if not clean:
            return
        key = clean[turn % len(clean)]
        state = self._keys[key]
        version = state.version
        kv = await self._store.get(key)
        if (kv is None or kv.lease != self._epoch) and state.version == version and self._keys.get(key) is state:
            log.error("%s has vanished from the registry; publishing everything again", key)
            self._publish_all()

    def _publish_all(self) -> None:
        for key, state in self._keys.items():
            if state.value is not None:
                self._dirty[key] = None
        self._has_dirty.set()

    # ---- the keys ----

    def _want(self, key: str, value: bytes | None, compare: Compare | None) -> asyncio.Future[bool]:
        state = self._keys.setdefault(key, _Key(value, compare))
        state.value, state.compare = value, compare
        state.version += 1
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        # Those that nobody waits for any more need not pile up during a long outage.
        state.waiters = [*(w for w in state.waiters if not w.done()), waiter]
        self._dirty[key] = None
        self._has_dirty.set()
        return waiter

    def _settle(self, key: str, outcome: bool) -> None:
        waiters, self._keys[key].waiters = self._keys[key].waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(outcome)

    async def _keep_keys(self) -> None:
        """Bring the store to what is wanted, a transaction at a time."""
        backoff = Backoff()
        while True:
            await self._has_dirty.wait()
            if self._is_fenced:
                # Nothing may be written on a lease that is gone; `_renew` wakes us.
                self._has_dirty.clear()
                continue
            keys = self._next_keys()
            if not keys:
                self._has_dirty.clear()
                continue
            for key in keys:
                del self._dirty[key]
            try:
                await self._write(await self._prepare(keys))
                backoff.reset()
            except RegistryError as error:
                self._dirty.update(dict.fromkeys(key for key in keys if key in self._keys))
                if isinstance(error, LeaseGone):
                    self._fence(str(error))
                else:
                    log.warning("%d keys wait to be published: %s", len(self._dirty), error)
                    await asyncio.sleep(backoff.next_s())

    def _next_keys(self) -> list[str]:
        """As many dirty keys as fit into one transaction."""
        keys: list[str] = []
        room_bytes = VALUE_BYTES_MAX
        for key in self._dirty:
            room_bytes -= len(self._keys[key].value or b"")
            if len(keys) == TXN_OPS_MAX or (keys and room_bytes < 0):
                break
            keys.append(key)
        return keys

    async def _prepare(self, keys: list[str]) -> list[_Write]:
        """What to write for each key, as wanted at this moment."""
        writes = []
        for key in keys:
            state = self._keys[key]
            if state.value is None and state.revision == 0:
                # Perhaps published by a transaction whose outcome we never learnt.
                version, kv = state.version, await self._store.get(key)
                if state.version == version and (kv is None or kv.lease != self._epoch):
                    self._finish(key, version, kv.mod_revision if kv else 0)
                    continue
                state.revision = kv.mod_revision if kv else 0
            if state.value is None:
                compare = Compare(key, mod_revision=state.revision)
                writes.append(_Write(key, state.version, Delete(key), compare))
            else:
                writes.append(_Write(key, state.version, Put(key, state.value, self._epoch), state.compare))
        return writes

    async def _write(self, writes: list[_Write]) -> None:
        """Write them in one transaction; when a compare fails, in halves, so that each key gets its own outcome."""
        if not writes:
            return
        compares = [write.compare for write in writes if write.compare]
        is_single = len(writes) == 1
        read_back: list[Op] = [Get(writes[0].key)] if is_single else []
        result = await self._store.txn(compares, [write.op for write in writes], read_back)
        if result.succeeded:
            for write in writes:
                self._finish(write.key, write.version, result.revision)
        elif not is_single:
            half = len(writes) // 2
            await self._write(writes[:half])
            await self._write(writes[half:])
        else:
            self._lose(writes[0], result.gets[0])

    def _lose(self, write: _Write, found: KeyValue | None) -> None:
        """The compare of one key did not hold: find out what that means."""
        state = self._keys[write.key]
        is_ours = found is not None and found.lease == self._epoch
        if isinstance(write.op, Delete):
            if found and is_ours:
                # Ours, but of another write than we knew: try again with what we know now.
                state.revision = found.mod_revision
                self._dirty[write.key] = None
            else:
                self._finish(write.key, write.version, 0)
        elif found and is_ours and found.value == write.op.value:
            # An earlier try had worked after all.
            self._finish(write.key, write.version, found.mod_revision)
        elif state.version == write.version:
            self._settle(write.key, False)
            if is_ours:
                # What we had there before: nobody stands behind it any more.
                self._want(write.key, None, None)
            else:
                del self._keys[write.key]
                self._dirty.pop(write.key, None)
            if self._on_dropped:
                self._on_dropped(write.key)

    def _finish(self, key: str, version: int, revision: int) -> None:
        """`version` of `key` is in the store. Settled, unless something newer is wanted by now (then it is dirty)."""
        state = self._keys[key]
        state.revision = revision
        if state.version == version:
            self._settle(key, True)
            if state.value is None:
                del self._keys[key]
