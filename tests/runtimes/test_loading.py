"""Loading, evicting and unloading, with a real cache, session and store, and models that do as they are told."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop

from raymesh.placement.cache import InstanceCache
from raymesh.registry.keys import Keys
from raymesh.registry.memory import MemoryStore
from raymesh.registry.records import CopyRecord, CopyState, ModelRecord
from raymesh.registry.session import Session
from raymesh.registry.store import Delete, Put
from raymesh.runtimes import loading
from raymesh.runtimes.errors import CapacityExhausted, Code, LoadFailed, Reason, RequestError, Unavailable
from raymesh.runtimes.frameworks.base import Array, LoadOptions
from raymesh.runtimes.loading import Loader, LoadOutcome, LoadSpec, parse_key
from raymesh.runtimes.memory import LoadMeter
from raymesh.runtimes.storage.cache import DiskCache

KEYS = Keys("test")


async def until(condition: Callable[[], Any], deadline_s: float = 10.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        await asyncio.sleep(0.001)


@dataclass
class Plan:
    """What becomes of the file at one path."""

    size_bytes: int = 100
    #: What the cache expects; 0: the real size.
    predicted_bytes: int = 0
    error: Exception | None = None
    fetch_error: Exception | None = None
    #: The load (or the fetch) waits for it in its thread.
    gate: threading.Event | None = None
    fetch_gate: threading.Event | None = None
    loads: int = 0
    options: LoadOptions | None = None


class FakeModel:
    inputs = ()
    outputs = ()
    platform = "fake"
    is_batchable = True

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.is_closed = False

    def predict(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        raise NotImplementedError

    def close(self) -> None:
        assert not self.is_closed, "closed twice"
        self.is_closed = True


class FakeArtifact:
    def __init__(self, uri: str, plan: Plan) -> None:
        self.path = Path(uri)
        self.plan = plan
        self.size_bytes = plan.predicted_bytes or plan.size_bytes
        self.is_released = False

    def __enter__(self) -> FakeArtifact:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_released = True


class World:
    """Files, the framework and the disk cache that read them, and a meter that knows every size."""

    def __init__(self) -> None:
        self.plans: dict[str, Plan] = {}
        self.models: list[FakeModel] = []
        self.artifacts: list[FakeArtifact] = []
        self.loading = 0
        self.loading_max = 0
        self.type = "fake"
        self.lock = threading.Lock()

    # the disk cache
    def fetch(self, uri: str) -> FakeArtifact:
        plan = self.plans[uri]
        if plan.fetch_gate is not None:
            assert plan.fetch_gate.wait(10)
        if plan.fetch_error is not None:
            raise plan.fetch_error
        self.artifacts.append(FakeArtifact(uri, plan))
        return self.artifacts[-1]

    # the framework
    def load(self, path: Path, options: LoadOptions) -> FakeModel:
        plan = self.plans[str(path)]
        with self.lock:
            plan.loads += 1
            plan.options = options
            self.loading += 1
            self.loading_max = max(self.loading_max, self.loading)
        try:
            if plan.gate is not None:
                assert plan.gate.wait(10)
            if plan.error is not None:
                raise plan.error
            model = FakeModel(plan)
            with self.lock:
                self.models.append(model)
            return model
        finally:
            with self.lock:
                self.loading -= 1

    def framework_for(self, type: str) -> World:
        if type != "fake":
            raise LoadFailed(f"unknown model type '{type}'")
        return self


class FakeMeter:
    """Every copy takes exactly what its plan says, and is expected to take what the artifact says."""

    @property
    def sizes(self) -> FakeMeter:
        return self

    def predict(self, type: str, artifact_bytes: int) -> int:
        return artifact_bytes

    def load(self, type: str, artifact_bytes: int, load: Callable[[], Any]) -> tuple[Any, int]:
        result = load()
        return result, result.plan.size_bytes if isinstance(result, FakeModel) else 0


@dataclass
class Rig:
    loader: Loader
    cache: InstanceCache
    store: MemoryStore
    session: Session
    world: World
    dropped: list[str] = field(default_factory=list)

    async def register(self, id: str, *, type: str = "fake", key: str = "", **plan: Any) -> LoadSpec:
        path = f"/models/{id}"
        self.world.plans[path] = Plan(**plan)
        record = ModelRecord(tenant="t", id=id, type=type, path=path, key=key)
        model_key = KEYS.model("t", id)
        await self.store.txn([], [Put(model_key, record.encode())])
        kv = await self.store.get(model_key)
        assert kv is not None
        return LoadSpec("t", id, type, path, kv.create_revision, key)

    async def unregister(self, id: str) -> None:
        await self.store.txn([], [Delete(KEYS.model("t", id))])

    def plan(self, spec: LoadSpec) -> Plan:
        return self.world.plans[spec.path]

    async def load(self, *specs: LoadSpec) -> LoadOutcome:
        for spec in specs:
            outcome = await self.loader.load(spec)
            self.check()
        return outcome

    def loaded(self) -> set[str]:
        return {name.decode().removeprefix("t/") for name in self.loader.copies}

    async def published(self) -> set[str]:
        listing = await self.store.list(KEYS.copies)
        return {KEYS.read_copy(kv.key).name.removeprefix("t/") for kv in listing.items}

    async def settled(self, *ids: str) -> None:
        """Exactly these models are loaded and published, once all is quiet."""
        await until(lambda: not self.loader._leaving and not self.loader.loads_in_progress)
        assert self.loaded() == set(ids)
        end_s = time.monotonic() + 10
        while await self.published() != set(ids):
            assert time.monotonic() < end_s, (await self.published(), ids)
            await asyncio.sleep(0.001)
        self.check()
        assert not self.cache.booked_bytes - sum(self.cache.size_bytes(f"t/{id}") for id in ids)
        alive = [m for m in self.world.models if not m.is_closed]
        assert len(alive) == len(ids)

    def check(self) -> None:
        self.cache.validate()
        for name, copy in self.loader.copies.items():
            assert self.cache.is_loaded(name.decode())
            assert not cast(FakeModel, copy.model).is_closed


@contextlib.asynccontextmanager
async def rigged(monkeypatch: pytest.MonkeyPatch, capacity_bytes: int, **options: Any) -> AsyncIterator[Rig]:
    world = World()
    monkeypatch.setattr(loading, "framework_for", world.framework_for)
    store = MemoryStore()
    cache = InstanceCache(capacity_bytes)
    dropped: list[str] = []

    def on_dropped(key: str) -> None:
        dropped.append(key)
        loader.unload_soon(KEYS.read_copy(key).name)  # as the runtime does

    session = Session(store, ttl_s=5, on_dropped=on_dropped)
    await session.start()
    defaults: dict[str, Any] = {"load_timeout_s": 10.0, "load_slots": 2}
    loader = Loader(
        instance="i1",
        cache=cache,
        disk=cast(DiskCache, world),
        session=session,
        keys=KEYS,
        options=LoadOptions(threads=3),
        meter=cast(LoadMeter, FakeMeter()),
        **{**defaults, **options},
    )
    loader._warm_types.add("fake")
    try:
        yield Rig(loader, cache, store, session, world, dropped)
        cache.validate()
    finally:
        for plan in world.plans.values():
            for gate in (plan.gate, plan.fetch_gate):
                if gate is not None:
                    gate.set()
        await loader.close()
        await session.close()


def run(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[Rig], Awaitable[None]], capacity_bytes: int = 300, **options: Any
) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20), rigged(monkeypatch, capacity_bytes, **options) as rig:
            await work(rig)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bounded())


async def fails(work: Awaitable[Any]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await work
    return caught.value


# -- loads -----------------------------------------------------------------------------------------------------------


def test_a_load_is_in_the_registry_and_in_the_data_path(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        spec = await rig.register("a", key='{"threads": 2}')
        outcome = await rig.load(spec)
        assert outcome.size_bytes == 100 and outcome.load_ms >= 1 and outcome.evicted == ()
        kv = await rig.store.get(KEYS.copy("t", "a", "i1"))
        assert kv is not None and kv.lease == rig.session.epoch
        record = CopyRecord.decode(kv.value)
        assert (record.state, record.generation, record.size_bytes) == (CopyState.LOADED, spec.generation, 100)
        options = rig.plan(spec).options
        assert options is not None and options.parameters == {"threads": 2} and options.threads == 3
        # Again: the same answer, no second load.
        assert await rig.load(spec) == outcome
        assert rig.plan(spec).loads == 1 and rig.loader.counters.loads == 1
        assert all(artifact.is_released for artifact in rig.world.artifacts)
        await rig.settled("a")

    run(monkeypatch, work)


def test_many_callers_share_one_load_and_leaving_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        gate = threading.Event()
        spec = await rig.register("a", gate=gate)
        callers = [asyncio.create_task(rig.loader.load(spec)) for _ in range(20)]
        await until(lambda: rig.world.loading)
        assert rig.loader.loads_in_progress == 1
        for caller in callers[:19]:
            caller.cancel()
        gate.set()
        assert (await callers[19]).size_bytes == 100
        assert rig.plan(spec).loads == 1
        await rig.settled("a")
        # All of them leave: it is loaded all the same.
        other = await rig.register("b", gate=(gate := threading.Event()))
        caller = asyncio.create_task(rig.loader.load(other))
        await until(lambda: rig.world.loading)
        caller.cancel()
        gate.set()
        await until(lambda: "b" in rig.loaded())
        await rig.settled("a", "b")

    run(monkeypatch, work)


def test_loads_run_in_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        gate = threading.Event()
        specs = [await rig.register(f"m{n}", gate=gate, size_bytes=10) for n in range(6)]
        callers = [asyncio.create_task(rig.loader.load(spec)) for spec in specs]
        await until(lambda: rig.world.loading == 2)
        assert rig.loader.loads_in_progress == 6
        gate.set()
        await asyncio.gather(*callers)
        assert rig.world.loading_max == 2
        await rig.settled(*(f"m{n}" for n in range(6)))

    run(monkeypatch, work)


def test_the_least_recently_used_goes_and_its_key_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        a, b, c, d = [await rig.register(id) for id in "abcd"]
        await rig.load(a, b, c)
        await rig.settled("a", "b", "c")
        rig.loader.copies[b"t/b"].requests = 5
        rig.cache.touch("t/a", rig.loader.now_ms())
        outcome = await rig.load(d)
        assert outcome.evicted == ("t/b",)
        await rig.settled("a", "c", "d")
        counters = rig.loader.counters
        assert (counters.evictions, counters.loads, counters.unloads, counters.requests_before) == (1, 4, 0, 5)
        # A large one takes several; the evicted one may come back.
        outcome = await rig.load(await rig.register("e", size_bytes=250))
        assert set(outcome.evicted) == {"t/a", "t/c", "t/d"}
        await rig.load(b)
        await rig.settled("b")

    run(monkeypatch, work)


def test_a_copy_in_use_is_not_evicted_and_its_end_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        a, b = await rig.register("a", size_bytes=200), await rig.register("b", size_bytes=200)
        await rig.load(a)
        copy = rig.loader.copies[b"t/a"]
        copy.enter()
        waiting = asyncio.create_task(rig.loader.load(b))
        await until(lambda: rig.loader._slots._value == 1)
        for _ in range(50):
            await asyncio.sleep(0)
        assert rig.loaded() == {"a"}
        copy.leave(1)
        assert (await waiting).evicted == ("t/a",)
        await rig.settled("b")

    run(monkeypatch, work)


def test_without_room_in_time_the_caller_may_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "ROOM_WAIT_S", 0.05)

    async def work(rig: Rig) -> None:
        a, b = await rig.register("a", size_bytes=200), await rig.register("b", size_bytes=200)
        await rig.load(a)
        rig.loader.copies[b"t/a"].enter()
        error = await fails(rig.loader.load(b))
        assert isinstance(error, CapacityExhausted) and error.reason == Reason.NO_CAPACITY
        assert rig.loader.counters.load_failures == 1
        await rig.settled("a")
        rig.loader.copies[b"t/a"].leave(1)
        await rig.load(b)
        await rig.settled("b")
        error = await fails(rig.loader.load(await rig.register("huge", size_bytes=301)))
        assert "needs 301 bytes, a runtime has 300" in error.message
        await rig.settled("b")

    run(monkeypatch, work)


def test_waiting_for_a_leaving_copys_memory_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is booked while the old copy still answers: the memory may come later than a load can wait."""
    monkeypatch.setattr(loading, "ROOM_WAIT_S", 0.05)

    async def work(rig: Rig) -> None:
        a, b = await rig.register("a", size_bytes=200), await rig.register("b", size_bytes=200)
        await rig.load(a)
        copy = rig.loader.copies[b"t/a"]
        copy.enter()
        unloading = asyncio.create_task(rig.loader.unload("t/a"))
        await until(lambda: not rig.loader.copies)
        error = await fails(rig.loader.load(b))
        assert error.reason == Reason.NO_CAPACITY
        copy.leave(1)
        assert await unloading
        await rig.settled()
        await rig.load(b)

    run(monkeypatch, work)


