"""An event loop in a thread of its own, for servers that live inside a Ray actor.

Serve runs a replica's own calls on its loops; ours must not wait behind them, and wants uvloop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


class LoopThread:
    """A running uvloop in a daemon thread."""

    def __init__(self, name: str) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run `work` on the loop from another thread and wait for it. Raises `TimeoutError` and cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise

    def check(self, timeout_s: float) -> None:
        """Raises `RuntimeError` unless the loop answers within `timeout_s`."""
        answered = threading.Event()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(answered.set)
        if not answered.wait(timeout_s):
            raise RuntimeError(f"the event loop of {self._thread.name} does not answer")

    def stop(self) -> None:
        """End the loop; what still runs on it is dropped."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(1.0)
