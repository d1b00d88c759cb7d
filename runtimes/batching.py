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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from raymesh.runtimes import oip
from raymesh.runtimes.errors import Code, InvalidInput, Reason, RequestError
from raymesh.runtimes.frameworks.base import LoadedModel
from raymesh.runtimes.http1 import Request
from raymesh.runtimes.oip import InferRequest
from raymesh.runtimes.tensors import Array

log = logging.getLogger(__name__)

#: Rows computed in one call; more are split, so that a burst on one model cannot hold the loop for long.
BATCH_ROWS_MAX = 256
#: A model whose calls take longer than this on average computes in a thread (ARCHITECTURE section 6: 1-2 ms).
INLINE_MAX_S = 0.002
#: Weight of the newest measurement in a model's mean time.
MEAN_WEIGHT = 0.2

MODEL_VERSION = "1"


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

    __slots__ = ("infer", "request", "rows")

    def __init__(self, request: Request, infer: InferRequest, rows: int) -> None:
        self.request = request
        self.infer = infer
        self.rows = rows


#: The answer to one call, ready to send.
Answer = bytes


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
        inputs = infer.inputs
        if copy.model.is_batchable and inputs:
            rows = infer.rows
            key: Any = (
                infer.outputs,
                *[(name, a.dtype, a.shape[1:], a.shape[:1] == (rows,)) for name, a in inputs.items()],
            )
        else:
            # Never batched: an unbatchable model, or a request whose inputs the model has to judge by itself.
            rows, key = 1, request
        call = Call(request, infer, rows)
        queue = copy.queues.get(key)
        if queue is None:
            copy.queues[key] = [call]
        else:
            queue.append(call)
        copy.enter()
        self._ready[copy] = None
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._is_scheduled = False
        ready, self._ready = self._ready, {}
        for copy in ready:
            if copy.is_computing:
                continue  # its thread takes the queue when it is done
            self._touch(copy.name)
            if copy.mean_s > INLINE_MAX_S:
                self._start_thread(copy)
                continue
            queues, copy.queues = copy.queues, {}
            for calls in queues.values():
                for batch in _split(calls):
                    self._finish(batch, _compute(copy, batch))
                copy.leave(len(calls))

    def _start_thread(self, copy: Copy) -> None:
        copy.is_computing = True
        queues, copy.queues = copy.queues, {}
        batches = [batch for calls in queues.values() for batch in _split(calls)]
        future = self._loop.run_in_executor(self._workers, _compute_all, copy, batches)
        future.add_done_callback(lambda done: self._end_thread(copy, batches, done.result()))

    def _end_thread(self, copy: Copy, batches: list[list[Call]], answers: list[list[Answer]]) -> None:
        copy.is_computing = False
        if copy.queues:
            self._ready[copy] = None
            if not self._is_scheduled:
                self._is_scheduled = True
                self._loop.call_soon(self._run)
        for batch, batch_answers in zip(batches, answers, strict=True):
            self._finish(batch, batch_answers)
            copy.leave(len(batch))

    @staticmethod
    def _finish(batch: list[Call], answers: Sequence[Answer]) -> None:
        for call, answer in zip(batch, answers, strict=True):
            call.request.respond_raw(answer)


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


def _compute_all(copy: Copy, batches: list[list[Call]]) -> list[list[Answer]]:
    return [_compute(copy, batch) for batch in batches]


def _compute(copy: Copy, batch: list[Call]) -> list[Answer]:
    """The answers to a batch, in order. Never raises: a failure is an answer too."""
    started = time.perf_counter()
    calls = [c for c in batch if not c.request.has_left]
    try:
        if not calls:
            return [b""] * len(batch)
        answers = _predict(copy, calls)
    except Exception as error:
        # One request may have spoilt the batch: alone, each gets what it deserves.
        answers = [_answer_alone(copy, c) for c in calls] if len(calls) > 1 else [_failure(copy, calls[0], error)]
    copy.mean_s += MEAN_WEIGHT * (time.perf_counter() - started - copy.mean_s)
    if len(calls) == len(batch):
        return answers
    by_call = dict(zip(calls, answers, strict=True))
    return [by_call.get(c, b"") for c in batch]


def _predict(copy: Copy, calls: list[Call]) -> list[Answer]:
    model = copy.model
    first = calls[0].infer
    if len(calls) == 1:
        return [_encode(copy, calls[0], model.predict(first.inputs, first.outputs))]
    merged = {name: np.concatenate([c.infer.inputs[name] for c in calls]) for name in first.inputs}
    outputs = model.predict(merged, first.outputs)
    rows = sum(c.rows for c in calls)
    if any(a.shape[:1] != (rows,) for a in outputs.values()):
        raise ValueError("the model's outputs do not have one row per input row")
    answers = []
    at = 0
    for call in calls:
        end = at + call.rows
        answers.append(_encode(copy, call, {name: a[at:end] for name, a in outputs.items()}))
        at = end
    return answers


def _encode(copy: Copy, call: Call, outputs: dict[str, Array]) -> Answer:
    infer = call.infer
    if infer.outputs:
        outputs = {name: outputs[name] for name in infer.outputs}
    if infer.is_grpc:
        return copy.encoder.encode(outputs, infer.id)
    return oip.encode_rest(copy.id, MODEL_VERSION, infer, outputs)


def _answer_alone(copy: Copy, call: Call) -> Answer:
    try:
        return _predict(copy, [call])[0]
    except Exception as error:
        return _failure(copy, call, error)


def _failure(copy: Copy, call: Call, error: Exception) -> Answer:
    if not isinstance(error, RequestError):
        log.warning("model %s raised", copy.name, exc_info=error)
        # Only the kind of error: its text may hold paths or data of others.
        error = RequestError(
            Code.INTERNAL, f"model '{copy.id}' raised {type(error).__name__}", reason=Reason.MODEL_RAISED
        )
    return oip.error_answer(error, is_grpc=call.infer.is_grpc)
