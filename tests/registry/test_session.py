"""A session: what is published stays, and a process that may have been declared dead knows it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from raymesh.registry.memory import MemoryStore
from raymesh.registry.session import Session
from raymesh.registry.store import (
    TXN_OPS_MAX,
    Compare,
    Delete,
    Op,
    Put,
    RegistryReadOnly,
    RegistryUnavailable,
    RequestTooLarge,
    TxnResult,
)


async def values(store: Any, prefix: str = "") -> dict[str, bytes]:
    return {kv.key.removeprefix(prefix): kv.value for kv in (await store.list(prefix)).items}


async def test_publish_and_unpublish(open_store, prefix):
    async with open_store() as store:
        session = Session(store)
        assert session.is_fenced and session.epoch == 0
        await session.start()
        assert not session.is_fenced and session.epoch != 0
        assert await session.publish(prefix + "a", b"1")
        assert (await store.get(prefix + "a")).lease == session.epoch
        first, second = session.publish(prefix + "a", b"2"), session.publish(prefix + "b", b"3")
        assert await first and await second
        assert await values(store, prefix) == {"a": b"2", "b": b"3"}
        assert await session.unpublish(prefix + "a")
        assert await session.unpublish(prefix + "never-there")
        assert await values(store, prefix) == {"b": b"3"}
        await session.close()
        assert await values(store, prefix) == {}
        assert session.is_fenced
        await session.close()


async def test_many_keys_go_in_few_transactions(open_store, prefix):
    async with open_store() as store:
        session = Session(store)
        await session.start()
        before = (await store.txn([], [])).revision
        keys = [f"{prefix}{n}" for n in range(1_000)]
        assert all(await asyncio.gather(*(session.publish(key, b"v") for key in keys)))
        assert (await store.txn([], [])).revision - before <= -(-1_000 // TXN_OPS_MAX) + 1
        assert len(await values(store, prefix)) == 1_000
        assert all(await asyncio.gather(*(session.unpublish(key) for key in keys)))
        assert await values(store, prefix) == {}
        await session.close()


async def test_a_compare_that_fails_drops_its_key_only(open_store, prefix):
    async with open_store() as store:
        model = prefix + "model"
        generation = (await store.txn([], [Put(model, b"")])).revision
        dropped: list[str] = []
        session = Session(store, on_dropped=dropped.append)
        await session.start()
        outcomes = {
            name: session.publish(prefix + name, b"", compare=Compare(model, create_revision=wanted))
            for name, wanted in [("a", generation), ("b", generation - 1), ("c", generation), ("d", 0)]
        }
        outcomes["e"] = session.publish(prefix + "e", b"")
        assert {name: await outcome for name, outcome in outcomes.items()} == {
            "a": True, "b": False, "c": True, "d": False, "e": True,
        }  # fmt: skip
        assert set(await values(store, prefix)) == {"model", "a", "c", "e"}
        assert sorted(dropped) == [prefix + "b", prefix + "d"]
        await session.close()


async def test_the_newest_value_wins_and_all_who_wait_are_answered():
    store = MemoryStore()
    session = Session(store)
    await session.start()
    outcomes = [session.publish("k", b"%d" % number) for number in range(100)]
    assert all(await asyncio.gather(*outcomes))
    assert (await store.get("k")).value == b"99"
    gone = session.unpublish("k")
    back = session.publish("k", b"back")
    assert await gone and await back
    assert (await store.get("k")).value == b"back"
    first, last = session.publish("k", b"x"), session.unpublish("k")
    assert await first and await last
    assert await store.get("k") is None
    await session.close()


async def test_a_key_that_is_dropped_does_not_leave_its_old_value_behind(until):
    store, dropped = MemoryStore(), []
    generation = (await store.txn([], [Put("model", b"")])).revision
    session = Session(store, on_dropped=dropped.append)
    await session.start()
    assert await session.publish("copy", b"old", compare=Compare("model", create_revision=generation))
    await store.txn([], [Delete("model")])
    # Taken back and put anew before the first was sent, as a copy that is evicted and loaded again.
    session.unpublish("copy")
    assert not await session.publish("copy", b"new", compare=Compare("model", create_revision=generation))
    assert dropped == ["copy"]
    assert await session.unpublish("copy")
    assert await store.get("copy") is None
    await session.close()


async def test_a_lost_lease_fences_until_everything_can_be_said_again(until):
    store, epochs = MemoryStore(), []
    session: Session

    async def on_epoch(epoch: int) -> None:
        epochs.append(epoch)
        assert session.is_fenced
        session.publish("instance", b"%d" % epoch)

    session = Session(store, ttl_s=1, on_epoch=on_epoch)
    await session.start()
    first = session.epoch
    assert await session.publish("copy", b"c")
    await store.revoke(first)
    assert await values(store) == {}
    await until(lambda: session.epoch != first and not session.is_fenced)

    async def is_back() -> bool:
        return await values(store) == {"copy": b"c", "instance": b"%d" % session.epoch}

    await until(is_back)
    assert epochs == [first, session.epoch]
    assert {kv.lease for kv in (await store.list("")).items} == {session.epoch}
    await session.close()


async def test_a_put_on_a_lost_lease_is_made_good_at_once(until):
    """The lease's end is found out by a publish, long before the next renewal."""
    store = MemoryStore()
    session = Session(store, ttl_s=3600)
    await session.start()
    await store.revoke(session.epoch)
    assert await session.publish("k", b"v")
    assert (await store.get("k")).lease == session.epoch
    await session.close()


