"""The launcher: its checks and its state dir alone, then whole, with real Ray and etcd and a stand-in application."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from raymesh.mesh.config import Settings
from raymesh.mesh.launch import ExitCode, LaunchError, check_port, check_registry, down
from raymesh.mesh.launch_checks import is_ready
from raymesh.mesh.state_dir import MARK, AlreadyRunning, MeshRecord, StateDir


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(is_done: Callable[[], Any], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_done():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)


# ---- checks -----------------------------------------------------------------------------------------------------


def test_a_taken_port_is_named_with_its_owner() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"port {port} on 127.0.0.1 is taken by .*pid {os.getpid()}") as caught:
            check_port("127.0.0.1", port)
    assert caught.value.exit_code is ExitCode.PORT_TAKEN
    check_port("127.0.0.1", port)


def test_an_address_that_is_not_ours_is_wrong_usage() -> None:
    with pytest.raises(LaunchError, match=r"192\.0\.2\.1") as caught:  # TEST-NET-1
        check_port("192.0.2.1", free_port())
    assert caught.value.exit_code is ExitCode.USAGE


def test_a_registry_that_refuses_or_stays_silent_is_said_in_time() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for port in (free_port(), silent.getsockname()[1]):
            started = time.monotonic()
            with pytest.raises(LaunchError, match=f"127.0.0.1:{port}") as caught:
                check_registry(f"etcd://user:secret@127.0.0.1:{port}")
            assert caught.value.exit_code is ExitCode.UNREACHABLE
            assert "secret" not in str(caught.value)
            assert time.monotonic() - started < 10


def test_a_registry_url_that_is_none() -> None:
    with pytest.raises(LaunchError) as caught:
        check_registry("etcd://")
    assert caught.value.exit_code is ExitCode.USAGE


def test_nobody_listening_is_not_ready() -> None:
    assert is_ready(f"127.0.0.1:{free_port()}") is False


# ---- the state dir ----------------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateDir]:
    state = StateDir(tmp_path / "state", tmp_path / "ray")
    state.create()
    yield state
    state.unlock()


def test_one_mesh_per_state_dir(state: StateDir, tmp_path: Path) -> None:
    state.lock()
    other = StateDir(state.path, tmp_path / "ray")
    with pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}") as caught:
        other.lock()
    assert caught.value.pid == os.getpid()
    state.unlock()
    other.lock()
    other.unlock()


def test_a_secret_is_made_once_and_private(state: StateDir) -> None:
    secret = state.secret("token")
    assert len(secret) == 64
    assert state.secret("token") == secret != state.secret("other")
    assert stat.S_IMODE((state.path / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700


def test_a_record_tells_a_reused_pid(state: StateDir) -> None:
    me = psutil.Process()
    record = MeshRecord(
        pid=me.pid, created_s=me.create_time(), port=1, endpoint="http://h:1", registry="etcd://h:2", state="ready"
    )
    state.write_record(record)
    assert state.read_record() == record
    assert record.process == me
    before_us = MeshRecord(**json.loads((state.path / "mesh.json").read_text()) | {"created_s": me.create_time() - 9})
    assert before_us.process is None
    (state.path / "mesh.json").write_text("{broken")
    assert state.read_record() is None
    state.forget_record()


def test_only_proven_leftovers_are_ended(state: StateDir) -> None:
    command = ["sleep", "600"]
    ours = subprocess.Popen(command, env=os.environ | {MARK: str(state.path)}, start_new_session=True)
    neighbours = subprocess.Popen(command, env=os.environ | {MARK: str(state.path) + "2"}, start_new_session=True)
    try:
        state.lock()
        wait_until(lambda: len(state.leftovers()) == 1, 5, "the leftover seen")
        assert state.end_leftovers() == [f"sleep ({ours.pid})"]
        assert ours.wait(5) == -signal.SIGTERM
        assert neighbours.poll() is None
        assert state.end_leftovers() == []
    finally:
        for process in (ours, neighbours):
            process.kill()
            process.wait()


def test_a_leftover_that_ignores_sigterm_is_killed(state: StateDir) -> None:
    code = "import signal, sys, time\nsignal.signal(15, signal.SIG_IGN)\nprint('on', flush=True)\ntime.sleep(600)"
    stubborn = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {MARK: str(state.path)}, stdout=subprocess.PIPE
    )
    try:
        assert stubborn.stdout is not None
        with stubborn.stdout:
            assert stubborn.stdout.readline() == b"on\n"
        assert len(state.end_leftovers()) == 1
        assert stubborn.wait(5) == -signal.SIGKILL
    finally:
        stubborn.kill()
        stubborn.wait()


def test_down_without_a_mesh_ends_what_a_crash_left(state: StateDir) -> None:
    left = subprocess.Popen(["sleep", "600"], env=os.environ | {MARK: str(state.path)})
    try:
        done = down(Settings(state_dir=state.path))
        assert (done.pid, done.leftovers) == (0, (f"sleep ({left.pid})",))
    finally:
        left.kill()
        left.wait()


# ---- the whole --------------------------------------------------------------------------------------------------

# Answers like a front door, and starts a process that leaves it, as HAProxy does.
_STAND_IN = """
import http.server, subprocess, threading
from ray import serve

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass

class Front:
    def __init__(self, settings):
        subprocess.run(["sh", "-c", "setsid sleep 600 </dev/null >/dev/null 2>&1 &"], check=True)
        self.server = http.server.ThreadingHTTPServer((settings.host, settings.port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

class Broken:
    def __init__(self):
        raise RuntimeError("no such luck")

def build(settings):
    assert len(settings.internal_token) == 64
    assert settings.registry.startswith("etcd://127.0.0.1:")
    return serve.deployment(Front, ray_actor_options={"num_cpus": 0}).bind(settings)

def broken(settings):
    return serve.deployment(Broken, ray_actor_options={"num_cpus": 0}).bind()
"""


class Place:
    """A state dir, a home and a port of its own, and the command line in them."""

    def __init__(self, path: Path) -> None:
        self.state_dir = path / "state"
        self.home = path / "home"
        self.home.mkdir()
        (path / "stand_in.py").write_text(_STAND_IN)
        self.port = free_port()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RAYMESH_"))}
        self.environment = kept | {"PYTHONPATH": str(path), "HOME": str(self.home)}
        self.state = StateDir(self.state_dir, Settings(state_dir=self.state_dir).ray_temp_dir)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "raymesh.mesh.cli", *arguments, "--state-dir", str(self.state_dir)]

    def up(self, *arguments: str, app: str = "stand_in:build") -> list[str]:
        return self.command("up", "--port", str(self.port), "--app", app, "--runtimes", "1", *arguments)

    def run(self, command: list[str], timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout_s)

    def left(self) -> list[str]:
        return [f"{p.name()} ({p.pid})" for p in self.state.leftovers()]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    record = place.state.read_record()
    if record is not None and record.process is not None:
        place.run(place.command("down"))
    if place.state_dir.is_dir():
        place.state.end_leftovers()


@pytest.mark.e2e
def test_up_until_ctrl_c(place: Place) -> None:
    up = subprocess.Popen(
        place.up(), env=place.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    assert up.stdout is not None
    assert up.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(up.stderr or ()))
    reader.start()
    try:
        line = up.stdout.readline()
        assert line == (
            f"raymesh is ready at http://127.0.0.1:{place.port} (REST and gRPC), state in {place.state_dir},"
            f" pid {up.pid}\n"
        ), errors
        record = place.state.read_record()
        assert record is not None
        assert (record.pid, record.port, record.state) == (up.pid, place.port, "ready")
        assert any(name.startswith("sleep") for name in place.left())

        again = place.run(place.up())
        assert again.returncode == ExitCode.ALREADY_RUNNING
        assert f"pid {up.pid}" in again.stderr
        elsewhere = place.run([*place.up(), "--state-dir", str(place.state_dir) + "2"])
        assert elsewhere.returncode == ExitCode.PORT_TAKEN
        assert str(place.port) in elsewhere.stderr

        etcd = next(p for p in psutil.Process(up.pid).children() if p.name() == "etcd")
        etcd.kill()
        wait_until(
            lambda: any(p.name() == "etcd" and p != etcd for p in psutil.Process(up.pid).children()), 15, "etcd back"
        )

        # As a terminal does it: the whole group hears it.
        os.killpg(up.pid, signal.SIGINT)
        assert up.wait(60) == 0
        assert up.stdout.read() == ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            up.kill()
        up.wait()
        reader.join()
        up.stdout.close()
        up.stderr.close()
    assert place.left() == []
    assert place.state.read_record() is None
    assert list(place.home.iterdir()) == []  # no ~/.ray
    assert [line for line in errors if "etcd ended" not in line] == []


@pytest.mark.e2e
def test_detached_killed_and_cleaned_up(place: Place) -> None:
    up = place.run(place.up("--detach", "--json"))
    assert up.returncode == 0, up.stderr
    answer = json.loads(up.stdout)
    assert answer["endpoint"] == f"http://127.0.0.1:{place.port}"
    assert place.run(place.up("--detach")).returncode == ExitCode.ALREADY_RUNNING
    os.kill(answer["pid"], signal.SIGKILL)
    done = place.run(place.command("down", "--json"))
    assert done.returncode == 0
    assert json.loads(done.stdout)["stopped"] is False
    assert place.left() == []
    check_port("127.0.0.1", place.port)

    failed = place.run(place.up("--detach", app="stand_in:broken"))
    assert failed.returncode == ExitCode.NOT_READY
    assert "no such luck" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert place.left() == []


@pytest.mark.e2e
def test_detached_and_down(place: Place) -> None:
    answer = json.loads(place.run(place.up("--detach", "--json")).stdout)
    done = place.run(place.command("down", "--json"))
    assert json.loads(done.stdout) == {"stopped": True, "pid": answer["pid"], "leftovers": []}
    assert place.left() == []
    assert place.state.read_record() is None


def test_an_unreachable_registry_ends_up_within_ten_seconds(place: Place) -> None:
    started = time.monotonic()
    up = place.run(place.up("--registry", f"etcd://127.0.0.1:{free_port()}"))
    assert time.monotonic() - started < 10
    assert up.returncode == ExitCode.UNREACHABLE
    assert "the registry at 127.0.0.1" in up.stderr
    assert len(up.stderr.splitlines()) == 1


def test_a_signal_while_starting_leaves_nothing(place: Place) -> None:
    up = subprocess.Popen(place.up(), env=place.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert up.stderr is not None
    try:
        # Once etcd runs Ray is being started.
        wait_until(lambda: any(name.startswith("etcd") for name in place.left()), 20, "etcd")
        up.send_signal(signal.SIGTERM)
        assert up.wait(60) == ExitCode.INTERRUPTED
    finally:
        up.kill()
        up.wait()
        up.stderr.close()
    assert place.left() == []
