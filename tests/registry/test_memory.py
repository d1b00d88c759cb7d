"""What the memory store offers beyond the contract: a clock by hand, outages, lost data."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from raymesh.registry.memory import MemoryStore
from raymesh.registry.store import Put, RegistryUnavailable, RevisionCompacted


async def test_leases_live_by_the_clock_passed_in():
    now = [100.0]
    store = MemoryStore(now=lambda: now[0])
    lease = await store.grant(5)
    await store.txn([], [Put("k", b"", lease)])
    now[0] = 104.9
    assert await store.keep_alive(lease) == 5
    now[0] = 109.8
    assert await store.get("k")
    now[0] = 109.9
    assert await store.get("k") is None
    assert await store.keep_alive(lease) == 0


async def test_watchers_hear_of_an_expiry():
    now = [0.0]
    store = MemoryStore(now=lambda: now[0])
    await store.txn([], [Put("k", b"", await store.grant(5))])
    async with contextlib.aclosing(store.watch("k", from_revision=3)) as batches:
        waiting = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0)
        now[0] = 5.0
        store.expire()
        assert [event.is_delete for event in (await waiting).events] == [True]


async def test_an_outage_refuses_calls_and_silences_watches():
    store = MemoryStore()
    await store.txn([], [Put("k", b"1")])
    async with contextlib.aclosing(store.watch("k", from_revision=2)) as batches:
        assert (await anext(batches)).events[0].kv.value == b"1"
        store.is_down = True
        with pytest.raises(RegistryUnavailable):
            await store.get("k")
        waiting = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0)
        store.is_down = False
        await store.txn([], [Put("k", b"2")])
        assert (await waiting).events[0].kv.value == b"2"


async def test_lost_data_ends_watches():
    store = MemoryStore()
    for _ in range(3):
        await store.txn([], [Put("k", b"")])
    async with contextlib.aclosing(store.watch("k", from_revision=5)) as batches:
        waiting = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0)
        store.lose_data()
        with pytest.raises(RevisionCompacted):
            await waiting
    assert store.revision == 1 and (await store.list("")).items == ()