def test_a_load_that_fails_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[dict[str, Any], type[RequestError], str]] = [
        ({"error": LoadFailed("not an XGBoost file")}, LoadFailed, "not an XGBoost file"),
        ({"error": ZeroDivisionError("/secret/path")}, LoadFailed, "'m' could not be loaded: ZeroDivisionError"),
        ({"error": MemoryError()}, LoadFailed, "'m' could not be loaded: MemoryError"),
        ({"fetch_error": LoadFailed("no such file")}, LoadFailed, "no such file"),
        ({"fetch_error": OSError("/secret/path")}, LoadFailed, "'m' could not be loaded: OSError"),
        ({"fetch_error": Unavailable("disk", reason="X")}, Unavailable, "disk"),
        ({"type": "other"}, LoadFailed, "unknown model type 'other'"),
        ({"key": "[1]"}, LoadFailed, "must be a JSON object"),
        ({"key": "{"}, LoadFailed, "must be a JSON object"),
    ]

    async def work(rig: Rig) -> None:
        for plan, kind, says in cases:
            error = await fails(rig.loader.load(await rig.register("m", **plan)))
            assert isinstance(error, kind) and says in error.message and "secret" not in error.message
            await rig.settled()
        assert rig.loader.counters.load_failures == len(cases) and rig.cache.used_bytes == 0
        assert all(artifact.is_released for artifact in rig.world.artifacts)
        # Trying again is possible and may go well.
        await rig.load(await rig.register("m"))
        await rig.settled("m")

    run(monkeypatch, work)


