"""The vmodels as one gateway knows them: which model answers for a name, and the changes that clients ask for.

Rule of the file: a name is a model's. Only if there is no model of that name is it a vmodel's (that is how ModelMesh's
serving layer names things: the model name of the inference protocol is a vmodel's id). After a change was acknowledged
no later answer of this gateway contradicts it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from raymesh.mesh.catalog import Catalog, registry_errors
from raymesh.mesh.vmodel_writes import VModelWrites, Written
from raymesh.placement.vmodels import Plan, Refusal, SetVModel, models_of, plan_delete, plan_set
from raymesh.registry.keys import is_valid_id
from raymesh.registry.records import ModelRecord, VModelRecord
from raymesh.registry.store import Store
from raymesh.registry.view import Change, MeshView, ModelEntry, VModelDeleted, VModelEntry, VModelPut
from raymesh.runtimes.errors import Code, ModelNotFound, Reason, RequestError

log = logging.getLogger(__name__)

#: Longest a change waits until the view shows it.
VIEW_TIMEOUT_S = 1.0


class Named(NamedTuple):
    """What a request names: ``tenant/id``, a vmodel's if it says so, else a model's or a vmodel's."""

    name: str
    is_vmodel: bool = False


class Resolved(NamedTuple):
    """The model that is to answer; `vmodel` is the full name of the vmodel that led to it, or ""."""

    entry: ModelEntry
    vmodel: str = ""


class VModelNotFound(RequestError):
    """No such vmodel."""

    def __init__(self, vmodel: str) -> None:
        super().__init__(Code.NOT_FOUND, f"vmodel '{vmodel}' is not found", reason=Reason.NOT_REGISTERED)


