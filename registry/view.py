"""`MeshView`: the mesh as in-memory tables, kept true by the events of a watch.

Rule of the file: no I/O, no clock, no logging. Events in, typed changes out, O(1) for each event; so the same view
serves the gateway, the controller and the simulator. `registry/follow.py` feeds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Generic, NamedTuple, TypeVar

from raymesh.registry.keys import Keys
from raymesh.registry.records import (
    CopyRecord,
    CopyState,
    GatewayRecord,
    InstanceRecord,
    LeaderRecord,
    ModelRecord,
    RecordError,
    VModelRecord,
)
from raymesh.registry.store import Event, KeyValue, Listing

R = TypeVar("R")
RecordT = TypeVar("RecordT", ModelRecord, VModelRecord, InstanceRecord, CopyRecord, GatewayRecord, LeaderRecord)


class Entry(NamedTuple, Generic[R]):
    """A record with what the store knows of its key. `create_revision` of a model's key is its generation.

    `mod_revision` is what a compare-and-set of the key compares with; `lease` is 0 for durable keys.
    """

    record: R
    create_revision: int
    mod_revision: int
    lease: int = 0


ModelEntry = Entry[ModelRecord]
VModelEntry = Entry[VModelRecord]
InstanceEntry = Entry[InstanceRecord]
CopyEntry = Entry[CopyRecord]
GatewayEntry = Entry[GatewayRecord]
LeaderEntry = Entry[LeaderRecord]


class ModelPut(NamedTuple):
    """A model was registered (`old` is None) or its record changed; `name` is ``tenant/id``."""

    name: str
    old: ModelEntry | None
    new: ModelEntry


class ModelDeleted(NamedTuple):
    """A model was unregistered."""

    name: str
    old: ModelEntry


class VModelPut(NamedTuple):
    """A vmodel appeared (`old` is None) or changed; `name` is ``tenant/id``."""

    name: str
    old: VModelEntry | None
    new: VModelEntry


class VModelDeleted(NamedTuple):
    """A vmodel is no more."""

    name: str
    old: VModelEntry


class InstancePut(NamedTuple):
    """An instance appeared (`old` is None) or changed its record (a new epoch, draining, its load)."""

    instance: str
    old: InstanceEntry | None
    new: InstanceEntry


class InstanceGone(NamedTuple):
    """An instance's record is gone: it left or its lease ended. Its copies' `CopyGone`s come on their own."""

    instance: str
    old: InstanceEntry


class CopyPut(NamedTuple):
    """A copy of model `name` on `instance` appeared (`old` is None) or changed."""

    name: str
    instance: str
    old: CopyEntry | None
    new: CopyEntry


class CopyGone(NamedTuple):
    """A copy of model `name` on `instance` is no more."""

    name: str
    instance: str
    old: CopyEntry


class GatewayPut(NamedTuple):
    """A gateway appeared (`old` is None) or changed."""

    gateway: str
    old: GatewayEntry | None
    new: GatewayEntry


class GatewayGone(NamedTuple):
    """A gateway's record is gone."""

    gateway: str
    old: GatewayEntry


class LeaderChanged(NamedTuple):
    """Another leader, another address of it, or (`new` is None) no leader."""

    old: LeaderEntry | None
    new: LeaderEntry | None


Change = (
    ModelPut
    | ModelDeleted
    | VModelPut
    | VModelDeleted
    | InstancePut
    | InstanceGone
    | CopyPut
    | CopyGone
    | GatewayPut
    | GatewayGone
    | LeaderChanged
)

_NO_COPIES: Mapping[str, CopyEntry] = MappingProxyType({})


