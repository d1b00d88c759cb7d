"""What `raymesh up` keeps in its state dir: a lock, secrets, a record of itself, and the processes that belong to it.

Rule of the file: a process is touched only when it is proven ours, never by its name or number alone.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

_log = logging.getLogger(__name__)

#: Set in `up`'s environment and inherited by all it starts; its value is the state dir.
MARK = "RAYMESH_UP_IN"

#: How long a process may take to end after SIGTERM, before SIGKILL.
_TERMINATE_S = 3.0

_PR_SET_CHILD_SUBREAPER = 36


class AlreadyRunning(Exception):
    """Another `raymesh up` holds the state dir. `pid` is its process, 0 if unknown."""

    def __init__(self, path: Path, pid: int) -> None:
        super().__init__(
            f"a mesh is running in {path} already (pid {pid}); stop it with: raymesh down --state-dir {path}"
        )
        self.pid = pid


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeshRecord:
    """``mesh.json``: the running mesh. `created_s` is the process's start time, which tells a reused pid."""

    pid: int
    created_s: float
    port: int
    endpoint: str
    registry: str
    #: ``starting``, ``ready`` or ``stopping``.
    state: str

    @property
    def process(self) -> psutil.Process | None:
        """The process, if it is still that one and alive."""
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.created_s) < 1.0
            return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None


class StateDir:
    """A state dir. `path` must be absolute; `ray_temp_dir` is where Ray keeps the files of this mesh."""

    def __init__(self, path: Path, ray_temp_dir: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self._ray_temp_dir = ray_temp_dir
        self._lock: int | None = None

    def create(self) -> None:
        """Make the folders, for this user only. Raises `OSError`."""
        for folder in (self.path, self.logs, self._ray_temp_dir):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def lock(self) -> None:
        """Claim the state dir until this process ends or `unlock`s. Raises `AlreadyRunning`."""
        # Not inherited by children, so that it ends with this process and not with the last of them.
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(lock, 32, 0)
            os.close(lock)
            raise AlreadyRunning(self.path, int(text) if text.isdigit() else 0) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        self._lock = lock

    def unlock(self) -> None:
        """Let the state dir go."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def secret(self, name: str) -> str:
        """A random secret of 64 hex digits, made once and kept in the file `name` (mode 600)."""
        path = self.path / name
        if path.exists():
            text = path.read_text().strip()
            if text:
                return text
        temporary = path.with_name(f"{name}.new")
        temporary.unlink(missing_ok=True)
        temporary.touch(mode=0o600, exist_ok=False)
        temporary.write_text(secrets.token_hex(32))
        temporary.rename(path)
        return path.read_text()

    def read_record(self) -> MeshRecord | None:
        """The mesh that was started here last and not stopped cleanly, running or not."""
        try:
            return MeshRecord(**json.loads((self.path / "mesh.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write_record(self, record: MeshRecord) -> None:
        """Say which mesh runs here; readers see the old record or the new one."""
        temporary = self.path / "mesh.json.new"
        temporary.write_text(json.dumps(dataclasses.asdict(record)) + "\n")
        temporary.rename(self.path / "mesh.json")

    def forget_record(self) -> None:
        """No mesh runs here."""
        (self.path / "mesh.json").unlink(missing_ok=True)

    def leftovers(self) -> list[psutil.Process]:
        """Processes of a mesh in this state dir. Hold the lock: then none of them belongs to a running mesh."""
        me = psutil.Process()
        mine = {process.pid for process in (me, *me.parents())}
        return [p for p in psutil.process_iter() if p.pid not in mine and self._is_ours(p)]

    def end_leftovers(self, more: Iterable[psutil.Process] = ()) -> list[str]:
        """End the processes in `more` and all `leftovers`; returns ``name (pid)`` of each. Hold the lock."""
        # A psutil process is a pid and a start time: a reused pid is not signalled.
        processes = {p.pid: p for p in (*more, *self.leftovers()) if _is_alive(p)}
        ended = [f"{_name(p)} ({p.pid})" for p in processes.values()]
        for process in processes.values():
            _signal(process, "terminate")
        _wait(processes.values(), _TERMINATE_S)
        for process in processes.values():
            if _is_alive(process):
                _signal(process, "kill")
        _wait(processes.values(), _TERMINATE_S)
        return ended

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.uids().real != os.getuid() or process.status() == psutil.STATUS_ZOMBIE:
                return False
            name = process.name()
            if process.environ().get(MARK) == str(self.path):
                return True
            if name in ("etcd", "haproxy"):
                inside = f"{self.path}/"
                return process.cwd().startswith(inside) or any(inside in word for word in process.cmdline())
            if name.startswith("ray::"):
                # Their titles overwrite the environment; their log files are in our own Ray's folder.
                return any(file.path.startswith(f"{self._ray_temp_dir}/") for file in process.open_files())
        except (psutil.Error, OSError):
            pass
        return False


def become_subreaper() -> None:
    """Be the parent of orphaned descendants (HAProxy leaves its starter, workers lose theirs), so none gets lost."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(own_pids: set[int]) -> None:
    """Collect ended descendants that became our children; `own_pids` are waited for by whoever started them."""
    for process in psutil.Process().children():
        try:
            if process.pid not in own_pids and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.Error, ChildProcessError):
            continue


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return "?"


def _signal(process: psutil.Process, verb: str) -> None:
    try:
        getattr(process, verb)()
    except psutil.Error as error:
        _log.debug("cannot %s %s: %s", verb, process, error)


def _wait(processes: Iterable[psutil.Process], timeout_s: float) -> None:
    # Not `psutil.wait_procs`: a zombie that nobody collects counts as ended here.
    deadline = time.monotonic() + timeout_s
    while any(map(_is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
