"""Loading and unloading copies on one runtime: the shell around its `InstanceCache`.

Rule of the file: the cache decides, this file carries out, in an order that never lies: room is booked before a load
begins, a copy is in the registry before anybody is told about it, and it is out of the data path before it is freed.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import orjson

from raymesh.registry.keys import Keys
from raymesh.registry.records import CopyRecord, CopyState
from raymesh.registry.session import Session
from raymesh.registry.store import Compare
from raymesh.runtimes.batching import Copy
from raymesh.runtimes.copy_cache import CopyCache
from raymesh.runtimes.errors import (
    CapacityExhausted,
    Code,
    LoadFailed,
    Reason,
    RequestError,
    Unavailable,
)
from raymesh.runtimes.frameworks.base import LoadedModel, LoadOptions
from raymesh.runtimes.frameworks.registry import framework_for
from raymesh.runtimes.memory import LoadMeter
from raymesh.runtimes.storage.cache import Artifact, DiskCache

log = logging.getLogger(__name__)

#: How long a loaded copy waits for the registry's word before it serves without. Only an unreachable registry takes
#: that long, and while it is unreachable nobody can unregister the model either.
PUBLISH_WAIT_S = 1.0
#: How long a load waits for room when every other copy is in use or loading.
ROOM_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """What to load. `generation` is the create revision of the model's record; `size_hint` is bytes, 0 if unknown."""

    tenant: str
    id: str
    type: str
    path: str
    generation: int
    key: str = ""
    size_hint: int = 0

    @property
    def name(self) -> str:
        """The model's full name, ``tenant/id``."""
        return f"{self.tenant}/{self.id}"


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """How a load ended well: measured size in bytes, time taken, what was evicted for it."""

    size_bytes: int
    load_ms: int
    evicted: tuple[str, ...] = ()


@dataclass(slots=True)
class Counters:
    """What a runtime has done since it started."""

    loads: int = 0
    load_failures: int = 0
    evictions: int = 0
    unloads: int = 0
    #: Requests accepted by copies that are gone by now.
    requests_before: int = 0


