"""Opportunistic batching: requests of one model that arrived together are computed together.

Rule of the file: nobody waits on purpose. What one turn of the event loop read is computed in the next; what arrives
during a computation is the next batch. A batch holds rows of one model and one signature (input names, dtypes, row
shapes, outputs wanted); errors stay with the request that caused them. Models that take long move to a worker thread,
so that one heavy model does not stall the others of its runtime.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from raymesh.runtimes import oip
from raymesh.runtimes.errors import Code, InvalidInput, Reason, RequestError
from raymesh.runtimes.frameworks.base import LoadedModel
from raymesh.runtimes.http1 import Request
from raymesh.runtimes.oip import MODEL_VERSION, InferRequest
from raymesh.runtimes.statistics import Statistics
from raymesh.runtimes.tensors import Array

log = logging.getLogger(__name__)

#: Rows computed in one call; more are split, so that a burst on one model cannot hold the loop for long.
BATCH_ROWS_MAX = 256
#: A model whose calls take longer than this on average computes in a thread (ARCHITECTURE section 6: 1-2 ms).
INLINE_MAX_S = 0.002
#: Weight of the newest measurement in a model's mean time.
MEAN_WEIGHT = 0.2


class Copy:
    """One loaded model as the data path sees it."""

    __slots__ = (
        "_cache_pin",
        "_cache_unpin",
        "encoder",
        "generation",
        "id",
        "in_flight",
        "is_computing",
        "mean_s",
        "model",
        "name",
        "on_idle",
        "output_names",
        "queues",
        "requests",
        "statistics",
    )

    def __init__(
        self,
        name: str,
        generation: int,
        model: LoadedModel,
        *,
        pin: Callable[[str], None],
        unpin: Callable[[str], None],
    ) -> None:
        self.name = name
        #: What clients call it: the id without its tenant.
        self.id = name.partition("/")[2]
        self.generation = generation
        self.model = model
        self.encoder = oip.GrpcEncoder(self.id, MODEL_VERSION)
        self.output_names = frozenset(o.name for o in model.outputs)
        #: Requests accepted and not answered yet. The cache's pin is held while this is not 0.
        self.in_flight = 0
        self.requests = 0
        self.statistics = Statistics()
        self.mean_s = 0.0
        #: A worker thread has this model now; what arrives waits in `queues`.
        self.is_computing = False
        self.queues: dict[Any, list[Call]] = {}
        #: Called once when the last request in flight has been answered; set by who waits to unload.
        self.on_idle: Callable[[], None] | None = None
        self._cache_pin = pin
        self._cache_unpin = unpin

    def enter(self) -> None:
        """A request begins."""
        if self.in_flight == 0:
            self._cache_pin(self.name)
        self.in_flight += 1
        self.requests += 1

    def leave(self, count: int) -> None:
        """`count` requests have been answered."""
        self.in_flight -= count
        if self.in_flight == 0:
            self._cache_unpin(self.name)
            if self.on_idle is not None:
                self.on_idle()


class Call:
    """One accepted request: what to compute and whom to answer."""

    __slots__ = ("begun_ns", "infer", "request", "rows")

    def __init__(self, request: Request, infer: InferRequest, rows: int) -> None:
        self.begun_ns = time.perf_counter_ns()
        self.request = request
        self.infer = infer
        self.rows = rows


#: The answer to one call, ready to send.
Answer = bytes
#: What a model made of one call: its outputs by name, or what it raised.
_Result = dict[str, Array] | Exception


class Batcher:
    """Collects calls and computes them, inline or in `workers`. Belongs to one event loop.

    `touch` is told the name of a model once per batch that used it.
    """

    def __init__(self, workers: ThreadPoolExecutor, touch: Callable[[str], None]) -> None:
        self._workers = workers
        self._touch = touch
        #: Copies with something queued since the last turn, in order of arrival.
        self._ready: dict[Copy, None] = {}
        self._is_scheduled = False
        self._loop = asyncio.get_running_loop()

    def submit(self, copy: Copy, request: Request, infer: InferRequest) -> None:
        """Accept a decoded request. Raises `InvalidInput` for outputs the model does not have."""
        if infer.outputs and not copy.output_names.issuperset(infer.outputs):
            unknown = next(o for o in infer.outputs if o not in copy.output_names)
            raise InvalidInput(f"unexpected inference output '{unknown}' for model '{copy.id}'")
        rows, key = _signature(infer) if copy.model.is_batchable else (1, None)
        if key is None:
            # A queue of its own: never computed with another.
            key = request
        call = Call(request, infer, rows)
        queue = copy.queues.get(key)
        if queue is None:
            copy.queues[key] = [call]
        else:
            queue.append(call)
        copy.enter()
        self._schedule(copy)

    def _schedule(self, copy: Copy) -> None:
        self._ready[copy] = None
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._is_scheduled = False
        ready, self._ready = self._ready, {}
        for copy in ready:
            if copy.is_computing:
                continue  # its thread's end puts it back
            self._touch(copy.name)
            queues, copy.queues = copy.queues, {}
            batches = [batch for calls in queues.values() for batch in _split(calls)]
            if copy.mean_s > INLINE_MAX_S:
                self._start_thread(copy, batches)
                continue
            for batch in batches:
                self._finish(copy, batch, _compute(copy, batch))

    def _start_thread(self, copy: Copy, batches: list[list[Call]]) -> None:
        def work() -> None:
            for batch in batches:
                answers = _compute(copy, batch)
                # One by one: the callers of the first batch need not wait for the last.
                self._loop.call_soon_threadsafe(self._finish, copy, batch, answers)

        copy.is_computing = True
        self._loop.run_in_executor(self._workers, work).add_done_callback(lambda done: self._end_thread(copy, done))

    def _end_thread(self, copy: Copy, done: asyncio.Future[None]) -> None:
        copy.is_computing = False
        if copy.queues:
            self._schedule(copy)
        if not done.cancelled():
            done.result()  # raises what must never happen where the loop logs it

    @staticmethod
    def _finish(copy: Copy, batch: list[Call], answers: list[Answer]) -> None:
        for call, answer in zip(batch, answers, strict=True):
            call.request.respond_raw(answer)
        copy.leave(len(batch))


def _signature(infer: InferRequest) -> tuple[int, Any]:
    """The rows of a request and what it must have in common with another to be computed with it.

    None for the latter when the inputs do not agree on their rows: the model has to judge them by themselves.
    """
    rows = infer.rows
    parts: list[Any] = [infer.outputs]
    for name, array in infer.inputs.items():
        shape = array.shape
        if not shape or shape[0] != rows:
            return 1, None
        parts.append((name, array.dtype, shape[1:]))
    return (rows, tuple(parts)) if infer.inputs else (1, None)


def _split(calls: list[Call]) -> list[list[Call]]:
    """`calls` in batches of at most `BATCH_ROWS_MAX` rows each (a larger single request stays whole)."""
    if len(calls) == 1 or sum(c.rows for c in calls) <= BATCH_ROWS_MAX:
        return [calls]
    batches: list[list[Call]] = [[]]
    rows = 0
    for call in calls:
        if batches[-1] and rows + call.rows > BATCH_ROWS_MAX:
            batches.append([])
            rows = 0
        batches[-1].append(call)
        rows += call.rows
    return batches


def _compute(copy: Copy, batch: list[Call]) -> list[Answer]:
    """The answers to a batch, in order. Never raises: a failure is an answer too. Callers who left get ``b""``."""
    calls = [c for c in batch if not c.request.has_left]
    if not calls:
        return [b""] * len(batch)
    clock = time.perf_counter_ns
    begun_ns = clock()
    ready_ns = inferred_ns = begun_ns
    results: list[_Result]
    try:
        inputs = _merge_inputs(calls)
        ready_ns = clock()
        outputs = copy.model.predict(inputs, calls[0].infer.outputs)
        inferred_ns = clock()
        results = list(_split_outputs(calls, outputs))
    except Exception as error:
        # One request may have spoilt the batch: alone, each gets what it deserves.
        results = [_predict_alone(copy, c) for c in calls] if len(calls) > 1 else [error]
        ready_ns, inferred_ns = begun_ns, clock()
    failed: list[Call] = []
    answers = [_encode(copy, c, r, failed) for c, r in zip(calls, results, strict=True)]
    ended_ns = clock()
    copy.mean_s += MEAN_WEIGHT * ((ended_ns - begun_ns) * 1e-9 - copy.mean_s)
    requests = len(calls)
    if requests == 1:
        rows, waited_ns = calls[0].rows, begun_ns - calls[0].begun_ns
    else:
        rows = sum([c.rows for c in calls])
        waited_ns = requests * begun_ns - sum([c.begun_ns for c in calls])
    copy.statistics.add_batch(
        requests=requests,
        failed=len(failed),
        rows=rows,
        waited_ns=waited_ns,
        input_ns=ready_ns - begun_ns,
        infer_ns=inferred_ns - ready_ns,
        output_ns=ended_ns - inferred_ns,
    )
    if requests == len(batch):
        return answers
    by_call = dict(zip(calls, answers, strict=True))
    return [by_call.get(c, b"") for c in batch]


def _merge_inputs(calls: list[Call]) -> dict[str, Array]:
    """The inputs of all calls, one after the other."""
    first = calls[0].infer.inputs
    if len(calls) == 1:
        return first
    return {name: np.concatenate([c.infer.inputs[name] for c in calls]) for name in first}


def _split_outputs(calls: list[Call], outputs: dict[str, Array]) -> list[dict[str, Array]]:
    """The outputs of each call, in order. Raises `ValueError` when they are not one row per input row."""
    if len(calls) == 1:
        return [outputs]
    rows = sum(c.rows for c in calls)
    if any(a.shape[:1] != (rows,) for a in outputs.values()):
        raise ValueError("the model's outputs do not have one row per input row")
    results = []
    at = 0
    for call in calls:
        end = at + call.rows
        results.append({name: a[at:end] for name, a in outputs.items()})
        at = end
    return results


def _predict_alone(copy: Copy, call: Call) -> _Result:
    try:
        return copy.model.predict(call.infer.inputs, call.infer.outputs)
    except Exception as error:
        return error


def _encode(copy: Copy, call: Call, result: _Result, failed: list[Call]) -> Answer:
    """The answer to one call; the call is added to `failed` when that is an error."""
    infer = call.infer
    try:
        if isinstance(result, Exception):
            raise result
        if infer.outputs:
            result = {name: result[name] for name in infer.outputs}
        if infer.is_grpc:
            return copy.encoder.encode(result, infer.id, alias=infer.alias)
        if infer.encode is not None:
            return infer.encode(result)
        return oip.encode_rest(infer.alias or copy.id, MODEL_VERSION, infer, result)
    except RequestError as error:
        failed.append(call)
        return oip.error_answer(error, is_grpc=infer.is_grpc)
    except Exception as error:
        failed.append(call)
        log.warning("model %s raised", copy.name, exc_info=error)
        # Only the kind of error: its text may hold paths or data of others.
        hidden = RequestError(
            Code.INTERNAL, f"model '{copy.id}' raised {type(error).__name__}", reason=Reason.MODEL_RAISED
        )
        return oip.error_answer(hidden, is_grpc=infer.is_grpc)