async def test_an_unreachable_store_does_not_fence(until):
    now = [0.0]
    store = MemoryStore(now=lambda: now[0])
    session = Session(store, ttl_s=1)
    await session.start()
    first = session.epoch
    assert await session.publish("k", b"1")
    store.is_down = True
    outcome = session.publish("k", b"2")
    deadline = asyncio.get_running_loop().time() + 1.5
    while asyncio.get_running_loop().time() < deadline:
        assert not session.is_fenced
        await asyncio.sleep(0.02)
    assert not outcome.done()
    store.is_down = False
    # For the store no time has passed: the lease is still there.
    assert await outcome
    assert session.epoch == first and (await store.get("k")).value == b"2"
    await session.close()


async def test_lost_data_is_published_again(until):
    store = MemoryStore()
    session = Session(store, ttl_s=1)
    await session.start()
    keys = [f"k{n}" for n in range(300)]
    await asyncio.gather(*(session.publish(key, b"v") for key in keys))
    store.lose_data()

    async def is_back() -> bool:
        return set(await values(store)) == set(keys)

    await until(is_back)
    await session.close()


async def test_a_frozen_process_is_fenced_before_it_can_answer(until):
    now = [0.0]
    store = MemoryStore()
    session = Session(store, ttl_s=1, now=lambda: now[0])
    await session.start()
    first = session.epoch
    assert await session.publish("k", b"v")
    now[0] += 1.1  # SIGSTOP ... SIGCONT
    # Asked before any timer or answer of the store could run.
    assert session.is_fenced
    await until(lambda: not session.is_fenced)
    assert session.epoch != first

    async def is_on_the_new_lease() -> bool:
        return (await store.get("k")).lease == session.epoch

    await until(is_on_the_new_lease)
    await session.close()


async def test_a_frozen_process_stays_fenced_while_the_store_is_away(until):
    now = [0.0]
    store = MemoryStore()
    session = Session(store, ttl_s=1, now=lambda: now[0])
    await session.start()
    store.is_down = True
    now[0] += 5
    for _ in range(20):
        assert session.is_fenced
        await asyncio.sleep(0.01)
    store.is_down = False
    await until(lambda: not session.is_fenced)
    await session.close()


