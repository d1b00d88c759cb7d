"""What every store promises. One suite, run against the memory store, etcd through our client, and through etcd3."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import Any

import pytest

from raymesh.registry.store import (
    TXN_OPS_MAX,
    VALUE_BYTES_MAX,
    Compare,
    Delete,
    Event,
    Get,
    LeaseGone,
    Put,
    RequestTooLarge,
    RevisionCompacted,
)


async def put(store: Any, key: str, value: bytes = b"v", lease: int = 0) -> int:
    """Write one key; its mod revision."""
    return (await store.txn([], [Put(key, value, lease)])).revision


async def compact(store: Any, revision: int) -> None:
    result = store.compact(revision)
    if inspect.isawaitable(result):
        await result


async def collect(store: Any, prefix: str, from_revision: int, count: int) -> list[Event]:
    """The first `count` events of a watch."""
    events: list[Event] = []
    async with contextlib.aclosing(store.watch(prefix, from_revision=from_revision)) as batches:
        async for batch in batches:
            events += batch.events
            if len(events) >= count:
                return events
    raise AssertionError("the watch ended")


async def test_a_key_can_be_written_read_and_removed(open_store, prefix):
    async with open_store() as store:
        key = prefix + "k"
        assert await store.get(key) is None
        first = await put(store, key, b"one")
        kv = await store.get(key)
        assert kv == (key, b"one", first, first, 0)
        second = await put(store, key, b"two")
        assert await store.get(key) == (key, b"two", first, second, 0)
        gone = await store.txn([], [Delete(key)])
        assert gone.succeeded and gone.revision == second + 1
        assert await store.get(key) is None
        again = await put(store, key)
        kv = await store.get(key)
        assert (kv.create_revision, kv.mod_revision) == (again, again)


async def test_removing_what_is_absent_changes_nothing(open_store, prefix):
    async with open_store() as store:
        before = await put(store, prefix + "k")
        result = await store.txn([], [Delete(prefix + "other")])
        assert result == (True, before, ())


async def test_compare_and_set(open_store, prefix):
    async with open_store() as store:
        key = prefix + "k"
        won = await store.txn([Compare.absent(key)], [Put(key, b"a")], [Get(key)])
        assert won.succeeded and won.gets == ()
        lost = await store.txn([Compare.absent(key)], [Put(key, b"b")], [Get(key), Get(prefix + "none")])
        assert not lost.succeeded
        assert lost.gets == ((key, b"a", won.revision, won.revision, 0), None)
        assert (await store.txn([Compare(key, mod_revision=won.revision)], [Put(key, b"c")])).succeeded
        assert not (await store.txn([Compare(key, mod_revision=won.revision)], [Put(key, b"d")])).succeeded
        assert (await store.txn([Compare(key, create_revision=won.revision)], [Delete(key)])).succeeded
        # A deleted key is like one that never was, by either revision.
        assert (await store.txn([Compare(key, mod_revision=0), Compare.absent(key)], [Put(key, b"e")])).succeeded


async def test_all_compares_must_hold(open_store, prefix):
    async with open_store() as store:
        revision = await put(store, prefix + "a")
        compares = [Compare(prefix + "a", mod_revision=revision), Compare(prefix + "b", mod_revision=7)]
        assert not (await store.txn(compares, [Put(prefix + "c", b"")])).succeeded
        both = Compare(prefix + "a", mod_revision=revision, create_revision=revision - 1)
        assert not (await store.txn([both], [Put(prefix + "c", b"")])).succeeded
        assert await store.get(prefix + "c") is None


async def test_a_transaction_is_one_revision_and_reads_what_it_wrote(open_store, prefix):
    async with open_store() as store:
        a, b = prefix + "a", prefix + "b"
        revision = await put(store, a, b"old")
        result = await store.txn([], [Get(a), Put(a, b"new"), Put(b, b"new"), Get(a), Get(b)])
        assert result.revision == revision + 1
        assert [kv and (kv.value, kv.mod_revision) for kv in result.gets] == [
            (b"old", revision),
            (b"new", revision + 1),
            (b"new", revision + 1),
        ]


async def test_counters_count_under_contention(open_store, prefix):
    async with open_store() as store:
        key = prefix + "counter"

        async def add(times: int) -> None:
            while times:
                kv = await store.get(key)
                value = int(kv.value) if kv else 0
                compare = Compare(key, mod_revision=kv.mod_revision if kv else 0)
                times -= (await store.txn([compare], [Put(key, b"%d" % (value + 1))])).succeeded

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(add(10))
        assert (await store.get(key)).value == b"40"


async def test_a_listing_is_sorted_and_keeps_to_its_prefix(open_store, prefix):
    async with open_store() as store:
        for name in ("models/b", "models/a/x", "models2/z", "modelr", "models/é", "models/a"):
            revision = await put(store, prefix + name, name.encode())
        listing = await store.list(prefix + "models/")
        assert [kv.key for kv in listing.items] == [
            prefix + n for n in ("models/a", "models/a/x", "models/b", "models/é")
        ]
        assert listing.revision == revision
        assert (await store.list(prefix + "nothing/")).items == ()


async def test_a_listing_of_thousands_is_of_one_revision(open_store, prefix):
    async with open_store() as store:
        keys = [f"{prefix}{number:05}" for number in range(2_500)]
        for begin in range(0, len(keys), TXN_OPS_MAX):
            await store.txn([], [Put(key, b"old") for key in keys[begin : begin + TXN_OPS_MAX]])

        async def disturb() -> None:
            for number in range(0, 2_500, 125):
                await store.txn(
                    [], [Delete(keys[number]), Put(keys[number + 1], b"new"), Put(f"{prefix}x{number}", b"new")]
                )

        listing, _ = await asyncio.gather(store.list(prefix), disturb())
        # Each disturbance leaves the number of keys as it is; half of one would not.
        assert len(listing.items) == 2_500
        assert max(kv.mod_revision for kv in listing.items) <= listing.revision
        assert listing == await store.list(prefix, revision=listing.revision)


async def test_the_past_can_be_listed(open_store, prefix):
    async with open_store() as store:
        first = await put(store, prefix + "a", b"1")
        await put(store, prefix + "a", b"2")
        third = (await store.txn([], [Delete(prefix + "a"), Put(prefix + "b", b"3")])).revision
        assert [kv.value for kv in (await store.list(prefix, revision=first)).items] == [b"1"]
        assert [kv.value for kv in (await store.list(prefix, revision=first + 1)).items] == [b"2"]
        assert [kv.value for kv in (await store.list(prefix, revision=third)).items] == [b"3"]


async def test_compacted_history_is_refused(open_store, prefix):
    async with open_store() as store:
        first = await put(store, prefix + "a")
        last = await put(store, prefix + "a", b"2")
        await compact(store, last)
        with pytest.raises(RevisionCompacted):
            await store.list(prefix, revision=first)
        assert [kv.value for kv in (await store.list(prefix, revision=last)).items] == [b"2"]
        with pytest.raises(RevisionCompacted) as caught:
            await collect(store, prefix, first, 1)
        assert caught.value.compact_revision == last
        # From the compaction revision itself there is no gap.
        assert [event.kv.value for event in await collect(store, prefix, last, 1)] == [b"2"]


async def test_a_revision_the_store_never_reached_is_no_history(open_store, prefix):
    async with open_store() as store:
        revision = await put(store, prefix + "a")
        with pytest.raises(RevisionCompacted):
            await store.list(prefix, revision=revision + 1_000_000)
        with pytest.raises(RevisionCompacted):
            await collect(store, prefix, revision + 1_000_000, 1)


async def test_a_watch_replays_the_past_and_goes_on(open_store, prefix):
    async with open_store() as store:
        first = await put(store, prefix + "a", b"1")
        await put(store, "/test/other", b"not mine")
        second = (await store.txn([], [Delete(prefix + "a"), Put(prefix + "b", b"2")])).revision
        watching = asyncio.create_task(collect(store, prefix, first, 4))
        third = await put(store, prefix + "b", b"3")
        events = await watching
        assert events[0] == (False, (prefix + "a", b"1", first, first, 0))
        assert sorted(events[1:3], key=lambda event: event.kv.key) == [
            (True, (prefix + "a", b"", 0, second, 0)),
            (False, (prefix + "b", b"2", second, second, 0)),
        ]
        assert events[3] == (False, (prefix + "b", b"3", second, third, 0))


async def test_a_watch_can_begin_in_the_very_next_revision(open_store, prefix):
    async with open_store() as store:
        revision = await put(store, prefix + "a", b"1")
        watching = asyncio.create_task(collect(store, prefix, revision + 1, 1))
        await put(store, prefix + "a", b"2")
        assert [event.kv.value for event in await watching] == [b"2"]


async def test_batches_hold_whole_transactions_and_can_be_resumed_after(open_store, prefix):
    async with open_store() as store:
        revisions = [
            (await store.txn([], [Put(f"{prefix}{n}/{key}", b"") for key in range(20)])).revision for n in range(30)
        ]
        seen: list[int] = []
        next_revision = revisions[0]
        while len(seen) < 600:
            # A new watch for every batch: what `revision` promises.
            async with contextlib.aclosing(store.watch(prefix, from_revision=next_revision)) as batches:
                batch = await anext(batches)
            assert not batch.events or batch.revision >= batch.events[-1].kv.mod_revision
            seen += [event.kv.mod_revision for event in batch.events]
            next_revision = batch.revision + 1
        assert seen == [revision for revision in revisions for _ in range(20)]


async def test_watches_do_not_disturb_each_other(open_store, prefix):
    async with open_store() as store:
        revision = await put(store, prefix + "start")
        names = [f"{prefix}{n}/" for n in range(10)]
        tasks = [asyncio.create_task(collect(store, name, revision, 5)) for name in names]
        for _ in range(5):
            for name in names:
                await put(store, name + "k")
        for name, events in zip(names, await asyncio.gather(*tasks), strict=True):
            assert [event.kv.key for event in events] == [name + "k"] * 5


async def test_keys_go_with_their_lease(open_store, prefix):
    async with open_store() as store:
        lease = await store.grant(60)
        revision = await put(store, prefix + "b", b"", lease)
        await put(store, prefix + "a", b"", lease)
        await put(store, prefix + "free", b"", lease)
        await put(store, prefix + "free", b"")
        assert (await store.get(prefix + "a")).lease == lease
        assert (await store.get(prefix + "free")).lease == 0
        assert 0 < await store.keep_alive(lease) <= 60
        await store.revoke(lease)
        assert [kv.key for kv in (await store.list(prefix)).items] == [prefix + "free"]
        events = await collect(store, prefix, revision, 6)
        assert [(event.is_delete, event.kv.key) for event in events[4:]] == [(True, prefix + "a"), (True, prefix + "b")]
        assert events[4].kv.mod_revision == events[5].kv.mod_revision
        assert await store.keep_alive(lease) == 0
        await store.revoke(lease)
        with pytest.raises(LeaseGone):
            await store.txn([], [Put(prefix + "x", b""), Put(prefix + "y", b"", lease)])
        assert await store.get(prefix + "x") is None


async def test_a_lease_that_is_not_renewed_ends(open_store, prefix):
    async with open_store() as store:
        lost, kept = await store.grant(1), await store.grant(1)
        revision = await put(store, prefix + "lost", b"", lost)
        await put(store, prefix + "kept", b"", kept)
        watching = asyncio.create_task(collect(store, prefix, revision + 2, 1))
        while not watching.done():
            assert await store.keep_alive(kept) > 0
            await asyncio.wait({watching}, timeout=0.2)
        assert [(event.is_delete, event.kv.key) for event in watching.result()] == [(True, prefix + "lost")]
        assert await store.keep_alive(lost) == 0
        assert await store.keep_alive(kept) > 0
        assert await store.get(prefix + "kept")
        await store.revoke(kept)


async def test_lease_ids_differ(open_store):
    async with open_store() as store:
        leases = [await store.grant(60) for _ in range(20)]
        assert len(set(leases)) == 20 and all(lease > 0 for lease in leases)
        for lease in leases:
            await store.revoke(lease)


async def test_what_is_too_large_is_refused_unsent(open_store, prefix):
    async with open_store() as store:
        full = [Put(f"{prefix}{n}", b"") for n in range(TXN_OPS_MAX)]
        compares = [Compare.absent(op.key) for op in full]
        assert (await store.txn(compares, full, [Get(op.key) for op in full])).succeeded
        one_more = Put(prefix + "more", b"")
        with pytest.raises(RequestTooLarge):
            await store.txn([], [*full, one_more])
        with pytest.raises(RequestTooLarge):
            await store.txn([*compares, Compare.absent(prefix + "more")], [one_more])
        with pytest.raises(RequestTooLarge):
            await store.txn([], [Put(prefix + "more", b"x" * (VALUE_BYTES_MAX + 1))])
        with pytest.raises(RequestTooLarge):
            await store.txn([], [one_more, Delete(prefix + "more")])
        assert await store.get(prefix + "more") is None
        large = b"\0\xff" * (VALUE_BYTES_MAX // 2)
        await put(store, prefix + "large", large)
        assert (await store.get(prefix + "large")).value == large
