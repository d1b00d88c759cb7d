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
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from raymesh.mesh.catalog import Catalog
from raymesh.mesh.config import Settings
from raymesh.mesh.inference_api import EXTENSIONS, server_version
from raymesh.mesh.metrics import GatewayMetrics
from raymesh.mesh.model_metadata import ModelMetadata
from raymesh.mesh.model_repository import ModelRepository
from raymesh.mesh.model_status import Status
from raymesh.mesh.placing import Placing
from raymesh.mesh.repository_api import check_load_parameters
from raymesh.registry.keys import DEFAULT_TENANT
from raymesh.registry.view import ModelEntry
from raymesh.runtimes.content_encoding import JSON_BYTES_MIN, decode_body
from raymesh.runtimes.errors import Code, InvalidInput, Reason, RequestError, TooLarge
from raymesh.runtimes.oip import MODEL_VERSION

log = logging.getLogger(__name__)

#: Models in one page of a listing.
PAGE_DEFAULT = 100
PAGE_MAX = 1000

_Endpoint = Callable[[Request], Awaitable[Response]]


class Rest:
    """The endpoints, and `app`, the ASGI application that has them."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        placing: Placing,
        metadata: ModelMetadata,
        repository: ModelRepository,
        metrics: GatewayMetrics,
    ) -> None:
        self._settings = settings
        self._repository = repository
        self._catalog = catalog
        self._placing = placing
        self._metadata = metadata
        self._metrics = metrics
        starlette = Starlette(
            routes=[
                Route(path, _answering(endpoint), methods=[method]) for method, path, endpoint in self._endpoints()
            ],
            exception_handlers={HTTPException: _http_error, Exception: _internal_error},
        )
        starlette.router.redirect_slashes = False
        self.app: ASGIApp = _TokenCheck(_Compressing(starlette), settings.internal_token)

    def _endpoints(self) -> list[tuple[str, str, _Endpoint]]:
        endpoints: list[tuple[str, str, _Endpoint]] = [
            ("GET", "/", self.alive),
            ("GET", "/v2", self.server),
            ("GET", "/v2/", self.server),
            ("GET", "/v2/health/live", self.live),
            ("GET", "/v2/health/ready", self.ready),
            ("GET", "/v2/models", self.models),
            ("GET", "/v2/models/stats", self.statistics),
            ("POST", "/v2/repository/index", self.index),
            ("POST", "/v2/repository/models/{model}/load", self.load),
            ("POST", "/v2/repository/models/{model}/unload", self.unload),
            ("GET", "/v1/models", self.v1_models),
            ("GET", "/v1/models/{model}:{verb}", self.wrong_method),
            ("GET", "/v1/models/{model}", self.model_ready),
            ("POST", "/v1/models/{model}:explain", self.explain),
            # The front door sends inference elsewhere; here they are for whoever asks with the wrong method.
            ("POST", "/v1/models/{model}:predict", self.misdirected),
            ("GET", "/metrics", self.metrics),
        ]
        for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            endpoints += [
                ("GET", prefix, self.model),
                ("GET", prefix + "/ready", self.model_ready),
                ("GET", prefix + "/config", self.config),
                ("GET", prefix + "/stats", self.statistics),
                ("POST", prefix + "/infer", self.misdirected),
            ]
        return endpoints

    async def alive(self, request: Request) -> Response:
        """``GET /``: what V1 clients take for liveness."""
        return _json({"status": "alive"})

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
        entry = await self._find(request)
        known = await self._metadata.get(entry.record.name, until_s=self._until_s(self._settings.request_timeout_s))
        described = {key: known[key] for key in ("platform", "inputs", "outputs") if key in known}
        return _json({"name": request.path_params["model"], "versions": [MODEL_VERSION], **described})

    async def model_ready(self, request: Request) -> Response:
        """``GET …/models/{m}[/ready]``: may be asked; with ``?strict=true``: is loaded now."""
        entry = await self._find(request)
        is_ready = await self._catalog.is_model_ready(entry.record.name)
        if request.query_params.get("strict") == "true":
            is_ready = bool(self._catalog.holders(entry))
        model = request.path_params["model"]
        answer: dict[str, Any] = {"name": model, "ready": is_ready}
        if not is_ready:
            answer["error"] = f"Model with name {model} is not ready."
        return _json(answer, status=200 if is_ready else 503)

    async def config(self, request: Request) -> Response:
        """``GET /v2/models/{m}/config``: as Triton describes the model; loads it if need be."""
        model, version = request.path_params["model"], request.path_params.get("version", "")
        until_s = self._until_s(self._settings.request_timeout_s)
        return _json(await self._repository.config(model, version, until_s=until_s))

    async def statistics(self, request: Request) -> Response:
        """``GET /v2/models/{m}/stats`` and ``/v2/models/stats``: what one model has done, or all loaded ones."""
        counted = await self._repository.statistics(
            request.path_params.get("model", ""), request.path_params.get("version", "")
        )
        return _json({"model_stats": [{**model, "batch_stats": []} for model in counted]})

    async def index(self, request: Request) -> Response:
        """``POST /v2/repository/index``: every model with its state, as Triton lists its repository."""
        body = await self._read_json(request)
        only_ready = body.get("ready", False)
        if not isinstance(only_ready, bool):
            raise InvalidInput("'ready' must be true or false")
        return _json(self._repository.index(only_ready=only_ready))

    async def load(self, request: Request) -> Response:
        """``POST /v2/repository/models/{m}/load``: have a registered model loaded."""
        model = str(request.path_params["model"])
        body = await self._read_json(request)
        parameters = body.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise InvalidInput("'parameters' must be an object")
        check_load_parameters(model, list(parameters))
        await self._repository.load(model, until_s=self._until_s(self._settings.load_timeout_s))
        return _json({"name": model, "load": True})

    async def unload(self, request: Request) -> Response:
        """``POST /v2/repository/models/{m}/unload``: have every copy of a model unloaded."""
        model = str(request.path_params["model"])
        await self._read_json(request)
        await self._repository.unload(model)
        return _json({"name": model, "unload": True})

    async def v1_models(self, request: Request) -> Response:
        """``GET /v1/models``: all names."""
        entries = self._catalog.page(DEFAULT_TENANT, after="", limit=len(self._catalog.view.models))
        return _json({"models": [entry.record.id for entry in entries]})

    async def explain(self, request: Request) -> Response:
        """``POST /v1/models/{m}:explain``: no framework here has explanations."""
        await self._find(request)
        message = f"model '{request.path_params['model']}' has no explainer"
        raise RequestError(Code.UNIMPLEMENTED, message, reason=Reason.UNSUPPORTED)

    async def wrong_method(self, request: Request) -> Response:
        """``GET`` of what is asked with ``POST``."""
        raise HTTPException(405, headers={"allow": "POST"})

    async def misdirected(self, request: Request) -> Response:
        """An inference that did not come through the front door."""
        raise RequestError(Code.NOT_FOUND, "inference is not served by this listener")

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics`` for Prometheus."""
        return Response(self._metrics.page(), headers={"content-type": self._metrics.content_type})

    async def _find(self, request: Request) -> ModelEntry:
        return await self._repository.find(request.path_params["model"], request.path_params.get("version", ""))

    @staticmethod
    def _until_s(timeout_s: float) -> float:
        return asyncio.get_running_loop().time() + timeout_s

    async def _read_json(self, request: Request) -> dict[str, Any]:
        """The JSON object in the request's body, ``{}`` for none. Raises `InvalidInput`, `TooLarge`."""
        bytes_max = self._settings.message_bytes_max
        body = bytearray()
        # Not `request.body()`: what a chunked body grows to is only known when it is there.
        async for chunk in request.stream():
            body += chunk
            if len(body) > bytes_max:
                raise TooLarge(bytes_max, "the request body")
        if encoding := request.headers.get("content-encoding"):
            body = bytearray(decode_body(bytes(body), encoding.encode("latin-1"), bytes_max=bytes_max))
        try:
            value = orjson.loads(body) if body.strip() else {}
        except orjson.JSONDecodeError as error:
            raise InvalidInput(f"the request is not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise InvalidInput("the body must be empty or a JSON object")
        return value

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


class _Compressing:
    """Compresses large listings for who accepts that.

    Not the answers that Triton's clients ask for: its asyncio client says it accepts gzip and cannot read it there.
    """

    PATHS = frozenset({"/v2/models", "/v1/models", "/metrics"})

    def __init__(self, app: ASGIApp) -> None:
        self._plain = app
        self._gzip = GZipMiddleware(app, minimum_size=JSON_BYTES_MIN, compresslevel=1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._gzip if scope.get("path") in self.PATHS else self._plain
        await app(scope, receive, send)


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
        except HTTPException:
            raise
        except Exception:
            # Here, not in the framework: that would end the connection, and the client's next request with it.
            log.exception("%s failed", request.url.path)
            return _json({"error": "internal error"}, status=500)

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


def _limit_in(request: Request) -> int:
    text = request.query_params.get("limit", str(PAGE_DEFAULT))
    if not (text.isdecimal() and 1 <= int(text) <= PAGE_MAX):
        raise RequestError(Code.INVALID_ARGUMENT, f"limit: use a number from 1 to {PAGE_MAX}", reason=Reason.BAD_INPUT)
    return int(text)