def test_a_time_out_keeps_the_room_until_the_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        gate = threading.Event()
        spec = await rig.register("a", gate=gate)
        error = await fails(rig.loader.load(spec))
        assert (error.code, error.reason) == (Code.DEADLINE_EXCEEDED, Reason.LOAD_TIMEOUT)
        assert rig.cache.used_bytes == 100 and not rig.loader.copies
        # Asked for again meanwhile: the same answer, neither a crash nor a second thread in the same file.
        error = await fails(rig.loader.load(spec))
        assert error.reason == Reason.LOAD_TIMEOUT and rig.plan(spec).loads == 1
        assert not rig.world.artifacts[0].is_released
        gate.set()
        await until(lambda: rig.cache.used_bytes == 0)
        assert rig.world.models[0].is_closed and rig.world.artifacts[0].is_released
        await rig.load(spec)
        await rig.settled("a")
        # One that fails late.
        gate = threading.Event()
        spec = await rig.register("b", gate=gate, error=LoadFailed("late"))
        assert (await fails(rig.loader.load(spec))).reason == Reason.LOAD_TIMEOUT
        gate.set()
        await until(lambda: rig.cache.used_bytes == 100)
        await rig.settled("a")

    run(monkeypatch, work, load_timeout_s=0.05)


def test_a_fetch_that_hangs_times_out_and_gives_its_slot_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        specs = [await rig.register(f"m{n}", fetch_gate=threading.Event()) for n in range(3)]
        errors = await asyncio.gather(*(fails(rig.loader.load(spec)) for spec in specs))
        assert {error.reason for error in errors} == {Reason.LOAD_TIMEOUT}
        await rig.load(await rig.register("a"))
        await rig.settled("a")

    run(monkeypatch, work, load_timeout_s=0.05, load_slots=1)


