"""`register_many` without the sending: what to send next, what the answers mean, what to send again.

Rule of the file: no I/O, and a round at a time. A round sends everything that is left; whatever the mesh could not do
then goes into the next one, after a pause. `client.py` and `client_async.py` do the sending.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from raymesh.mesh import client_calls as calls
from raymesh.mesh.client_calls import MeshError, ModelSpec, RegisterSummary, RpcCall
from raymesh.runtimes.errors import Code

Progress = Callable[[int], None]

#: Requests for many models in flight: one is carried out, one is on its way, one is being read or written here.
_BATCHES_IN_FLIGHT = 3
#: Characters of models in one request, far below what a mesh takes in one message. One model alone is always sent.
_BATCH_CHARACTERS_MAX = 512 * 1024


class Item(NamedTuple):
    """One of the models. `number` is its place among them, `attempt` how often it was sent before."""

    number: int
    spec: ModelSpec
    attempt: int = 0


class Job(NamedTuple):
    """One call: the models it is about, and the call itself, which answers with one error or None for each."""

    items: tuple[Item, ...]
    call: RpcCall[tuple[MeshError | None, ...]]
    is_bulk: bool


class BulkRegistration:
    """The state of one `register_many`.

    Send `take()`s until it is None, at most `in_flight_max` at a time, and tell what became of each with `settle`; when
    nothing is in flight any more ask `next_round`. `pause_s` says how long to wait before a model is sent again, and
    raises the error when it should not be. A mesh that does not know the bulk call gets a call for each model.
    """

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        *,
        batch: int,
        concurrency: int,
        progress: Progress | None,
        pause_s: Callable[[MeshError, int], float],
    ) -> None:
        for name, value in (("concurrency", concurrency), ("batch", batch)):
            if value < 1:
                raise ValueError(f"{name} {value}: must be at least 1")
        self._todo: Iterator[Item] = (Item(number, spec) for number, spec in enumerate(specs))
        self._batch = batch
        self._concurrency = concurrency
        self._progress = progress
        self._pause_s = pause_s
        #: An item taken from `_todo` that did not fit into the last batch.
        self._kept: Item | None = None
        self._again: list[Item] = []
        self._pauses_s = [0.0]
        self._failed: dict[int, tuple[str, str]] = {}
        self._registered = 0
        #: The mesh has just said that it does not know the bulk call.
        self._is_round_over = False

    @property
    def in_flight_max(self) -> int:
        """How many calls may be in flight."""
        return self._concurrency if self._batch == 1 else min(self._concurrency, _BATCHES_IN_FLIGHT)

    def take(self) -> Job | None:
        """What to send next in this round; None when that was all."""
        if self._is_round_over:
            return None
        items: list[Item] = []
        characters = 0
        while len(items) < self._batch and (item := self._next_item()) is not None:
            characters += sum(map(len, item.spec))
            if items and characters > _BATCH_CHARACTERS_MAX:
                self._kept = item
                break
            items.append(item)
        if not items:
            return None
        if self._batch > 1:
            return Job(tuple(items), calls.register_bulk([item.spec for item in items]), is_bulk=True)
        return Job(tuple(items), calls.register_one(items[0].spec), is_bulk=False)

    def settle(self, job: Job, answer: tuple[MeshError | None, ...] | MeshError) -> None:
        """What the call of `job` answered, or the error it ended in."""
        if isinstance(answer, MeshError):
            if job.is_bulk and answer.code is Code.UNIMPLEMENTED:
                self._batch = 1
                self._is_round_over = True
                self._again.extend(job.items)
                return
            answer = (answer,) * len(job.items)
        before = self._done
        for item, error in zip(job.items, answer, strict=True):
            self._settle_item(item, error)
        if self._progress is not None and self._done > before:
            self._progress(self._done)

    def next_round(self) -> float | None:
        """Begin the next round: how long to wait before it, in seconds; None when there is nothing left to do."""
        if not self._again:
            return None
        again, self._again = self._again, []
        self._todo = itertools.chain(again, self._todo)
        self._is_round_over = False
        pause_s, self._pauses_s = max(self._pauses_s), [0.0]
        return pause_s

    def summary(self) -> RegisterSummary:
        """What came of it all, the failures in the order of the models."""
        return RegisterSummary(self._registered, [self._failed[number] for number in sorted(self._failed)])

    @property
    def _done(self) -> int:
        return self._registered + len(self._failed)

    def _next_item(self) -> Item | None:
        item, self._kept = self._kept, None
        return item if item is not None else next(self._todo, None)

    def _settle_item(self, item: Item, error: MeshError | None) -> None:
        if error is None:
            self._registered += 1
            return
        try:
            self._pauses_s.append(self._pause_s(error, item.attempt))
        except MeshError:
            self._failed[item.number] = (item.spec.name, error.message)
        else:
            self._again.append(item._replace(attempt=item.attempt + 1))
