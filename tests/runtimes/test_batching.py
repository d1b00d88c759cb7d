"""Batching: every caller gets its own rows, its own errors and its own protocol, whoever it was computed with."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import orjson
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from raymesh.runtimes import batching, oip
from raymesh.runtimes.batching import BATCH_ROWS_MAX, Batcher, Copy
from raymesh.runtimes.errors import InvalidInput
from raymesh.runtimes.frameworks.base import Array, TensorSpec
from raymesh.runtimes.oip import InferRequest


async def until(condition: Callable[[], Any]) -> None:
    end_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        await asyncio.sleep(0.0005)


class FakeRequest:
    """Stands in for `http1.Request`: keeps its answer."""

    def __init__(self) -> None:
        self.has_left = False
        self.answers: list[bytes] = []

    def respond_raw(self, answer: bytes) -> None:
        self.answers.append(answer)

    @property
    def outputs(self) -> dict[str, list[Any]]:
        (answer,) = self.answers
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), answer
        return {o["name"]: o["data"] for o in orjson.loads(body)["outputs"]}

    @property
    def error(self) -> str:
        (answer,) = self.answers
        head, _, body = answer.partition(b"\r\n\r\n")
        assert not head.startswith(b"HTTP/1.1 200")
        return f"{head.split()[1].decode()} {orjson.loads(body)['error']}"


class Doubler:
    """Twice its input `x`, and a label; raises on 13, refuses negatives, and minds being called by two threads."""

    inputs = (TensorSpec("x", "FP64", (-1, 2)),)
    outputs = (TensorSpec("double", "FP64", (-1, 2)), TensorSpec("label", "BYTES", (-1,)))
    platform = "fake"

    def __init__(self, *, is_batchable: bool = True) -> None:
        self.is_batchable = is_batchable
        self.calls: list[int] = []
        self.threads: set[int] = set()
        self.gate: threading.Event | None = None
        self.delay_s = 0.0
        self._busy = threading.Lock()

    def predict(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        assert self._busy.acquire(blocking=False), "two threads at once"
        try:
            x = inputs["x"]
            self.calls.append(len(x) if x.ndim else 1)
            self.threads.add(threading.get_ident())
            if self.gate is not None:
                assert self.gate.wait(5)
            until_s = time.perf_counter() + self.delay_s
            while time.perf_counter() < until_s:
                pass
            if (x == 13).any():
                raise ArithmeticError("secret")
            if (x < 0).any():
                raise InvalidInput("input 'x' must not be negative")
            labels = np.array([b"\xff" if (row == 99).any() else b"ok" for row in np.atleast_1d(x)], dtype=object)
            answers: dict[str, Array] = {"double": x * 2, "label": labels}
            return {name: answers[name] for name in outputs or answers}
        finally:
            self._busy.release()

    def close(self) -> None: ...


class Rig:
    """A batcher, one copy, and the pins it holds."""

    def __init__(self, model: Any) -> None:
        self.pins: list[str] = []
        self.pinned = 0
        self.touched: list[str] = []
        self.copy = Copy("t/m", 1, model, pin=self._pin, unpin=self._unpin)
        self.threads = ThreadPoolExecutor(2)
        self.batcher = Batcher(self.threads, self.touched.append)

    def _pin(self, name: str) -> None:
        assert name == "t/m"
        self.pinned += 1

    def _unpin(self, name: str) -> None:
        self.pinned -= 1
        assert self.pinned >= 0

    def ask(self, x: Any, *outputs: str, is_grpc: bool = False, **more: Any) -> FakeRequest:
        request = FakeRequest()
        inputs = {"x": np.asarray(x, dtype=np.float64), **{n: np.asarray(a) for n, a in more.items()}}
        self.batcher.submit(self.copy, request, InferRequest("m", "", inputs, outputs, is_grpc=is_grpc))  # type: ignore[arg-type]
        return request

    async def settled(self) -> None:
        await until(lambda: not self.copy.in_flight and not self.copy.is_computing)
        assert self.pinned == 0 and not self.copy.queues


def run(model: Any, work: Callable[[Rig], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            rig = Rig(model)
            try:
                await work(rig)
                await rig.settled()
            finally:
                rig.threads.shutdown()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bounded())


@pytest.fixture(params=["inline", "thread"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether models compute on the loop or in a thread."""
    monkeypatch.setattr(batching, "INLINE_MAX_S", 1e9 if request.param == "inline" else -1.0)
    return str(request.param)


