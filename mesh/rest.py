"""The gateway's REST surface: everything but inference, which has its own listener.

Rule of the file: every answer is JSON and every error ``{"error": …}``, those of the framework included.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from raymesh.mesh.catalog import Catalog
from raymesh.mesh.config import Settings
from raymesh.mesh.inference_api import EXTENSIONS, VERSION, check_version, server_version
from raymesh.mesh.metrics import GatewayMetrics
from raymesh.mesh.model_metadata import ModelMetadata
from raymesh.mesh.model_status import Status
from raymesh.mesh.placing import Placing
from raymesh.mesh.vmodels import Asked, VModels
from raymesh.registry.keys import DEFAULT_TENANT, is_valid_id
from raymesh.registry.view import ModelEntry
from raymesh.runtimes.errors import Code, InvalidInput, ModelNotFound, Reason, RequestError

log = logging.getLogger(__name__)

#: Models in one page of a listing.
PAGE_DEFAULT = 100
PAGE_MAX = 1000

#: Triton's words for a model's state, which clients of the repository index know.
_INDEX_STATES = {Status.LOADED: "READY", Status.LOADING: "LOADING"}

_Endpoint = Callable[[Request], Awaitable[Response]]


class Rest:
    """The endpoints, and `app`, the ASGI application that has them."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        vmodels: VModels,
        placing: Placing,
        metadata: ModelMetadata,
        metrics: GatewayMetrics,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._vmodels = vmodels
        self._placing = placing
        self._metadata = metadata
        self._metrics = metrics
        model = "/v2/models/{model}"
        routes = [
            Route("/v2", self.server, methods=["GET"]),
            Route("/v2/", self.server, methods=["GET"]),
            Route("/v2/health/live", self.live, methods=["GET"]),
            Route("/v2/health/ready", self.ready, methods=["GET"]),
            Route("/v2/models", self.models, methods=["GET"]),
            Route(model, self.model, methods=["GET"]),
            Route(model + "/ready", self.model_ready, methods=["GET"]),
            Route(model + "/versions/{version}", self.model, methods=["GET"]),
            Route(model + "/versions/{version}/ready", self.model_ready, methods=["GET"]),
            Route("/v2/repository/index", self.index, methods=["POST"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]
        starlette = Starlette(
            routes=[Route(route.path, _answering(route.endpoint), methods=route.methods) for route in routes],
            exception_handlers={HTTPException: _http_error, Exception: _internal_error},
        )
        starlette.router.redirect_slashes = False
        self.app: ASGIApp = _TokenCheck(starlette, settings.internal_token)

    async def server(self, request: Request) -> Response:
        """``GET /v2``: name, version, extensions."""
        return _json({"name": "raymesh", "version": server_version(), "extensions": EXTENSIONS})

    async def live(self, request: Request) -> Response:
        """``GET /v2/health/live``: the gateway answers."""
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        """``GET /v2/health/ready``: requests can be routed (not: every model is loaded)."""
        is_ready = self._catalog.is_ready
        return _json({"ready": is_ready, "live": True}, status=200 if is_ready else 503)

    async def models(self, request: Request) -> Response:
        """``GET /v2/models?limit=&after=``: one page of the models; ``next`` is the ``after`` of the next page."""
        limit = _limit_in(request)
        # One more than asked for tells whether there is a next page.
        entries = self._catalog.page(DEFAULT_TENANT, after=request.query_params.get("after", ""), limit=limit + 1)
        answer: dict[str, Any] = {"models": [self._describe(entry) for entry in entries[:limit]]}
        if len(entries) > limit:
            answer["next"] = entries[limit - 1].record.id
        return _json(answer)

    async def model(self, request: Request) -> Response:
        """``GET /v2/models/{m}``: inputs and outputs; loads the model if need be."""
        model = _model_in(request)
        until_s = asyncio.get_running_loop().time() + self._settings.request_timeout_s
        resolved = await self._vmodels.resolve(Asked(f"{DEFAULT_TENANT}/{model}"))
        known = await self._metadata.get(resolved.entry.record.name, until_s=until_s)
        return _json({**known, "name": model, "versions": [VERSION]})

    async def model_ready(self, request: Request) -> Response:
        """``GET /v2/models/{m}/ready``: may be asked; with ``?strict=true``: is loaded now."""
        model = _model_in(request)
        entry = (await self._vmodels.resolve(Asked(f"{DEFAULT_TENANT}/{model}"))).entry
        is_ready = await self._catalog.is_model_ready(entry.record.name)
        if request.query_params.get("strict") == "true":
            is_ready = bool(self._catalog.holders(entry))
        return _json({"name": model, "ready": is_ready}, status=200 if is_ready else 503)

    async def index(self, request: Request) -> Response:
        """``POST /v2/repository/index``: every model with its state, as Triton lists its repository."""
        wants_ready = False
        if body := await request.body():
            try:
                wants_ready = bool(orjson.loads(body).get("ready", False))
            except (orjson.JSONDecodeError, AttributeError):
                raise InvalidInput('the body must be empty or {"ready": true|false}') from None
        entries = self._catalog.page(DEFAULT_TENANT, after="", limit=len(self._catalog.view.models))
        listed = []
        for entry in entries:
            status = self._catalog.status(entry, is_loading=self._placing.is_placing(entry.record.name))
            state = _INDEX_STATES.get(status.status, "UNAVAILABLE")
            if state == "READY" or not wants_ready:
                reason = status.errors[0] if status.status is Status.LOADING_FAILED else ""
                listed.append({"name": entry.record.id, "version": VERSION, "state": state, "reason": reason})
        return _json(listed)

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics`` for Prometheus."""
        return Response(self._metrics.page(), headers={"content-type": self._metrics.content_type})

    def _describe(self, entry: ModelEntry) -> dict[str, Any]:
        record = entry.record
        status = self._catalog.status(entry, is_loading=self._placing.is_placing(record.name))
        return {
            "name": record.id,
            "type": record.type,
            "state": status.status.name,
            "size_bytes": record.size_bytes,
            "instances": sorted(copy.instance for copy in status.copies if copy.status is Status.LOADED),
        }


class _TokenCheck:
    """Lets only the mesh itself in: clients come through the front door, which knows who they are."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            shown = dict(scope["headers"]).get(b"x-raymesh-token", b"")
            if not hmac.compare_digest(shown, self._token):
                error = RequestError(Code.PERMISSION_DENIED, "the internal token is missing or wrong")
                await _error(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _answering(endpoint: _Endpoint) -> _Endpoint:
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except RequestError as error:
            return _error(error)

    return answer


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def _error(error: RequestError) -> Response:
    headers = {"x-raymesh-reason": error.reason} if error.reason else {}
    if error.retry_after_s:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    body = orjson.dumps({"error": error.message})
    return Response(body, error.http_status, headers=headers, media_type="application/json")


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: f"no such path: {request.url.path}", 405: f"{request.method} is not allowed here"}
    body = orjson.dumps({"error": message.get(error.status_code, error.detail)})
    return Response(body, error.status_code, headers=error.headers, media_type="application/json")


def _internal_error(request: Request, error: Exception) -> Response:
    return _json({"error": "internal error"}, status=500)


def _model_in(request: Request) -> str:
    model = str(request.path_params["model"])
    if not is_valid_id(model):
        raise ModelNotFound(model)
    check_version(model, request.path_params.get("version", ""))
    return model


def _limit_in(request: Request) -> int:
    text = request.query_params.get("limit", str(PAGE_DEFAULT))
    if not (text.isdecimal() and 1 <= int(text) <= PAGE_MAX):
        raise RequestError(Code.INVALID_ARGUMENT, f"limit: use a number from 1 to {PAGE_MAX}", reason=Reason.BAD_INPUT)
    return int(text)