class MeshView:
    """What the mesh looked like at `revision`. Read the tables freely; only `apply`, `replace`, `repair` write them.

    A value that is not the record its key promises counts as an absent key (so that a view built from a listing and
    one built from events agree) and is counted in `garbage_total`. Keys of unknown kinds are ignored.
    """

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        #: Everything up to this revision is in the tables. 0: never filled.
        self.revision = 0
        #: Values seen that could not be read, ever.
        self.garbage_total = 0
        #: Registered models by full name (``tenant/id``).
        self.models: dict[str, ModelEntry] = {}
        #: Vmodels by full name (``tenant/id``).
        self.vmodels: dict[str, VModelEntry] = {}
        #: Live instances by id.
        self.instances: dict[str, InstanceEntry] = {}
        #: Live gateways by id.
        self.gateways: dict[str, GatewayEntry] = {}
        #: The placement controller in charge, if any.
        self.leader: LeaderEntry | None = None
        # Copies twice, by model and by instance: every decision asks both ways. Never an empty inner dict.
        self._by_model: dict[str, dict[str, CopyEntry]] = {}
        self._by_instance: dict[str, dict[str, CopyEntry]] = {}
        # Full names of the vmodels that have a model as active or target, by its full name. Never an empty inner set.
        self._vmodels_by_model: dict[str, set[str]] = {}
        # The mod revision of every key of ours in the store, garbage and unknown kinds included: what a re-list is
        # compared with.
        self._mod_revisions: dict[str, int] = {}

    @property
    def is_synced(self) -> bool:
        """Whether the view was ever filled from the store."""
        return self.revision > 0

    @property
    def copies_total(self) -> int:
        """How many copies there are, in any state. O(instances)."""
        return sum(len(copies) for copies in self._by_instance.values())

    def generation(self, name: str) -> int:
        """The generation of model `name` (``tenant/id``); 0 when it is not registered."""
        entry = self.models.get(name)
        return entry.create_revision if entry else 0

    def copies_of(self, name: str) -> Mapping[str, CopyEntry]:
        """The copies of model `name` in any state and of any generation, by instance id. Do not keep or change it."""
        return self._by_model.get(name, _NO_COPIES)

    def copies_on(self, instance: str) -> Mapping[str, CopyEntry]:
        """The copies on `instance` in any state and of any generation, by model name. Do not keep or change it."""
        return self._by_instance.get(instance, _NO_COPIES)

    def vmodels_of(self, name: str) -> tuple[str, ...]:
        """Full names, in order, of the vmodels that have model `name` as their active model or as their target."""
        return tuple(sorted(self._vmodels_by_model.get(name, ())))

    def loaded_on(self, name: str) -> tuple[str, ...]:
        """Ids of the live instances where model `name` can be used: copy loaded, for the model's present generation."""
        generation = self.generation(name)
        return tuple(
            instance
            for instance, copy in self.copies_of(name).items()
            if copy.record.state is CopyState.LOADED
            and copy.record.generation == generation
            and instance in self.instances
        )

    def apply(self, events: Iterable[Event], revision: int = 0) -> tuple[Change, ...]:
        """Follow the events of a watch, in order; `revision` is the batch's. Events seen before change nothing."""
        changes: list[Change] = []
        # Of the moment before the batch: several events of one transaction share their revision.
        seen = self.revision
        for event in events:
            if event.kv.mod_revision > seen:
                self._apply(event, changes)
                self.revision = max(self.revision, event.kv.mod_revision)
        self.revision = max(self.revision, revision)
        return tuple(changes)

    def replace(self, listing: Listing) -> tuple[Change, ...]:
        """Become what `listing` says, and tell what that changed (deletes that no event told of included)."""
        changes = self._reconcile(listing, ignored=frozenset())
        # Backwards too: a store that was restored from a backup counts from its own revision.
        self.revision = listing.revision
        return changes

    def repair(self, listing: Listing, touched: frozenset[str]) -> tuple[Change, ...]:
        """Compare with a listing at a revision the view has passed; put right, and tell, what differs.

        `touched` are the keys of the events applied since the listing's revision: the view knows better there. With a
        true watch there is never a difference.
        """
        return self._reconcile(listing, ignored=touched)

    def _reconcile(self, listing: Listing, ignored: frozenset[str]) -> tuple[Change, ...]:
        changes: list[Change] = []
        listed = {kv.key for kv in listing.items}
        for key in [k for k in self._mod_revisions if k not in listed and k not in ignored]:
            self._apply(Event(True, KeyValue(key, b"", 0, listing.revision)), changes)
        for kv in listing.items:
            if self._mod_revisions.get(kv.key) != kv.mod_revision and kv.key not in ignored:
                self._apply(Event(False, kv), changes)
        return tuple(changes)

    def _apply(self, event: Event, changes: list[Change]) -> None:
        """Route one event to its table by the kind in its key."""
        key, keys = event.kv.key, self.keys
        if not key.startswith(keys.prefix):
            return
        if event.is_delete:
            self._mod_revisions.pop(key, None)
        else:
            self._mod_revisions[key] = event.kv.mod_revision
        if key.startswith(keys.copies):
            self._apply_copy(event, changes)
        elif key.startswith(keys.models):
            self._apply_model(event, changes)
        elif key.startswith(keys.vmodels):
            self._apply_vmodel(event, changes)
        elif key.startswith(keys.instances):
            self._apply_instance(event, changes)
        elif key.startswith(keys.gateways):
            self._apply_gateway(event, changes)
        elif key == keys.leader:
            self._apply_leader(event, changes)

    def _apply_model(self, event: Event, changes: list[Change]) -> None:
        name = event.kv.key.removeprefix(self.keys.models)
        new = self._read(event, ModelRecord, lambda record: record.name == name)
        old = self.models.get(name)
        if old and (new is None or new.create_revision != old.create_revision):
            # A new generation is another model under the same name, even when a re-list hides the delete between.
            del self.models[name]
            changes.append(ModelDeleted(name, old))
            old = None
        if new:
            self.models[name] = new
            changes.append(ModelPut(name, old, new))

    def _apply_vmodel(self, event: Event, changes: list[Change]) -> None:
        name = event.kv.key.removeprefix(self.keys.vmodels)
        new = self._read(event, VModelRecord, lambda record: record.name == name)
        old = self.vmodels.pop(name, None) if new is None else self.vmodels.get(name)
        if old:
            for model in {old.record.active_name, old.record.target_name}:
                vmodels = self._vmodels_by_model[model]
                vmodels.discard(name)
                if not vmodels:
                    del self._vmodels_by_model[model]
        if new:
            self.vmodels[name] = new
            for model in {new.record.active_name, new.record.target_name}:
                self._vmodels_by_model.setdefault(model, set()).add(name)
            changes.append(VModelPut(name, old, new))
        elif old:
            changes.append(VModelDeleted(name, old))

    def _apply_instance(self, event: Event, changes: list[Change]) -> None:
        name = event.kv.key.removeprefix(self.keys.instances)
        new = self._read(event, InstanceRecord, lambda record: record.id == name)
        old = self.instances.pop(name, None) if new is None else self.instances.get(name)
        if new:
            self.instances[name] = new
            changes.append(InstancePut(name, old, new))
        elif old:
            changes.append(InstanceGone(name, old))

    def _apply_copy(self, event: Event, changes: list[Change]) -> None:
        try:
            key = self.keys.read_copy(event.kv.key)
        except ValueError:
            self.garbage_total += not event.is_delete
            return
        name, instance = key.name, key.instance
        new = self._read(event, CopyRecord)
        old = self.copies_of(name).get(instance)
        if new:
            self._by_model.setdefault(name, {})[instance] = new
            self._by_instance.setdefault(instance, {})[name] = new
            changes.append(CopyPut(name, instance, old, new))
        elif old:
            _drop(self._by_model, name, instance)
            _drop(self._by_instance, instance, name)
            changes.append(CopyGone(name, instance, old))

    def _apply_gateway(self, event: Event, changes: list[Change]) -> None:
        name = event.kv.key.removeprefix(self.keys.gateways)
        new = self._read(event, GatewayRecord, lambda record: record.id == name)
        old = self.gateways.pop(name, None) if new is None else self.gateways.get(name)
        if new:
            self.gateways[name] = new
            changes.append(GatewayPut(name, old, new))
        elif old:
            changes.append(GatewayGone(name, old))

    def _apply_leader(self, event: Event, changes: list[Change]) -> None:
        old, self.leader = self.leader, self._read(event, LeaderRecord)
        if old or self.leader:
            changes.append(LeaderChanged(old, self.leader))

    def _read(
        self, event: Event, kind: type[RecordT], is_of_key: Callable[[RecordT], bool] = lambda _: True
    ) -> Entry[RecordT] | None:
        """The entry in a put; None for a delete and for garbage, which a record of another key is too."""
        if event.is_delete:
            return None
        kv = event.kv
        try:
            record = kind.decode(kv.value)
        except RecordError:
            record = None
        if record is None or not is_of_key(record):
            self.garbage_total += 1
            return None
        return Entry(record, kv.create_revision, kv.mod_revision, kv.lease)


def _drop(table: dict[str, dict[str, CopyEntry]], outer: str, inner: str) -> None:
    row = table[outer]
    del row[inner]
    if not row:
        del table[outer]
