"""The controller's placements: one at a time for each model, however many ask.

Rule of the file: `placement.Attempts` decides, this file calls the runtimes and reports what they said. A load that
has begun goes on when nobody waits for it any more; the next caller finds the copy.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import NamedTuple

from raymesh.mesh.config import Settings
from raymesh.mesh.fresh_copies import FreshCopies, Placed
from raymesh.mesh.model_notes import ModelNotes, with_failure, with_load
from raymesh.placement.attempts import (
    Attempts,
    GiveUp,
    Loaded,
    LoadFailed,
    Outcome,
    Recorded,
    RecordFailure,
    Refused,
    TryLoad,
    UseCopy,
)
from raymesh.placement.ledger import Ledger
from raymesh.placement.view import DEFAULT_SIZE_BYTES, ClusterView, InstanceViews, ModelView
from raymesh.registry.records import CopyState, ModelRecord, RecordError
from raymesh.registry.store import RegistryError, Store
from raymesh.registry.view import Change, Entry, InstanceGone, InstancePut, MeshView, ModelEntry
from raymesh.runtimes.errors import Code, ModelNotFound, Reason, RequestError, Unavailable
from raymesh.runtimes.upstream import Upstreams

log = logging.getLogger(__name__)

#: What a runtime's own time limit is given on top before its silence counts as one.
LOAD_ANSWER_MARGIN_S = 5.0
#: A size nobody measured is guessed from the last ones of the same type; weight of the newest in the running mean.
SIZE_LEARNING_RATE = 0.1
#: "Not loaded here" about an instance that reported its load less than this long ago is checked before it is believed:
#: requests that follow the watch can be at a runtime just before its copy can be used.
RECENT_LOAD_S = 5.0


@dataclass(frozen=True, slots=True)
class PlaceRequest:
    """One question: where is model `name`?

    `excluded` instances are not to be used at all; `stale` ones said that they do not hold the copy that the view
    shows (they may be asked to load it again). `cause_id` seeds the decision's random source.
    """

    name: str
    cause_id: str
    excluded: frozenset[str] = frozenset()
    stale: frozenset[str] = frozenset()


class _Answer(NamedTuple):
    """How a flight ended: exactly one of the two is set. A value, for an exception would be shared by its waiters."""

    placed: Placed | None = None
    error: RequestError | None = None


@dataclass(slots=True)
class _Flight:
    """One placement under way; `vanished` says that a runtime found the model's record gone or another one."""

    request: PlaceRequest
    entry: ModelEntry
    task: asyncio.Task[_Answer] | None = None
    vanished: bool = field(default=False)


