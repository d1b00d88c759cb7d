"""The placement controller's shell: a control server, a lease, an election and the registry's view around `Placements`.

Rule of the file: only the leader places; everybody else says so at once, for the caller knows whom to ask next.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Awaitable, Coroutine
from typing import Any

import orjson

from raymesh.mesh.config import Settings
from raymesh.mesh.fresh_copies import Placed
from raymesh.mesh.leadership import Leadership
from raymesh.mesh.orphans import orphans, suspects
from raymesh.mesh.placements import Placements, PlaceRequest
from raymesh.mesh.transitions import Transitions
from raymesh.mesh.vmodel_writes import VModelWrites
from raymesh.registry.follow import follow
from raymesh.registry.for_ever import for_ever
from raymesh.registry.keys import Keys, is_valid_id
from raymesh.registry.session import Session
from raymesh.registry.store import Store
from raymesh.registry.view import Change, InstanceGone, LeaderChanged, MeshView
from raymesh.runtimes.errors import Code, InvalidInput, Reason, RequestError, Unavailable
from raymesh.runtimes.http1 import HttpServer, Request
from raymesh.runtimes.upstream import Upstreams

log = logging.getLogger(__name__)

#: Control requests are small; a larger one is not ours.
CONTROL_BYTES_MAX = 1024 * 1024
#: How long the gateway that unregistered a model has for unloading its copies before the controller steps in.
ORPHAN_GRACE_S = 2.0
UNLOAD_TIMEOUT_S = 10.0


class Controller:
    """One placement controller; several may run, one leads.

    `host` is where other members of the mesh reach this process. The store stays the caller's to close.
    """

    def __init__(self, settings: Settings, store: Store, *, host: str = "127.0.0.1") -> None:
        self.id = f"controller-{secrets.token_hex(4)}"
        self._settings = settings
        self._store = store
        self._host = host
        self._token = settings.internal_token.encode()
        self.view = MeshView(Keys(settings.mesh))
        self._upstreams = Upstreams(settings.internal_token)
        self._placements = Placements(settings, store, self.view, self._upstreams)
        self._transitions = Transitions(
            self.view,
            VModelWrites(store, self.view.keys),
            self._placements.place,
            is_leader=lambda: self.is_leader,
            source=self.id,
        )
        self._server = HttpServer(self._handle, body_bytes_max=CONTROL_BYTES_MAX)
        self._session = Session(
            store, ttl_s=settings.lease_ttl_s, on_epoch=self._renew_leadership, on_dropped=self._lose_key
        )
        self._leadership: Leadership | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        #: Models whose copies may have been orphaned and are to be looked at.
        self._suspects: set[str] = set()
        self._has_suspects = asyncio.Event()

    @property
    def address(self) -> str:
        """``host:port`` of the control server."""
        return f"{self._host}:{self._server.port}"

    @property
    def is_leader(self) -> bool:
        """Whether this controller is the one in charge."""
        return self._leadership is not None and self._leadership.is_leader

    async def start(self) -> None:
        """Listen, join the registry and stand for election.

        Raises `RegistryUnavailable` when the registry is away; what was started is closed again then.
        """
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> None:
        await self._server.start(self._host)
        await self._session.start()
        self._leadership = Leadership(self.id, self.address, self._session, self.view)
        synced = asyncio.Event()
        prefix = self.view.keys.prefix
        self._spawn(for_ever(lambda: follow(self._store, prefix, self.view, self._see, synced=synced)))
        await synced.wait()
        for run in (self._leadership.campaign, self._sweep, self._transitions.run):
            self._spawn(for_ever(run))

    async def close(self) -> None:
        """Step down and stop. Loads that runtimes have begun go on there."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._placements.close()
        await self._session.close()
        await self._server.close()
        await self._upstreams.close()

    # -- the registry ----------------------------------------------------------------------------------------------

    def _see(self, changes: tuple[Change, ...]) -> None:
        self._placements.see(changes)
        self._transitions.see(changes)
        if self._leadership is not None:
            self._leadership.see(changes)
        for change in changes:
            if isinstance(change, InstanceGone) and change.instance not in self.view.instances:
                # Its lease has ended. If it is frozen, a load there would be waited for until its time limit.
                self._upstreams.give_up(change.old.record.address)
        self._suspects |= suspects(changes)
        if any(isinstance(change, LeaderChanged) and change.new is not None for change in changes):
            # A new leader knows nothing of what its predecessor left undone.
            self._suspects.update(name for i in self.view.instances for name in self.view.copies_on(i))
        if self._suspects:
            self._has_suspects.set()

    async def _renew_leadership(self, epoch: int) -> None:
        if self._leadership is not None:
            self._leadership.wake()

    def _lose_key(self, key: str) -> None:
        if self._leadership is not None:
            self._leadership.dropped(key)

    async def _sweep(self) -> None:
        """Unload orphaned copies, some time after they became that."""
        while True:
            await self._has_suspects.wait()
            self._has_suspects.clear()
            names, self._suspects = self._suspects, set()
            await asyncio.sleep(ORPHAN_GRACE_S)
            if not self.is_leader:
                continue
            for name, instance in orphans(self.view, names):
                present = self.view.instances.get(instance)
                if present is None:
                    continue
                tenant, _, model = name.partition("/")
                body = {"tenant": tenant, "id": model}
                try:
                    await self._upstreams.call(
                        present.record.address, "POST", "/control/unload", body, timeout_s=UNLOAD_TIMEOUT_S
                    )
                except RequestError as error:
                    log.warning("orphaned copy of %s on %s stays: %s", name, instance, error.message)
                    self._suspects.add(name)
                    self._has_suspects.set()

    # -- control calls ---------------------------------------------------------------------------------------------

    def _handle(self, request: Request) -> None:
        if not hmac.compare_digest(request.headers.get(b"x-raymesh-token", b""), self._token):
            raise RequestError(Code.PERMISSION_DENIED, "the internal token is missing or wrong", reason=Reason.DENIED)
        match request.method, request.target:
            case b"POST", b"/control/place":
                if not self.is_leader:
                    raise Unavailable("this controller does not lead", reason=Reason.NOT_LEADER, retry_after_s=0.1)
                place, timeout_s = _read_place(request.body)
                self._spawn(self._answer(request, self._placements.place(place), timeout_s))
            case b"GET", b"/control/status":
                request.respond_json({"controller": self.id, "is_leader": self.is_leader})
            case _:
                raise RequestError(Code.NOT_FOUND, "no such control call")

    async def _answer(self, request: Request, placing: Awaitable[Placed], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                placed = await placing
            request.respond_json(placed._asdict())
        except RequestError as error:
            request.respond_error(error)
        except TimeoutError:
            message = f"the model is still being loaded after {timeout_s:g} s"
            request.respond_error(RequestError(Code.DEADLINE_EXCEEDED, message, reason=Reason.DEADLINE))
        except Exception:
            log.exception("placement failed")
            request.respond_error(RequestError(Code.INTERNAL, "internal error"))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` until it ends or the controller closes."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of %s ended", self.id, exc_info=task.exception())


def _read_place(body: bytes) -> tuple[PlaceRequest, float]:
    """The request in a ``/control/place`` body and how many seconds its caller waits. Raises `InvalidInput`."""
    try:
        raw = orjson.loads(body)
        tenant, model = raw["tenant"], raw["id"]
        if not (is_valid_id(tenant) and is_valid_id(model)):
            raise InvalidInput("tenant or id is not a valid id")
        place = PlaceRequest(
            f"{tenant}/{model}",
            str(raw.get("cause_id", "")),
            frozenset(raw.get("exclude", ())),
            frozenset(raw.get("stale", ())),
        )
        return place, float(raw.get("timeout_s", 60.0))
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(f"not a placement request: {error}") from None
