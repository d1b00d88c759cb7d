"""The models as one gateway knows them: the view, what it may lack, and the writes that clients ask for.

Rule of the file: at most one registry transaction for each registration (many at once share one), and after a write was
acknowledged no later answer of this gateway contradicts it.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import NamedTuple

from raymesh.mesh.fresh_copies import FreshCopies, Placed
from raymesh.mesh.model_status import ModelStatus, is_ready, status_of
from raymesh.mesh.registrar import Created, Registrar
from raymesh.registry.keys import is_valid_id
from raymesh.registry.records import InstanceRecord, ModelRecord, RecordError
from raymesh.registry.store import Compare, Delete, Get, KeyValue, Put, RegistryError, RegistryReadOnly, Store
from raymesh.registry.view import Change, Entry, MeshView, ModelDeleted, ModelEntry, ModelPut
from raymesh.runtimes.errors import Code, Reason, RequestError, Unavailable
from raymesh.runtimes.upstream import Upstreams

log = logging.getLogger(__name__)

#: Longest `unregister` waits for the runtimes to let go of the model.
UNLOAD_TIMEOUT_S = 3.0
#: Longest `unregister` waits until the view shows what was just written.
VIEW_TIMEOUT_S = 1.0


class Registered(NamedTuple):
    """A registered model's entry, and whether it is new."""

    entry: ModelEntry
    is_new: bool