@dataclass(slots=True)
class Loader:
    """Loads, evicts and unloads copies. Belongs to one event loop.

    `copies` is the data path's table, by encoded full name; a model is in it exactly while requests may use it.
    """

    instance: str
    cache: CopyCache
    disk: DiskCache
    session: Session
    keys: Keys
    options: LoadOptions
    load_timeout_s: float
    load_slots: int
    copies: dict[bytes, Copy] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    meter: LoadMeter = field(default_factory=LoadMeter)
    is_draining: bool = False
    now_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000
    wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    _loading: dict[tuple[str, int], asyncio.Task[LoadOutcome]] = field(default_factory=dict)
    #: Copies out of the data path that still answer what they had accepted.
    _leaving: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    #: Loads that outlived their time-out: their threads still run, their room is still booked.
    _late: set[str] = field(default_factory=set)
    _outcomes: dict[str, LoadOutcome] = field(default_factory=dict)
    #: Publications that the registry, being away, has not answered yet.
    _unanswered: set[asyncio.Future[bool]] = field(default_factory=set)
    #: Set whenever room may have appeared; who waits for it clears it first.
    _room: asyncio.Event = field(default_factory=asyncio.Event)
    _slots: asyncio.Semaphore = field(init=False)
    _threads: ThreadPoolExecutor = field(init=False)
    #: Types whose library is imported and has made what it makes once.
    _warm_types: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.load_slots)
        # More threads than slots: a load that hangs for ever keeps its thread.
        self._threads = ThreadPoolExecutor(max_workers=self.load_slots + 16, thread_name_prefix="load")

    @property
    def loads_in_progress(self) -> int:
        """Loads begun or waiting for a slot."""
        return len(self._loading)

    def size_bytes(self, name: str) -> int:
        """The measured size of a copy that is loaded, else 0."""
        outcome = self._outcomes.get(name)
        return outcome.size_bytes if outcome is not None else 0

    # -- load --------------------------------------------------------------------------------------------------------

    async def load(self, spec: LoadSpec) -> LoadOutcome:
        """Have the model loaded; callers for the same generation share one load, and leaving does not stop it.

        Raises `LoadFailed`, `CapacityExhausted`, `Unavailable` (draining or fenced) or a `RequestError` with
        LOAD_TIMEOUT or NOT_REGISTERED.
        """
        if self.session.is_fenced:
            raise Unavailable("this runtime has lost its lease and is getting a new one", reason=Reason.FENCED)
        key = (spec.name, spec.generation)
        # First: a copy in the table may be on its way into the registry still.
        task = self._loading.get(key)
        if task is None:
            present = self.copies.get(spec.name.encode())
            if present is not None and present.generation == spec.generation:
                return self._outcomes[spec.name]
            if self.is_draining:
                raise Unavailable("this runtime is stopping", reason=Reason.DRAINING)
            # Loads of one name never overlap: another generation of it ends first.
            earlier = [t for (name, _), t in self._loading.items() if name == spec.name]
            task = asyncio.create_task(self._load(spec, earlier), name=f"load {spec.name}")
            self._loading[key] = task
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        return await asyncio.shield(task)

    async def _load(self, spec: LoadSpec, earlier: Sequence[asyncio.Task[LoadOutcome]]) -> LoadOutcome:
        if earlier:
            await asyncio.wait(earlier)
        # An older generation of a re-registered id, or a copy that is leaving: two of one name never overlap.
        await self._unload_now(spec.name)
        try:
            async with self._slots:
                model, outcome = await self._bring(spec)
            await self._publish(spec, model, outcome)
        except RequestError as error:
            self.counters.load_failures += 1
            log.info("load of %s failed: %s", spec.name, error.message)
            raise
        except Exception as error:
            self.counters.load_failures += 1
            log.exception("load of %s failed", spec.name)
            raise LoadFailed(f"model '{spec.id}' could not be loaded: {type(error).__name__}") from None
        self.counters.loads += 1
        return outcome

    async def _bring(self, spec: LoadSpec) -> tuple[LoadedModel, LoadOutcome]:
        """The model in memory, its room booked, pinned; not yet in the data path."""
        started = time.perf_counter()
        if spec.name in self._late:
            raise self._timed_out(spec)
        until_s = asyncio.get_running_loop().time() + self.load_timeout_s
        try:
            async with asyncio.timeout_at(until_s):
                artifact = await self._in_thread(self.disk.fetch, spec.path)
        except TimeoutError:
            raise self._timed_out(spec) from None
        evicted = await self._make_room(spec, artifact)
        model, size_bytes = await self._read(spec, artifact, until_s)
        load_ms = max(1, round((time.perf_counter() - started) * 1000))
        evicted += self._settle(spec, model, size_bytes, load_ms)
        return model, LoadOutcome(size_bytes, load_ms, evicted)

    async def _make_room(self, spec: LoadSpec, artifact: Artifact) -> tuple[str, ...]:
        """Book room and evict for it; returns who was evicted."""
        size_bytes = spec.size_hint or self.meter.sizes.predict(spec.type, artifact.size_bytes)
        self._check_fit(spec, size_bytes)
        evicted: tuple[str, ...] = ()
        is_booked = False
        try:
            async with asyncio.timeout(ROOM_WAIT_S):
                while (reservation := self.cache.reserve(spec.name, size_bytes, self.now_ms())) is None:
                    await self._wait_for_room()
                is_booked = True
                for victim in reservation.victims:
                    self._evict(victim)
                evicted = tuple(reservation.victims)
                while not self.cache.may_load(spec.name):
                    await self._wait_for_room()
        except BaseException as error:
            if is_booked:
                self.cache.forget(spec.name)
                self._room.set()
            if isinstance(error, TimeoutError):
                raise CapacityExhausted("every loaded model is in use; no room for another one now") from None
            raise
        return evicted

    def _check_fit(self, spec: LoadSpec, size_bytes: int) -> None:
        if not self.cache.can_ever_fit(size_bytes):
            raise CapacityExhausted(
                f"model '{spec.id}' needs {size_bytes} bytes, a runtime has {self.cache.capacity_bytes}"
            )

    async def _wait_for_room(self) -> None:
        self._room.clear()
        await self._room.wait()

    async def _read(self, spec: LoadSpec, artifact: Artifact, until_s: float) -> tuple[LoadedModel, int]:
        """The model in memory and its measured size. The reservation outlives a load that outlives its time-out."""
        loop = asyncio.get_running_loop()
        reading = loop.run_in_executor(self._threads, self._read_blocking, spec, artifact)
        done, _ = await asyncio.wait({reading}, timeout=max(0.0, until_s - loop.time()))
        if not done:
            self._late.add(spec.name)
            reading.add_done_callback(lambda late: self._drop_late(spec.name, late))
            raise self._timed_out(spec)
        try:
            return reading.result()
        except Exception as error:
            self.cache.forget(spec.name)
            self._room.set()
            if isinstance(error, RequestError):
                raise
            log.warning("load of %s raised", spec.name, exc_info=error)
            raise LoadFailed(f"model '{spec.id}' could not be loaded: {type(error).__name__}") from None

    def _read_blocking(self, spec: LoadSpec, artifact: Artifact) -> tuple[LoadedModel, int]:
        # Here, because the files must stay as long as this thread reads them, whoever has given up waiting.
        with artifact:
            options = self._options_for(spec)
            if spec.type not in self._warm_types:
                # Under the meter, so that it is not counted as a part of a model that loads meanwhile.
                self.meter.load(f"first {spec.type}", 0, lambda: _warm_up(spec.type, artifact, options))
                self._warm_types.add(spec.type)
            framework = framework_for(spec.type)
            return self.meter.load(spec.type, artifact.size_bytes, lambda: framework.load(artifact.path, options))

    def _options_for(self, spec: LoadSpec) -> LoadOptions:
        parameters = parse_key(spec.key)
        return LoadOptions(threads=self.options.threads, trust_pickle=self.options.trust_pickle, parameters=parameters)

    def _timed_out(self, spec: LoadSpec) -> RequestError:
        return RequestError(
            Code.DEADLINE_EXCEEDED,
            f"model '{spec.id}' did not load within {self.load_timeout_s:g} s",
            reason=Reason.LOAD_TIMEOUT,
        )

    def _drop_late(self, name: str, late: asyncio.Future[tuple[LoadedModel, int]]) -> None:
        self._late.discard(name)
        if not late.cancelled() and late.exception() is None:
            self._close_model(name, late.result()[0])
        self.cache.forget(name)
        self._room.set()

    def _settle(self, spec: LoadSpec, model: LoadedModel, size_bytes: int, load_ms: int) -> tuple[str, ...]:
        """Book the measured size; returns who had to go because it was more than expected."""
        try:
            self._check_fit(spec, size_bytes)
        except CapacityExhausted:
            self._close_model(spec.name, model)
            self.cache.forget(spec.name)
            self._room.set()
            raise
        self.cache.loaded(spec.name, size_bytes, load_ms=load_ms)
        # Nobody may evict it before it is in the table: it is pinned until `_publish` is done with it.
        self.cache.pin(spec.name)
        return self._evict_excess()

    async def _publish(self, spec: LoadSpec, model: LoadedModel, outcome: LoadOutcome) -> None:
        """Enter the copy into the data path and the registry; what was removed meanwhile is dropped.

        Into the data path first: nobody is sent here before the registry has the copy, and who is sent must find it.
        """
        record = CopyRecord(
            state=CopyState.LOADED,
            generation=spec.generation,
            size_bytes=outcome.size_bytes,
            loaded_at_ms=self.wall_ms(),
            load_ms=outcome.load_ms,
        )
        copy = Copy(spec.name, spec.generation, model, pin=self.cache.pin, unpin=self._unpin)
        # The load holds its copy as a request would, on the pin of `_settle`: whoever unloads it waits for our end.
        copy.in_flight = 1
        self.copies[spec.name.encode()] = copy
        self._outcomes[spec.name] = outcome
        model_key = self.keys.model(spec.tenant, spec.id)
        published = asyncio.ensure_future(
            self.session.publish(
                self.keys.copy(spec.tenant, spec.id, self.instance),
                record.encode(),
                compare=Compare(model_key, create_revision=spec.generation),
            )
        )
        await asyncio.wait({published}, timeout=PUBLISH_WAIT_S)
        if self.cache.used_bytes > self.cache.capacity_bytes:
            self._evict_excess()  # while this one is held: somebody waits for it
        copy.leave(1)
        if published.done() and not published.result():
            await self._unload_now(spec.name)
            if self.session.is_fenced or self.is_draining:
                # Not the registry's word on the model: a session that ends says no to everything.
                raise Unavailable("this runtime is stopping", reason=Reason.DRAINING)
            raise RequestError(
                Code.NOT_FOUND, f"model '{spec.id}' was unregistered while it loaded", reason=Reason.NOT_REGISTERED
            )
        if not published.done():
            # The registry is away. When it is back and says no, the copy goes.
            self._unanswered.add(published)
            published.add_done_callback(lambda done: self._end_late_publish(copy, done))

    def _end_late_publish(self, copy: Copy, done: asyncio.Future[bool]) -> None:
        self._unanswered.discard(done)
        if not done.cancelled() and not done.result() and self.copies.get(copy.name.encode()) is copy:
            self.unload_soon(copy.name)

    # -- unload ------------------------------------------------------------------------------------------------------

    async def unload(self, name: str) -> bool:
        """Take the model out of memory; waits for its requests in flight. False when it was not loaded.

        A load of it under way is waited for first. After the answer no request is answered from that copy.
        """
        loads = [task for (loading, _), task in self._loading.items() if loading == name]
        if loads:
            await asyncio.wait(loads)
        return await self._unload_now(name)

    async def _unload_now(self, name: str) -> bool:
        self.unload_soon(name)
        leaving = self._leaving.get(name)
        if leaving is None:
            return False
        # Shielded: half an unload would keep its room booked for ever.
        await asyncio.shield(leaving)
        return True

    def unload_soon(self, name: str) -> None:
        """Take the model out of the data path now, and out of memory as soon as its requests are answered."""
        copy = self.copies.pop(name.encode(), None)
        if copy is None:
            return
        self.cache.begin_unload(name)
        self._unpublish(name)
        task = asyncio.get_running_loop().create_task(self._leave(copy), name=f"unload {name}")
        self._leaving[name] = task
        task.add_done_callback(lambda _: self._leaving.pop(name, None) if self._leaving.get(name) is task else None)

    async def _leave(self, copy: Copy) -> None:
        if copy.in_flight:
            idle = asyncio.Event()
            copy.on_idle = idle.set
            await idle.wait()
        self.counters.requests_before += copy.requests
        self._free(copy.name, copy.model)
        self.counters.unloads += 1

    def _evict(self, name: str) -> None:
        """Unload a victim the cache has named. It has no request in flight, so it goes at once."""
        copy = self.copies.pop(name.encode())
        self._unpublish(name)
        self.counters.requests_before += copy.requests
        self._free(name, copy.model)
        self.counters.evictions += 1

    def _evict_excess(self) -> tuple[str, ...]:
        """Evict what measured sizes put above the capacity; returns who went."""
        victims = self.cache.victims_for(0) or ()
        for victim in victims:
            self.cache.begin_unload(victim)
            self._evict(victim)
        return victims

    def _free(self, name: str, model: LoadedModel) -> None:
        self._outcomes.pop(name, None)
        self._close_model(name, model)
        self.cache.unloaded(name)
        self._room.set()

    @staticmethod
    def _close_model(name: str, model: LoadedModel) -> None:
        try:
            model.close()
        except Exception:
            log.exception("closing %s failed", name)

    def _unpublish(self, name: str) -> None:
        tenant, _, model = name.partition("/")
        self.session.unpublish(self.keys.copy(tenant, model, self.instance))

    def _unpin(self, name: str) -> None:
        """The last request in flight on a copy has ended: it may make room for those who wait."""
        self.cache.unpin(name)
        self._room.set()
        if self.cache.used_bytes > self.cache.capacity_bytes:
            # A copy was found too large when everything else was in use. One that only now ends its load is spared.
            copy = self.copies.get(name.encode())
            if copy is None or copy.requests:
                self._evict_excess()

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _in_thread(self, function: Callable[[str], Artifact], argument: str) -> Artifact:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, argument)

    async def close(self) -> None:
        """End what runs in the background. Copies are left to the process's end."""
        for published in self._unanswered:
            published.cancel()
        tasks = [*self._loading.values(), *self._leaving.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)


def _warm_up(type: str, artifact: Artifact, options: LoadOptions) -> None:
    """Import a type's library and let it allocate what it allocates once: a hundred megabytes that are no model's."""
    framework_for(type).load(artifact.path, options).close()
    # A library leaves a hundred thousand objects that never go: the collector would look through all of them time and
    # again (measured with scikit-learn: 110 ms in which no request is answered; 2 ms without them).
    gc.collect()
    gc.freeze()


def parse_key(key: str) -> dict[str, Any]:
    """The parameters in a registration's `key`: a JSON object, or nothing. Raises `LoadFailed` for anything else."""
    if not key:
        return {}
    try:
        value = orjson.loads(key)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise LoadFailed("the registration's key must be a JSON object of parameters (or empty)")
    return value
