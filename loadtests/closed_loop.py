"""A cheap HTTP/1.1 load generator in Python: N connections, each sends its next request when the last is answered.

It exists to drive two servers in the same way. It costs about 30 µs of CPU a request, so it flatters neither.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_END_OF_HEAD = b"\r\n\r\n"


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """One request as bytes, and whether an answer's body is right (it is asked of every answer)."""

    request: bytes
    is_right: Callable[[bytes], bool]


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a run gave. Latencies are milliseconds, one for each right answer."""

    seconds: float
    latencies_ms: npt.NDArray[np.float64]
    errors: int
    wrong: int
    first_error: str

    @property
    def requests_per_s(self) -> float:
        """Right answers a second."""
        return len(self.latencies_ms) / self.seconds


class _Caller(asyncio.Protocol):
    """One connection. Answers must have a content-length: both servers measured here send it."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._received = b""
        self._question: Question | None = None
        self._sent_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._question = self._run.next_question()
        if self._question is None:
            self._transport.close()
            return
        self._sent_s = time.perf_counter()
        self._transport.write(self._question.request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(_END_OF_HEAD)
        if end < 0:
            return
        head = self._received[:end]
        length = _LENGTH.search(head)
        if length is None:
            self._run.abort(f"an answer without content-length: {head[:200]!r}")
            self._transport.close()
            return
        begin = end + len(_END_OF_HEAD)
        if len(self._received) < begin + int(length[1]):
            return
        body = self._received[begin:]
        self._received = b""
        assert self._question is not None
        self._run.answered(self._question, head, body, (time.perf_counter() - self._sent_s) * 1e3)
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.connection_lost(self._question is not None)


class _Run:
    """All the connections of one run."""

    def __init__(self, questions: Callable[[], Question | None], connections: int) -> None:
        self._questions = questions
        self._open = connections
        self.is_aborted = False
        self.is_done = asyncio.get_running_loop().create_future()
        self.latencies_ms: list[float] = []
        self.errors = 0
        self.wrong = 0
        self.first_error = ""

    def next_question(self) -> Question | None:
        return None if self.is_aborted else self._questions()

    def answered(self, question: Question, head: bytes, body: bytes, latency_ms: float) -> None:
        if head[9:12] != b"200":
            self.errors += 1
            self.first_error = self.first_error or f"{head[:40]!r} {body[:200]!r}"
        elif not question.is_right(body):
            self.wrong += 1
        else:
            self.latencies_ms.append(latency_ms)

    def abort(self, text: str) -> None:
        self.is_aborted = True
        self.errors += 1
        self.first_error = self.first_error or text

    def connection_lost(self, is_unanswered: bool) -> None:
        if is_unanswered and not self.is_aborted:
            self.abort("the server closed a connection before it had answered")
        self._open -= 1
        if not self._open and not self.is_done.done():
            self.is_done.set_result(None)


async def drive(host: str, port: int, questions: Callable[[], Question | None], *, connections: int) -> Outcome:
    """Asks until `questions` gives None, over `connections` connections."""
    loop = asyncio.get_running_loop()
    run = _Run(questions, connections)
    begin_s = time.perf_counter()
    for _ in range(connections):
        await loop.create_connection(lambda: _Caller(run), host, port)
    await run.is_done
    seconds = time.perf_counter() - begin_s
    return Outcome(seconds, np.array(run.latencies_ms), run.errors, run.wrong, run.first_error)


def until(seconds: float, draw: Callable[[], Question]) -> Callable[[], Question | None]:
    """Questions from `draw` for so many seconds, counted from the first."""
    end_s = 0.0

    def next_question() -> Question | None:
        nonlocal end_s
        now_s = time.perf_counter()
        end_s = end_s or now_s + seconds
        return draw() if now_s < end_s else None

    return next_question


def each_once(questions: Iterable[Question]) -> Callable[[], Question | None]:
    """Every question once, in order."""
    waiting = iter(questions)
    return lambda: next(waiting, None)