class VModels:
    """Finds, sets and deletes vmodels. `see` must get every change of the view, after the view has it."""

    def __init__(self, store: Store, view: MeshView, catalog: Catalog) -> None:
        self._writes = VModelWrites(store, view.keys)
        self._view = view
        self._catalog = catalog
        #: Registry reads under way, by name: a flood of requests for an unknown vmodel reads it once.
        self._reads: dict[str, asyncio.Task[VModelEntry | None]] = {}
        #: Records read that are newer than the view's, until the view moves on.
        self._newer: dict[str, VModelEntry] = {}
        #: Set, and replaced, whenever any vmodel changes; only who waits for a transition listens.
        self._news = asyncio.Event()

    def see(self, changes: Iterable[Change]) -> None:
        """Follow the view."""
        has_news = False
        for change in changes:
            if isinstance(change, VModelPut | VModelDeleted):
                has_news = True
                newer = self._newer.get(change.name)
                if newer and (isinstance(change, VModelDeleted) or change.new.mod_revision >= newer.mod_revision):
                    del self._newer[change.name]
        if has_news:
            self._news.set()
            self._news = asyncio.Event()

    # -- reads -----------------------------------------------------------------------------------------------------

    async def find(self, name: str) -> VModelEntry | None:
        """The vmodel's entry, from the registry when the view lacks it. Raises UNAVAILABLE as `Catalog.find` does."""
        entry, newer = self._view.vmodels.get(name), self._newer.get(name)
        if entry is not None:
            return newer if newer is not None and newer.mod_revision > entry.mod_revision else entry
        read = self._reads.get(name)
        if read is None:
            read = self._reads[name] = asyncio.create_task(self._read(name))
            read.add_done_callback(lambda _: self._reads.pop(name, None))
        return await asyncio.shield(read)

    async def refresh(self, name: str) -> None:
        """Read the vmodel anew: what the view says of it turned out to be over."""
        entry = await self._read(name)
        if entry is not None and name in self._view.vmodels:
            self._newer[name] = entry

    async def resolve(self, asked: Named) -> Resolved:
        """The model that answers a request. Raises `ModelNotFound` or `VModelNotFound`."""
        name = asked.name
        if asked.is_vmodel or (name not in self._view.models and name in self._view.vmodels):
            return await self._active(name)
        entry = await self._catalog.find(name)
        if entry is not None:
            return Resolved(entry)
        if await self.find(name) is not None:
            return await self._active(name)
        raise ModelNotFound(name.partition("/")[2])

    async def model_behind(self, name: str) -> ModelEntry | None:
        """The model that answers to a plain name; None when nothing does."""
        tenant, _, model = name.partition("/")
        if not (is_valid_id(tenant) and is_valid_id(model)):
            return None
        try:
            return (await self.resolve(Named(name))).entry
        except RequestError as error:
            if error.code is Code.NOT_FOUND:
                return None
            raise

    async def _active(self, name: str) -> Resolved:
        vmodel = await self.find(name)
        if vmodel is None:
            raise VModelNotFound(name.partition("/")[2])
        entry = await self._catalog.find(vmodel.record.active_name)
        if entry is None:
            # Deleted when the vmodel left it, a moment ago.
            await self.refresh(name)
            vmodel = await self.find(name)
            entry = await self._catalog.find(vmodel.record.active_name) if vmodel else None
        if entry is None:
            raise VModelNotFound(name.partition("/")[2])
        return Resolved(entry, name)

    async def _read(self, name: str) -> VModelEntry | None:
        with registry_errors():
            return await self._writes.read(name)

    # -- changes ---------------------------------------------------------------------------------------------------

    async def set(self, wish: SetVModel) -> VModelEntry:
        """Carry out a ``setVModel``; the vmodel as it is then. Raises the `RequestError` that the call ends in."""

        def decide(vmodel: VModelRecord | None, models: Mapping[str, ModelRecord]) -> Plan:
            touched = models_of(vmodel) | {wish.target}
            loaded = {model for model in touched if self._catalog.is_loaded(f"{wish.tenant}/{model}")}
            plan = plan_set(wish, vmodel, models, loaded)
            if isinstance(plan, Refusal):
                reason = Reason.NOT_REGISTERED if plan.code == "NOT_FOUND" else ""
                raise RequestError(Code[plan.code], plan.message, reason=reason)
            return plan

        name = f"{wish.tenant}/{wish.id}"
        with registry_errors():
            written = await self._writes.write(name, decide, also=wish.target)
        assert written is not None and written.entry is not None
        await self._wait_for_view(name, written)
        return written.entry

    async def delete(self, name: str, owner: str, on_deleted: Callable[[tuple[str, ...]], None]) -> None:
        """Delete a vmodel and the models that go with it, their copies included.

        No effect when there is none or, `owner` given, when it is somebody else's. `on_deleted` is told the names of
        the models as soon as the records are gone.
        """
        with registry_errors():
            written = await self._writes.write(name, lambda vmodel, models: plan_delete(vmodel, owner, models))
        if written is None:
            return
        self._newer.pop(name, None)
        on_deleted(tuple(model for model, _ in written.deleted))
        await asyncio.gather(*(self._catalog.release(model, generation) for model, generation in written.deleted))
        await self._wait_for_view(name, written)

    async def settled(self, begun: VModelEntry, *, until_s: float) -> VModelRecord | None:
        """The vmodel when the transition has ended that it was left in, well or not; or as it is at `until_s`.

        None when it was deleted meanwhile. `until_s` is in loop time.
        """
        record, target = begun.record, begun.record.target
        while True:
            news = self._news
            if self._view.revision >= begun.mod_revision:
                entry = self._view.vmodels.get(record.name)
                if entry is None:
                    return None
                record = entry.record
                if record.target != target or record.active == target or record.failure:
                    return record
            try:
                async with asyncio.timeout_at(until_s):
                    await news.wait()
            except TimeoutError:
                return record

    async def _wait_for_view(self, name: str, written: Written) -> None:
        """Return when the view shows what was written."""

        def is_shown() -> bool:
            shown = self._view.vmodels.get(name)
            if written.entry is None:
                return shown is None
            return shown is not None and shown.mod_revision >= written.entry.mod_revision

        until_s = asyncio.get_running_loop().time() + VIEW_TIMEOUT_S
        try:
            async with asyncio.timeout_at(until_s):
                while not is_shown():
                    await self._news.wait()
        except TimeoutError:
            log.warning("the view does not show %s yet; the registry's watch lags", name)
