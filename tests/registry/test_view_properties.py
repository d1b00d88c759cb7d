"""The view against a naive twin: whatever the events, its tables are those a fresh look at the store would give."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from raymesh.registry.keys import Keys
from raymesh.registry.records import (
    CopyRecord,
    CopyState,
    GatewayRecord,
    InstanceRecord,
    LeaderRecord,
    ModelRecord,
    VModelRecord,
)
from raymesh.registry.store import Event, KeyValue, Listing
from raymesh.registry.view import (
    CopyGone,
    CopyPut,
    GatewayGone,
    GatewayPut,
    InstanceGone,
    InstancePut,
    LeaderChanged,
    MeshView,
    ModelDeleted,
    ModelPut,
    VModelDeleted,
    VModelPut,
)

KEYS = Keys("m")
MODELS, INSTANCES = ["t/a", "t/b"], ["i1", "i2"]


def value_for(key: str, number: int) -> bytes:
    """A record that belongs under `key`."""
    last = key.rpartition("/")[2]
    if key.startswith(KEYS.models):
        return ModelRecord(tenant="t", id=last, type="x", path="p", size_bytes=number).encode()
    if key.startswith(KEYS.vmodels):
        return VModelRecord(tenant="t", id=last, active="ab"[number % 2], target="ab"[number // 2 % 2]).encode()
    if key.startswith(KEYS.instances):
        return InstanceRecord(id=last, address="h:1", pool="cpu", epoch=number).encode()
    if key.startswith(KEYS.copies):
        state = CopyState.LOADED if number % 2 else CopyState.LOADING
        return CopyRecord(state=state, generation=number).encode()
    if key.startswith(KEYS.gateways):
        return GatewayRecord(id=last, data_address=f"h:{number}").encode()
    return LeaderRecord(id="c", address=f"h:{number}").encode()


ALL_KEYS = [
    *(KEYS.model("t", name[2:]) for name in MODELS),
    *(KEYS.vmodel("t", vmodel) for vmodel in "av"),
    *map(KEYS.instance, INSTANCES),
    *(KEYS.copy("t", name[2:], instance) for name in MODELS for instance in INSTANCES),
    KEYS.gateway("g"),
    KEYS.leader,
    KEYS.prefix + "tenants/t",  # a kind this version does not know
    KEYS.copies + "odd",  # not a copy's key
]
#: (key, what): what is a number for a good record, bytes for garbage, None for a delete.
writes = st.tuples(
    st.sampled_from(ALL_KEYS),
    st.one_of(st.integers(0, 9), st.sampled_from([b"", b"{", b"[]", b'{"id":"other"}']), st.none()),
)
#: Transactions of distinct keys.
txns = st.lists(st.lists(writes, min_size=1, max_size=4, unique_by=lambda write: write[0]), max_size=25)


class Twin:
    """The store, in the simplest way."""

    def __init__(self) -> None:
        self.revision = 1
        self.kvs: dict[str, KeyValue] = {}

    def commit(self, txn: list[Any]) -> list[Event]:
        self.revision += 1
        events = []
        for key, what in txn:
            if what is None:
                if self.kvs.pop(key, None):
                    events.append(Event(True, KeyValue(key, b"", 0, self.revision)))
                continue
            value = what if isinstance(what, bytes) else value_for(key, what)
            created = self.kvs[key].create_revision if key in self.kvs else self.revision
            self.kvs[key] = KeyValue(key, value, created, self.revision, 7)
            events.append(Event(False, self.kvs[key]))
        return events

    def listing(self) -> Listing:
        return Listing(tuple(self.kvs[key] for key in sorted(self.kvs)), self.revision)


def tables(view: MeshView) -> Any:
    copies = {(name, i): copy for name in MODELS for i, copy in view.copies_of(name).items()}
    other_way = {(name, i): copy for i in INSTANCES for name, copy in view.copies_on(i).items()}
    assert copies == other_way and len(copies) == view.copies_total
    for name in MODELS:
        records = {vmodel: entry.record for vmodel, entry in view.vmodels.items()}
        users = [v for v, record in records.items() if name in {record.active_name, record.target_name}]
        assert view.vmodels_of(name) == tuple(sorted(users))
    return view.models, view.vmodels, view.instances, copies, view.gateways, view.leader


def fresh(twin: Twin) -> MeshView:
    view = MeshView(KEYS)
    view.replace(twin.listing())
    return view


class Mirror:
    """Tables kept by nothing but the changes a view tells, checking that each `old` is what was there."""

    def __init__(self) -> None:
        self.models: dict[str, Any] = {}
        self.vmodels: dict[str, Any] = {}
        self.instances: dict[str, Any] = {}
        self.copies: dict[tuple[str, str], Any] = {}
        self.gateways: dict[str, Any] = {}
        self.leader: Any = None

    def follow(self, changes: tuple[Any, ...]) -> None:
        for change in changes:
            match change:
                case ModelPut(name, old, new):
                    assert self.models.get(name) == old
                    assert old is None or old.create_revision == new.create_revision
                    self.models[name] = new
                case ModelDeleted(name, old):
                    assert self.models.pop(name) == old
                case VModelPut(name, old, new):
                    assert self.vmodels.get(name) == old
                    self.vmodels[name] = new
                case VModelDeleted(name, old):
                    assert self.vmodels.pop(name) == old
                case InstancePut(name, old, new):
                    assert self.instances.get(name) == old
                    self.instances[name] = new
                case InstanceGone(name, old):
                    assert self.instances.pop(name) == old
                case CopyPut(name, instance, old, new):
                    assert self.copies.get((name, instance)) == old
                    self.copies[name, instance] = new
                case CopyGone(name, instance, old):
                    assert self.copies.pop((name, instance)) == old
                case GatewayPut(name, old, new):
                    assert self.gateways.get(name) == old
                    self.gateways[name] = new
                case GatewayGone(name, old):
                    assert self.gateways.pop(name) == old
                case LeaderChanged(old, new):
                    assert self.leader == old
                    self.leader = new
                case _:
                    raise AssertionError(change)

    def tables(self) -> Any:
        return self.models, self.vmodels, self.instances, self.copies, self.gateways, self.leader


@given(history=txns)
def test_events_lead_where_a_fresh_listing_leads(history):
    twin, view, mirror = Twin(), MeshView(KEYS), Mirror()
    mirror.follow(view.replace(twin.listing()))
    for txn in history:
        mirror.follow(view.apply(twin.commit(txn), twin.revision))
        assert tables(view) == tables(fresh(twin)) == mirror.tables()
        assert view.revision == twin.revision


@given(before=txns, missed=txns)
def test_a_listing_makes_good_for_missed_events(before, missed):
    twin, view, mirror = Twin(), MeshView(KEYS), Mirror()
    for txn in before:
        mirror.follow(view.apply(twin.commit(txn)))
    for txn in missed:
        twin.commit(txn)
    mirror.follow(view.replace(twin.listing()))
    assert tables(view) == tables(fresh(twin)) == mirror.tables()
    assert view.replace(twin.listing()) == ()


@given(history=txns)
def test_events_seen_before_change_nothing(history):
    twin, view = Twin(), MeshView(KEYS)
    events = [event for txn in history for event in twin.commit(txn)]
    view.apply(events)
    assert view.apply(events) == ()
    assert tables(view) == tables(fresh(twin))


@given(history=txns, during=txns, lost=st.sets(st.integers(0, 80)))
def test_an_audit_finds_exactly_what_a_leaky_watch_lost(history, during, lost):
    """The listing is of an earlier revision than the view, which goes on applying events meanwhile."""
    twin, view, mirror, number = Twin(), MeshView(KEYS), Mirror(), 0
    for txn in history:
        kept = []
        for event in twin.commit(txn):
            number += 1
            if number not in lost:
                kept.append(event)
        mirror.follow(view.apply(kept, twin.revision))
    listing, touched = twin.listing(), set()
    for txn in during:
        events = twin.commit(txn)
        touched.update(event.kv.key for event in events)
        mirror.follow(view.apply(events, twin.revision))
    changes = view.repair(listing, frozenset(touched))
    mirror.follow(changes)
    assert tables(view) == tables(fresh(twin)) == mirror.tables()
    if not lost:
        assert changes == ()


def test_copies_of_another_generation_or_of_the_lost_are_not_loaded():
    twin, view = Twin(), MeshView(KEYS)
    model = KEYS.model("t", "a")
    view.apply(twin.commit([(model, 0), (KEYS.instance("i1"), 0)]))
    generation = view.generation("t/a")
    assert generation == 2 and view.generation("t/none") == 0
    view.apply(twin.commit([(KEYS.copy("t", "a", "i1"), generation + 1), (KEYS.copy("t", "a", "i2"), generation + 1)]))
    assert view.loaded_on("t/a") == ()  # generation 3, and i2 has no instance record
    loaded = CopyRecord(state=CopyState.LOADED, generation=generation).encode()
    view.apply(twin.commit([(KEYS.copy("t", "a", "i1"), loaded), (KEYS.copy("t", "a", "i2"), loaded)]))
    assert view.loaded_on("t/a") == ("i1",)
    view.apply(twin.commit([(model, None)]))
    assert view.loaded_on("t/a") == ()
    view.apply(twin.commit([(model, 0)]))
    assert view.loaded_on("t/a") == ()


def test_garbage_is_counted_and_as_good_as_absent():
    twin, view = Twin(), MeshView(KEYS)
    key = KEYS.instance("i1")
    view.apply(twin.commit([(key, 1)]))
    changes = view.apply(twin.commit([(key, b"nonsense")]))
    assert [type(change) for change in changes] == [InstanceGone]
    assert view.garbage_total == 1 and view.instances == {}
    assert [type(change) for change in view.apply(twin.commit([(key, 2)]))] == [InstancePut]


def test_a_new_generation_hidden_by_a_listing_is_a_delete_and_a_put():
    twin, view = Twin(), MeshView(KEYS)
    key = KEYS.model("t", "a")
    view.apply(twin.commit([(key, 1)]))
    twin.commit([(key, None)])
    twin.commit([(key, 1)])
    assert [type(change) for change in view.replace(twin.listing())] == [ModelDeleted, ModelPut]
    assert view.generation("t/a") == 4
