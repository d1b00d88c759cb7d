"""A mesh in virtual time: the production cores, with a simulated controller, runtimes and registry around them.

Rule of the file: it decides nothing that the mesh decides. `InstanceCache`, `choose`, `Ledger` and `Attempts` are the
real ones; what surrounds them is as plain as it can be, and as unkind: reports are old, replies get lost, instances
die. The same seed gives the same run on every machine. Used by `tests/sim` and by `loadtests/simulate.py`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raymesh.placement.attempts import (
    Attempts,
    GiveUp,
    Loaded,
    LoadFailed,
    Outcome,
    Recorded,
    RecordFailure,
    Refused,
    Step,
    TryLoad,
    UseCopy,
)
from raymesh.placement.cache import InstanceCache
from raymesh.placement.ledger import Ledger
from raymesh.placement.view import InstanceViews, ModelView
from raymesh.registry.records import CopyState, InstanceRecord, LoadFailure

if TYPE_CHECKING:
    from random import Random


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How likely each fault is, 0.0 to 1.0, per load unless it says otherwise."""

    load_fails: float = 0.0
    load_hangs: float = 0.0
    size_differs: float = 0.0
    reply_lost: float = 0.0
    #: Per heartbeat of every instance; a lost one is replaced under a new id.
    instance_lost: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long things take, in virtual milliseconds."""

    rpc: int = 1
    load: int = 50
    #: Share by which a load may be faster or slower.
    load_jitter: float = 0.5
    unload: int = 5
    service: int = 4
    watch_lag: int = 20
    heartbeat: int = 1_000
    lease: int = 5_000
    load_timeout: int = 2_000
    failure_expiry: int = 30_000


@dataclass(slots=True)
class SimModel:
    """A registered model; `size_bytes` is the true size, `seen_bytes` what the record says (0: never loaded)."""

    name: str
    size_bytes: int
    is_broken: bool = False
    seen_bytes: int = 0
    failures: tuple[LoadFailure, ...] = ()
    #: What the registry says, in order of publication.
    copies: dict[str, CopyState] = field(default_factory=dict)


@dataclass(slots=True)
class SimInstance:
    """A runtime: its cache, and the loads that wait for memory or a load slot."""

    id: str
    cache: InstanceCache
    load_slots: int = 2
    is_alive: bool = True
    is_draining: bool = False
    queue: list[str] = field(default_factory=list)
    loading: dict[str, int] = field(default_factory=dict)
    #: Placements that wait for a load here, by model.
    callers: dict[str, list[_Placement]] = field(default_factory=dict)
    #: Bytes by which copies in memory turned out larger than expected.
    overshoot_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Placement:
    """One placement under way and the requests that wait for it. `tries` tells late replies from current ones."""

    model: str
    attempts: Attempts
    requests: list[int] = field(default_factory=list)
    tries: int = 0


class SimulationError(AssertionError):
    """The run broke one of the promises it checks."""


class Simulation:
    """One run. Script it with `add_instance`, `register`, `request`, `lose`, `drain`; move time with `run_until`.

    `transcript` gets a line per thing that happens. With `is_checked` every step verifies: caches keep their invariants
    and never overfill, one load of a model at a time, every request answered exactly once.
    """

    def __init__(
        self,
        rng: Random,
        *,
        faults: Faults | None = None,
        timing: Timing | None = None,
        is_checked: bool = True,
        transcript: Callable[[str], None] | None = None,
    ) -> None:
        self.rng = rng
        self.faults = faults or Faults()
        self.timing = timing or Timing()
        self.now_ms = 0
        self.models: dict[str, SimModel] = {}
        self.instances: dict[str, SimInstance] = {}
        #: Answers by kind: ``warm``, ``cold`` and the reasons of failures.
        self.answers: Counter[str] = Counter()
        #: Things done: loads, evictions, load_failures, decisions.
        self.counts: Counter[str] = Counter()
        #: How each request ended, by its number.
        self.outcomes: dict[int, str] = {}
        self.open: dict[int, str] = {}
        self._is_checked = is_checked
        self._transcript = transcript
        self._views = InstanceViews()
        self._ledger = Ledger()
        self._placements: dict[str, _Placement] = {}
        self._revision = 0
        self._next_id = 0
        self._events: list[tuple[int, int, Callable[..., object], tuple[Any, ...]]] = []
        self._sequence = 0

    # -- The script ---------------------------------------------------------------------------------------------------

    def add_instance(self, capacity_bytes: int, *, load_slots: int = 2) -> SimInstance:
        """A new instance, known to the controller at once; ids count up and are never reused."""
        self._next_id += 1
        instance = SimInstance(f"i{self._next_id}", InstanceCache(capacity_bytes), load_slots)
        self.instances[instance.id] = instance
        self._see(self._record(instance), self._revise())
        self._after(self.timing.heartbeat, self._beat, instance)
        return instance

    def register(self, name: str, size_bytes: int, *, is_broken: bool = False) -> None:
        """A new model. A broken one fails to load everywhere."""
        self.models[name] = SimModel(name, size_bytes, is_broken)

    def request(self, model: str) -> int:
        """A request for the model arrives; its number."""
        number = len(self.outcomes) + len(self.open) + 1
        self.open[number] = model
        self._say(f"request {number} for {model}")
        self._route(number)
        return number

    def lose(self, instance_id: str) -> None:
        """The instance dies. The registry lists it until its lease ends; callers learn it by their connections."""
        instance = self.instances[instance_id]
        instance.is_alive = False
        self._say(f"{instance_id} lost")
        for placements in instance.callers.values():
            for placement in placements:
                self._reply(placement, Refused("NO_INSTANCE", f"{instance_id} is unreachable"))
        instance.callers.clear()
        self._after(self.timing.lease, self._expire, instance)

    def drain(self, instance_id: str) -> None:
        """The instance takes no more loads and says so; it keeps answering from its copies."""
        instance = self.instances[instance_id]
        instance.is_draining = True
        self._say(f"{instance_id} draining")
        self._publish(instance)

    def at(self, at_ms: int, action: Callable[..., object], *args: Any) -> None:
        """Call `action` when virtual time reaches `at_ms`."""
        self._after(at_ms - self.now_ms, action, *args)

    def run_until(self, until_ms: int) -> None:
        """Let everything happen that is due by then. Raises `SimulationError` when a promise is broken."""
        while self._events and self._events[0][0] <= until_ms:
            self.now_ms, _, action, args = heapq.heappop(self._events)
            action(*args)
        self.now_ms = max(self.now_ms, until_ms)

    # -- Requests -----------------------------------------------------------------------------------------------------

    def _route(self, number: int) -> None:
        """What front door and gateway do: a known copy, else the controller."""
        model = self.models[self.open[number]]
        for instance_id in model.copies:
            instance = self.instances.get(instance_id)
            if instance is not None and instance.is_alive and instance.cache.is_loaded(model.name):
                self._serve(number, instance, "warm")
                return
        self._place(number, model)

    def _serve(self, number: int, instance: SimInstance, kind: str) -> None:
        model = self.open[number]
        instance.cache.touch(model, self.now_ms)
        instance.cache.pin(model)
        self._after(self.timing.service, self._served, number, instance, kind)

    def _served(self, number: int, instance: SimInstance, kind: str) -> None:
        model = self.open[number]
        if not instance.is_alive:
            self._route(number)
            return
        instance.cache.unpin(model)
        if instance.cache.booked_bytes > instance.cache.capacity_bytes:
            self._relieve(instance)
        self._answer(number, kind, f"{kind} by {instance.id}")

    def _answer(self, number: int, kind: str, text: str) -> None:
        if self.open.pop(number, None) is None:
            raise SimulationError(f"request {number} answered twice")
        self.outcomes[number] = kind
        self.answers[kind] += 1
        self._say(f"request {number} {text}")

    # -- The controller -----------------------------------------------------------------------------------------------

    def _place(self, number: int, model: SimModel) -> None:
        placement = self._placements.get(model.name)
        if placement is not None:  # single flight: wait with the others
            placement.requests.append(number)
            return
        dead = [i for i in model.copies if not self.instances[i].is_alive]  # found out by connecting
        attempts = Attempts(
            model.name, self.rng, self._ledger, excluded=dead, failure_expiry_ms=self.timing.failure_expiry
        )
        placement = self._placements[model.name] = _Placement(model.name, attempts, [number])
        self._perform(placement, self.decide(placement, None))

    def decide(self, placement: _Placement, outcome: Outcome | None) -> Step:
        """Ask the placement for its next step; a seam for measuring."""
        self.counts["decisions"] += 1
        model = self.models[placement.model]
        view = self._views.at(self.now_ms, self._revision)
        # The registry knows only what instances published; copies of lost instances stay until the lease ends.
        model_view = ModelView(
            name=model.name,
            type="any",
            size_bytes=model.seen_bytes or model.size_bytes,
            failures=model.failures,
            copies=dict(model.copies),
        )
        if outcome is None:
            return placement.attempts.start(model_view, view)
        return placement.attempts.next(outcome, model_view, view)

    def _perform(self, placement: _Placement, step: Step) -> None:
        model = self.models[placement.model]
        match step:
            case TryLoad(instance_id, size_bytes):
                placement.tries += 1
                self._after(self.timing.rpc, self._asked, instance_id, size_bytes, placement)
            case RecordFailure(failure):
                model.failures = (*(f for f in model.failures if f.expires_ms > self.now_ms), failure)
                self._perform(placement, self.decide(placement, Recorded()))
            case UseCopy(instance_id):
                del self._placements[placement.model]
                instance = self.instances.get(instance_id)
                for number in placement.requests:
                    if instance is not None and instance.is_alive and instance.cache.is_loaded(model.name):
                        self._serve(number, instance, "cold")
                    else:
                        # The view was stale: the registry drops the dead one's copies when somebody runs into it.
                        model.copies.pop(instance_id, None)
                        self._route(number)
            case GiveUp(_, reason, message):
                del self._placements[placement.model]
                for number in placement.requests:
                    self._answer(number, reason, f"{reason}: {message}")

    def _reply(self, placement: _Placement, outcome: Outcome, delay_ms: int | None = None) -> None:
        self._after(
            self.timing.rpc if delay_ms is None else delay_ms, self._replied, placement, placement.tries, outcome
        )

    def _replied(self, placement: _Placement, tries: int, outcome: Outcome) -> None:
        if tries == placement.tries and self._placements.get(placement.model) is placement:
            placement.tries += 1  # whatever else arrives for this try is late
            self._perform(placement, self.decide(placement, outcome))

    # -- The runtimes -------------------------------------------------------------------------------------------------

    def _asked(self, instance_id: str, size_bytes: int, placement: _Placement) -> None:
        """A load request arrives at an instance."""
        instance, name = self.instances.get(instance_id), placement.model
        if instance is None or not instance.is_alive:
            self._reply(placement, Refused("NO_INSTANCE", f"{instance_id} is unreachable"))
        elif instance.cache.is_loaded(name):
            self._reply(placement, Loaded(instance.cache.size_bytes(name)))
        elif instance.is_draining:
            self._reply(placement, Refused("DRAINING"))
        elif instance.cache.state(name) in (CopyState.RESERVED, CopyState.LOADING):
            instance.callers.setdefault(name, []).append(placement)
        elif name in instance.cache:  # its last copy is leaving: load it again once that is gone
            self._after(self.timing.unload, self._asked, instance_id, size_bytes, placement)
        else:
            reservation = instance.cache.reserve(name, size_bytes, self.now_ms)
            if reservation is None:
                self._say(f"{instance_id} no room for {name}")
                self._reply(placement, Refused("NO_CAPACITY"))
                return
            instance.callers[name] = [placement]
            instance.queue.append(name)
            self._evict(instance, reservation.victims)
            self._start_loads(instance)
            self._check(instance)

    def _evict(self, instance: SimInstance, victims: Iterable[str]) -> None:
        """Take copies that are UNLOADING already out of the registry and out of memory."""
        for victim in victims:
            self.counts["evictions"] += 1
            self._say(f"{instance.id} evict {victim}")
            self.models[victim].copies.pop(instance.id, None)
            self._after(self.timing.unload, self._free, instance, victim)

    def _free(self, instance: SimInstance, name: str) -> None:
        if instance.is_alive and not instance.cache.in_flight(name):
            instance.cache.unloaded(name)
            instance.overshoot_bytes.pop(name, None)
            self._start_loads(instance)
            self._check(instance)

    def _relieve(self, instance: SimInstance) -> None:
        """A load was larger than expected: evict until everything fits again."""
        victims = instance.cache.victims_for(0) or ()
        for victim in victims:
            instance.cache.begin_unload(victim)
        self._evict(instance, victims)

    def _start_loads(self, instance: SimInstance) -> None:
        for name in list(instance.queue):
            if len(instance.loading) < instance.load_slots and instance.cache.may_load(name):
                instance.queue.remove(name)
                self._start_load(instance, name)

    def _start_load(self, instance: SimInstance, name: str) -> None:
        self.counts["loads"] += 1
        self._say(f"{instance.id} load {name}")
        instance.loading[name] = self.now_ms
        load_ms = int(self.timing.load * (1 + self.timing.load_jitter * (2 * self.rng.random() - 1)))
        if self._happens(self.faults.load_hangs):
            load_ms += 2 * self.timing.load_timeout
            # The instance gives its callers up after the timeout; the load itself goes on, and nobody waits for it.
            self._after(self.timing.load_timeout, self._timed_out, instance, name)
        self._after(load_ms, self._load_ended, instance, name)
        self._check_single_flight(name)

    def _timed_out(self, instance: SimInstance, name: str) -> None:
        for placement in instance.callers.pop(name, ()):
            self._reply(placement, Refused("LOAD_TIMEOUT"))

    def _load_ended(self, instance: SimInstance, name: str) -> None:
        if not instance.is_alive:
            return
        model = self.models[name]
        del instance.loading[name]
        outcome: Outcome
        if model.is_broken or self._happens(self.faults.load_fails):
            self.counts["load_failures"] += 1
            self._say(f"{instance.id} load failed {name}")
            instance.cache.forget(name)
            outcome = LoadFailed(f"{name} cannot be loaded")
        else:
            expected_bytes = instance.cache.size_bytes(name)
            factor = 0.5 + self.rng.random() if self._happens(self.faults.size_differs) else 1.0
            actual_bytes = int(model.size_bytes * factor)
            instance.cache.loaded(name, actual_bytes)
            instance.overshoot_bytes[name] = max(0, actual_bytes - expected_bytes)
            model.seen_bytes, model.copies[instance.id] = actual_bytes, CopyState.LOADED
            outcome = Loaded(actual_bytes)
            self._revise()
        # First those who waited (they pin the copy), then the overshoot.
        for placement in instance.callers.pop(name, ()):
            if self._happens(self.faults.reply_lost):
                self._reply(placement, Refused("LOAD_TIMEOUT"), self.timing.load_timeout)
            else:
                self._reply(placement, outcome)
        self._relieve(instance)
        self._start_loads(instance)
        self._check(instance)

    # -- The registry -------------------------------------------------------------------------------------------------

    def _revise(self) -> int:
        self._revision += 1
        return self._revision

    def _record(self, instance: SimInstance) -> InstanceRecord:
        cache = instance.cache
        return InstanceRecord(
            id=instance.id,
            address=f"{instance.id}:1",
            pool="cpu",
            epoch=1,
            capacity_bytes=cache.capacity_bytes,
            used_bytes=cache.booked_bytes,
            load_slots=instance.load_slots,
            loads_in_progress=len(instance.loading) + len(instance.queue),
            copies=len(cache),
            lru_age_ms=cache.lru_age_ms(self.now_ms),
            draining=instance.is_draining,
        )

    def _publish(self, instance: SimInstance) -> None:
        """The instance reports itself; the controller sees it a watch lag later."""
        self._after(self.timing.watch_lag, self._see, self._record(instance), self._revise())

    def _see(self, record: InstanceRecord, revision: int) -> None:
        if record.id in self.instances:
            self._views.put(record, revision)

    def _beat(self, instance: SimInstance) -> None:
        if not instance.is_alive:
            return
        if self._happens(self.faults.instance_lost):
            self.lose(instance.id)
            replacement = self.add_instance(instance.cache.capacity_bytes, load_slots=instance.load_slots)
            self._say(f"{replacement.id} replaces {instance.id}")
            return
        self._publish(instance)
        self._after(self.timing.heartbeat, self._beat, instance)

    def _expire(self, instance: SimInstance) -> None:
        self._say(f"{instance.id} expired")
        del self.instances[instance.id]
        self._views.remove(instance.id)
        for name in instance.cache:
            self.models[name].copies.pop(instance.id, None)
        self._revise()

    # -- Time, chance, checks -----------------------------------------------------------------------------------------

    def _after(self, delay_ms: int, action: Callable[..., object], *args: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (self.now_ms + delay_ms, self._sequence, action, args))

    def _happens(self, probability: float) -> bool:
        return probability > 0.0 and self.rng.random() < probability

    def _say(self, line: str) -> None:
        if self._transcript is not None:
            self._transcript(f"{self.now_ms:>6} {line}")

    def _check(self, instance: SimInstance) -> None:
        if not self._is_checked:
            return
        cache = instance.cache
        cache.validate()
        if cache.used_bytes > cache.capacity_bytes + sum(instance.overshoot_bytes.values()):
            raise SimulationError(f"{instance.id} is overfull: {cache}")
        if cache.victims_for(0):
            raise SimulationError(f"{instance.id} is overfull and evicts nothing: {cache}")

    def _check_single_flight(self, name: str) -> None:
        """One load that somebody waits for, however many requests there are. (Timed out loads may still run.)"""
        if not self._is_checked:
            return
        places = [i.id for i in self.instances.values() if i.is_alive and i.callers.get(name)]
        if len(places) > 1:
            raise SimulationError(f"{name} is loading on {places}")