class Catalog:
    """Finds, registers and unregisters models. `see` must get every change of the view, after the view has it."""

    def __init__(self, store: Store, view: MeshView, upstreams: Upstreams) -> None:
        self._store = store
        self._upstreams = upstreams
        self._registrar = Registrar(store)
        self.view = view
        self.fresh = FreshCopies()
        #: Registry reads under way, by model name: a flood of requests for an unknown model reads it once.
        self._reads: dict[str, asyncio.Task[ModelEntry | None]] = {}
        #: Who waits for the view to lose a model, by its name.
        self._deletions: dict[str, asyncio.Event] = {}
        #: Records read that are newer than the view's, until the view moves on.
        self._newer: dict[str, ModelEntry] = {}
        self._turn = 0
        #: Set, and replaced, at every change of the view.
        self._changed = asyncio.Event()

    def see(self, changes: Iterable[Change]) -> None:
        """Follow the view."""
        self._changed.set()
        self._changed = asyncio.Event()
        self.fresh.see(changes)
        if self._deletions or self._newer:
            for change in changes:
                if isinstance(change, ModelPut | ModelDeleted):
                    self._forget_older(change)
                if isinstance(change, ModelDeleted) and change.name in self._deletions:
                    self._deletions[change.name].set()

    def _forget_older(self, change: ModelPut | ModelDeleted) -> None:
        newer = self._newer.get(change.name)
        if newer is not None and (isinstance(change, ModelDeleted) or change.new.mod_revision >= newer.mod_revision):
            del self._newer[change.name]

    # -- reads -----------------------------------------------------------------------------------------------------

    async def find(self, name: str) -> ModelEntry | None:
        """The model's entry, straight from the registry when the view lacks it; None when it is not registered.

        Raises UNAVAILABLE when the view lacks it and the registry cannot be asked.
        """
        entry = self.view.models.get(name)
        newer = self._newer.get(name)
        if entry is not None:
            if newer is None or newer.create_revision != entry.create_revision:
                return entry
            return newer if newer.mod_revision > entry.mod_revision else entry
        read = self._reads.get(name)
        if read is None:
            read = self._reads[name] = asyncio.create_task(self._read(name))
            read.add_done_callback(lambda _: self._reads.pop(name, None))
        return await asyncio.shield(read)

    async def refresh(self, name: str) -> None:
        """Read the model anew: its record has just been written and the view may not show that yet."""
        with suppress(RequestError):
            entry = await self._read(name)
            if entry is not None:
                self._newer[name] = entry

    def holders(self, entry: ModelEntry) -> list[Placed]:
        """Where the model can be used now, so far as known; draining instances left out."""
        name, generation, view = entry.record.name, entry.create_revision, self.view
        placed = []
        if view.generation(name) == generation:
            for instance in view.loaded_on(name):
                record = view.instances[instance].record
                if not record.draining:
                    placed.append(Placed(instance, record.address, generation))
        known = {holder.instance for holder in placed}
        for copy in self.fresh.of(name, generation, asyncio.get_running_loop().time()):
            present = view.instances.get(copy.instance)
            # An instance the view does not know yet is newer than the view.
            if copy.instance not in known and not (present is not None and present.record.draining):
                placed.append(copy)
        return placed

    def is_loaded(self, name: str) -> bool:
        """Whether model `name` can be used now, so far as known."""
        entry = self.view.models.get(name)
        return entry is not None and bool(self.holders(entry))

    def holder(self, entry: ModelEntry, avoided: frozenset[str]) -> Placed | None:
        """One of the model's holders, in turn."""
        holders = [placed for placed in self.holders(entry) if placed.instance not in avoided]
        if not holders:
            return None
        self._turn += 1
        return holders[self._turn % len(holders)]

    def status(self, entry: ModelEntry, *, is_loading: bool) -> ModelStatus:
        """What to say about the model; `is_loading`: a load was asked for and has not ended."""
        fresh = self.fresh.of(entry.record.name, entry.create_revision, asyncio.get_running_loop().time())
        now_ms = time.time_ns() // 1_000_000
        return status_of(
            entry, self.view, fresh=[copy.instance for copy in fresh], is_loading=is_loading, now_ms=now_ms
        )

    @property
    def is_ready(self) -> bool:
        """Whether requests can be answered: the registry was read and there is an instance that takes models.

        The controller and the registry may both be away: what is loaded keeps answering.
        """
        return self.view.is_synced and any(not entry.record.draining for entry in self.view.instances.values())

    async def is_model_ready(self, name: str) -> bool:
        """Whether a request for model `name` may be sent: registered, and its last load did not fail."""
        tenant, _, model = name.partition("/")
        if not (is_valid_id(tenant) and is_valid_id(model)):
            return False
        entry = await self.find(name)
        return entry is not None and is_ready(self.status(entry, is_loading=False))

    def page(self, tenant: str, *, after: str, limit: int) -> list[ModelEntry]:
        """The next `limit` models of `tenant` in order of id, those with ids greater than `after`."""
        prefix = f"{tenant}/"
        first = prefix + after
        names = (name for name in self.view.models if name > first and name.startswith(prefix))
        return [self.view.models[name] for name in heapq.nsmallest(limit, names)]

    # -- writes ----------------------------------------------------------------------------------------------------

    async def register(self, record: ModelRecord) -> Registered:
        """Create the model, or find that it is there already with the same spec.

        A model that a vmodel created, to go with it, stays from now on.
        Raises ALREADY_EXISTS when the id names something else, UNAVAILABLE when the registry does not answer.
        """
        key = self.view.keys.model(record.tenant, record.id)
        with registry_errors():
            created = await self._registrar.create(key, record.encode())
        return await self._kept(_registered(record, created, record))

    async def register_many(self, records: Sequence[ModelRecord]) -> list[Registered | RequestError]:
        """`register` for many: for each what it would return or raise. Of several with one id the first wins."""
        firsts: dict[str, ModelRecord] = {}
        keys = [self.view.keys.model(record.tenant, record.id) for record in records]
        for key, record in zip(keys, records, strict=True):
            firsts.setdefault(key, record)
        outcomes = await self._registrar.create_many((key, record.encode()) for key, record in firsts.items())
        created = dict(zip(firsts, outcomes, strict=True))
        registered: list[Registered | RequestError] = []
        for key, record in zip(keys, records, strict=True):
            try:
                with registry_errors():
                    outcome = created[key]
                    if isinstance(outcome, RegistryError):
                        raise outcome
                    registered.append(await self._kept(_registered(record, outcome, firsts[key])))
            except RequestError as error:
                registered.append(error)
        return registered

    async def _kept(self, registered: Registered) -> Registered:
        """Make a model that was created by a vmodel, to go with it, one that stays: it was registered by itself now."""
        entry = registered.entry
        key = self.view.keys.model(entry.record.tenant, entry.record.id)
        while entry.record.auto_delete:
            kept = replace(entry.record, auto_delete=False)
            condition = Compare(key, mod_revision=entry.mod_revision)
            with registry_errors():
                result = await self._store.txn([condition], [Put(key, kept.encode())], [Get(key)])
            if result.succeeded:
                return Registered(Entry(kept, entry.create_revision, result.revision), is_new=False)
            present = _decode(result.gets[0])
            if present is None or present.create_revision != entry.create_revision:
                raise Unavailable("the model was deleted with its vmodel just now", reason=Reason.NOT_REGISTERED)
            entry = present
        return Registered(entry, registered.is_new)

    async def unregister(self, name: str, on_deleted: Callable[[], None]) -> bool:
        """Delete the model and have every copy unloaded before returning. False when there was none.

        `on_deleted` is called as soon as the record is gone. A copy whose load was under way is dropped by its runtime,
        for publishing it compares with the record. Runtimes that do not answer in `UNLOAD_TIMEOUT_S` are left to the
        controller, which unloads orphaned copies when it can.
        """
        tenant, _, model = name.partition("/")
        with registry_errors():
            generation = await self._delete(self.view.keys.model(tenant, model))
        if not generation:
            return False
        on_deleted()
        await self.release(name, generation)
        return True

    async def release(self, name: str, generation: int) -> None:
        """Have every copy of a model unloaded whose record was just deleted, and wait until the view shows that."""
        tenant, _, model = name.partition("/")
        with registry_errors():
            # All copies there will ever be: the runtimes publish on the condition that the record is there.
            listing = await self._store.list(f"{self.view.keys.copies}{name}/")
        instances = {self.view.keys.read_copy(kv.key).instance for kv in listing.items} | set(self.view.copies_of(name))
        await asyncio.gather(*(self._unload(tenant, model, instance) for instance in sorted(instances)))
        await self._wait_for_view(name, generation)

    async def unload(self, entry: ModelEntry) -> None:
        """Have every copy of a model unloaded; it stays registered, and comes back when somebody asks for it.

        Raises UNAVAILABLE when a runtime does not let go of it in time.
        """
        tenant, _, model = entry.record.name.partition("/")
        instances = set(self.view.copies_of(entry.record.name)) | {placed.instance for placed in self.holders(entry)}
        for instance in instances:
            self.fresh.forget(entry.record.name, instance)
        await asyncio.gather(*(self._unload(tenant, model, instance) for instance in sorted(instances)))
        try:
            async with asyncio.timeout(VIEW_TIMEOUT_S):
                while self.view.copies_of(entry.record.name).keys() & instances:
                    await self.next_change()
        except TimeoutError:
            message = f"failed to unload '{model}', a runtime did not answer in time; try again"
            raise Unavailable(message, reason=Reason.NO_INSTANCE) from None

    async def next_change(self) -> None:
        """Return at the view's next change."""
        await self._changed.wait()

    async def _delete(self, key: str) -> int:
        """Delete a model's key. Its generation, 0 when there was none. FAILED_PRECONDITION when a vmodel has it."""
        while True:
            present = await self._store.get(key)
            if present is None:
                return 0
            entry = _decode(present)
            if entry is not None and entry.record.refs > 0:
                raise RequestError(
                    Code.FAILED_PRECONDITION,
                    f"model '{entry.record.id}' is in use by {entry.record.refs} vmodel(s)",
                )
            condition = Compare(key, mod_revision=present.mod_revision)
            if (await self._store.txn([condition], [Delete(key)])).succeeded:
                return present.create_revision

    async def _unload(self, tenant: str, model: str, instance: str) -> None:
        address = await self._address(instance)
        if address is None:
            return
        body = {"tenant": tenant, "id": model}
        try:
            await self._upstreams.call(address, "POST", "/control/unload", body, timeout_s=UNLOAD_TIMEOUT_S)
        except RequestError as error:
            log.warning("%s/%s not unloaded on %s: %s", tenant, model, instance, error.message)

    async def _address(self, instance: str) -> str | None:
        """Where the instance is; it may be newer than the view. None when it is gone, and its copies with it."""
        present = self.view.instances.get(instance)
        if present is not None:
            return present.record.address
        try:
            async with asyncio.timeout(UNLOAD_TIMEOUT_S):
                kv = await self._store.get(self.view.keys.instance(instance))
            return InstanceRecord.decode(kv.value).address if kv is not None else None
        except (RegistryError, RecordError, TimeoutError):
            return None

    async def _wait_for_view(self, name: str, generation: int) -> None:
        if self.view.generation(name) != generation:
            return
        deleted = self._deletions.setdefault(name, asyncio.Event())
        try:
            async with asyncio.timeout(VIEW_TIMEOUT_S):
                await deleted.wait()
        except TimeoutError:
            log.warning("the view still shows %s; the registry's watch lags", name)
        finally:
            self._deletions.pop(name, None)

    async def _read(self, name: str) -> ModelEntry | None:
        tenant, _, model = name.partition("/")
        with registry_errors():
            return _decode(await self._store.get(self.view.keys.model(tenant, model)))


