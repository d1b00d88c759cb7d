"""`raymesh.v1.Mesh`: what ModelMesh's management API lacks, on grpc.aio.

Rule of the file: a request for many things answers for each of them what asking for it alone would have; the call as a
whole fails only when nothing was done.
"""

from __future__ import annotations

import asyncio
from typing import Any

from raymesh.mesh.catalog import Catalog, Registered
from raymesh.mesh.config import Settings
from raymesh.mesh.grpc_service import Method
from raymesh.mesh.management import record_of
from raymesh.mesh.metrics import GatewayMetrics
from raymesh.mesh.placing import Placing
from raymesh.registry.protos import Messages
from raymesh.registry.records import ModelRecord
from raymesh.runtimes.errors import InvalidInput, RequestError

_SERVICE = "/raymesh.v1.Mesh/"

#: Models in one request: some ten transactions, so that nobody else's registration waits long behind it.
MODELS_MAX = 1000


class MeshApi:
    """The RPCs of `raymesh.v1.Mesh`."""

    def __init__(self, settings: Settings, catalog: Catalog, placing: Placing, metrics: GatewayMetrics) -> None:
        self._settings = settings
        self._catalog = catalog
        self._placing = placing
        self._messages = Messages("raymesh.mesh", "raymesh")
        self._created = metrics.registrations.labels("created")
        self._present = metrics.registrations.labels("present")
        self._refused = metrics.registrations.labels("refused")

    def methods(self) -> dict[str, Method]:
        """The service, for `grpc_service.Services`."""
        m = self._messages
        return {_SERVICE + "RegisterModels": Method(self.register, m.RegisterModelsRequest, m.RegisterModelsResponse)}

    async def register(self, request: Any, context: Any) -> Any:
        """Register many models, each as `registerModel` would. Raises `InvalidInput` for more than `MODELS_MAX`."""
        specs = request.models
        if len(specs) > MODELS_MAX:
            raise InvalidInput(f"models: {len(specs)} in one request, at most {MODELS_MAX} are allowed")
        read = [_record_in(spec) for spec in specs]
        outcomes = iter(await self._catalog.register_many([item for item in read if isinstance(item, ModelRecord)]))
        response = self._messages.RegisterModelsResponse()
        for spec, item in zip(specs, read, strict=True):
            outcome = next(outcomes) if isinstance(item, ModelRecord) else item
            self._add_result(response, spec.model_id, outcome)
            if spec.load_now and isinstance(outcome, Registered):
                self._begin_load(outcome)
        return response

    def _add_result(self, response: Any, model_id: str, outcome: Registered | RequestError) -> None:
        if isinstance(outcome, Registered):
            (self._created if outcome.is_new else self._present).inc()
            response.results.add(model_id=model_id, outcome=response.CREATED if outcome.is_new else response.EXISTED)
            return
        self._refused.inc()
        response.results.add(
            model_id=model_id,
            outcome=response.REFUSED,
            code=int(outcome.code),
            message=outcome.message,
            reason=outcome.reason,
            retry_after_s=outcome.retry_after_s,
        )

    def _begin_load(self, registered: Registered) -> None:
        if not self._catalog.holders(registered.entry):
            until_s = asyncio.get_running_loop().time() + self._settings.load_timeout_s
            self._placing.begin(registered.entry.record.name, until_s=until_s)


def _record_in(spec: Any) -> ModelRecord | InvalidInput:
    """The record that a ModelSpec asks for, or what is wrong with it."""
    try:
        return record_of(spec.model_id, spec.type, spec.path, spec.key, id_field="model_id")
    except InvalidInput as error:
        return error
