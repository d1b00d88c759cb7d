"""`mmesh.ModelMesh`: ModelMesh's management API, with its status codes, on grpc.aio.

Rule of the file: requests are validated here and nowhere later, and the answer names the field that is wrong. A model
that does not load is not a failed call: as with ModelMesh the call is OK and says LOADING_FAILED.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from raymesh.mesh.catalog import Catalog
from raymesh.mesh.config import Settings
from raymesh.mesh.fresh_copies import Placed
from raymesh.mesh.grpc_service import Method, until_s
from raymesh.mesh.metrics import GatewayMetrics
from raymesh.mesh.model_status import NOT_FOUND, CopyStatus, ModelStatus, Status
from raymesh.mesh.placing import Placing
from raymesh.registry.keys import DEFAULT_TENANT, ID_RULE, is_valid_id
from raymesh.registry.protos import Messages
from raymesh.registry.records import ModelRecord
from raymesh.registry.view import ModelEntry
from raymesh.runtimes.errors import Code, InvalidInput, Reason, RequestError

_SERVICE = "/mmesh.ModelMesh/"

#: Records are small keys that every member holds in memory; what is larger belongs into the model's files.
TYPE_CHARACTERS_MAX = 128
PATH_CHARACTERS_MAX = 4096
KEY_CHARACTERS_MAX = 32 * 1024


class Management:
    """The four RPCs. `on_placed` is told of placements, `on_deleted` of models that are gone (both by name)."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        placing: Placing,
        metrics: GatewayMetrics,
        *,
        on_placed: Callable[[str, Placed], None],
        on_deleted: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._placing = placing
        self._metrics = metrics
        self._on_placed = on_placed
        self._on_deleted = on_deleted
        #: What the calls take and give; messages of one pool only go together.
        self.messages = Messages("raymesh.mesh", "mmesh")
        self._unregistering: set[asyncio.Task[bool]] = set()
        self._created = metrics.registrations.labels("created")
        self._present = metrics.registrations.labels("present")
        self._refused = metrics.registrations.labels("refused")

    def methods(self) -> dict[str, Method]:
        """The service, for `grpc_service.Services`."""
        m = self.messages
        return {
            _SERVICE + "registerModel": Method(self.register, m.RegisterModelRequest, m.ModelStatusInfo),
            _SERVICE + "unregisterModel": Method(self.unregister, m.UnregisterModelRequest, m.UnregisterModelResponse),
            _SERVICE + "getModelStatus": Method(self.get_status, m.GetStatusRequest, m.ModelStatusInfo),
            _SERVICE + "ensureLoaded": Method(self.ensure_loaded, m.EnsureLoadedRequest, m.ModelStatusInfo),
        }

    async def register(self, request: Any, context: Any) -> Any:
        """Register a model; the same registration again is OK, another one under the same id ALREADY_EXISTS."""
        try:
            info = request.modelInfo
            record = record_of(
                request.modelId, info.type, info.path, info.key,
                last_used_ms=request.lastUsedTime, id_field="modelId", prefix="modelInfo.",
            )  # fmt: skip
            entry, is_new = await self._catalog.register(record)
        except RequestError:
            self._refused.inc()
            raise
        (self._created if is_new else self._present).inc()
        if request.loadNow:
            return self.info(await self.load(entry, is_sync=request.sync, context=context))
        if is_new:
            return self.messages.ModelStatusInfo(status=int(Status.NOT_LOADED))
        return self.info(self.status(entry))

    async def unregister(self, request: Any, context: Any) -> Any:
        """Unregister a model; when this returns nobody gets an answer from it any more. Absent is OK."""
        name = _name_in(request.modelId)
        # To its end even if the client leaves: half of it would leave copies behind.
        work = asyncio.create_task(self._catalog.unregister(name, lambda: self._on_deleted(name)))
        self._unregistering.add(work)
        work.add_done_callback(self._unregistering.discard)
        await asyncio.shield(work)
        self._metrics.unregistrations.inc()
        return self.messages.UnregisterModelResponse()

    async def get_status(self, request: Any, context: Any) -> Any:
        """A model's status; an unknown one is OK with NOT_FOUND."""
        entry = await self._catalog.find(_name_in(request.modelId))
        return self.info(NOT_FOUND if entry is None else self.status(entry))

    async def ensure_loaded(self, request: Any, context: Any) -> Any:
        """Have at least one copy loaded; waits for it if `sync`. An unknown model is an error here."""
        entry = await self._catalog.find(_name_in(request.modelId))
        if entry is None:
            raise RequestError(Code.NOT_FOUND, f"model '{request.modelId}' is not found", reason=Reason.NOT_REGISTERED)
        return self.info(await self.load(entry, is_sync=request.sync, context=context))

    async def load(self, entry: ModelEntry, *, is_sync: bool, context: Any) -> ModelStatus:
        """Load the model unless a copy is there. Its status then, or, if not `is_sync`, now."""
        name = entry.record.name
        if self._catalog.holders(entry):
            return self.status(entry)
        if not is_sync:
            now_s = asyncio.get_running_loop().time()
            self._placing.begin(name, until_s=now_s + self._settings.load_timeout_s)
            return self.status(entry)
        deadline_s = until_s(context, default_s=self._settings.load_timeout_s)
        try:
            async with asyncio.timeout_at(deadline_s):
                placed = await self._placing.place(name, until_s=deadline_s)
        except RequestError as error:
            if error.code is Code.NOT_FOUND:
                raise
            if error.reason == Reason.DEADLINE:
                raise
            return self._failed(entry, error)
        self._on_placed(name, placed)
        return self.status(entry)

    def status(self, entry: ModelEntry) -> ModelStatus:
        """What this gateway knows about the model."""
        return self._catalog.status(entry, is_loading=self._placing.is_placing(entry.record.name))

    def _failed(self, entry: ModelEntry, error: RequestError) -> ModelStatus:
        """The status after a load that failed just now; the record may not show it yet."""
        known = self.status(entry)
        errors = known.errors if error.message in known.errors else (error.message, *known.errors)
        copies = known.copies or (CopyStatus("", Status.LOADING_FAILED, time.time_ns() // 1_000_000),)
        return ModelStatus(Status.LOADING_FAILED, errors, copies)

    def info(self, status: ModelStatus) -> Any:
        """The status as a ``ModelStatusInfo``."""
        info = self.messages.ModelStatusInfo(status=int(status.status), errors=status.errors)
        for copy in status.copies:
            info.modelCopyInfos.add(location=copy.instance, copyStatus=int(copy.status), time=copy.time_ms)
        return info


def _name_in(model_id: str) -> str:
    return f"{DEFAULT_TENANT}/{checked_id('modelId', model_id)}"


def checked_id(field: str, given: str) -> str:
    """The id in a request's field. Raises `InvalidInput` naming the field when it is none."""
    if not is_valid_id(given):
        raise InvalidInput(f"{field}: use {ID_RULE}" if given else f"{field}: must not be empty")
    return given


def record_of(
    model_id: str, type: str, path: str, key: str, *, last_used_ms: int = 0, id_field: str, prefix: str = ""
) -> ModelRecord:
    """The record of a model to register, last used now unless `last_used_ms` says when.

    Raises `InvalidInput` naming the field as the request does: the id is `id_field`, the others come after `prefix`.
    """
    checked_id(id_field, model_id)
    if not type:
        raise InvalidInput(f"{prefix}type: must not be empty")
    for name, text, characters_max in (
        ("type", type, TYPE_CHARACTERS_MAX),
        ("path", path, PATH_CHARACTERS_MAX),
        ("key", key, KEY_CHARACTERS_MAX),
    ):
        if len(text) > characters_max:
            raise InvalidInput(f"{prefix}{name}: {len(text)} characters, at most {characters_max} are allowed")
    return ModelRecord(
        tenant=DEFAULT_TENANT,
        id=model_id,
        type=type,
        path=path,
        key=key,
        last_used_ms=last_used_ms or time.time_ns() // 1_000_000,
    )
