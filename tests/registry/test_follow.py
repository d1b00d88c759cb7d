"""A followed view: true after outages, compaction, lost events and lost data."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from raymesh.registry.follow import follow
from raymesh.registry.keys import Keys
from raymesh.registry.memory import MemoryStore
from raymesh.registry.records import ModelRecord
from raymesh.registry.store import Delete, Put, WatchBatch
from raymesh.registry.view import Change, MeshView, ModelDeleted, ModelPut

KEYS = Keys("m")


def model(name: str) -> Put:
    return Put(KEYS.model("t", name), ModelRecord(tenant="t", id=name, type="x", path="p").encode())


class Followed:
    """A view that is followed, and all it told."""

    def __init__(self, store: Any, **options: Any) -> None:
        self.view = MeshView(KEYS)
        self.synced = asyncio.Event()
        self.changes: list[Change] = []
        self._follow = follow(store, KEYS.prefix, self.view, self.changes.extend, synced=self.synced, **options)

    async def __aenter__(self) -> Followed:
        self.task = asyncio.create_task(self._follow)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


async def test_it_lists_then_watches(open_store, until):
    async with open_store() as store:
        await store.txn([], [model("a")])
        async with Followed(store) as followed:
            await followed.synced.wait()
            assert set(followed.view.models) == {"t/a"} and followed.view.is_synced
            assert [type(change) for change in followed.changes] == [ModelPut]
            await store.txn([], [model("b"), Delete(KEYS.model("t", "a"))])
            await until(lambda: set(followed.view.models) == {"t/b"})
        await store.txn([], [Delete(KEYS.model("t", "b"))])


async def test_it_waits_for_a_store_that_is_away_at_the_start(until):
    store = MemoryStore()
    await store.txn([], [model("a")])
    store.is_down = True
    async with Followed(store) as followed:
        await asyncio.sleep(0)
        assert not followed.view.is_synced and not followed.synced.is_set()
        store.is_down = False
        await followed.synced.wait()
        assert set(followed.view.models) == {"t/a"}


async def test_an_outage_leaves_the_view_as_it_was(until):
    store = MemoryStore()
    await store.txn([], [model("a")])
    async with Followed(store) as followed:
        await followed.synced.wait()
        store.is_down = True
        for _ in range(10):
            await asyncio.sleep(0)
        assert set(followed.view.models) == {"t/a"} and len(followed.changes) == 1
        store.is_down = False
        await store.txn([], [model("b")])
        await until(lambda: set(followed.view.models) == {"t/a", "t/b"})


async def test_deletes_hidden_by_compaction_are_told(until):
    store = MemoryStore()
    await store.txn([], [model("a"), model("b")])
    async with Followed(store) as followed:
        await followed.synced.wait()
        followed.changes.clear()
        # No await in between: the watch sees none of this before it is compacted.
        await store.txn([], [Delete(KEYS.model("t", "a")), model("c")])
        await store.txn([], [model("d")])
        store.compact(store.revision)
        await until(lambda: "t/d" in followed.view.models)
        assert set(followed.view.models) == {"t/b", "t/c", "t/d"}
        assert {(type(change), change.name) for change in followed.changes} == {
            (ModelDeleted, "t/a"),
            (ModelPut, "t/c"),
            (ModelPut, "t/d"),
        }


async def test_a_store_that_lost_its_data_is_believed(until):
    store = MemoryStore()
    for name in "abc":
        await store.txn([], [model(name)])
    async with Followed(store) as followed:
        await followed.synced.wait()
        store.lose_data()
        await store.txn([], [model("z")])
        await until(lambda: set(followed.view.models) == {"t/z"})
        await store.txn([], [model("y")])
        await until(lambda: set(followed.view.models) == {"t/z", "t/y"})


class LeakyStore(MemoryStore):
    """Its watches lose the events of chosen keys."""

    lost: frozenset[str] = frozenset()

    async def watch(self, prefix: str, *, from_revision: int) -> AsyncGenerator[WatchBatch, None]:
        async with contextlib.aclosing(super().watch(prefix, from_revision=from_revision)) as batches:
            async for batch in batches:
                yield batch._replace(events=tuple(e for e in batch.events if e.kv.key not in self.lost))


async def test_the_audit_finds_lost_events_and_says_so(until):
    store, differences = LeakyStore(), []
    await store.txn([], [model("a"), model("b")])
    async with Followed(store, audit_period_s=0.05, on_difference=differences.extend) as followed:
        await followed.synced.wait()
        store.lost = frozenset({KEYS.model("t", "a"), KEYS.model("t", "c")})
        await store.txn([], [Delete(KEYS.model("t", "a")), model("c"), model("d")])
        await until(lambda: set(followed.view.models) == {"t/b", "t/c", "t/d"})
        assert {(type(change), change.name) for change in differences} == {(ModelDeleted, "t/a"), (ModelPut, "t/c")}


async def test_the_audit_of_a_true_watch_finds_nothing_under_traffic(until):
    store, differences = MemoryStore(), []
    async with Followed(store, audit_period_s=0.001, on_difference=differences.extend) as followed:
        await followed.synced.wait()
        for number in range(300):
            name = f"m{number % 20}"
            await store.txn([], [model(name) if number % 3 else Delete(KEYS.model("t", name))])
            await asyncio.sleep(0.001 if number % 10 == 0 else 0)
        revision = store.revision
        await until(lambda: followed.view.revision == revision)
        assert differences == []


async def test_a_defect_of_the_listener_is_not_swallowed(until):
    store = MemoryStore()

    def listen(changes: tuple[Change, ...]) -> None:
        raise ZeroDivisionError

    await store.txn([], [model("a")])
    with pytest.raises(ZeroDivisionError):
        await follow(store, KEYS.prefix, MeshView(KEYS), listen)
