"""Registrations that share transactions: each gets its own outcome."""

from __future__ import annotations

import asyncio

import pytest

from raymesh.mesh.registrar import BATCH_BYTES_MAX, BATCH_MAX, Registrar
from raymesh.registry.memory import MemoryStore
from raymesh.registry.store import Put, RegistryUnavailable


class CountingStore(MemoryStore):
    """Counts transactions, and takes a loop turn for each, as a network would."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    async def txn(self, compares, success, failure=()):
        self.sizes.append(len(success))
        await asyncio.sleep(0)
        return await super().txn(compares, success, failure)


def run(body):
    async def main():
        store = CountingStore()
        await body(store, Registrar(store))
        await store.close()

    asyncio.run(main())


def test_many_at_once_share_transactions():
    async def body(store, registrar):
        created = await asyncio.gather(*(registrar.create(f"k{n}", b"v") for n in range(200)))
        assert all(c.present is None and c.revision > 0 for c in created)
        for n, c in enumerate(created):
            assert (await store.get(f"k{n}")).create_revision == c.revision
        # One at once, the others while it is under way: 1 + 64 + 64 + 64 + 7.
        assert sorted(store.sizes) == [1, 7, 64, 64, 64]

    run(body)


def test_one_that_is_there_does_not_hold_up_the_others():
    async def body(store, registrar):
        await store.txn([], [Put("k5", b"old")])
        outcomes = await asyncio.gather(*(registrar.create(f"k{n}", b"new") for n in range(20)))
        for n, outcome in enumerate(outcomes):
            value = (await store.get(f"k{n}")).value
            if n == 5:
                assert (outcome.present.value, value) == (b"old", b"old")
            else:
                assert (outcome.present, value) == (None, b"new")

    run(body)


def test_many_together_are_sent_in_full_batches_and_each_has_its_outcome():
    async def body(store, registrar):
        await store.txn([], [Put("k5", b"old")])
        store.sizes.clear()
        outcomes = await registrar.create_many((f"k{n}", b"new") for n in range(200))
        assert [n for n, outcome in enumerate(outcomes) if outcome.present is not None] == [5]
        assert outcomes[5].present.value == b"old"
        for n, outcome in enumerate(outcomes):
            assert n == 5 or (await store.get(f"k{n}")).create_revision == outcome.revision
        # The 63 others of the first batch go once more.
        assert sum(store.sizes) == 200 + 63
        assert len(store.sizes) == 5
        assert await registrar.create_many([]) == []

    run(body)


def test_many_together_and_an_unreachable_store():
    async def body(store, registrar):
        store.is_down = True
        outcomes = await registrar.create_many((f"k{n}", b"v") for n in range(100))
        assert {type(outcome) for outcome in outcomes} == {RegistryUnavailable}

    run(body)


def test_what_a_caller_that_left_had_not_sent_yet_is_not_sent():
    async def body(store, registrar):
        task = asyncio.create_task(registrar.create_many((f"k{n}", b"v") for n in range(500)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await registrar.create("last", b"v")).present is None
        # Two full batches were under way.
        assert sum(store.sizes) == 2 * BATCH_MAX + 1

    run(body)


def test_of_several_for_one_key_the_first_wins():
    async def body(store, registrar):
        outcomes = await asyncio.gather(*(registrar.create("k", str(n).encode()) for n in range(10)))
        assert [outcome.present is None for outcome in outcomes] == [True] + [False] * 9
        assert {outcome.present.value for outcome in outcomes[1:]} == {b"0"}

    run(body)


def test_large_records_do_not_travel_in_crowds():
    async def body(store, registrar):
        value = b"x" * (BATCH_BYTES_MAX // 2)
        await asyncio.gather(*(registrar.create(f"k{n}", value) for n in range(10)))
        assert max(store.sizes) == 2

    run(body)


def test_an_unreachable_store_is_told_to_everyone():
    async def body(store, registrar):
        store.is_down = True
        outcomes = await asyncio.gather(*(registrar.create(f"k{n}", b"v") for n in range(100)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {RegistryUnavailable}
        store.is_down = False
        assert (await registrar.create("k0", b"v")).present is None

    run(body)


def test_a_caller_that_leaves_changes_nothing_for_the_others():
    async def body(store, registrar):
        tasks = [asyncio.create_task(registrar.create(f"k{n}", b"v")) for n in range(10)]
        await asyncio.sleep(0)
        tasks[5].cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(outcomes[5], asyncio.CancelledError)
        assert sum(getattr(outcome, "revision", 0) > 0 for outcome in outcomes) == 9
        with pytest.raises(asyncio.CancelledError):
            await tasks[5]

    run(body)
