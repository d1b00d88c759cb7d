"""A runtime as a Ray Serve replica: one process per core or device, many models in it.

Serve starts it, watches its health and replaces it; no request and no load goes through Serve (ARCHITECTURE section 1).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

# Before any framework is imported: one compute thread a call, the runtime has one process per core.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

from raymesh.registry.etcd import EtcdStore
from raymesh.runtimes.copy_cache import CopyCache
from raymesh.runtimes.loop_thread import LoopThread
from raymesh.runtimes.runtime import Runtime, RuntimeOptions

log = logging.getLogger(__name__)

#: Longest a new replica waits for the registry before Serve is told that it did not start.
START_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 5.0
HEALTH_TIMEOUT_S = 5.0


class Part(Protocol):
    """What lives in a replica, started already."""

    async def close(self) -> None:
        """Leave the registry and stop answering."""
        ...


class LoopReplica:
    """A part of the mesh as a Serve replica: an event loop in a thread of its own, and Serve's hooks around it."""

    def _begin(self, name: str, start: Coroutine[Any, Any, Part]) -> None:
        """Start the loop and, on it, the part. Raises what `start` raises, and Serve tries another process."""
        self._thread = LoopThread(name)
        self._part = self._thread.run(start, START_TIMEOUT_S)

    def check_health(self) -> None:
        """Called by Serve; raises when the part does not answer, and Serve replaces the process."""
        self._thread.check(HEALTH_TIMEOUT_S)

    def __del__(self) -> None:
        # Serve's word for "stop now, gracefully".
        with contextlib.suppress(Exception):
            self._thread.run(self._part.close(), CLOSE_TIMEOUT_S)
            self._thread.stop()


class RuntimeReplica(LoopReplica):
    """The Serve deployment class of a pool.

    `options` without an instance id (each replica makes its own), `registry` is the store's URL, `make_cache` gives
    the cache with this runtime's share of the pool's memory.
    """

    def __init__(self, options: RuntimeOptions, registry: str, make_cache: Callable[[], CopyCache]) -> None:
        instance = f"{options.pool}-{uuid.uuid4().hex[:12]}"
        # The host's name, as in the gateways' records: a stale route goes to a gateway of its own node first.
        options = dataclasses.replace(options, instance=instance, node=socket.gethostname())
        self._begin(instance, self._start(options, registry, make_cache))

    @staticmethod
    async def _start(options: RuntimeOptions, registry: str, make_cache: Callable[[], CopyCache]) -> Runtime:
        runtime = Runtime(options, EtcdStore.from_url(registry), make_cache())
        await runtime.start(START_TIMEOUT_S)
        return runtime