def test_a_copy_larger_than_expected_pushes_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        await rig.load(*[await rig.register(id) for id in "ab"])
        outcome = await rig.load(await rig.register("c", predicted_bytes=50, size_bytes=150))
        assert outcome.size_bytes == 150 and outcome.evicted == ("t/a",)
        await rig.settled("b", "c")

    run(monkeypatch, work)


def test_what_is_too_much_goes_as_soon_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        await rig.load(*[await rig.register(id) for id in "ab"])
        copies = [rig.loader.copies[f"t/{id}".encode()] for id in "ab"]
        for copy in copies:
            copy.enter()
        await rig.load(await rig.register("c", predicted_bytes=50, size_bytes=150))
        assert rig.cache.used_bytes == 350 and rig.loaded() == {"a", "b", "c"}
        # The new copy is idle, but somebody waits for it: the first one to fall idle goes instead.
        copies[1].leave(1)
        copies[0].leave(1)
        await rig.settled("a", "c")

    run(monkeypatch, work)


def test_a_copy_larger_than_the_runtime_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        await rig.load(await rig.register("a"))
        error = await fails(rig.loader.load(await rig.register("huge", predicted_bytes=50, size_bytes=301)))
        assert isinstance(error, CapacityExhausted) and "needs 301 bytes" in error.message
        await rig.settled("a")

    run(monkeypatch, work)


