"""`grpc.health.v1.Health`: gRPC's own health checks, for load balancers and probes that know nothing of models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from raymesh.mesh.catalog import Catalog
from raymesh.mesh.grpc_service import AnswerStream, Method
from raymesh.registry.protos import Messages
from raymesh.runtimes.errors import Code, RequestError

_SERVICE = "/grpc.health.v1.Health/"
_SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = 1, 2, 3


class HealthApi:
    """Answers for `services` (full names) and for the server as a whole (the empty name)."""

    def __init__(self, catalog: Catalog, services: frozenset[str]) -> None:
        self._catalog = catalog
        self._services = services | {""}
        self._messages = Messages("raymesh.mesh", "health")

    def methods(self) -> dict[str, Method | AnswerStream]:
        """The service, for `grpc_service.Services`."""
        m = self._messages
        return {
            _SERVICE + "Check": Method(self.check, m.HealthCheckRequest, m.HealthCheckResponse),
            _SERVICE + "Watch": AnswerStream(self.watch, m.HealthCheckRequest, m.HealthCheckResponse),
        }

    async def check(self, request: Any, context: Any) -> Any:
        """The status now. Raises NOT_FOUND for a service that is not here."""
        status = self._status(request.service)
        if status == _SERVICE_UNKNOWN:
            raise RequestError(Code.NOT_FOUND, "unknown service")
        return self._messages.HealthCheckResponse(status=status)

    async def watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """The status now and whenever it changes, until the caller leaves."""
        told = None
        while True:
            status = self._status(request.service)
            if status != told:
                told = status
                yield self._messages.HealthCheckResponse(status=status)
            await self._catalog.next_change()

    def _status(self, service: str) -> int:
        if service not in self._services:
            return _SERVICE_UNKNOWN
        return _SERVING if self._catalog.is_ready else _NOT_SERVING