def _decode(kv: KeyValue | None) -> ModelEntry | None:
    if kv is None:
        return None
    try:
        return Entry(ModelRecord.decode(kv.value), kv.create_revision, kv.mod_revision)
    except RecordError:
        # As in the view: what cannot be read counts as absent.
        log.exception("unreadable record at %s", kv.key)
        return None


def _registered(record: ModelRecord, created: Created, first: ModelRecord) -> Registered:
    """What registering `record` comes to after its key was `created` with the value of `first`, or found there."""
    if created.present is None:
        present: ModelEntry | None = Entry(first, created.revision, created.revision)
    else:
        present = _decode(created.present)
    if present is None:
        raise RequestError(Code.INTERNAL, f"the record of model '{record.id}' cannot be read")
    if not present.record.serves_same_as(record):
        # As ModelMesh: a model is immutable; a new version is a new id.
        raise RequestError(
            Code.ALREADY_EXISTS, f"model '{record.id}' is already registered with another type, path or key"
        )
    return Registered(present, is_new=created.present is None and record is first)


@contextmanager
def registry_errors() -> Iterator[None]:
    """Turn what a store raises into the error a client should see. (Stores keep deadlines of their own.)"""
    try:
        yield
    except RegistryReadOnly:
        message = "the registry is out of space and takes no writes"
        raise Unavailable(message, reason=Reason.REGISTRY_UNAVAILABLE) from None
    except RegistryError:
        raise Unavailable("the registry is not reachable", reason=Reason.REGISTRY_UNAVAILABLE) from None
