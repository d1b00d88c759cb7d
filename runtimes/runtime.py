"""One runtime process: its data server, its copies, and its presence in the registry, wired together."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from raymesh.registry.follow import follow
from raymesh.registry.for_ever import for_ever
from raymesh.registry.keys import Keys
from raymesh.registry.records import InstanceRecord
from raymesh.registry.session import Session
from raymesh.registry.store import Store
from raymesh.registry.view import Change, MeshView
from raymesh.runtimes.batching import Batcher
from raymesh.runtimes.copy_cache import CopyCache
from raymesh.runtimes.frameworks.base import LoadOptions
from raymesh.runtimes.frameworks.registry import available_types
from raymesh.runtimes.http1 import HttpServer
from raymesh.runtimes.loading import Loader
from raymesh.runtimes.server import DataServer
from raymesh.runtimes.storage.cache import DiskCache
from raymesh.runtimes.upstream import Upstreams

log = logging.getLogger(__name__)

#: How often a runtime looks whether its record has changed enough to be written again.
PUBLISH_PERIOD_S = 1.0
#: Changes smaller than these are not worth a write that everybody watches.
USED_CHANGE_SHARE = 0.01
BUSY_CHANGE = 0.1
LRU_CHANGE_SHARE = 0.25


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    """What one runtime is told at birth. `instance` is an id never used before; sizes are bytes."""

    instance: str
    mesh: str
    pool: str
    token: str
    disk_cache_dir: Path
    host: str = "127.0.0.1"
    node: str = ""
    lease_ttl_s: int = 5
    load_timeout_s: float = 90.0
    load_slots: int = 2
    message_bytes_max: int = 64 * 1024 * 1024
    disk_cache_bytes: int = 10 * 1024**3
    trust_pickle: bool = False


class Runtime:
    """Holds copies in `cache`'s room and answers with them. Start and close it on one event loop."""

    def __init__(self, options: RuntimeOptions, store: Store, cache: CopyCache) -> None:
        self._options = options
        self._store = store
        self._cache = cache
        self._keys = Keys(options.mesh)
        self._view = MeshView(self._keys)
        self._upstreams = Upstreams(options.token)
        self._session = Session(store, ttl_s=options.lease_ttl_s, on_epoch=self._on_epoch, on_dropped=self._on_dropped)
        self._loader = Loader(
            instance=options.instance,
            cache=cache,
            disk=DiskCache(options.disk_cache_dir, options.disk_cache_bytes),
            session=self._session,
            keys=self._keys,
            options=LoadOptions(threads=1, trust_pickle=options.trust_pickle),
            load_timeout_s=options.load_timeout_s,
            load_slots=options.load_slots,
        )
        self._workers = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="infer")
        self._address = ""
        self._record: InstanceRecord | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self._busy_mark = (time.monotonic(), time.process_time())
        self._server: HttpServer | None = None
        self._handler: DataServer | None = None
        self._process = psutil.Process()

    @property
    def address(self) -> str:
        """``host:port`` of the data server; empty before `start`."""
        return self._address

    @property
    def loader(self) -> Loader:
        """The runtime's copies and how they come and go."""
        return self._loader

    async def start(self, deadline_s: float = 10.0) -> None:
        """Listen, get a lease, and appear in the registry. Raises `RegistryUnavailable` after `deadline_s`."""
        loader, options = self._loader, self._options
        batcher = Batcher(self._workers, lambda name: self._cache.touch(name, loader.now_ms()))
        handler = DataServer(
            loader,
            batcher,
            self._upstreams,
            token=options.token,
            message_bytes_max=options.message_bytes_max,
            gateway=self._gateway,
            status=self.status,
        )
        self._handler = handler
        self._server = HttpServer(handler.handle, body_bytes_max=options.message_bytes_max + 64 * 1024)
        try:
            port = await self._server.start(options.host)
            self._address = f"{options.host}:{port}"
            await self._session.start(deadline_s)  # publishes the record, by `_on_epoch`
        except BaseException:
            await self.close()
            raise
        self._tasks = [
            asyncio.create_task(for_ever(self._keep_published), name="publish instance"),
            asyncio.create_task(
                for_ever(lambda: follow(self._store, self._keys.gateways, self._view, _ignore)), name="follow gateways"
            ),
        ]
        log.info("runtime %s serves on %s", options.instance, self._address)

    async def close(self) -> None:
        """Leave the registry and stop answering."""
        self._loader.is_draining = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()
        if self._server is not None:
            await self._server.close()
        if self._handler is not None:
            await self._handler.close()
        await self._loader.close()
        await self._upstreams.close()
        self._workers.shutdown(wait=False, cancel_futures=True)

    def status(self) -> dict[str, Any]:
        """The runtime in numbers, for ``GET /control/status``."""
        loader, cache = self._loader, self._cache
        counters = dataclasses.asdict(loader.counters)
        requests_before = counters.pop("requests_before")
        return {
            "instance": self._options.instance,
            "epoch": self._session.epoch,
            "is_fenced": self._session.is_fenced,
            "pool": self._options.pool,
            "pid": os.getpid(),
            "address": self._address,
            "capacity_bytes": cache.capacity_bytes,
            "used_bytes": cache.used_bytes,
            "copies": len(loader.copies),
            "requests": requests_before + sum(c.requests for c in loader.copies.values()),
            "rss_bytes": self._process.memory_info().rss,
            "lru_age_ms": cache.lru_age_ms(loader.now_ms()),
            **counters,
        }

    # -- presence ----------------------------------------------------------------------------------------------------

    def _gateway(self) -> str:
        """Where stale routes go: the gateway of this node, else any."""
        gateways = sorted(
            self._view.gateways.values(), key=lambda e: (e.record.node != self._options.node, e.record.id)
        )
        return gateways[0].record.data_address if gateways else ""

    def _measure(self) -> InstanceRecord:
        now, cpu = time.monotonic(), time.process_time()
        then, cpu_then = self._busy_mark
        self._busy_mark = (now, cpu)
        options, cache, loader = self._options, self._cache, self._loader
        return InstanceRecord(
            id=options.instance,
            address=self._address,
            pool=options.pool,
            epoch=self._session.epoch,
            node=options.node,
            capacity_bytes=cache.capacity_bytes,
            used_bytes=cache.used_bytes,
            load_slots=options.load_slots,
            loads_in_progress=loader.loads_in_progress,
            copies=len(loader.copies),
            lru_age_ms=cache.lru_age_ms(loader.now_ms()),
            busy=round(min(1.0, (cpu - cpu_then) / max(now - then, 1e-3)), 2),
            draining=loader.is_draining,
            types=available_types(),
        )

    def _publish(self, *, force: bool = False) -> None:
        record = self._measure()
        if force or self._record is None or _differs(self._record, record):
            self._record = record
            self._session.publish(self._keys.instance(record.id), record.encode())

    async def _keep_published(self) -> None:
        while True:
            await asyncio.sleep(PUBLISH_PERIOD_S)
            self._publish()

    async def _on_epoch(self, epoch: int) -> None:
        log.info("runtime %s has epoch %d", self._options.instance, epoch)
        if self._address:
            self._publish(force=True)

    def _on_dropped(self, key: str) -> None:
        """The registry refused a copy's key after a new lease: its model was unregistered or replaced meanwhile."""
        if key.startswith(self._keys.copies):
            name = self._keys.read_copy(key).name
            self._loader.unload_soon(name)


def _ignore(_: tuple[Change, ...]) -> None:
    """The view is all that is wanted."""


def _differs(old: InstanceRecord, new: InstanceRecord) -> bool:
    """Whether the new measurement says enough that is new to be written."""
    if (
        dataclasses.replace(
            old,
            used_bytes=new.used_bytes,
            copies=new.copies,
            lru_age_ms=new.lru_age_ms,
            busy=new.busy,
            loads_in_progress=new.loads_in_progress,
        )
        != new
    ):
        return True
    share = new.capacity_bytes * USED_CHANGE_SHARE
    return (
        abs(old.used_bytes - new.used_bytes) > share
        or (old.copies == 0) != (new.copies == 0)
        or abs(old.busy - new.busy) >= BUSY_CHANGE
        or abs(old.lru_age_ms - new.lru_age_ms) > max(1000.0, old.lru_age_ms * LRU_CHANGE_SHARE)
        or (old.loads_in_progress >= old.load_slots) != (new.loads_in_progress >= new.load_slots)
    )
