"""One placement, from the question to an answer: use a copy, load one, try elsewhere, or give up with a reason.

Rule of the file: the machine decides and books, its shell acts and reports. Every step but the two last ones
(`UseCopy`, `GiveUp`) is answered with exactly one outcome, and after `start` the shell may await as it likes: the room
is booked in the ledger in the step that decides. The shell, whole:

    attempts = Attempts(name, rng, ledger)
    try:
        step = attempts.start(model_view, cluster_view)
        while not isinstance(step, UseCopy | GiveUp):
            match step:
                case TryLoad(instance, size_bytes): outcome = await load(...)   # Loaded, LoadFailed or Refused
                case RecordFailure(failure): outcome = await record(failure)    # Recorded, written or not
            step = attempts.next(outcome, fresh_model_view, fresh_cluster_view)
    finally:
        attempts.abandon()                                                      # lets go of what is still booked
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raymesh.placement.filters import Reason
from raymesh.placement.ledger import Ledger
from raymesh.placement.policy import Decision, choose
from raymesh.placement.view import ClusterView, ModelView, PlacementRequest
from raymesh.registry.records import CopyState, LoadFailure

if TYPE_CHECKING:
    from random import Random

#: A model that failed to load this often, each time somewhere else, will fail the next time too (ModelMesh: 3).
LOAD_FAILURES_MAX = 3
#: Instances asked for one placement. Each may cost the caller a round trip or a load, so it has to end.
LOAD_PLACES_MAX = 5
#: How long a load failure counts, unless the shell says otherwise (ModelMesh: 15 minutes).
FAILURE_EXPIRY_MS = 900_000


@dataclass(frozen=True, slots=True)
class TryLoad:
    """Load the model on `instance`; room for `size_bytes` is booked. Answer: `Loaded`, `LoadFailed` or `Refused`."""

    instance: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class RecordFailure:
    """Add the failure to the model's record, for other controllers and `getModelStatus`. Answer: `Recorded`."""

    failure: LoadFailure


@dataclass(frozen=True, slots=True)
class UseCopy:
    """The end: `instance` holds a loaded copy."""

    instance: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The end: no copy. `code` names a gRPC status, `reason` is for machines, `message` for the caller."""

    code: str
    reason: str
    message: str


Step = TryLoad | RecordFailure | UseCopy | GiveUp


@dataclass(frozen=True, slots=True)
class Loaded:
    """The instance holds the copy now; `size_bytes` as measured, 0 if unknown."""

    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The instance tried and the model cannot be loaded there: the model is at fault."""

    message: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The instance did not try, or its answer was lost: the model is not at fault.

    `reason` is the instance's own (NO_CAPACITY, DRAINING, FENCED, LOAD_TIMEOUT …) or NO_INSTANCE when unreachable.
    """

    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The failure was written to the registry, or could not be: the placement goes on either way."""


Outcome = Loaded | LoadFailed | Refused | Recorded