def test_what_arrives_together_is_computed_together_and_answered_apart(place: str) -> None:
    model = Doubler()

    async def work(rig: Rig) -> None:
        requests = [rig.ask([[n, n]] * (n % 3 + 1), "double") for n in range(10)]
        assert rig.pinned == 1 and rig.copy.in_flight == 10
        await rig.settled()
        for n, request in enumerate(requests):
            assert request.outputs == {"double": [2 * n, 2 * n] * (n % 3 + 1)}
        assert model.calls == [sum(n % 3 + 1 for n in range(10))]
        assert rig.touched == ["t/m"] and rig.copy.requests == 10

    run(model, work)
    assert (model.threads == {threading.get_ident()}) == (place == "inline")


def test_different_signatures_are_computed_apart(place: str) -> None:
    model = Doubler()

    async def work(rig: Rig) -> None:
        cases: list[tuple[Any, tuple[str, ...], dict[str, Any]]] = [
            ([[1, 2]], ("double",), {}),
            ([[1, 2, 3]], ("double",), {}),  # another width
            ([[1, 2]], (), {}),  # other outputs
            ([[1, 2]], ("double",), {"y": [[1]]}),  # another input
            ([[1, 2]], ("double",), {"y": [[1.5]]}),  # of another dtype
        ]
        requests = [[rig.ask(x, *outputs, **more) for _ in range(2)] for x, outputs, more in cases]
        await rig.settled()
        assert model.calls == [2] * len(cases)
        for (x, _, _), pair in zip(cases, requests, strict=True):
            for request in pair:
                assert request.outputs["double"] == [2 * v for v in x[0]]

    run(model, work)


