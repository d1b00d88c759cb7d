"""Transitions of vmodels, carried out by the placement controller that leads.

Rule of the file: `placement.vmodels` says what to do next, this file does it. All that matters is in the registry, so
a new leader goes on where the old one stopped, and two leaders at once do no harm: every write compares.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

from raymesh.mesh.fresh_copies import Placed
from raymesh.mesh.placements import PlaceRequest
from raymesh.mesh.vmodel_writes import VModelWrites
from raymesh.placement.vmodels import Flip, Plan, Wait, next_step, plan_failure, plan_flip, retry_at_ms
from raymesh.registry.records import ModelRecord, VModelRecord
from raymesh.registry.store import RegistryError
from raymesh.registry.view import Change, CopyPut, InstancePut, LeaderChanged, MeshView, VModelDeleted, VModelPut
from raymesh.runtimes.errors import Code, Reason, RequestError

log = logging.getLogger(__name__)

#: While a vmodel is in transition it is looked at this often: failures expire, and what the registry or the mesh could
#: not do is tried again. News (a copy, an instance, a changed vmodel) is acted on at once.
TICK_S = 1.0


class Transitions:
    """Brings every vmodel to its target. `see` must get every change of the view; `run` is to be a task of the caller.

    `place` has a model loaded and raises the `RequestError` that says why it cannot be.
    """

    def __init__(
        self,
        view: MeshView,
        writes: VModelWrites,
        place: Callable[[PlaceRequest], Awaitable[Placed]],
        *,
        is_leader: Callable[[], bool],
        source: str,
    ) -> None:
        self._view = view
        self._writes = writes
        self._place = place
        self._is_leader = is_leader
        self._source = source
        self._numbers = itertools.count(1)
        #: Full names of the vmodels in transition.
        self._open: set[str] = set()
        #: Those to be tried at once whatever was said about waiting: there is a new instance.
        self._eager: set[str] = set()
        #: Steps under way, by vmodel and target: a new target does not wait for the load of the one before.
        self._working: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._news = asyncio.Event()

    def see(self, changes: Iterable[Change]) -> None:
        """Follow the view."""
        for change in changes:
            match change:
                case VModelPut(name, _, new):
                    if new.record.active != new.record.target:
                        self._open.add(name)
                        self._news.set()
                    else:
                        self._open.discard(name)
                case VModelDeleted(name, _):
                    self._open.discard(name)
                case CopyPut(name, _, _, _):
                    if self._open and self._view.vmodels_of(name):
                        self._news.set()
                case InstancePut(_, None, _):
                    self._eager |= self._open
                    self._news.set()
                case LeaderChanged():
                    self._news.set()
                case _:
                    pass

    async def run(self) -> None:
        """Look after the vmodels in transition for ever (cancel to end)."""
        try:
            while True:
                try:
                    async with asyncio.timeout(TICK_S if self._open else None):
                        await self._news.wait()
                except TimeoutError:
                    pass
                self._news.clear()
                self._eager &= self._open
                if self._is_leader():
                    for name in sorted(self._open):
                        self._advance(name)
        finally:
            working = list(self._working.values())
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)

    def _advance(self, name: str) -> None:
        """Begin the next step of one vmodel, unless one is under way or there is nothing to do now."""
        entry = self._view.vmodels.get(name)
        if entry is None or (name, entry.record.target) in self._working:
            return
        record = entry.record
        loaded = {m for m in (record.active, record.target) if self._view.loaded_on(f"{record.tenant}/{m}")}
        step = next_step(record, loaded, _now_ms())
        if step is None or (isinstance(step, Wait) and name not in self._eager):
            return
        self._eager.discard(name)
        work = self._flip(name, record.target) if isinstance(step, Flip) else self._load(record)
        key = (name, record.target)
        task = self._working[key] = asyncio.create_task(work, name=f"transition of {name}")
        task.add_done_callback(lambda done: self._done(key, done))

    def _done(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        del self._working[key]
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, RegistryError | RequestError):
            log.warning("transition of %s is tried again: %s", key[0], error)
        elif error is not None:
            log.error("transition of %s failed", key[0], exc_info=error)

    async def _flip(self, name: str, target: str) -> None:
        written = await self._writes.write(name, lambda vmodel, models: plan_flip(vmodel, target, models))
        if written is not None:
            # Copies of a model that went with its last reference are unloaded as any orphans are, a little later: by
            # then nobody is sent to them any more.
            gone = f", {', '.join(model for model, _ in written.deleted)} deleted" if written.deleted else ""
            log.info("vmodel %s is %s now%s", name, target, gone)

    async def _load(self, record: VModelRecord) -> None:
        """Have the target loaded, then flip; or note why it cannot be."""
        cause_id = f"{self._source}-v{next(self._numbers)}"
        try:
            await self._place(PlaceRequest(record.target_name, cause_id))
        except RequestError as error:
            if error.code is Code.UNAVAILABLE or error.reason == Reason.NOT_REGISTERED:
                # Not the model's fault, or the view is behind: again at the next tick.
                raise
            await self._note_failure(record, error.message)
            return
        await self._flip(record.name, record.target)

    async def _note_failure(self, record: VModelRecord, message: str) -> None:
        target = record.target

        def decide(vmodel: VModelRecord | None, models: Mapping[str, ModelRecord]) -> Plan | None:
            failures = models[target].failures if target in models else ()
            now_ms = _now_ms()
            return plan_failure(vmodel, target, message, retry_at_ms(failures, now_ms))

        await self._writes.write(record.name, decide)
        log.warning("vmodel %s stays at %s: %s does not load: %s", record.name, record.active, target, message)


def _now_ms() -> int:
    # Wall-clock time, as load failures expire by it.
    return time.time_ns() // 1_000_000