class Placements:
    """Answers `PlaceRequest`s. Belongs to one event loop; `see` must get every change of the view."""

    def __init__(self, settings: Settings, store: Store, view: MeshView, upstreams: Upstreams) -> None:
        self._settings = settings
        self._store = store
        self._view = view
        self._upstreams = upstreams
        self._ledger = Ledger()
        self._instances = InstanceViews()
        self._fresh = FreshCopies()
        self._notes = ModelNotes(store, view)
        #: Placements under way, by model name and generation. Never two loads of one model by our own doing.
        self._flights: dict[tuple[str, int], _Flight] = {}
        self._writing: set[asyncio.Task[bool]] = set()
        #: When instances last reported a load, by (model name, instance) in loop time, the oldest first.
        self._loaded_s: dict[tuple[str, str], float] = {}
        #: Running mean of measured sizes in bytes, by model type.
        self._size_by_type: dict[str, float] = {}

    def see(self, changes: Iterable[Change]) -> None:
        """Follow the view."""
        self._fresh.see(changes)
        self._notes.see(changes)
        for change in changes:
            match change:
                case InstancePut(_, _, new):
                    self._instances.put(new.record, new.mod_revision)
                case InstanceGone(instance, _):
                    self._instances.remove(instance)
                case _:
                    pass

    async def place(self, request: PlaceRequest) -> Placed:
        """A loaded copy, loaded now if need be. Raises the `RequestError` that says why there is none."""
        entry = self._notes.entry(request.name) or await self._read(request.name)
        for instance in request.excluded | request.stale:
            self._fresh.forget(request.name, instance)
        while True:
            key = (request.name, entry.create_revision)
            flight = self._flights.get(key)
            if flight is None:
                placed = self._holder(entry, request.excluded | request.stale)
                if placed is not None:
                    return placed
                flight = self._flights[key] = _Flight(request, entry)
                flight.task = asyncio.create_task(self._run(flight), name=f"place {request.name}")
            assert flight.task is not None
            # Shielded: a caller that leaves does not stop a load.
            answer = await asyncio.shield(flight.task)
            if flight.vanished:
                # Unregistered, or registered anew, faster than the view follows. What is there now?
                fresh = await self._read(request.name)
                if fresh.create_revision == entry.create_revision:
                    raise ModelNotFound(request.name.partition("/")[2])
                entry = fresh
            elif answer.placed is not None and answer.placed.instance not in request.excluded:
                return answer.placed
            elif answer.error is not None and (flight.request.excluded <= request.excluded):
                raise _copy_of(answer.error)
            # Else the flight was begun with other exclusions than ours: one of our own.

    async def close(self) -> None:
        """Stop placing. Loads that runtimes have begun go on there."""
        tasks: list[asyncio.Task[_Answer] | asyncio.Task[bool]] = [*self._writing]
        tasks += [flight.task for flight in self._flights.values() if flight.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._notes.close()

    # -- one placement ---------------------------------------------------------------------------------------------

    async def _run(self, flight: _Flight) -> _Answer:
        name, entry, request = flight.request.name, flight.entry, flight.request
        expiry_ms = round(self._settings.failure_expiry_s * 1000)
        attempts = Attempts(
            name, Random(request.cause_id), self._ledger, excluded=request.excluded, failure_expiry_ms=expiry_ms
        )
        try:
            for instance in sorted(request.stale - request.excluded):
                if self._was_just_loaded(name, instance):
                    size_bytes = entry.record.size_bytes
                    if isinstance(await self._load(flight, instance, size_bytes), Loaded):
                        return self._use(entry.create_revision, instance)
                    if flight.vanished:
                        return _Answer()
            step = attempts.start(self._model_view(entry, request.stale), self._cluster_view())
            while True:
                match step:
                    case TryLoad(instance, size_bytes):
                        outcome = await self._load(flight, instance, size_bytes)
                        if flight.vanished:
                            return _Answer()
                    case RecordFailure(failure):
                        await self._notes.write(name, entry, partial(with_failure, failure=failure))
                        outcome = Recorded()
                    case UseCopy(instance):
                        return self._use(entry.create_revision, instance)
                    case GiveUp(code, reason, message):
                        leaving = self._holder(entry, request.excluded | request.stale, allows_draining=True)
                        if leaving is not None:
                            return _Answer(placed=leaving)
                        retry_after_s = 1.0 if code in {"UNAVAILABLE", "RESOURCE_EXHAUSTED"} else 0.0
                        return _Answer(
                            error=RequestError(Code[code], message, reason=reason, retry_after_s=retry_after_s)
                        )
                entry = self._notes.latest(entry)
                step = attempts.next(outcome, self._model_view(entry, request.stale), self._cluster_view())
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("placement of %s failed", name)
            return _Answer(error=RequestError(Code.INTERNAL, "internal error while placing the model"))
        finally:
            attempts.abandon()
            del self._flights[name, flight.entry.create_revision]

    async def _load(self, flight: _Flight, instance: str, size_bytes: int) -> Outcome:
        """Have one instance load the model, and say how that went."""
        present = self._view.instances.get(instance)
        if present is None:
            return Refused(Reason.NO_INSTANCE, "the chosen instance has just gone")
        record = flight.entry.record
        body = {
            "tenant": record.tenant,
            "id": record.id,
            "type": record.type,
            "path": record.path,
            "key": record.key,
            "generation": flight.entry.create_revision,
            "size_hint": size_bytes,
            "cause_id": flight.request.cause_id,
        }
        address = present.record.address
        timeout_s = self._settings.load_timeout_s + LOAD_ANSWER_MARGIN_S
        try:
            answer = await self._upstreams.call(address, "POST", "/control/load", body, timeout_s=timeout_s)
        except RequestError as error:
            if error.reason == Reason.NOT_REGISTERED:
                flight.vanished = True
            if error.reason == Reason.LOAD_FAILED:
                return LoadFailed(error.message)
            reason = Reason.LOAD_TIMEOUT if error.reason == Reason.DEADLINE else error.reason or Reason.NO_INSTANCE
            return Refused(reason, error.message)
        measured_bytes = int(answer.get("size_bytes", 0))
        placed = Placed(instance, address, flight.entry.create_revision)
        now_s = asyncio.get_running_loop().time()
        self._fresh.add(record.name, placed, self._view, now_s)
        self._note_load(record.name, instance, now_s)
        self._learn(record, measured_bytes)
        entry = self._notes.latest(flight.entry)
        if entry.record.failures:
            # Soon known to all, for it counts when the model is placed again; but the caller wants its answer first.
            change = partial(with_load, size_bytes=measured_bytes)
            task = asyncio.create_task(self._notes.write(record.name, entry, change))
            self._writing.add(task)
            task.add_done_callback(self._writing.discard)
        elif with_load(entry.record, measured_bytes) != entry.record:
            self._notes.write_size_soon(entry, measured_bytes)
        return Loaded(measured_bytes)

    def _note_load(self, name: str, instance: str, now_s: float) -> None:
        self._loaded_s.pop((name, instance), None)
        while self._loaded_s and (oldest := next(iter(self._loaded_s.items())))[1] < now_s - RECENT_LOAD_S:
            del self._loaded_s[oldest[0]]
        self._loaded_s[name, instance] = now_s

    def _was_just_loaded(self, name: str, instance: str) -> bool:
        loaded_s = self._loaded_s.get((name, instance))
        return loaded_s is not None and asyncio.get_running_loop().time() - loaded_s < RECENT_LOAD_S

    def _use(self, generation: int, instance: str) -> _Answer:
        present = self._view.instances.get(instance)
        if present is None:
            return _Answer(error=Unavailable("the instance has just gone", reason=Reason.NO_INSTANCE))
        return _Answer(placed=Placed(instance, present.record.address, generation))

    # -- what is known ---------------------------------------------------------------------------------------------

    async def _read(self, name: str) -> ModelEntry:
        """The model straight from the registry: it may have been registered a millisecond ago."""
        tenant, _, model = name.partition("/")
        try:
            kv = await self._store.get(self._view.keys.model(tenant, model))
            if kv is None:
                raise ModelNotFound(model)
            return Entry(ModelRecord.decode(kv.value), kv.create_revision, kv.mod_revision)
        except RegistryError:
            raise Unavailable("the registry is not reachable", reason=Reason.REGISTRY_UNAVAILABLE) from None
        except RecordError as error:
            raise RequestError(Code.INTERNAL, f"the model's record cannot be read: {error}") from None

    def _holder(self, entry: ModelEntry, avoided: Collection[str], *, allows_draining: bool = False) -> Placed | None:
        """A copy that is known to be loaded, without any decision: the usual answer to the second caller.

        One on a draining instance only if nothing better can be had: else the model would leave with it.
        """
        name, generation = entry.record.name, entry.create_revision
        loaded = [
            instance
            for instance, copy in self._view.copies_of(name).items()
            if copy.record.generation == generation and copy.record.state is CopyState.LOADED
        ]
        fresh = self._fresh.of(name, generation, asyncio.get_running_loop().time())
        for instance in (*loaded, *(placed.instance for placed in fresh)):
            present = self._view.instances.get(instance)
            if present is None or instance in avoided or (present.record.draining and not allows_draining):
                continue
            return Placed(instance, present.record.address, generation)
        return None

    def _model_view(self, entry: ModelEntry, stale: Collection[str]) -> ModelView:
        name, generation = entry.record.name, entry.create_revision
        instances = self._view.instances
        copies = [
            (i, copy.record)
            for i, copy in self._view.copies_of(name).items()
            if i not in stale and i in instances and not instances[i].record.draining
        ]
        hint_bytes = round(self._size_by_type.get(entry.record.type, DEFAULT_SIZE_BYTES))
        return ModelView.from_records(entry.record, generation, copies, size_hint_bytes=hint_bytes)

    def _cluster_view(self) -> ClusterView:
        return self._instances.at(time.time_ns() // 1_000_000, self._view.revision)

    def _learn(self, record: ModelRecord, size_bytes: int) -> None:
        if size_bytes > 0:
            mean = self._size_by_type.get(record.type, float(size_bytes))
            self._size_by_type[record.type] = mean + SIZE_LEARNING_RATE * (size_bytes - mean)


def _copy_of(error: RequestError) -> RequestError:
    return RequestError(error.code, error.message, reason=error.reason, retry_after_s=error.retry_after_s)