def test_inputs_that_disagree_on_their_rows_are_never_joined(place: str) -> None:
    """Joined, three rows and a threshold of two callers would become six rows and two thresholds."""
    model = Doubler()

    async def work(rig: Rig) -> None:
        requests = [rig.ask([[1, 1]] * 3, "double", y=[n]) for n in range(2)]
        requests += [rig.ask([[1, 1]], "double", y=0.5) for _ in range(2)]
        scalars = [rig.ask(5, "double") for _ in range(2)]
        await rig.settled()
        assert model.calls == [3, 3, 1, 1, 1, 1]
        assert all(r.outputs["double"] == [2, 2] * (len(r.outputs["double"]) // 2) for r in requests)
        assert all(len(r.answers) == 1 for r in scalars)

    run(model, work)


def test_an_unbatchable_model_computes_each_request_alone(place: str) -> None:
    model = Doubler(is_batchable=False)

    async def work(rig: Rig) -> None:
        requests = [rig.ask([[n, n]], "double") for n in range(5)]
        await rig.settled()
        assert model.calls == [1] * 5
        assert [r.outputs["double"] for r in requests] == [[2 * n, 2 * n] for n in range(5)]

    run(model, work)


def test_an_error_stays_with_the_request_that_caused_it(place: str) -> None:
    async def work(rig: Rig) -> None:
        good, bug, bad, other = (rig.ask([[n, n]], "double") for n in (1, 13, -1, 2))
        await rig.settled()
        assert (good.outputs["double"], other.outputs["double"]) == ([2, 2], [4, 4])
        assert bug.error == "500 model 'm' raised ArithmeticError"
        assert bad.error == "400 input 'x' must not be negative"
        assert b"x-raymesh-reason: MODEL_RAISED" in bug.answers[0]

    run(Doubler(), work)


def test_one_answer_that_cannot_be_written_does_not_cost_the_others_a_second_computation(place: str) -> None:
    model = Doubler()

    async def work(rig: Rig) -> None:
        good, unspeakable, other = (rig.ask([[n, n]]) for n in (1, 99, 2))
        as_grpc = rig.ask([[99, 99]], is_grpc=True)
        await rig.settled()
        assert good.outputs["label"] == other.outputs["label"] == ["ok"]
        assert "400 output 'label' is not UTF-8" in unspeakable.error
        assert b"grpc-status: 0" in as_grpc.answers[0]
        assert model.calls == [4]

    run(model, work)


def test_errors_come_in_the_callers_protocol(place: str) -> None:
    async def work(rig: Rig) -> None:
        as_grpc = rig.ask([[13, 13]], is_grpc=True)
        as_rest = rig.ask([[13, 13]])
        await rig.settled()
        assert b"\r\ngrpc-status: 13\r\n" in as_grpc.answers[0]
        assert as_rest.error.startswith("500 ")

    run(Doubler(), work)


class Odd(Doubler):
    """Declares rows and answers with something else."""

    def __init__(self, answer: Callable[[Array], Any]) -> None:
        super().__init__()
        self.answer = answer

    def predict(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        answer: dict[str, Array] = self.answer(inputs["x"])
        return answer


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: None,
        lambda x: {},
        lambda x: {"double": None},
        lambda x: {"double": np.zeros(1, dtype="M8[s]")},
        lambda x: {"double": np.array([object()])},
    ],
)
def test_a_model_that_answers_nonsense_is_to_blame(place: str, answer: Callable[[Array], Any]) -> None:
    async def work(rig: Rig) -> None:
        requests = [rig.ask([[1, 1]], "double") for _ in range(3)]
        await rig.settled()
        assert all(r.error.startswith("500 model 'm' raised ") for r in requests)

    run(Odd(answer), work)


def test_a_model_that_sums_over_the_batch_is_asked_one_by_one(place: str) -> None:
    async def work(rig: Rig) -> None:
        requests = [rig.ask([[n, n]], "double") for n in range(3)]
        await rig.settled()
        assert [r.outputs["double"] for r in requests] == [0, 2, 4] or [r.outputs["double"] for r in requests] == [
            [0],
            [2],
            [4],
        ]

    run(Odd(lambda x: {"double": np.asarray(x.sum())}), work)


def test_unknown_outputs_are_refused_before_anything_is_pinned() -> None:
    async def work(rig: Rig) -> None:
        with pytest.raises(InvalidInput, match="unexpected inference output 'nope' for model 'm'"):
            rig.ask([[1, 1]], "double", "nope")
        assert rig.copy.in_flight == rig.pinned == 0

    run(Doubler(), work)


def test_callers_who_left_are_not_computed(place: str) -> None:
    model = Doubler()

    async def work(rig: Rig) -> None:
        requests = [rig.ask([[n, n]], "double") for n in range(4)]
        requests[0].has_left = requests[2].has_left = True
        await rig.settled()
        assert model.calls == [2]
        assert [r.outputs["double"] for r in requests[1::2]] == [[2, 2], [6, 6]]
        gone = rig.ask([[1, 1]], "double")
        gone.has_left = True
        await rig.settled()
        assert model.calls == [2]

    run(model, work)


def test_rows_are_split_at_the_limit(place: str) -> None:
    model = Doubler()

    async def work(rig: Rig) -> None:
        sizes = [100, 100, 100, BATCH_ROWS_MAX + 50, 0, 1, BATCH_ROWS_MAX]
        requests = [rig.ask(np.full((rows, 2), n), "double") for n, rows in enumerate(sizes)]
        await rig.settled()
        for n, (rows, request) in enumerate(zip(sizes, requests, strict=True)):
            assert request.outputs["double"] == [2 * n] * (2 * rows)
        assert model.calls == [200, 100, BATCH_ROWS_MAX + 50, 1, BATCH_ROWS_MAX]

    run(model, work)


def test_a_slow_model_moves_to_a_thread_and_the_loop_goes_on() -> None:
    model = Doubler()
    model.delay_s = 0.02

    async def work(rig: Rig) -> None:
        rig.ask([[1, 1]], "double")
        await rig.settled()
        assert model.threads == {threading.get_ident()}
        model.gate = threading.Event()
        slow = rig.ask([[2, 2]], "double")
        await until(lambda: rig.copy.is_computing and len(model.calls) == 2)
        # The thread is stuck; the loop is not. What arrives now is the next batch.
        waiting = [rig.ask([[n, n]], "double") for n in range(3)]
        for _ in range(10):
            await asyncio.sleep(0)
        assert not slow.answers and model.calls == [1, 1]
        model.gate.set()
        await rig.settled()
        assert model.calls == [1, 1, 3] and len(model.threads) >= 2
        assert [r.outputs["double"] for r in (slow, *waiting)] == [[4, 4], [0, 0], [2, 2], [4, 4]]

    run(model, work)


def test_in_a_thread_the_first_batch_is_answered_before_the_last_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "INLINE_MAX_S", -1.0)
    model = Doubler(is_batchable=False)

    async def work(rig: Rig) -> None:
        release = [threading.Event() for _ in range(3)]
        original = model.predict

        def predict(inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
            assert release[len(model.calls)].wait(5)
            return original(inputs, outputs)

        monkeypatch.setattr(model, "predict", predict)
        requests = [rig.ask([[n, n]], "double") for n in range(3)]
        for n in range(3):
            release[n].set()
            await until(lambda n=n: requests[n].answers)
            assert not any(r.answers for r in requests[n + 1 :])
            assert rig.copy.in_flight == 2 - n

    run(model, work)


def test_a_model_that_became_fast_comes_back_to_the_loop() -> None:
    model = Doubler()

    async def work(rig: Rig) -> None:
        rig.copy.mean_s = 0.004
        for _ in range(40):
            rig.ask([[1, 1]], "double")
            await rig.settled()
        assert rig.copy.mean_s < batching.INLINE_MAX_S
        assert threading.get_ident() in model.threads and len(model.threads) > 1

    run(model, work)


def test_on_idle_is_called_when_the_last_answer_is_out(place: str) -> None:
    async def work(rig: Rig) -> None:
        requests = [rig.ask([[n, n]], "double", **({} if n % 2 else {"y": [[1]]})) for n in range(4)]
        seen: list[bool] = []
        rig.copy.on_idle = lambda: seen.append(all(r.answers for r in requests))
        await rig.settled()
        assert seen == [True]

    run(Doubler(), work)


def test_the_end_of_the_workers_leaves_nobody_stuck_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "INLINE_MAX_S", -1.0)

    async def bounded() -> None:
        rig = Rig(Doubler())
        blocker = threading.Event()
        for _ in range(2):
            rig.threads.submit(blocker.wait, 5)
        rig.ask([[1, 1]])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert rig.copy.is_computing
        rig.threads.shutdown(wait=False, cancel_futures=True)
        blocker.set()
        await until(lambda: not rig.copy.is_computing)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(bounded(), 10))


