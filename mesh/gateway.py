"""The gateway's shell: three listeners, a presence in the registry, its view, and the front door it keeps true.

Rule of the file: wiring only. What a request means is decided in `cold_path`, `management`, `inference_api` and `rest`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Coroutine, Iterator
from typing import Any

import grpc
import uvicorn

from raymesh.mesh.catalog import Catalog
from raymesh.mesh.cold_path import ColdPath
from raymesh.mesh.config import Settings
from raymesh.mesh.fresh_copies import Placed
from raymesh.mesh.front_door import FrontDoor, FrontDoorError, fds_max
from raymesh.mesh.front_door_config import FrontDoorConfig
from raymesh.mesh.grpc_service import AnyMethod, Services
from raymesh.mesh.health_api import HealthApi
from raymesh.mesh.inference_api import InferenceApi
from raymesh.mesh.management import Management
from raymesh.mesh.mesh_api import MeshApi
from raymesh.mesh.metrics import GatewayMetrics
from raymesh.mesh.model_metadata import ModelMetadata
from raymesh.mesh.model_repository import ModelRepository
from raymesh.mesh.placing import Placing
from raymesh.mesh.reflection_api import ReflectionApi
from raymesh.mesh.repository_api import RepositoryApi
from raymesh.mesh.rest import Rest
from raymesh.mesh.routes_follow import Door, RoutesFollower
from raymesh.mesh.stream_infer import StreamInfer
from raymesh.mesh.vmodel_api import VModelApi
from raymesh.mesh.vmodels import VModels
from raymesh.registry.follow import follow
from raymesh.registry.for_ever import for_ever
from raymesh.registry.keys import Keys
from raymesh.registry.protos import Messages
from raymesh.registry.records import GatewayRecord
from raymesh.registry.session import Session
from raymesh.registry.store import Store
from raymesh.registry.view import Change, MeshView
from raymesh.runtimes.http1 import HttpServer
from raymesh.runtimes.upstream import Upstreams

log = logging.getLogger(__name__)

#: What a data request's body may have on top of a message: the gRPC frame, the JSON head of binary tensors.
BODY_MARGIN_BYTES = 64 * 1024
#: How long a change of a vmodel waits for the front door. A later request that still gets the model of before gets a
#: right answer too, only not the newest.
ROUTES_TIMEOUT_S = 1.0
#: How long calls under way are given when the gateway closes.
CLOSE_GRACE_S = 1.0


class Gateway:
    """One gateway. `host` is where the front door and the runtimes reach it (its listeners take any free port there).

    `door` replaces the HAProxy front door (tests). The store stays the caller's to close.
    """

    def __init__(self, settings: Settings, store: Store, *, host: str = "127.0.0.1", door: Door | None = None) -> None:
        self.id = f"gateway-{secrets.token_hex(4)}"
        self._settings = settings
        self._store = store
        self._host = host
        self.view = MeshView(Keys(settings.mesh))
        self.metrics = GatewayMetrics()
        self._upstreams = Upstreams(settings.internal_token)
        self._door = door or FrontDoor(FrontDoorConfig.from_settings(settings, fds_max=fds_max()), settings.state_dir)
        self._routes = RoutesFollower(self.view, self._door)
        self._catalog = Catalog(store, self.view, self._upstreams)
        self._placing = Placing(self.id, self.view, self._upstreams, self.metrics, on_failed=self._catalog.refresh)
        catalog, placing = self._catalog, self._placing
        self._vmodels = VModels(store, self.view, catalog)
        self._cold = ColdPath(
            settings, catalog, self._vmodels, placing, self._upstreams, self.metrics, self._note_placed
        )
        metadata = ModelMetadata(catalog, placing, self._upstreams, self._note_placed)
        self._management = Management(
            settings, catalog, placing, self.metrics, on_placed=self._note_placed, on_deleted=self._routes.drop
        )
        self._vmodel_api = VModelApi(
            catalog,
            self._vmodels,
            self._management,
            on_deleted=self._routes.drop_vmodel,
            in_force=self._routes_in_force,
        )
        self._mesh_api = MeshApi(settings, catalog, placing, self.metrics)
        self._inference = InferenceApi(settings, catalog, self._vmodels, metadata)
        repository = ModelRepository(catalog, self._vmodels, placing, metadata, self._upstreams, self._note_placed)
        self._repository = RepositoryApi(settings, repository)
        self._streams = StreamInfer(settings, self._cold)
        self._rest = _RestServer(Rest(settings, catalog, placing, metadata, repository, self.metrics).app)
        self._data = HttpServer(self._cold.handle, body_bytes_max=settings.message_bytes_max + BODY_MARGIN_BYTES)
        self._grpc: grpc.aio.Server | None = None
        self._grpc_port = 0
        self._session = Session(store, ttl_s=settings.lease_ttl_s)
        self._tasks: list[asyncio.Task[None]] = []
        self._has_door = False
        metrics = self.metrics
        metrics.models.set_function(lambda: len(self.view.models))
        metrics.instances.set_function(lambda: len(self.view.instances))
        metrics.routes.set_function(lambda: self._routes.routes)

    @property
    def data_address(self) -> str:
        """``host:port`` of the data listener (inference)."""
        return f"{self._host}:{self._data.port}"

    @property
    def grpc_address(self) -> str:
        """``host:port`` of the grpc.aio listener (management, OIP questions)."""
        return f"{self._host}:{self._grpc_port}"

    @property
    def rest_address(self) -> str:
        """``host:port`` of the REST listener."""
        return f"{self._host}:{self._rest.port}"

    async def start(self) -> None:
        """Read the registry, listen, open the front door, appear in the registry.

        Raises `RegistryUnavailable` when the registry is away and `FrontDoorError` when HAProxy does not start; what
        was started is closed again then.
        """
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> None:
        await self._session.start()
        synced = asyncio.Event()
        prefix = self.view.keys.prefix
        self._spawn(for_ever(lambda: follow(self._store, prefix, self.view, self._see, synced=synced)))
        await synced.wait()
        await self._data.start(self._host)
        await self._start_grpc()
        await self._rest.start(self._host)
        await self._door.start()
        self._has_door = True
        self._door.set_gateway(self.data_address, self.grpc_address, self.rest_address)
        self._routes.resync()
        record = GatewayRecord(id=self.id, data_address=self.data_address, node=socket.gethostname())
        await self._session.publish(self.view.keys.gateway(self.id), record.encode())
        log.info("gateway %s: data %s, grpc %s, rest %s", self.id, self._data.port, self._grpc_port, self._rest.port)

    async def close(self) -> None:
        """Leave the registry and stop listening. The front door goes on with what it knows, for the next gateway."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()
        if self._grpc is not None:
            await self._grpc.stop(CLOSE_GRACE_S)
        await self._cold.close()
        await self._placing.close()
        await self._rest.close()
        await self._data.close()
        if self._has_door:
            self._has_door = False
            await self._door.close()
        await self._upstreams.close()

    async def _start_grpc(self) -> None:
        bytes_max = self._settings.message_bytes_max
        self._grpc = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", bytes_max),
                ("grpc.max_send_message_length", bytes_max),
                # The front door keeps connections open and idle.
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.so_reuseport", 0),
            ]
        )
        described = [Messages("raymesh.mesh", name) for name in ("mmesh", "raymesh", "health")]
        reflection = ReflectionApi([Messages("raymesh.runtimes", "oip"), *described])
        methods: dict[str, AnyMethod] = {
            **self._management.methods(),
            **self._vmodel_api.methods(),
            **self._mesh_api.methods(),
            **self._inference.methods(),
            **self._repository.methods(),
            **self._streams.methods(),
            **HealthApi(self._catalog, reflection.services).methods(),
            **reflection.methods(),
        }
        self._grpc.add_generic_rpc_handlers((Services(methods, token=self._settings.internal_token),))
        self._grpc_port = self._grpc.add_insecure_port(f"{self._host}:0")
        await self._grpc.start()

    def _see(self, changes: tuple[Change, ...]) -> None:
        listeners = [self._catalog.see, self._vmodels.see, self._placing.see]
        if self._has_door:
            listeners.append(self._routes.see)
        for see in listeners:
            try:
                see(changes)
            except Exception:
                # A defect in one must not keep the news from the others.
                log.exception("%s failed", see.__qualname__)

    def _note_placed(self, name: str, placed: Placed) -> None:
        """A copy was just loaded: usable, and routed, before the watch tells."""
        self._catalog.fresh.add(name, placed, self.view, asyncio.get_running_loop().time())
        self._routes.add(name, placed.instance)

    async def _routes_in_force(self) -> None:
        """Return when the front door routes as the view says; or soon, if it does not come to that."""
        with contextlib.suppress(TimeoutError, FrontDoorError):
            async with asyncio.timeout(ROUTES_TIMEOUT_S):
                await self._door.flushed()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(_log_failure)
        self._tasks.append(task)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("a task of the gateway ended", exc_info=task.exception())


class _RestServer:
    """uvicorn inside our event loop, on a socket of ours."""

    def __init__(self, app: Any) -> None:
        config = uvicorn.Config(
            app, lifespan="off", log_config=None, access_log=False, http="httptools", ws="none", timeout_keep_alive=75
        )
        self._server = _QuietServer(config)
        self._task: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self, host: str) -> None:
        listener = socket.create_server((host, 0), backlog=1024)
        self.port = listener.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        await self._server.has_started.wait()

    async def close(self) -> None:
        if self._task is not None:
            self._server.should_exit = True
            self._server.force_exit = True
            await asyncio.gather(self._task, return_exceptions=True)


class _QuietServer(uvicorn.Server):
    """uvicorn that says when it listens, and leaves the process's signals alone: they are not its to handle."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_started = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.has_started.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
