"""A task that must not end does not."""

from __future__ import annotations

import asyncio
import logging

import pytest

from raymesh.registry import for_ever as module
from raymesh.registry.for_ever import for_ever


async def test_what_fails_is_logged_and_run_again(monkeypatch, caplog):
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    runs = 0

    async def run() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise ZeroDivisionError

    with caplog.at_level(logging.ERROR):
        await for_ever(run)
    assert runs == 3 and len(caplog.records) == 2


async def test_a_cancelled_one_ends():
    task = asyncio.create_task(for_ever(asyncio.Event().wait))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