def test_what_a_library_takes_once_is_not_taken_for_a_models(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        rig.loader._warm_types.clear()
        seen: list[str] = []
        original = rig.loader.meter.load

        def load(type: str, artifact_bytes: int, load: Callable[[], Any]) -> tuple[Any, int]:
            seen.append(type)
            return original(type, artifact_bytes, load)

        monkeypatch.setattr(rig.loader.meter, "load", load)
        await rig.load(*[await rig.register(id) for id in "ab"])
        assert seen == ["first fake", "fake", "fake"]
        await rig.settled("a", "b")

    run(monkeypatch, work)


# -- registry --------------------------------------------------------------------------------------------------------


def test_a_model_unregistered_while_it_loads_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        gate = threading.Event()
        spec = await rig.register("a", gate=gate)
        loading_a = asyncio.create_task(rig.loader.load(spec))
        await until(lambda: rig.world.loading)
        await rig.unregister("a")
        gate.set()
        error = await fails(loading_a)
        assert (error.code, error.reason) == (Code.NOT_FOUND, Reason.NOT_REGISTERED)
        await rig.settled()
        assert rig.cache.used_bytes == 0 and rig.world.models[0].is_closed

    run(monkeypatch, work)


def test_a_runtime_that_stops_does_not_say_that_the_model_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        spec = await rig.register("a")
        rig.store.is_down = True
        load = asyncio.create_task(rig.loader.load(spec))
        await until(lambda: rig.loaded() == {"a"})
        await rig.session.close()
        with pytest.raises(Unavailable):
            await load
        rig.store.is_down = False

    run(monkeypatch, work)


def test_a_new_generation_replaces_the_old_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        old = await rig.register("a")
        await rig.load(old)
        await rig.unregister("a")
        new = await rig.register("a", size_bytes=120)
        assert new.generation != old.generation
        await rig.load(new)
        assert rig.loader.copies[b"t/a"].generation == new.generation
        await rig.settled("a")
        kv = await rig.store.get(KEYS.copy("t", "a", "i1"))
        assert kv is not None and CopyRecord.decode(kv.value).generation == new.generation
        # The old one cannot come back.
        assert (await fails(rig.loader.load(old))).reason == Reason.NOT_REGISTERED

    run(monkeypatch, work)


def test_a_failed_old_generation_does_not_take_the_new_one_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        gate = threading.Event()
        old = await rig.register("a", gate=gate)
        loading_old = asyncio.create_task(rig.loader.load(old))
        await until(lambda: rig.world.loading)
        await rig.unregister("a")
        new = await rig.register("a")
        loading_new = asyncio.create_task(rig.loader.load(new))
        await asyncio.sleep(0)
        gate.set()
        assert (await fails(loading_old)).reason == Reason.NOT_REGISTERED
        await loading_new
        for _ in range(50):
            await asyncio.sleep(0)
        assert rig.loader.copies[b"t/a"].generation == new.generation
        await rig.settled("a")

    run(monkeypatch, work)


def test_without_the_registry_a_copy_serves_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PUBLISH_WAIT_S", 0.05)

    async def work(rig: Rig) -> None:
        kept, gone = await rig.register("kept"), await rig.register("gone")
        rig.store.is_down = True
        await rig.load(kept, gone)
        assert rig.loaded() == {"kept", "gone"}
        rig.store.is_down = False
        await rig.unregister("gone")
        await until(lambda: rig.loaded() == {"kept"})
        await rig.settled("kept")
        assert rig.dropped == [KEYS.copy("t", "gone", "i1")]

    run(monkeypatch, work)


def test_a_copy_evicted_while_the_registry_is_away_is_not_published_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PUBLISH_WAIT_S", 0.05)

    async def work(rig: Rig) -> None:
        a, b = await rig.register("a", size_bytes=200), await rig.register("b", size_bytes=200)
        rig.store.is_down = True
        await rig.load(a, b)
        assert await rig.loader.unload("t/b")
        await rig.load(a)
        rig.store.is_down = False
        await rig.settled("a")

    run(monkeypatch, work)


def test_a_fenced_or_draining_runtime_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        a, b = await rig.register("a"), await rig.register("b")
        await rig.load(a)
        rig.loader.is_draining = True
        assert (await fails(rig.loader.load(b))).reason == Reason.DRAINING
        await rig.load(a)  # is here already
        await rig.session.close()
        assert (await fails(rig.loader.load(a))).reason == Reason.FENCED

    run(monkeypatch, work)


# -- unloads ---------------------------------------------------------------------------------------------------------


def test_an_unload_waits_for_the_requests_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        spec = await rig.register("a")
        await rig.load(spec)
        copy = rig.loader.copies[b"t/a"]
        copy.enter()
        copy.enter()
        callers = [asyncio.create_task(rig.loader.unload("t/a")) for _ in range(3)]
        gives_up = asyncio.create_task(rig.loader.unload("t/a"))
        await until(lambda: not rig.loader.copies)
        gives_up.cancel()
        copy.leave(1)
        for _ in range(20):
            await asyncio.sleep(0)
        # Nobody is told that it is gone while it still answers; it is out of the registry at once.
        assert not any(caller.done() for caller in callers)
        assert not rig.world.models[0].is_closed and rig.cache.used_bytes == 100
        assert await rig.published() == set()
        copy.leave(1)
        assert await asyncio.gather(*callers) == [True] * 3
        await rig.settled()
        assert rig.loader.counters.unloads == 1 and rig.loader.counters.requests_before == 2
        assert await rig.loader.unload("t/a") is False

    run(monkeypatch, work)


def test_an_unload_during_a_load_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        gate = threading.Event()
        spec = await rig.register("a", gate=gate)
        load = asyncio.create_task(rig.loader.load(spec))
        await until(lambda: rig.world.loading)
        unload = asyncio.create_task(rig.loader.unload("t/a"))
        await asyncio.sleep(0)
        gate.set()
        await load
        assert await unload
        await rig.settled()

    run(monkeypatch, work)


def test_a_load_while_the_old_copy_still_leaves_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        spec = await rig.register("a", size_bytes=200)
        await rig.load(spec)
        copy = rig.loader.copies[b"t/a"]
        copy.enter()
        unload = asyncio.create_task(rig.loader.unload("t/a"))
        await until(lambda: not rig.loader.copies)
        load = asyncio.create_task(rig.loader.load(spec))
        for _ in range(20):
            await asyncio.sleep(0)
        assert rig.plan(spec).loads == 1
        copy.leave(1)
        assert await unload
        await load
        assert rig.plan(spec).loads == 2
        await rig.settled("a")

    run(monkeypatch, work)


@pytest.mark.parametrize("seed", range(6))
def test_storms_of_everything_keep_the_books(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(loading, "ROOM_WAIT_S", 0.05)
    rng = random.Random(seed)

    async def work(rig: Rig) -> None:
        specs = {id: await rig.register(id, size_bytes=rng.choice((40, 90, 160))) for id in "abcdefgh"}
        for spec in specs.values():
            if rng.random() < 0.3:
                rig.plan(spec).predicted_bytes = rng.choice((20, 80))
            if rng.random() < 0.2:
                rig.plan(spec).error = LoadFailed("on purpose")
        tasks: set[asyncio.Task[Any]] = set()
        entered: list[Any] = []
        for _ in range(400):
            id = rng.choice("abcdefgh")
            action = rng.random()
            if action < 0.5:
                tasks.add(asyncio.create_task(rig.loader.load(specs[id])))
            elif action < 0.65:
                tasks.add(asyncio.create_task(rig.loader.unload(f"t/{id}")))
            elif action < 0.7:
                await rig.unregister(id)
                plan = rig.plan(specs[id])
                specs[id] = await rig.register(id)
                rig.world.plans[specs[id].path] = plan
            elif action < 0.75 and tasks:
                rng.choice(sorted(tasks, key=id_of)).cancel()
            elif action < 0.87 and f"t/{id}".encode() in rig.loader.copies:
                copy = rig.loader.copies[f"t/{id}".encode()]
                copy.enter()
                entered.append(copy)
            elif entered:
                entered.pop(rng.randrange(len(entered))).leave(1)
            rig.check()
            await asyncio.sleep(rng.choice((0, 0, 0.001)))
        while entered:
            entered.pop().leave(1)
            rig.check()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in outcomes:
            assert isinstance(outcome, LoadOutcome | bool | RequestError | asyncio.CancelledError), outcome
        await until(lambda: not rig.loader.loads_in_progress and not rig.loader._leaving)
        assert rig.cache.used_bytes <= 300
        await rig.settled(*rig.loaded())
        for id in specs:
            await rig.loader.unload(f"t/{id}")
        await rig.settled()
        assert rig.cache.used_bytes == 0 == rig.cache.booked_bytes

    run(monkeypatch, work)


def id_of(task: asyncio.Task[Any]) -> str:
    return task.get_name()


@pytest.mark.parametrize("key", ["", "{}", '{"a":1}'])
def test_keys_that_are_parameters(key: str) -> None:
    assert parse_key(key) == ({"a": 1} if "a" in key else {})
