"""What a runtime's port answers: inference on the data path, and the mesh's control calls.

Rule of the file: the warm path is a table look-up, a decode and a queue; everything else may be slow. Callers are the
front door, the gateways and the controller, all of whom show the mesh's internal token.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any
from urllib.parse import unquote

import orjson

from raymesh.runtimes import grpc_http1, oip, v1
from raymesh.runtimes.batching import BATCH_ROWS_MAX, Batcher, Copy
from raymesh.runtimes.content_encoding import accepted, decode_body
from raymesh.runtimes.errors import Code, InvalidInput, Reason, RequestError, Unavailable
from raymesh.runtimes.http1 import Request
from raymesh.runtimes.loading import Loader, LoadSpec
from raymesh.runtimes.upstream import UpstreamLost, Upstreams, headers_to_pass_on, hops_of

log = logging.getLogger(__name__)

_TOKEN = b"x-raymesh-token"
_MODEL = b"x-raymesh-model"
#: The vmodel, ``tenant/id``, by which the request came to the model.
_VMODEL = b"x-raymesh-vmodel"


class DataServer:
    """Handles the requests of one runtime.

    `gateway` gives the address a request for a model that is not here is passed on to ("" when none is known);
    `status` gives the body of ``GET /control/status``.
    """

    def __init__(
        self,
        loader: Loader,
        batcher: Batcher,
        upstreams: Upstreams,
        *,
        token: str,
        message_bytes_max: int,
        gateway: Callable[[], str],
        status: Callable[[], dict[str, Any]],
    ) -> None:
        self._loader = loader
        self._copies = loader.copies
        self._session = loader.session
        self._batcher = batcher
        self._upstreams = upstreams
        self._token = token.encode()
        self._message_bytes_max = message_bytes_max
        self._gateway = gateway
        self._status = status
        self._tasks: set[asyncio.Task[None]] = set()

    # -- the warm path -----------------------------------------------------------------------------------------------

    def handle(self, request: Request) -> None:
        """Answer one request, now or later."""
        headers = request.headers
        token = headers.get(_TOKEN, b"")
        if not hmac.compare_digest(token, self._token):
            raise RequestError(Code.UNAUTHENTICATED, "only the mesh itself may call a runtime", reason=Reason.DENIED)
        name = headers.get(_MODEL)
        if name is None:
            self._handle_control(request)
            return
        copy = self._copies.get(name)
        if copy is None or self._session.is_fenced:
            task = self._spawn(self._pass_on(request))
            request.on_left = task.cancel
            return
        is_grpc = request.target == grpc_http1.INFER_TARGET
        vmodel = headers.get(_VMODEL)
        # What the client calls the model, which the answer is to name.
        called = copy.id if vmodel is None else vmodel.partition(b"/")[2].decode("latin-1")
        try:
            if is_grpc:
                message = grpc_http1.unframe(
                    request.body,
                    encoding=headers.get(b"grpc-encoding", b"identity"),
                    bytes_max=self._message_bytes_max,
                )
                infer = oip.decode_grpc(message)
            else:
                infer = self._decode_rest(copy, called, request)
            if vmodel is not None:
                infer.alias = called
            self._batcher.submit(copy, request, infer)
        except RequestError as error:
            copy.statistics.refusals += 1
            request.respond_raw(oip.error_answer(error, is_grpc=is_grpc))
        except Exception:
            copy.statistics.refusals += 1
            log.exception("request for %s failed", copy.name)
            request.respond_raw(oip.error_answer(RequestError(Code.INTERNAL, "internal error"), is_grpc=is_grpc))

    def _decode_rest(self, copy: Copy, called: str, request: Request) -> oip.InferRequest:
        headers = request.headers
        path = request.target.partition(b"?")[0]
        is_v1 = path.endswith(b":predict")
        parts = path.count(b"/")
        if parts != (3 if is_v1 else 4) or not (is_v1 or path.endswith(b"/infer")):
            _check_versioned(called, path)
        body, encoding = request.body, headers.get(b"content-encoding")
        if encoding is not None:
            body = decode_body(body, encoding, bytes_max=self._message_bytes_max)
        accepts = accepted(headers.get(b"accept-encoding"))
        if is_v1:
            return v1.decode(called, copy.model.inputs, body, headers, accepts)
        infer = oip.decode_rest(called, body, headers.get(b"inference-header-content-length"))
        infer.accepts = accepts
        return infer

    async def close(self) -> None:
        """Drop what is being passed on, and control calls that still wait."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- stale routes ------------------------------------------------------------------------------------------------

    async def _pass_on(self, request: Request) -> None:
        """The caller's route was stale: let a gateway find the model, unless one of them sent the request."""
        is_grpc = request.target == grpc_http1.INFER_TARGET
        reason = Reason.FENCED if self._session.is_fenced else Reason.NOT_LOADED
        error: RequestError = Unavailable("the model is not loaded here", reason=reason, retry_after_s=0.1)
        gateway = self._gateway()
        hops = hops_of(request.headers)
        if hops == 0 and gateway:
            try:
                answer = await self._upstreams.send(
                    gateway,
                    request.method,
                    request.target,
                    headers=headers_to_pass_on(request.headers, hops=hops + 1),
                    body=request.body,
                )
                request.respond_raw(answer.whole())
                return
            except UpstreamLost:
                error = Unavailable("no gateway can be reached", reason=Reason.NO_INSTANCE)
        request.respond_raw(oip.error_answer(error, is_grpc=is_grpc))

    # -- control -----------------------------------------------------------------------------------------------------

    def _handle_control(self, request: Request) -> None:
        path = request.path
        if path == "/control/status":
            request.respond_json(self._status())
        elif path == "/control/load":
            self._spawn(self._answer(request, self._load(_read_body(request))))
        elif path == "/control/unload":
            self._spawn(self._answer(request, self._unload(_read_body(request))))
        elif path.startswith("/control/metadata/"):
            request.respond_json(self._metadata(path.removeprefix("/control/metadata/")))
        elif path.startswith("/control/statistics/"):
            request.respond_json(self._statistics(path.removeprefix("/control/statistics/")))
        else:
            raise RequestError(Code.NOT_FOUND, f"no such control call: {path}", reason=Reason.UNSUPPORTED)

    async def _load(self, body: dict[str, Any]) -> dict[str, Any]:
        spec = LoadSpec(
            tenant=_text(body, "tenant"),
            id=_text(body, "id"),
            type=_text(body, "type"),
            path=_text(body, "path"),
            key=_text(body, "key", ""),
            generation=_number(body, "generation"),
            size_hint=_number(body, "size_hint", 0),
        )
        outcome = await self._loader.load(spec)
        return {
            "instance": self._loader.instance,
            "epoch": self._session.epoch,
            "generation": spec.generation,
            "size_bytes": outcome.size_bytes,
            "load_ms": outcome.load_ms,
            "evicted": list(outcome.evicted),
        }

    async def _unload(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"unloaded": await self._loader.unload(f"{_text(body, 'tenant')}/{_text(body, 'id')}")}

    def _metadata(self, name: str) -> dict[str, Any]:
        copy = self._copies.get(name.encode())
        if copy is None:
            raise RequestError(Code.NOT_FOUND, "the model is not loaded here", reason=Reason.NOT_LOADED)
        model = copy.model
        specs = (*model.inputs, *model.outputs)

        def describe(specs: Any) -> list[dict[str, Any]]:
            return [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in specs]

        return {
            "name": copy.id,
            "platform": model.platform,
            "inputs": describe(model.inputs),
            "outputs": describe(model.outputs),
            # Rows that are computed in one call; 0 when the first dimension is not that of rows.
            "max_batch_size": BATCH_ROWS_MAX if model.is_batchable and all(s.shape[:1] == (-1,) for s in specs) else 0,
        }

    def _statistics(self, name: str) -> dict[str, Any]:
        """By full name, the statistics of the copy `name`; of all copies of a tenant for ``tenant/``."""
        copies = self._copies
        if name.endswith("/"):
            names = [key for key in copies if key.startswith(name.encode())]
        else:
            names = [key for key in (name.encode(),) if key in copies]
        return {
            key.decode(): {**copies[key].statistics.as_json(), "bytes": self._loader.size_bytes(key.decode())}
            for key in names
        }

    async def _answer(self, request: Request, work: Awaitable[dict[str, Any]]) -> None:
        try:
            request.respond_json(await work)
        except RequestError as error:
            request.respond_error(error)
        except Exception:
            log.exception("control call %s failed", request.path)
            request.respond_error(RequestError(Code.INTERNAL, "internal error"))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _check_versioned(model: str, path: bytes) -> None:
    """Raise NOT_FOUND unless `path` is ``/v2/models/{model}/versions/{version}/infer`` with the version there is."""
    parts = path.split(b"/")
    if len(parts) != 7 or parts[4] != b"versions" or parts[6] != b"infer":
        raise RequestError(Code.NOT_FOUND, f"no such path: {path[:200].decode('latin-1')}")
    oip.check_version(model, unquote(parts[5].decode("latin-1")))


def _text(body: dict[str, Any], field: str, default: str | None = None) -> str:
    value = body.get(field, default)
    if not isinstance(value, str):
        raise InvalidInput(f"field '{field}' must be a string")
    return value


def _number(body: dict[str, Any], field: str, default: int | None = None) -> int:
    value = body.get(field, default)
    if type(value) is not int or value < 0:
        raise InvalidInput(f"field '{field}' must be a non-negative integer")
    return value


def _read_body(request: Request) -> dict[str, Any]:
    try:
        value = orjson.loads(request.body)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise InvalidInput("the body must be a JSON object")
    return value
