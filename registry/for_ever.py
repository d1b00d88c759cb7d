"""Keeps a task that must never end running.

Rule of the file: a defect costs a log entry and a second, not the part that has it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

#: Between a failure and the next try: a defect that stays must not keep the loop busy.
PAUSE_S = 1.0


async def for_ever(run: Callable[[], Awaitable[None]]) -> None:
    """Await `run()`, again whenever it raises (cancel to end). Returns if it returns."""
    while True:
        try:
            await run()
            return
        except Exception:
            log.exception("%s stumbled", getattr(run, "__qualname__", run))
            await asyncio.sleep(PAUSE_S)
