"""One client of the demo: a process that asks for predictions as fast as it is answered, and checks every answer.

The demo tells it over a pipe which model each customer has now (`Use`), and learns when no request for the model
before it is under way any more. That is how a real caller would be moved to a new model: new requests go to the new
one, and the old one is unregistered once nobody uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import pickle
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from catalogue import POOL_ROWS, TrainedModel
from recorder import Recorder, Temperature
from workload import Zipf

Array = npt.NDArray[Any]
#: Asks `model` for the rows given; the outputs by name, and whether the request waited for a load.
Ask = Callable[[TrainedModel, Array], Awaitable[tuple[Mapping[str, Array], Temperature]]]

#: Rows in one request. Most callers ask about one thing.
ROWS_PER_REQUEST = (1, 1, 1, 2, 4)


@dataclasses.dataclass(frozen=True, slots=True)
class Assignment:
    """What one client process does. `protocols` says how each of its concurrent callers asks.

    `ranks_seed` is the same for all clients: which customers are popular is a fact about the customers.
    """

    target: str
    catalogue: Path
    protocols: tuple[str, ...]
    slots: int
    exponent: float
    ranks_seed: int
    seed: int


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
    """To a client: customer `slot` has this model now (None: the customer is gone). Answered by the `slot` number."""

    slot: int
    model_name: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Begin:
    """To a client: send, and count time from `at_s` (the system-wide monotonic clock)."""

    at_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Stop:
    """To a client: finish what is under way and answer with your `Recorder`."""


class Traffic:
    """The callers of one process and the models they choose from."""

    def __init__(self, assignment: Assignment, pipe: Connection) -> None:
        self._assignment = assignment
        self._pipe = pipe
        catalogue = pickle.loads(assignment.catalogue.read_bytes())["models"].values()
        self._models: dict[str, TrainedModel] = {model.name: model for model in catalogue}
        #: The model of each customer, None where there is none now.
        self._now: list[TrainedModel | None] = [None] * assignment.slots
        #: Requests under way by model name.
        self._under_way: Counter[str] = Counter()
        #: Customers whose change waits until nothing is under way for the model they had.
        self._draining: dict[str, list[int]] = {}
        self._begun = asyncio.Event()
        self._begin_s = 0.0
        self._is_stopping = False
        self.recorder = Recorder()
        self._zipf = Zipf(assignment.slots, assignment.exponent, random.Random(assignment.ranks_seed))

    async def run(self) -> None:
        """Serves the pipe and sends traffic until told to stop."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pipe.fileno(), self._read_pipe)
        # uvloop makes what it watches non-blocking; `Connection` cannot write or read a long message that way.
        os.set_blocking(self._pipe.fileno(), True)
        try:
            async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
                asks = {
                    protocol: await open_client(stack, protocol, self._assignment.target)
                    for protocol in sorted(set(self._assignment.protocols))
                }
                self._pipe.send("ready")
                for number, protocol in enumerate(self._assignment.protocols):
                    tasks.create_task(self._call(number, protocol, asks[protocol]))
        finally:
            loop.remove_reader(self._pipe.fileno())
        self._pipe.send(self.recorder)

    def _read_pipe(self) -> None:
        while self._pipe.poll():
            match self._pipe.recv():
                case Use(slot, model_name):
                    before = self._now[slot]
                    self._now[slot] = self._models[model_name] if model_name else None
                    if before is None or not self._under_way[before.name]:
                        self._pipe.send(slot)
                    else:
                        self._draining.setdefault(before.name, []).append(slot)
                case Begin(at_s):
                    self._begin_s = at_s
                    self._begun.set()
                case Stop():
                    self._is_stopping = True

    async def _call(self, number: int, protocol: str, ask: Ask) -> None:
        rng = random.Random(f"{self._assignment.seed} {number}")
        client = PROTOCOLS.index(protocol)
        await self._begun.wait()
        while not self._is_stopping:
            model = self._now[self._zipf.draw(rng)]
            if model is None:
                await asyncio.sleep(0)  # Or a client without customers would never read its pipe.
                continue
            self._under_way[model.name] += 1
            try:
                await self._ask_once(model, rng, ask, client)
            finally:
                self._under_way[model.name] -= 1
                if not self._under_way[model.name]:
                    for slot in self._draining.pop(model.name, ()):
                        self._pipe.send(slot)

    async def _ask_once(self, model: TrainedModel, rng: random.Random, ask: Ask, client: int) -> None:
        count = rng.choice(ROWS_PER_REQUEST)
        first = rng.randrange(POOL_ROWS - count + 1)
        begin_s = time.monotonic()
        try:
            outputs, temperature = await ask(model, model.rows[first : first + count])
        except Exception as error:  # Whatever a client raises is a failed request to its user.
            at_s = time.monotonic() - self._begin_s
            self.recorder.failed(f"{at_s:.1f} s {PROTOCOLS[client]} {model.name}: {type(error).__name__}: {error}")
            return
        end_s = time.monotonic()
        self.recorder.answered(end_s - self._begin_s, (end_s - begin_s) * 1e3, temperature, client)
        if wrong := model.explain_wrong(first, count, outputs):
            self.recorder.answered_wrong(f"{PROTOCOLS[client]} {wrong}")


#: The ways to ask, in the order that `Recorder.client` numbers them.
PROTOCOLS = ("grpc", "rest", "tritonclient-grpc", "tritonclient-http")


async def open_client(stack: contextlib.AsyncExitStack, protocol: str, target: str) -> Ask:
    """A client of that kind, open until `stack` closes."""
    if protocol in ("grpc", "rest"):
        return await open_raymesh(stack, protocol, target)
    if protocol == "tritonclient-grpc":
        import tritonclient.grpc as triton_grpc
        import tritonclient.grpc.aio as triton_grpc_aio

        client = await stack.enter_async_context(triton_grpc_aio.InferenceServerClient(target))
        return ask_triton(client, triton_grpc)
    import tritonclient.http as triton_http
    import tritonclient.http.aio as triton_http_aio

    client = await stack.enter_async_context(triton_http_aio.InferenceServerClient(target))
    return ask_triton(client, triton_http)


async def open_raymesh(stack: contextlib.AsyncExitStack, protocol: str, target: str) -> Ask:
    """raymesh's own client. It tries nothing twice here: a request that fails is counted as failed."""
    from raymesh.mesh.client import AsyncClient

    client = await stack.enter_async_context(AsyncClient(target, protocol=protocol, retries=0))

    async def ask(model: TrainedModel, rows: Array) -> tuple[Mapping[str, Array], Temperature]:
        prediction = await client.predict(model.name, {model.input_name: rows}, outputs=tuple(model.expected))
        return prediction.outputs, Temperature.COLD if prediction.cold else Temperature.WARM

    return ask


def ask_triton(client: Any, library: Any) -> Ask:
    """NVIDIA's client for Triton, either of its two: same names, other modules."""

    async def ask(model: TrainedModel, rows: Array) -> tuple[Mapping[str, Array], Temperature]:
        tensor = library.InferInput(model.input_name, list(rows.shape), "FP32")
        tensor.set_data_from_numpy(np.ascontiguousarray(rows))
        outputs = [library.InferRequestedOutput(name) for name in model.expected]
        result = await client.infer(model.name, [tensor], outputs=outputs)
        return {name: result.as_numpy(name) for name in model.expected}, Temperature.UNKNOWN

    return ask


def run_client(assignment: Assignment, pipe: Connection) -> None:
    """The whole process."""
    import uvloop

    async def main() -> None:
        await Traffic(assignment, pipe).run()

    uvloop.run(main())
