"""`mmesh.ModelMesh`'s vmodel calls, with ModelMesh's status codes, on grpc.aio.

Rule of the file: as in `management`. A transition that fails is not a failed call: the answer says TRANSITION_FAILED.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from enum import IntEnum
from typing import Any

from raymesh.mesh.catalog import Catalog
from raymesh.mesh.grpc_service import Method, until_s
from raymesh.mesh.management import Management, checked_id, record_of
from raymesh.mesh.model_status import NOT_FOUND, ModelStatus, Status
from raymesh.mesh.vmodels import VModels
from raymesh.placement.vmodels import SetVModel
from raymesh.registry.keys import DEFAULT_TENANT
from raymesh.registry.records import ModelRecord, VModelRecord

_SERVICE = "/mmesh.ModelMesh/"

#: Longest a `sync` call waits for a transition (ModelMesh: 4 minutes).
SYNC_TIMEOUT_S = 240.0


class VModelStatus(IntEnum):
    """`mmesh.VModelStatusInfo.VModelStatus`, by its numbers on the wire."""

    NOT_FOUND = 0
    DEFINED = 1
    TRANSITIONING = 2
    TRANSITION_FAILED = 3
    UNKNOWN = 5


def vmodel_status_of(record: VModelRecord) -> VModelStatus:
    """What to call the state of a vmodel."""
    if record.active == record.target:
        return VModelStatus.DEFINED
    return VModelStatus.TRANSITION_FAILED if record.failure else VModelStatus.TRANSITIONING


class VModelApi:
    """The three RPCs.

    `on_deleted` is told of a vmodel that is gone and of the models that went with it (full names). `in_force` returns
    when requests are routed as the view says.
    """

    def __init__(
        self,
        catalog: Catalog,
        vmodels: VModels,
        management: Management,
        *,
        on_deleted: Callable[[str, tuple[str, ...]], None],
        in_force: Callable[[], Awaitable[None]],
    ) -> None:
        self._catalog = catalog
        self._vmodels = vmodels
        self._management = management
        self._on_deleted = on_deleted
        self._in_force = in_force
        self._messages = management.messages
        self._deleting: set[asyncio.Task[None]] = set()

    def methods(self) -> dict[str, Method]:
        """The calls, for `grpc_service.Services`."""
        m = self._messages
        return {
            _SERVICE + "setVModel": Method(self.set, m.SetVModelRequest, m.VModelStatusInfo),
            _SERVICE + "deleteVModel": Method(self.delete, m.DeleteVModelRequest, m.DeleteVModelResponse),
            _SERVICE + "getVModelStatus": Method(self.get_status, m.GetVModelStatusRequest, m.VModelStatusInfo),
        }

    async def set(self, request: Any, context: Any) -> Any:
        """Create a vmodel, or give it a new target. The same call again is OK."""
        deadline_s = until_s(context, default_s=SYNC_TIMEOUT_S)
        deadline_s = min(deadline_s, asyncio.get_running_loop().time() + SYNC_TIMEOUT_S)
        wish = _wish_in(request)
        vmodel = await self._vmodels.set(wish)
        record: VModelRecord | None = vmodel.record
        active_status: ModelStatus | None = None
        if vmodel.record.active != vmodel.record.target:
            if request.sync:
                record = await self._vmodels.settled(vmodel, until_s=deadline_s)
        elif request.loadNow:
            entry = await self._catalog.find(vmodel.record.active_name)
            if entry is not None:
                active_status = await self._management.load(entry, is_sync=request.sync, context=context)
        await self._in_force()
        return await self._info(record, active_status)

    async def delete(self, request: Any, context: Any) -> Any:
        """Delete a vmodel, and models that were to go with it. Absent, or somebody else's, is OK without effect."""
        name = f"{DEFAULT_TENANT}/{checked_id('vModelId', request.vModelId)}"
        # To its end even if the client leaves: half of it would leave copies behind.
        work = asyncio.create_task(
            self._vmodels.delete(name, request.owner, lambda models: self._on_deleted(name, models))
        )
        self._deleting.add(work)
        work.add_done_callback(self._deleting.discard)
        await asyncio.shield(work)
        await self._in_force()
        return self._messages.DeleteVModelResponse()

    async def get_status(self, request: Any, context: Any) -> Any:
        """A vmodel's status; an unknown one, or (owner given) somebody else's, is OK with NOT_FOUND."""
        entry = await self._vmodels.find(f"{DEFAULT_TENANT}/{checked_id('vModelId', request.vModelId)}")
        if entry is not None and request.owner and request.owner != entry.record.owner:
            entry = None
        return await self._info(entry.record if entry else None)

    async def _info(self, record: VModelRecord | None, active_status: ModelStatus | None = None) -> Any:
        """The answer about a vmodel; `active_status` if more is known of it than the view says."""
        if record is None:
            info = self._messages.VModelStatusInfo(status=int(VModelStatus.NOT_FOUND))
            info.activeModelStatus.CopyFrom(self._management.info(NOT_FOUND))
            return info
        status = vmodel_status_of(record)
        info = self._messages.VModelStatusInfo(
            status=int(status), activeModelId=record.active, targetModelId=record.target, owner=record.owner
        )
        active_status = active_status or await self._model_status(record.active_name)
        info.activeModelStatus.CopyFrom(self._management.info(active_status))
        if status is not VModelStatus.DEFINED:
            target_status = _of_target(record, await self._model_status(record.target_name))
            info.targetModelStatus.CopyFrom(self._management.info(target_status))
        return info

    async def _model_status(self, name: str) -> ModelStatus:
        entry = await self._catalog.find(name)
        return NOT_FOUND if entry is None else self._management.status(entry)


def _of_target(record: VModelRecord, known: ModelStatus) -> ModelStatus:
    """A target's status: the controller, which loads it, knows more than the model's record may say."""
    if known.status not in {Status.NOT_LOADED, Status.LOADING_FAILED}:
        return known
    if not record.failure:
        return known._replace(status=Status.LOADING)
    errors = known.errors if record.failure in known.errors else (record.failure, *known.errors)
    return known._replace(status=Status.LOADING_FAILED, errors=errors)


def _wish_in(request: Any) -> SetVModel:
    """What a SetVModelRequest asks for. Raises `InvalidInput` naming the field."""
    vmodel = checked_id("vModelId", request.vModelId)
    target = checked_id("targetModelId", request.targetModelId)
    created = None
    # As ModelMesh: an empty message is as good as none.
    if request.modelInfo.ByteSize():
        created = replace(_record_in(target, request.modelInfo), auto_delete=request.autoDeleteTargetModel)
    return SetVModel(
        tenant=DEFAULT_TENANT,
        id=vmodel,
        target=target,
        created=created,
        owner=request.owner,
        updates_only=request.updateOnly,
        loads_now=request.loadNow,
        is_forced=request.force,
        expected_target=request.expectedTargetModelId,
    )


def _record_in(model_id: str, info: Any) -> ModelRecord:
    return record_of(model_id, info.type, info.path, info.key, id_field="targetModelId", prefix="modelInfo.")