_ASK = st.tuples(
    st.integers(0, 3),  # rows
    st.integers(1, 2),  # columns
    st.sampled_from([0, 1, 5, 13, -1, 99]),  # value: some raise, some cannot be written
    st.booleans(),  # gRPC
    st.booleans(),  # all outputs
    st.booleans(),  # has left
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(_ASK, max_size=8), max_size=4), st.booleans(), st.booleans())
def test_every_caller_gets_what_it_would_get_alone(
    turns: list[list[tuple[int, int, int, bool, bool, bool]]], is_batchable: bool, is_slow: bool
) -> None:
    asked: list[tuple[tuple[int, int, int, bool, bool, bool], FakeRequest]] = []

    async def work(rig: Rig) -> None:
        rig.copy.mean_s = 1.0 if is_slow else 0.0
        for turn in turns:
            for ask in turn:
                rows, columns, value, is_grpc, wants_all, has_left = ask
                x = np.full((rows, columns), value)
                request = rig.ask(x, *(() if wants_all else ("double",)), is_grpc=is_grpc)
                request.has_left = has_left
                asked.append((ask, request))
            await asyncio.sleep(0)

    run(Doubler(is_batchable=is_batchable), work)
    for ask, request in asked:
        if not ask[-1]:
            assert request.answers == [_alone(ask)]


@functools.cache
def _alone(ask: tuple[int, int, int, bool, bool, bool]) -> bytes:
    rows, columns, value, is_grpc, wants_all, _ = ask
    answers: list[bytes] = []

    async def work(rig: Rig) -> None:
        request = rig.ask(np.full((rows, columns), value), *(() if wants_all else ("double",)), is_grpc=is_grpc)
        await rig.settled()
        answers.extend(request.answers)

    run(Doubler(is_batchable=False), work)
    (answer,) = answers
    return answer


def test_encoders_of_copies_name_the_model_without_its_tenant() -> None:
    async def work(rig: Rig) -> None:
        request = rig.ask([[1, 1]], "double", is_grpc=True)
        await rig.settled()
        framed = request.answers[0].split(b"\r\n\r\n", 1)[1].split(b"\r\n", 1)[1]
        size = int.from_bytes(framed[1:5], "big")
        response = oip.MESSAGES.ModelInferResponse.FromString(framed[5 : 5 + size])
        assert (response.model_name, response.model_version) == ("m", "1")

    run(Doubler(), work)
