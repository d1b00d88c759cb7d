"""The event loop in a thread: it runs work, is found out when stuck, and ends."""

from __future__ import annotations

import asyncio
import threading

import pytest

from raymesh.runtimes.loop_thread import LoopThread


def test_a_loop_thread_runs_work_and_ends() -> None:
    thread = LoopThread("test loop")

    async def where() -> tuple[str, str]:
        return threading.current_thread().name, type(asyncio.get_running_loop()).__module__

    async def fail() -> None:
        raise KeyError("x")

    assert thread.run(where(), 5) == ("test loop", "uvloop")
    with pytest.raises(KeyError):
        thread.run(fail(), 5)
    thread.check(5)
    thread.stop()
    assert not thread._thread.is_alive()
    with pytest.raises(RuntimeError, match="does not answer"):
        thread.check(0.01)


def test_a_loop_thread_that_is_stuck_is_found_out() -> None:
    thread = LoopThread("test loop")
    release = threading.Event()

    async def block() -> None:
        release.wait(10)

    async def wait_for_ever() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    cancelled = threading.Event()
    with pytest.raises(TimeoutError):
        thread.run(wait_for_ever(), 0.02)
    assert cancelled.wait(5)
    with pytest.raises(TimeoutError):
        thread.run(block(), 0.02)
    with pytest.raises(RuntimeError, match="does not answer"):
        thread.check(0.02)
    release.set()
    thread.check(5)
    thread.stop()
