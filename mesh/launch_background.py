"""A mesh in the background: `detach` starts one, `down` stops one.

Rule of the file: no Ray here; both are about a process and its state dir, and both tell the truth about how it ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from raymesh.mesh.config import Settings
from raymesh.mesh.launch_checks import ExitCode, LaunchError
from raymesh.mesh.state_dir import AlreadyRunning, MeshRecord, StateDir

_log = logging.getLogger(__name__)

#: The whole of a stop: Serve, Ray, HAProxy, etcd and what is left, each at its own limit.
DOWN_TIMEOUT_S = 60.0


def detach(arguments: list[str], state_dir: Path) -> MeshRecord:
    """Run ``raymesh up`` with `arguments` in the background, its log in the state dir, and wait until it is ready.

    Raises `LaunchError` with the end of the log when it fails.
    """
    state_dir = Path(os.path.abspath(state_dir))  # noqa: PTH100
    log_file = state_dir / "logs" / "up.log"
    state = StateDir(state_dir, state_dir / "ray")
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The child takes the lock itself; this only spares a running mesh its log file.
        state.lock()
        state.unlock()
        if log_file.exists():
            log_file.replace(log_file.with_suffix(".log.1"))
        log = log_file.open("wb")
    except AlreadyRunning as error:
        raise LaunchError(ExitCode.ALREADY_RUNNING, str(error)) from None
    except OSError as error:
        raise LaunchError(ExitCode.USAGE, f"state dir {state_dir}: {error}") from None
    with log:
        # -P: the current folder is not the place to import from.
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "raymesh.mesh.cli", "up", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        while child.poll() is None:
            record = state.read_record()
            if record is not None and record.pid == child.pid and record.state == "ready":
                # It outlives us and is collected by whoever adopts it; Popen would warn that we did not wait.
                child.returncode = 0
                return record
            time.sleep(0.05)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    lines = [line.removeprefix("raymesh: ") for line in log_file.read_text(errors="replace").splitlines()[-20:]]
    codes = {int(code) for code in ExitCode}
    exit_code = ExitCode(child.returncode) if child.returncode in codes - {0} else ExitCode.NOT_READY
    raise LaunchError(exit_code, "\n".join(lines or [f"it ended with {child.returncode}"]) + f"\n(log: {log_file})")


@dataclasses.dataclass(frozen=True, slots=True)
class Down:
    """What `down` did. `pid` of the mesh that was stopped (0: none ran), and what else had to be ended."""

    pid: int
    leftovers: tuple[str, ...]


def down(settings: Settings, timeout_s: float = DOWN_TIMEOUT_S) -> Down:
    """Stop the mesh of ``settings.state_dir`` and wait until it is gone; no mesh there is no error.

    Raises `LaunchError` if something does not end.
    """
    settings = settings.resolved()
    state = StateDir(settings.state_dir, settings.ray_temp_dir)
    if not settings.state_dir.is_dir():
        return Down(0, ())
    record = state.read_record()
    process = record.process if record is not None else None
    pid = 0
    if process is not None:
        pid = int(process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
        if not _is_gone_within(record, timeout_s):
            _log.warning("pid %d did not stop within %.0f s; killing it", pid, timeout_s)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
            _is_gone_within(record, 5.0)
    try:
        state.lock()
    except AlreadyRunning as error:
        raise LaunchError(ExitCode.REFUSED, f"pid {error.pid} still holds {settings.state_dir}") from None
    try:
        leftovers = state.end_leftovers()
        state.forget_record()
    finally:
        state.unlock()
    return Down(pid, tuple(leftovers))


def _is_gone_within(record: MeshRecord | None, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while record is not None and record.process is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