class Attempts:
    """One placement of one model; used once.

    It ends after at most `LOAD_FAILURES_MAX` failures and `LOAD_PLACES_MAX` places. Failures on record count as if they
    had happened here until they expire, so a broken model fails fast everywhere. A refusal costs a place only.
    """

    def __init__(
        self,
        model: str,
        rng: Random,
        ledger: Ledger,
        *,
        excluded: Collection[str] = (),
        failure_expiry_ms: int = FAILURE_EXPIRY_MS,
    ) -> None:
        self._model = model
        self._rng = rng
        self._ledger = ledger
        self._failure_expiry_ms = failure_expiry_ms
        #: Where not to go: what the caller excluded and what was tried.
        self._excluded = set(excluded)
        self._places = 0
        #: This placement's own failures, by instance; the record may lack them when it could not be written.
        self._failures: dict[str, LoadFailure] = {}
        self._refusals: list[Refused] = []
        #: The step that waits for its outcome; None before `start` and after the end.
        self._waiting: TryLoad | RecordFailure | None = None
        self._has_started = False

    def start(self, model: ModelView, view: ClusterView) -> Step:
        """The first step. Raises `ValueError` when started before."""
        if self._has_started:
            raise ValueError("a placement starts once")
        self._has_started = True
        return self._decide(model, view)

    def next(self, outcome: Outcome, model: ModelView, view: ClusterView) -> Step:
        """The step after the last one's outcome, on fresh views. Raises `ValueError` when it answers no step."""
        waiting, self._waiting = self._waiting, None
        match waiting, outcome:
            case TryLoad(instance), Loaded(size_bytes):
                self._ledger.settled(self._model, instance, revision=view.revision, size_bytes=size_bytes)
                return UseCopy(instance)
            case TryLoad(instance), LoadFailed(message):
                self._ledger.forget(self._model, instance)
                failure = LoadFailure(instance, message, view.now_ms, view.now_ms + self._failure_expiry_ms)
                self._failures[instance] = failure
                self._waiting = RecordFailure(failure)
                return self._waiting
            case TryLoad(instance), Refused():
                self._ledger.forget(self._model, instance)
                self._refusals.append(outcome)
                return self._decide(model, view)
            case RecordFailure(), Recorded():
                return self._decide(model, view)
        self._waiting = waiting
        raise ValueError(f"{outcome} does not answer {waiting}")

    def abandon(self) -> None:
        """Let go of what is booked for a load that nobody will report on. No error after the end, or twice."""
        if isinstance(self._waiting, TryLoad):
            self._ledger.forget(self._model, self._waiting.instance)
        self._waiting = None

    def _decide(self, model: ModelView, view: ClusterView) -> Step:
        copy = self._usable_copy(model, view)
        if copy is not None:
            return UseCopy(copy)
        failures = {f.instance: f for f in model.unexpired_failures(view.now_ms)} | self._failures
        if len(failures) >= LOAD_FAILURES_MAX:
            return _load_failed(failures.values())
        if self._places >= LOAD_PLACES_MAX:
            return self._give_up(model, None, failures.values())
        merged = self._ledger.merged(view)
        if loading := self._ledger.loading(self._model):  # another placement of the same model, asked for an extra copy
            model = replace(model, copies={**model.copies, **dict.fromkeys(loading, CopyState.LOADING)})
        decision = choose(PlacementRequest(model, frozenset(self._excluded)), merged, self._rng)
        if decision.instance is None:
            return self._give_up(model, decision, failures.values())
        self._ledger.reserve(self._model, decision.instance, model.size_bytes)
        self._excluded.add(decision.instance)
        self._places += 1
        self._waiting = TryLoad(decision.instance, model.size_bytes)
        return self._waiting

    def _usable_copy(self, model: ModelView, view: ClusterView) -> str | None:
        """The least busy instance that holds a loaded copy; one that drains only if there is no other."""
        if not model.copies:
            return None
        holders = [
            i for i in view.instances if model.copies.get(i.id) is CopyState.LOADED and i.id not in self._excluded
        ]
        return min(holders, key=lambda i: (i.is_draining, i.busy, i.id)).id if holders else None

    def _give_up(self, model: ModelView, decision: Decision | None, failures: Collection[LoadFailure]) -> GiveUp:
        """The most useful reason: the model's own fault first, then lack of room, then whatever else there was."""
        reasons = list(decision.reasons.values()) if decision else []
        if failures and (decision is None or Reason.FAILED in reasons or self._failures):
            return _load_failed(failures)
        for refusal in self._refusals:
            if refusal.reason == "NO_CAPACITY":
                return GiveUp("RESOURCE_EXHAUSTED", "NO_CAPACITY", refusal.message or "no instance has room now")
        why = decision.explain() if decision else f"{self._places} instances were tried"
        if reasons and all(reason is Reason.TYPE for reason in reasons):
            return GiveUp("FAILED_PRECONDITION", "UNSUPPORTED", f"no instance serves models of type '{model.type}'")
        if reasons and all(reason in (Reason.TOO_SMALL, Reason.TYPE, Reason.LABEL) for reason in reasons):
            return GiveUp("RESOURCE_EXHAUSTED", "NO_CAPACITY", f"{model.size_bytes} bytes fit nowhere: {why}")
        if self._refusals:
            last = self._refusals[-1]
            code = "DEADLINE_EXCEEDED" if last.reason == "LOAD_TIMEOUT" else "UNAVAILABLE"
            return GiveUp(code, last.reason, last.message or why)
        is_all_draining = bool(reasons) and all(reason is Reason.DRAINING for reason in reasons)
        return GiveUp("UNAVAILABLE", "DRAINING" if is_all_draining else "NO_INSTANCE", f"no instance: {why}")


def _load_failed(failures: Collection[LoadFailure]) -> GiveUp:
    latest = max(failures, key=lambda f: (f.at_ms, f.instance))
    return GiveUp("FAILED_PRECONDITION", "LOAD_FAILED", latest.message)
