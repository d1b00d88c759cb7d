"""`raymesh up` and `raymesh down`: one process that starts a mesh, watches over it and takes it down again.

Rule of the file: whatever is started here is ended here, in reverse order, each step with a deadline of its own.
Ray starts inside this process, with light settings; the kernel ends Ray's daemons and etcd when this process is killed,
Ray ends its workers when its daemons are gone, and the next `up` or `down` ends what is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

from raymesh.mesh import launch_ray
from raymesh.mesh.config import Settings
from raymesh.mesh.launch_background import Down, detach, down
from raymesh.mesh.launch_checks import ExitCode, LaunchError, check_port, check_registry, is_ready
from raymesh.mesh.state_dir import MARK, AlreadyRunning, MeshRecord, StateDir, become_subreaper, reap_orphans

if TYPE_CHECKING:
    from raymesh.registry.embedded import EmbeddedEtcd

__all__ = ["APP", "Down", "ExitCode", "LaunchError", "Launcher", "check_port", "check_registry", "detach", "down"]

_log = logging.getLogger(__name__)

APP = "raymesh.mesh.app:build"
APP_NAME = "raymesh"

#: How long the front door may take to answer after Ray was started. On a busy small machine it takes 20 s.
READY_TIMEOUT_S = 120.0
#: Serve asks its replicas to leave in order, which takes seconds; after this they are killed.
SERVE_STOP_TIMEOUT_S = 20.0
RAY_STOP_TIMEOUT_S = 15.0


class _Interrupted(BaseException):
    """A signal asked us to stop. Not an `Exception`, so that nothing on the way takes it for a failure."""


class Launcher:
    """One mesh, from its start to its end, in this process's main thread.

    `is_embedded` starts an etcd of its own and ignores ``settings.registry``. `app` names the function that makes the
    Serve application from the settings, ``module:function``.
    """

    def __init__(self, settings: Settings, *, is_embedded: bool = True, app: str = APP) -> None:
        self._settings = settings.resolved()
        self._is_embedded = is_embedded
        self._app = app
        self._state = StateDir(self._settings.state_dir, self._settings.ray_temp_dir)
        self._etcd: EmbeddedEtcd | None = None
        self._is_interrupted = False
        #: Children this process had before; they are none of our business.
        self._earlier = {process.pid for process in psutil.Process().children(recursive=True)}

    def run(self, on_ready: Callable[[MeshRecord], None]) -> bool:
        """Start the mesh, call `on_ready` once its front door answers, and stay until SIGINT or SIGTERM.

        Leaves no process behind, however it ends. False if a signal came before it was ready. Raises `LaunchError`.
        """
        was_ready = False
        with contextlib.ExitStack() as stack:
            stack.callback(self._restore_signals({n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}))
            self._catch_signals()
            try:
                self._claim(stack)
                self._start_registry(stack)
                self._start_ray(stack)
                self._start_serve(stack)
                on_ready(self._record("ready"))
                was_ready = True
                self._watch_over()
            except (_Interrupted, KeyboardInterrupt):
                pass
            except SystemExit:
                # Ray's own handler of SIGTERM, which is in place while Ray starts.
                if not self._is_interrupted:
                    _log.debug("ended while Ray was starting")
            finally:
                self._ignore_signals()
                if self._state.read_record() is not None:
                    self._record("stopping")
        return was_ready

    # ---- starting ---------------------------------------------------------------------------------------------------

    def _claim(self, stack: contextlib.ExitStack) -> None:
        """Take the state dir, clean up after a mesh that crashed in it, and see that the port is free."""
        try:
            self._settings.validate()
            self._state.create()
            self._state.lock()
        except AlreadyRunning as error:
            raise LaunchError(ExitCode.ALREADY_RUNNING, str(error)) from None
        except (ValueError, OSError) as error:
            raise LaunchError(ExitCode.USAGE, str(error)) from None
        stack.callback(self._state.unlock)
        os.environ[MARK] = str(self._settings.state_dir)
        stack.callback(os.environ.pop, MARK, None)
        ended = self._state.end_leftovers()
        if ended:
            _log.warning("ended what a previous mesh left behind: %s", ", ".join(ended))
        self._state.forget_record()
        check_port(self._settings.host, self._settings.port)
        become_subreaper()
        self._record("starting")
        stack.callback(self._state.forget_record)
        stack.callback(self._end_descendants)

    def _start_registry(self, stack: contextlib.ExitStack) -> None:
        from raymesh.registry.embedded import EmbeddedEtcd, EmbeddedEtcdError

        if not self._is_embedded:
            check_registry(self._settings.registry)
            return
        etcd = EmbeddedEtcd(self._settings.state_dir / "etcd")
        stack.callback(etcd.stop)
        try:
            etcd.start()
        except EmbeddedEtcdError as error:
            raise LaunchError(ExitCode.UNREACHABLE, str(error)) from None
        self._etcd = etcd
        self._settings = dataclasses.replace(self._settings, registry=etcd.url)

    def _start_ray(self, stack: contextlib.ExitStack) -> None:
        temp_dir = self._settings.ray_temp_dir
        launch_ray.remove_old_sessions(temp_dir)
        launch_ray.prepare_environment(self._state, self._settings)
        import ray

        launch_ray.quieten()
        stack.callback(self._stop_ray)
        runtimes = self._settings.runtimes or os.cpu_count() or 1
        try:
            ray.init(
                address="local",
                # A slot per runtime, and some for what a user's own deployments may add on this machine.
                num_cpus=max(os.cpu_count() or 1, runtimes),
                include_dashboard=False,
                object_store_memory=launch_ray.OBJECT_STORE_BYTES,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=str(temp_dir),
            )
        except Exception as error:
            raise LaunchError(ExitCode.NOT_READY, f"Ray did not start: {error} (logs: {self._ray_logs})") from error
        finally:
            # `ray.init` puts its own in place.
            self._catch_signals()

    def _start_serve(self, stack: contextlib.ExitStack) -> None:
        from ray import serve
        from ray.serve.api import RunTarget

        if not _log.isEnabledFor(logging.DEBUG):
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
        module, _, function = self._app.partition(":")
        token = self._settings.internal_token or self._state.secret("internal-token")
        settings = dataclasses.replace(self._settings, internal_token=token)
        deadline = time.monotonic() + READY_TIMEOUT_S
        stack.callback(self._stop_serve)
        try:
            application = getattr(importlib.import_module(module), function)(settings)
            serve.start(proxy_location="Disabled")
            serve.run_many(
                [RunTarget(application, name=APP_NAME, route_prefix=None)], wait_for_applications_running=False
            )
        except Exception as error:
            raise LaunchError(ExitCode.NOT_READY, f"the mesh did not start: {error} ({self._ray_logs})") from error
        while not is_ready(self._settings.endpoint):
            self._raise_if_interrupted()
            status = serve.status().applications.get(APP_NAME)
            if status is not None and status.status == "DEPLOY_FAILED":
                raise LaunchError(
                    ExitCode.NOT_READY, f"the mesh did not start: {launch_ray.failure(status)} (logs: {self._ray_logs})"
                )
            if time.monotonic() > deadline:
                raise LaunchError(
                    ExitCode.NOT_READY,
                    f"the front door at {self._settings.endpoint} was not ready within {READY_TIMEOUT_S:.0f} s"
                    f" (logs: {self._ray_logs})",
                )
            time.sleep(0.1)

    @property
    def _ray_logs(self) -> Path:
        return self._settings.ray_temp_dir / "session_latest" / "logs"

    def _record(self, state: str) -> MeshRecord:
        record = MeshRecord(
            pid=os.getpid(),
            created_s=psutil.Process().create_time(),
            port=self._settings.port,
            endpoint=f"http://{self._settings.endpoint}",
            registry=self._settings.registry,
            state=state,
        )
        self._state.write_record(record)
        return record

    # ---- running ----------------------------------------------------------------------------------------------------

    def _watch_over(self) -> None:
        own_pids = {process.pid for process in psutil.Process().children()}
        while True:
            self._raise_if_interrupted()
            time.sleep(0.5)
            if self._etcd is not None and self._etcd.pid == 0:
                self._restart_etcd(self._etcd)
                own_pids.add(self._etcd.pid)
            reap_orphans(own_pids)

    def _restart_etcd(self, etcd: EmbeddedEtcd) -> None:
        # Its data is on disk and the mesh works on without it, so this is no reason to end; but it must be on the port
        # everyone knows.
        from raymesh.registry.embedded import EmbeddedEtcdError

        _log.warning("the embedded etcd ended; starting it again")
        try:
            etcd.start()
        except EmbeddedEtcdError as error:
            _log.error("%s", error)
            return
        if etcd.url != self._settings.registry:
            _log.error("etcd had to move from %s to %s; restart the mesh", self._settings.registry, etcd.url)

    def _catch_signals(self) -> None:
        def interrupt(_number: int, _frame: object) -> NoReturn:
            # Raising ends a wait at once; the flag is for exceptions that a callback of a library swallowed.
            self._is_interrupted = True
            raise _Interrupted

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)

    def _ignore_signals(self) -> None:
        # Stopping has deadlines of its own; cutting it short would leave processes behind.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _restore_signals(self, before: dict[signal.Signals, Any]) -> Callable[[], None]:
        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        return restore

    def _raise_if_interrupted(self) -> None:
        if self._is_interrupted:
            raise _Interrupted

    # ---- stopping ---------------------------------------------------------------------------------------------------

    def _stop_serve(self) -> None:
        from ray import serve

        def stop() -> None:
            with contextlib.suppress(Exception):
                serve.shutdown()  # type: ignore[no-untyped-call]

        thread = threading.Thread(target=stop, name="serve-shutdown", daemon=True)
        thread.start()
        thread.join(SERVE_STOP_TIMEOUT_S)
        if thread.is_alive():
            _log.warning("Serve did not stop within %.0f s; killing it", SERVE_STOP_TIMEOUT_S)

    def _stop_ray(self) -> None:
        import ray

        # A hanging `ray.shutdown` waits for its daemons: it goes on once they are gone.
        watchdog = threading.Timer(RAY_STOP_TIMEOUT_S, self._kill_children)
        watchdog.daemon = True
        watchdog.start()
        try:
            ray.shutdown()
        except Exception as error:
            _log.warning("while stopping Ray: %s", error)
        finally:
            watchdog.cancel()

    def _kill_children(self) -> None:
        etcd_pid = self._etcd.pid if self._etcd is not None else 0
        for process in self._descendants():
            with contextlib.suppress(psutil.Error):
                if process.pid != etcd_pid:
                    process.kill()

    def _descendants(self) -> list[psutil.Process]:
        return [p for p in psutil.Process().children(recursive=True) if p.pid not in self._earlier]

    def _end_descendants(self) -> None:
        """End what survived the orderly ways, HAProxy first of all: it is made to survive whoever started it."""
        ended = self._state.end_leftovers(self._descendants())
        _log.debug("ended at last: %s", ended)
        reap_orphans(self._earlier)
