"""The memory store answers as a real etcd does, whatever the sequence of calls."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymesh.registry.etcd import EtcdStore
from raymesh.registry.memory import MemoryStore
from raymesh.registry.store import Compare, Delete, Get, LeaseGone, Put

KEYS = ["a", "b", "c/d"]
keys = st.sampled_from(KEYS)
#: Revisions are written as steps back from the present one, so that they often are a key's; None: 0.
ages = st.one_of(st.none(), st.integers(0, 6))
compares = st.lists(st.tuples(keys, st.sampled_from(["mod", "create"]), ages), max_size=2)
ops = st.lists(
    st.tuples(st.sampled_from(["put", "put", "lease", "delete", "get"]), keys), max_size=3, unique_by=lambda op: op[1]
)
steps = st.one_of(
    st.tuples(st.just("txn"), compares, ops, ops),
    st.tuples(st.just("list"), st.integers(0, 5)),
    st.tuples(st.just("revoke")),
)


async def run(store: Any, prefix: str, script: list[Any]) -> list[Any]:
    """Carry out `script`; every answer, with revisions counted from the store's revision at the start."""
    base = (await store.txn([], [])).revision
    now, lease, answers = base, await store.grant(60), []

    def told(kv: Any) -> Any:
        if kv is None:
            return None
        create = kv.create_revision and kv.create_revision - base
        return kv.key.removeprefix(prefix), kv.value, create, kv.mod_revision - base, bool(kv.lease)

    def written(branch: list[Any]) -> list[Any]:
        made = {
            "put": lambda key: Put(key, b"value"),
            "lease": lambda key: Put(key, b"leased", lease),
            "delete": Delete,
            "get": Get,
        }
        return [made[kind](prefix + key) for kind, key in branch]

    for kind, *rest in script:
        if kind == "txn":
            conditions = []
            for key, which, age in rest[0]:
                revision = 0 if age is None else max(base, now - age)
                conditions.append(Compare(prefix + key, **{f"{which}_revision": revision}))
            try:
                result = await store.txn(conditions, written(rest[1]), written(rest[2]))
            except LeaseGone:
                answers.append("lease gone")
                continue
            now = result.revision
            answers.append((result.succeeded, now - base, [told(kv) for kv in result.gets]))
        elif kind == "list":
            listing = await store.list(prefix, revision=max(base, now - rest[0]))
            answers.append((listing.revision - base, [told(kv) for kv in listing.items]))
        else:
            await store.revoke(lease)
            now = (await store.txn([], [])).revision
            lease = await store.grant(60)
    history: list[Any] = []
    if now > base:
        await store.txn([], [Put(prefix + "end", b"")])
        async with contextlib.aclosing(store.watch(prefix, from_revision=base + 1)) as batches:
            async for batch in batches:
                history += [(event.is_delete, told(event.kv)) for event in batch.events]
                if history and history[-1][1][0] == "end":
                    break
    await store.revoke(lease)
    await store.close()
    # The order of events within one transaction is etcd's own affair.
    return [*answers, sorted(history, key=lambda event: (event[1][3], event[1][0]))]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=st.lists(steps, max_size=15))
def test_memory_and_etcd_tell_the_same_story(etcd, script):
    prefix = f"/test/{uuid.uuid4().hex}/"
    ours = asyncio.run(run(MemoryStore(), prefix, script))
    theirs = asyncio.run(run(EtcdStore.from_url(etcd.url), prefix, script))
    assert ours == theirs