async def test_a_renewal_that_lies_is_found_out(until):
    class ForgetfulStore(MemoryStore):
        """As etcd before 3.4.38 may: renews a lease that was revoked."""

        async def keep_alive(self, lease: int) -> int:
            return max(await super().keep_alive(lease), 1)

    store = ForgetfulStore()
    session = Session(store, ttl_s=0.1)  # type: ignore[arg-type]
    await session.start()
    first = session.epoch
    await session.publish("k", b"v")
    await store.revoke(first)
    await until(lambda: session.epoch != first and not session.is_fenced)

    async def is_back() -> bool:
        return await values(store) == {"k": b"v"}

    await until(is_back)
    await session.close()


class MumblingStore(MemoryStore):
    """Carries transactions out and then, as often as asked, says that it did not answer."""

    mumbles = 0

    async def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        result = await super().txn(compares, success, failure)
        if self.mumbles:
            self.mumbles -= 1
            raise RegistryUnavailable("the answer was lost")
        return result


@pytest.mark.parametrize("mumbles", [1, 3])
async def test_writes_whose_answer_was_lost_are_not_mistaken_for_lost_races(mumbles):
    store = MumblingStore()
    session = Session(store)
    await session.start()
    store.mumbles = mumbles
    outcomes = [session.publish("leader", b"me", compare=Compare.absent("leader")), session.publish("k", b"v")]
    assert all(await asyncio.gather(*outcomes))
    assert await values(store) == {"leader": b"me", "k": b"v"}
    store.mumbles = mumbles
    assert all(await asyncio.gather(session.unpublish("leader"), session.unpublish("k")))
    assert await values(store) == {}
    await session.close()


async def test_an_unpublish_that_overtakes_an_unknown_publish_still_removes_it(until):
    store = MumblingStore()
    session = Session(store)
    await session.start()
    store.mumbles = 1
    published = session.publish("k", b"v")
    await until(lambda: not store.mumbles)
    assert (await store.get("k")).value == b"v"
    assert await session.unpublish("k") and await published
    assert await store.get("k") is None
    await session.close()


async def test_leaders_do_not_remove_each_other(until):
    store, dropped = MemoryStore(), []
    one, two = Session(store, ttl_s=1, on_dropped=dropped.append), Session(store)
    await one.start()
    await two.start()
    absent = Compare.absent("leader")
    assert await one.publish("leader", b"one", compare=absent)
    assert not await two.publish("leader", b"two", compare=absent)
    # The first loses its lease; the second takes over before the first is back.
    await store.revoke(one.epoch)
    assert await two.publish("leader", b"two", compare=absent)
    await until(lambda: dropped)
    assert dropped == ["leader"] and not one.is_fenced
    assert await one.unpublish("leader")
    assert (await store.get("leader")).value == b"two"
    # And when the first does not know yet.
    assert await two.unpublish("leader")
    assert await one.publish("leader", b"one", compare=absent)
    await store.txn([], [Delete("leader")])
    assert await two.publish("leader", b"two", compare=absent)
    assert await one.unpublish("leader")
    assert (await store.get("leader")).value == b"two"
    await one.close()
    await two.close()


async def test_a_full_store_is_waited_for(until):
    class FullStore(MemoryStore):
        is_full = True

        async def txn(self, *args: Any) -> TxnResult:
            if self.is_full:
                raise RegistryReadOnly("no space")
            return await super().txn(*args)

    store = FullStore()
    session = Session(store)
    await session.start()
    outcome = session.publish("k", b"v")
    await asyncio.sleep(0)
    assert not session.is_fenced
    store.is_full = False
    assert await outcome
    await session.close()


async def test_no_store_at_the_start_is_an_error_with_a_deadline():
    store = MemoryStore()
    store.is_down = True
    session = Session(store)
    with pytest.raises(RegistryUnavailable, match="the store is down"):
        await session.start(0.1)
    assert session.is_fenced
    await session.close()


async def test_closing_answers_those_who_wait():
    store = MemoryStore()
    session = Session(store)
    await session.start()
    store.is_down = True
    outcome = session.publish("k", b"v")
    await session.close()
    assert await outcome is False


async def test_a_huge_value_is_refused():
    session = Session(MemoryStore())
    with pytest.raises(RequestTooLarge):
        session.publish("k", b"x" * 2_000_000)
