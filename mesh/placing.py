"""A gateway's way to the placement controller: whoever leads now, one question for each model.

Rule of the file: a herd of requests for one model is one question here and one load in the mesh. The question stays
open as long as anybody waits for it; no leader, a dead leader and a mesh without instances for a moment are waited out.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import orjson

from raymesh.mesh.fresh_copies import Placed
from raymesh.mesh.metrics import GatewayMetrics
from raymesh.registry.view import Change, InstancePut, LeaderChanged, MeshView
from raymesh.runtimes.errors import Code, Reason, RequestError, Unavailable
from raymesh.runtimes.upstream import UpstreamLost, Upstreams

#: Waits between questions that found nobody in charge: short first, for a new leader is usually there at once.
BACKOFF_MIN_S = 0.02
BACKOFF_MAX_S = 0.5
#: How long a mesh without a usable instance is given to get one (a killed runtime is replaced) before callers are told.
NO_INSTANCE_PATIENCE_S = 5.0
#: The controller's own time limit ends this much before ours, so that it is its answer that we hear.
ANSWER_MARGIN_S = 0.05


class PlacingOutcome(NamedTuple):
    """How a question ended: exactly one of the two is set."""

    placed: Placed | None = None
    error: RequestError | None = None


class _Key(NamedTuple):
    name: str
    excluded: frozenset[str]
    stale: frozenset[str]


@dataclass(slots=True)
class _Question:
    """One question under way. It ends at `until_s` (loop time), the latest deadline of those who wait."""

    until_s: float
    task: asyncio.Task[PlacingOutcome] | None = field(default=None)


class Placing:
    """Asks for placements. `source` names this gateway in cause ids; `see` must get every change of the view.

    `on_failed` is awaited, with the model's name, before anybody is told that it does not load.
    """

    def __init__(
        self,
        source: str,
        view: MeshView,
        upstreams: Upstreams,
        metrics: GatewayMetrics,
        *,
        on_failed: Callable[[str], Awaitable[None]],
        no_instance_patience_s: float = NO_INSTANCE_PATIENCE_S,
    ) -> None:
        self._source = source
        self._view = view
        self._upstreams = upstreams
        self._metrics = metrics
        self._on_failed = on_failed
        self._no_instance_patience_s = no_instance_patience_s
        self._questions: dict[_Key, _Question] = {}
        self._numbers = itertools.count(1)
        #: Set, and replaced, whenever asking again makes sense before the backoff is over.
        self._news = asyncio.Event()

    def see(self, changes: Iterable[Change]) -> None:
        """Notice a new leader or a new instance."""
        for change in changes:
            is_new_leader = isinstance(change, LeaderChanged) and change.new is not None
            if is_new_leader or (isinstance(change, InstancePut) and change.old is None):
                self._news.set()
                self._news = asyncio.Event()
                return

    def is_placing(self, name: str) -> bool:
        """Whether a placement of model `name` is under way by our asking."""
        # Retries with exclusions are rare and brief; the plain question is what callers wait for.
        return _Key(name, frozenset(), frozenset()) in self._questions

    async def place(
        self,
        name: str,
        *,
        until_s: float,
        excluded: frozenset[str] = frozenset(),
        stale: frozenset[str] = frozenset(),
    ) -> Placed:
        """A loaded copy of model `name`. Raises the `RequestError` that says why there is none.

        `until_s` is the caller's deadline in loop time. A caller that is cancelled leaves the question to the others.
        """
        outcome = await asyncio.shield(self._ask(name, until_s, excluded, stale))
        if outcome.placed is not None:
            return outcome.placed
        error = outcome.error
        assert error is not None
        # A copy: an exception collects the traceback of everybody who raises it.
        raise RequestError(error.code, error.message, reason=error.reason, retry_after_s=error.retry_after_s)

    def begin(self, name: str, *, until_s: float) -> None:
        """Have model `name` loaded without waiting for it."""
        self._ask(name, until_s, frozenset(), frozenset())

    async def close(self) -> None:
        """Drop all questions."""
        tasks = [question.task for question in self._questions.values() if question.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ask(
        self, name: str, until_s: float, excluded: frozenset[str], stale: frozenset[str]
    ) -> asyncio.Task[PlacingOutcome]:
        key = _Key(name, excluded, stale)
        question = self._questions.get(key)
        if question is None:
            question = self._questions[key] = _Question(until_s)
            question.task = asyncio.create_task(self._run(key, question), name=f"ask for {name}")
        question.until_s = max(question.until_s, until_s)
        assert question.task is not None
        return question.task

    async def _run(self, key: _Key, question: _Question) -> PlacingOutcome:
        loop = asyncio.get_running_loop()
        patience_until_s = loop.time() + self._no_instance_patience_s
        cause_id = f"{self._source}-{next(self._numbers)}"
        backoff_s = BACKOFF_MIN_S
        error: RequestError
        try:
            while True:
                news = self._news
                leader = self._view.leader
                if leader is None:
                    error = Unavailable("no placement controller is in charge", reason=Reason.NOT_LEADER)
                else:
                    try:
                        async with asyncio.timeout_at(question.until_s):
                            placed = await self._call(leader.record.address, key, cause_id, question.until_s)
                        self._metrics.placements.labels("placed").inc()
                        return PlacingOutcome(placed=placed)
                    except RequestError as answer:
                        error = answer
                    except UpstreamLost:
                        error = Unavailable("the placement controller is not reachable", reason=Reason.NOT_LEADER)
                    except TimeoutError:
                        error = _too_late()
                if not self._is_worth_waiting(error, question, patience_until_s):
                    self._metrics.placements.labels(error.reason or error.code.name).inc()
                    if error.reason == Reason.LOAD_FAILED:
                        await self._on_failed(key.name)
                    return PlacingOutcome(error=error)
                try:
                    async with asyncio.timeout_at(min(loop.time() + backoff_s, question.until_s)):
                        await news.wait()
                except TimeoutError:
                    backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
        finally:
            del self._questions[key]

    @staticmethod
    def _is_worth_waiting(error: RequestError, question: _Question, patience_until_s: float) -> bool:
        now_s = asyncio.get_running_loop().time()
        if now_s >= question.until_s:
            return False
        if error.reason == Reason.NO_INSTANCE:
            return now_s < patience_until_s
        # A deadline that passed: but somebody who can wait longer has joined, and the load goes on.
        return error.reason in {Reason.NOT_LEADER, Reason.DEADLINE}

    async def _call(self, address: str, key: _Key, cause_id: str, until_s: float) -> Placed:
        tenant, _, model = key.name.partition("/")
        timeout_s = until_s - asyncio.get_running_loop().time() - ANSWER_MARGIN_S
        if timeout_s <= 0:
            raise _too_late()
        body = {
            "tenant": tenant,
            "id": model,
            "cause_id": cause_id,
            "timeout_s": timeout_s,
            "exclude": list(key.excluded),
            "stale": list(key.stale),
        }
        answer = await self._upstreams.send(
            address,
            b"POST",
            b"/control/place",
            headers=b"content-type: application/json\r\n",
            body=orjson.dumps(body),
        )
        # Not `Upstreams.call`: an unreachable controller and a mesh without instances must be told apart here.
        try:
            value = orjson.loads(answer.rest) if answer.rest else {}
            if answer.status == 200:
                return Placed(value["instance"], value["address"], value["generation"])
            error = RequestError(
                Code(value["code"]),
                str(value.get("error", "")),
                reason=str(value.get("reason", "")),
                retry_after_s=float(value.get("retry_after_s", 0.0)),
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            # Somebody else at the address of a controller that has just gone.
            raise UpstreamLost("the placement controller did not answer sensibly") from None
        raise error


def _too_late() -> RequestError:
    return RequestError(
        Code.DEADLINE_EXCEEDED, "the model was not loaded within the request's deadline", reason=Reason.DEADLINE
    )
