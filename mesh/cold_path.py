"""The gateway's data listener: inference requests that the front door could not send to a runtime itself.

Rule of the file: a request is passed on as the bytes that came, to an instance that holds its model; if none does, one
is made to. Whatever goes wrong on the way is tried elsewhere while the caller's deadline lasts.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable

from raymesh.mesh.catalog import Catalog
from raymesh.mesh.config import Settings
from raymesh.mesh.fresh_copies import Placed
from raymesh.mesh.inference_target import (
    DEFAULT_DEADLINE_REASON,
    Inference,
    OwnInference,
    asked_for,
    is_grpc,
    passed_on_headers,
)
from raymesh.mesh.metrics import GatewayMetrics
from raymesh.mesh.placing import Placing
from raymesh.mesh.vmodels import VModels
from raymesh.registry.view import ModelEntry
from raymesh.runtimes import grpc_http1
from raymesh.runtimes.errors import Code, Reason, RequestError, Unavailable
from raymesh.runtimes.http1 import Request
from raymesh.runtimes.upstream import RawAnswer, UpstreamLost, Upstreams, hops_of

log = logging.getLogger(__name__)

#: Runtimes tried for one request. Only churn needs more than two; more than this is thrashing.
ATTEMPTS_MAX = 8
#: Processes a request may pass through. A stale route costs two; a loop must end.
HOPS_MAX = 8

#: Answers of a runtime that mean "not here": the copy was evicted, or the runtime must not or will not serve.
_NOT_HERE = frozenset({Reason.NOT_LOADED.encode(), Reason.FENCED.encode(), Reason.DRAINING.encode()})


class ColdPath:
    """Handles the data listener's requests. `on_placed` is told of every placement (model name, instance id)."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        vmodels: VModels,
        placing: Placing,
        upstreams: Upstreams,
        metrics: GatewayMetrics,
        on_placed: Callable[[str, Placed], None],
    ) -> None:
        self._settings = settings
        self._token = settings.internal_token.encode()
        self._catalog = catalog
        self._vmodels = vmodels
        self._placing = placing
        self._upstreams = upstreams
        self._metrics = metrics
        self._on_placed = on_placed
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(self, request: Request) -> None:
        """The `HttpServer` handler."""
        if not hmac.compare_digest(request.headers.get(b"x-raymesh-token", b""), self._token):
            raise RequestError(Code.PERMISSION_DENIED, "the internal token is missing or wrong", reason=Reason.DENIED)
        task = asyncio.get_running_loop().create_task(self._serve(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Drop the requests that still wait."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def ask(self, request: OwnInference, *, until_s: float) -> RawAnswer:
        """The answer to a request of the gateway's own, by `until_s` (loop time). Raises why there is none."""
        try:
            async with asyncio.timeout_at(until_s):
                answer, _ = await self._pass_on(request, until_s)
        except TimeoutError:
            raise RequestError(Code.DEADLINE_EXCEEDED, DEFAULT_DEADLINE_REASON, reason=Reason.DEADLINE) from None
        assert answer is not None  # only callers who leave get none
        return answer

    async def _serve(self, request: Request) -> None:
        """Answer one request, with an error if need be."""
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        wanted_s = grpc_http1.timeout_s(request.headers.get(b"grpc-timeout"))
        until_s = begun_s + (self._settings.request_timeout_s if wanted_s is None else wanted_s)
        outcome = "answered"
        try:
            async with asyncio.timeout_at(until_s):
                answer, has_waited = await self._pass_on(request, until_s)
            if answer is not None:
                request.respond_raw(answer.whole(b"x-raymesh-cold: 1\r\n" if has_waited else b""))
            if has_waited:
                outcome = "loaded"
                self._metrics.cold_seconds.observe(loop.time() - begun_s)
        except RequestError as error:
            outcome = error.reason or error.code.name
            _refuse(request, error)
        except TimeoutError:
            outcome = Reason.DEADLINE
            _refuse(request, RequestError(Code.DEADLINE_EXCEEDED, DEFAULT_DEADLINE_REASON, reason=Reason.DEADLINE))
        except Exception:
            log.exception("cold request failed")
            outcome = "INTERNAL"
            _refuse(request, RequestError(Code.INTERNAL, "internal error"))
        self._metrics.cold_requests.labels(outcome).inc()

    async def _pass_on(self, request: Inference, until_s: float) -> tuple[RawAnswer | None, bool]:
        """The answer of a runtime (None when the caller has left), and whether it had to wait for a placement."""
        asked = asked_for(request, bytes_max=self._settings.message_bytes_max)
        hops = hops_of(request.headers)
        if hops >= HOPS_MAX:
            raise Unavailable("the request was passed on too often", reason=Reason.NOT_LOADED)
        excluded: frozenset[str] = frozenset()
        stale: frozenset[str] = frozenset()
        name = ""
        has_waited = False
        for _ in range(ATTEMPTS_MAX):
            entry, vmodel = await self._vmodels.resolve(asked)
            if entry.record.name != name:
                # The first time, or the vmodel has moved on: what was said about instances is about another model.
                name, excluded, stale = entry.record.name, frozenset(), frozenset()
            placed = self._catalog.holder(entry, excluded | stale)
            if placed is None:
                try:
                    placed = await self._place(entry, until_s, excluded, stale)
                except RequestError as error:
                    if not vmodel or error.reason != Reason.NOT_REGISTERED:
                        raise
                    # The vmodel left the model, which is gone, faster than the view follows.
                    await self._vmodels.refresh(vmodel)
                    continue
                has_waited = True
                stale -= {placed.instance}
            if request.has_left:
                # Not forwarded: nobody would read the answer, and the model is loaded for the next one.
                return None, has_waited
            answer = await self._forward(request, name, vmodel, placed, hops, until_s)
            reason = answer.header(b"x-raymesh-reason") if answer is not None else None
            if answer is not None and reason not in _NOT_HERE:
                return answer, has_waited
            self._catalog.fresh.forget(name, placed.instance)
            if reason == Reason.NOT_LOADED.encode():
                # Evicted since: that instance is as good as any to load it again.
                stale |= {placed.instance}
            else:
                excluded |= {placed.instance}
        raise Unavailable(f"no instance could serve the model in {ATTEMPTS_MAX} attempts", reason=Reason.NOT_LOADED)

    async def _place(
        self, entry: ModelEntry, until_s: float, excluded: frozenset[str], stale: frozenset[str]
    ) -> Placed:
        name = entry.record.name
        placed = await self._placing.place(name, until_s=until_s, excluded=excluded, stale=stale)
        self._on_placed(name, placed)
        return placed

    async def _forward(
        self, request: Inference, name: str, vmodel: str, placed: Placed, hops: int, until_s: float
    ) -> RawAnswer | None:
        """The runtime's answer; None when it is gone. An inference may be repeated, so a lost answer is no harm."""
        remaining_s = until_s - asyncio.get_running_loop().time()
        headers = passed_on_headers(request, name=name, vmodel=vmodel, hops=hops + 1, remaining_s=remaining_s)
        try:
            return await self._upstreams.send(
                placed.address, request.method, request.target, headers=headers, body=request.body
            )
        except UpstreamLost:
            return None


def _refuse(request: Request, error: RequestError) -> None:
    if is_grpc(request):
        request.respond_raw(grpc_http1.error_answer(error))
    else:
        request.respond_error(error)
