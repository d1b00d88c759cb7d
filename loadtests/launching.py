"""A mesh of its own for a load test or an end-to-end test: started with `raymesh up`, watched from inside, taken down.

Rule of the file: it does what a user would do, and looks deeper: with the internal token of the state folder it reads
the runtimes' own counters.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raymesh.mesh.client import Client
from raymesh.mesh.state_dir import MeshRecord, StateDir
from raymesh.registry.etcd import EtcdStore
from raymesh.registry.keys import Keys
from raymesh.registry.records import InstanceRecord

START_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = 60.0
STATUS_TIMEOUT_S = 5.0


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def raymesh(*arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Runs the command line client."""
    command = [sys.executable, "-m", "raymesh.mesh.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@dataclass(slots=True)
class Mesh:
    """One mesh on this machine. `start` and `stop` may be called again and again; what it knows is in `state_dir`.

    `external_registry` empty: the embedded etcd. `start_s` is how long the last start took.
    """

    state_dir: Path
    memory_bytes: int
    runtimes: int = 0
    external_registry: str = ""
    port: int = field(default_factory=free_port)
    start_s: float = 0.0

    @property
    def target(self) -> str:
        """``host:port`` of the front door."""
        return f"127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        """What the processes of this mesh show one another."""
        return (self.state_dir / "internal-token").read_text(encoding="utf-8").strip()

    @property
    def record(self) -> MeshRecord:
        """What `raymesh up` wrote about itself; raises `RuntimeError` when none runs."""
        record = StateDir(self.state_dir.absolute(), self.state_dir.absolute() / "ray").read_record()
        if record is None:
            raise RuntimeError(f"no mesh runs in {self.state_dir}")
        return record

    def start(self) -> None:
        """Starts it and waits until it is ready; raises `RuntimeError` with what `raymesh up` said."""
        begin_s = time.monotonic()
        arguments = ["--port", str(self.port), "--state-dir", str(self.state_dir), "--memory", str(self.memory_bytes)]
        arguments += ["--runtimes", str(self.runtimes)] if self.runtimes else []
        arguments += ["--registry", self.external_registry] if self.external_registry else []
        done = raymesh("up", "--detach", *arguments, timeout_s=START_TIMEOUT_S)
        if done.returncode != 0:
            raise RuntimeError(f"raymesh up failed ({done.returncode}): {done.stdout}{done.stderr}")
        self.start_s = time.monotonic() - begin_s

    def stop(self) -> None:
        """Takes it down; raises `RuntimeError` when that did not work."""
        done = raymesh("down", "--state-dir", str(self.state_dir), timeout_s=STOP_TIMEOUT_S)
        if done.returncode != 0:
            raise RuntimeError(f"raymesh down failed ({done.returncode}): {done.stdout}{done.stderr}")

    def instances(self) -> dict[str, InstanceRecord]:
        """The live runtimes by id, as the registry has them."""
        return asyncio.run(self._list_instances())

    async def _list_instances(self) -> dict[str, InstanceRecord]:
        store = EtcdStore.from_url(self.record.registry)
        try:
            listing = await store.list(Keys().instances)
        finally:
            await store.close()
        records = [InstanceRecord.decode(item.value) for item in listing.items]
        return {record.id: record for record in records}

    def runtime_statuses(self) -> list[dict[str, Any]]:
        """What each runtime says of itself: copies, loads, evictions, used_bytes, rss_bytes and more."""
        return [self.ask_runtime(record.address, "/control/status") for record in self.instances().values()]

    def ask_runtime(self, address: str, path: str) -> dict[str, Any]:
        """A control GET on one runtime."""
        request = urllib.request.Request(f"http://{address}{path}", headers={"x-raymesh-token": self.token})
        with urllib.request.urlopen(request, timeout=STATUS_TIMEOUT_S) as answer:
            body: dict[str, Any] = json.load(answer)
            return body

    def runtime_that_holds(self, model: str) -> str:
        """The address of a runtime with a loaded copy of `model`; raises `LookupError` without one."""
        with Client(self.target) as client:
            located = {copy.instance for copy in client.status(model).copies}
        for instance, record in self.instances().items():
            if instance in located:
                return record.address
        raise LookupError(f"no live runtime holds {model}")


@contextlib.contextmanager
def started_mesh(state_dir: Path, *, memory_bytes: int, runtimes: int = 0, keep: bool = False) -> Iterator[Mesh]:
    """A fresh mesh with an embedded etcd: what an earlier one left in `state_dir` is taken down first.

    It is taken down at the end, however that comes; with `keep` it stays up and its state with it.
    """
    if state_dir.exists():
        raymesh("down", "--state-dir", str(state_dir), timeout_s=STOP_TIMEOUT_S)
        shutil.rmtree(state_dir, ignore_errors=True)
    mesh = Mesh(state_dir, memory_bytes, runtimes)
    mesh.start()
    try:
        yield mesh
    finally:
        if not keep:
            mesh.stop()
