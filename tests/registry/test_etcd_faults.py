"""Our etcd client while etcd is killed, frozen, wiped, full, or one of several."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from raymesh.registry import etcd_connection
from raymesh.registry.embedded import EmbeddedEtcd, find_etcd
from raymesh.registry.etcd import EtcdStore
from raymesh.registry.etcd3_store import Etcd3Store
from raymesh.registry.etcd_connection import EtcdAddress
from raymesh.registry.etcd_wire import pb
from raymesh.registry.follow import follow
from raymesh.registry.keys import Keys
from raymesh.registry.records import InstanceRecord
from raymesh.registry.session import Session
from raymesh.registry.store import (
    Compare,
    Event,
    Get,
    Put,
    RegistryDenied,
    RegistryReadOnly,
    RegistryUnavailable,
    RevisionCompacted,
)
from raymesh.registry.view import MeshView

KINDS = [EtcdStore, Etcd3Store]


@contextlib.asynccontextmanager
async def opened(url: str, kind: Any = EtcdStore, timeout_s: float = 3.0) -> AsyncGenerator[Any, None]:
    store = kind.from_url(url, timeout_s=timeout_s)
    try:
        yield store
    finally:
        await store.close()


def kill(server: EmbeddedEtcd) -> None:
    """SIGKILL, and gone."""
    pid = server.pid
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while server.pid:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def frozen(server: EmbeddedEtcd) -> Iterator[None]:
    os.kill(server.pid, signal.SIGSTOP)
    # The signal is on its way only: on a busy machine some threads would still answer.
    threads = [thread / "stat" for thread in Path(f"/proc/{server.pid}/task").iterdir()]
    deadline = time.monotonic() + 5
    while any(stat.read_text().rpartition(")")[2].split()[0] != "T" for stat in threads):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


class Watching:
    """All events of a prefix, from a revision on."""

    def __init__(self, store: Any, prefix: str, from_revision: int = 1) -> None:
        self.events: list[Event] = []
        self._watch = store.watch(prefix, from_revision=from_revision)

    async def __aenter__(self) -> Watching:
        self.task = asyncio.create_task(self._run())
        return self

    async def _run(self) -> None:
        async with contextlib.aclosing(self._watch) as batches:
            async for batch in batches:
                self.events += batch.events

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


@pytest.mark.parametrize("kind", KINDS)
async def test_no_event_is_lost_or_repeated_when_etcd_is_killed_under_traffic(own_etcd, until, kind):
    acknowledged: dict[str, int] = {}
    async with (
        opened(own_etcd.url) as writer,
        opened(own_etcd.url, kind) as reader,
        Watching(reader, "/k/") as watching,
    ):
        is_over = False

        async def write(name: str) -> None:
            number = 0
            while not is_over:
                key, number = f"/k/{name}/{number}", number + 1
                with contextlib.suppress(RegistryUnavailable):
                    acknowledged[key] = (await writer.txn([Compare.absent(key)], [Put(key, b"")])).revision

        tasks = [asyncio.create_task(write(name)) for name in ("one", "two")]
        for _ in range(2):
            # Something must have happened before each kill, or the test proves nothing.
            before = len(acknowledged)
            await until(lambda before=before: len(acknowledged) > before + 50)
            await asyncio.to_thread(kill, own_etcd)
            await asyncio.to_thread(own_etcd.start)
        before = len(acknowledged)
        await until(lambda: len(acknowledged) > before + 50)
        is_over = True
        await asyncio.gather(*tasks)
        last = max(acknowledged.values())
        await until(lambda: watching.events and watching.events[-1].kv.mod_revision >= last)
        seen = [event.kv.key for event in watching.events]
        revisions = [event.kv.mod_revision for event in watching.events]
        assert set(acknowledged) <= set(seen)
        assert len(set(seen)) == len(seen) and revisions == sorted(set(revisions))
        truth = await writer.list("/k/")
        assert set(seen) == {kv.key for kv in truth.items}


async def test_a_watch_far_behind_is_cut_while_it_catches_up(own_etcd, until):
    """etcd replays history in batches; the header then already names the present revision, and must not be believed."""
    async with opened(own_etcd.url) as store:
        for begin in range(0, 6_000, 100):
            await asyncio.gather(*(store.txn([], [Put(f"/k/{n}", b"")]) for n in range(begin, begin + 100)))
        async with Watching(store, "/k/", from_revision=2) as watching:
            await until(lambda: len(watching.events) >= 1_000)
            assert len(watching.events) < 6_000
            await asyncio.to_thread(kill, own_etcd)
            await asyncio.to_thread(own_etcd.start)
            await until(lambda: len(watching.events) >= 6_000)
            assert sorted(event.kv.mod_revision for event in watching.events) == list(range(2, 6_002))


async def test_large_transactions_arrive_whole(own_etcd, until):
    """Over 2 MiB etcd cuts a response in pieces."""
    value = b"x" * 600_000
    async with opened(own_etcd.url) as store:
        for round_ in range(5):
            await store.txn([], [Put(f"/k/{round_}/{n}", value) for n in range(2)])
        seen = []
        async with contextlib.aclosing(store.watch("/k/", from_revision=2)) as batches:
            async for batch in batches:
                seen += [event.kv.key for event in batch.events]
                assert len(batch.events) % 2 == 0
                if len(seen) == 10:
                    break
        assert sorted(seen) == [f"/k/{round_}/{n}" for round_ in range(5) for n in range(2)]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_frozen_etcd_meets_a_deadline_and_then_works_again(own_etcd, until, kind):
    async with opened(own_etcd.url, kind, timeout_s=0.4) as store, Watching(store, "/k/", 1) as watching:
        lease = await store.grant(60)
        await store.txn([], [Put("/k/a", b"")])
        await until(lambda: len(watching.events) == 1)
        with frozen(own_etcd):
            calls = [store.get("/k/a"), store.list("/k/"), store.grant(5), store.keep_alive(lease), store.revoke(1)]
            calls += [store.txn([], [Put("/k/b", b"")]), store.txn([Compare.absent("/k/c")], [Put("/k/c", b"")])]
            began = time.monotonic()
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, RegistryUnavailable), outcome
            # Not a measurement: without a deadline this would never end.
            assert time.monotonic() - began < 10
        await until(lambda: _answers(store))
        assert await store.keep_alive(lease) > 0
        await store.txn([], [Put("/k/end", b"")])
        await until(lambda: watching.events[-1].kv.key == "/k/end")
        keys = [event.kv.key for event in watching.events]
        assert len(set(keys)) == len(keys)


async def _answers(store: Any) -> bool:
    with contextlib.suppress(RegistryUnavailable):
        await store.get("/")
        return True
    return False


async def test_a_watch_notices_a_frozen_etcd_and_goes_on_after(own_etcd, until, monkeypatch):
    monkeypatch.setattr("raymesh.registry.etcd_watch._SILENCE_MAX_S", 0.1)
    async with opened(own_etcd.url, timeout_s=0.3) as store, Watching(store, "/k/") as watching:
        await store.txn([], [Put("/k/a", b"")])
        await until(lambda: watching.events)
        # Idle but alive: the signs of life keep it open.
        calls = store.stats.watch_resumes
        await asyncio.sleep(0.6)
        assert store.stats.watch_resumes == calls
        with frozen(own_etcd):
            await until(lambda: store.stats.watch_resumes > calls)
        async with opened(own_etcd.url) as other:
            await other.txn([], [Put("/k/b", b"")])
        await until(lambda: [event.kv.key for event in watching.events] == ["/k/a", "/k/b"])


async def test_an_outage_is_met_with_patience_first_and_fast_failures_then(own_etcd, until):
    async with opened(own_etcd.url) as store, Watching(store, "/k/"):
        await store.txn([], [Put("/k/a", b"")])
        kill(own_etcd)
        with pytest.raises(RegistryUnavailable):
            await store.get("/k/a")
        loop = asyncio.get_running_loop()
        began, cpu_began, calls = loop.time(), time.process_time(), store.stats.calls
        with pytest.raises(RegistryUnavailable):
            await store.get("/k/a")
        assert loop.time() - began < 0.5
        await asyncio.sleep(1.0)
        # One call of ours and a few tries of the watch: nothing spins.
        assert store.stats.calls - calls <= 2
        assert time.process_time() - cpu_began < 0.3
        own_etcd.start()
        await until(lambda: _answers(store))


async def test_wiped_data_ends_a_watch_and_resets_a_view(own_etcd, until):
    """A new, empty etcd at the old address would let a watch of the old revision wait for ever."""
    keys, view = Keys("m"), MeshView(Keys("m"))
    record = InstanceRecord(id="old", address="h:1", pool="cpu", epoch=1)
    async with opened(own_etcd.url) as store, asyncio.TaskGroup() as group:
        for _ in range(20):
            await store.txn([], [Put(keys.instance("old"), record.encode())])
        following = group.create_task(follow(store, keys.prefix, view, lambda changes: None))
        await until(lambda: "old" in view.instances)
        session = Session(store, ttl_s=1)
        await session.start()
        mine = InstanceRecord(id="new", address="h:1", pool="cpu", epoch=1)
        assert await session.publish(keys.instance("new"), mine.encode())
        own_etcd.stop()
        shutil.rmtree(own_etcd.log_file.parent / "data")
        own_etcd.start()
        await until(lambda: set(view.instances) == {"new"})
        assert not session.is_fenced
        with pytest.raises(RevisionCompacted):
            async with contextlib.aclosing(store.watch("/", from_revision=10_000)) as batches:
                await anext(batches)
        await session.close()
        following.cancel()


async def test_a_session_survives_a_restart_of_etcd(own_etcd, until):
    async with opened(own_etcd.url) as store:
        session = Session(store, ttl_s=2)
        await session.start()
        first = session.epoch
        assert await session.publish("/k/a", b"1")
        kill(own_etcd)
        outcome = asyncio.ensure_future(session.publish("/k/b", b"2"))
        await asyncio.sleep(0.3)
        assert not session.is_fenced and not outcome.done()
        own_etcd.start()
        assert await outcome
        assert {kv.key for kv in (await store.list("/k/")).items} == {"/k/a", "/k/b"}
        # Leases are as durable as keys, and a restart counts as a renewal.
        assert session.epoch == first
        await session.close()


class Cluster:
    """Three members. Not durable."""

    def __init__(self, folder: Path) -> None:
        ports = _free_ports(6)
        self.endpoints = [f"127.0.0.1:{port}" for port in ports[:3]]
        peers = [f"http://127.0.0.1:{port}" for port in ports[3:]]
        members = ",".join(f"m{n}={peer}" for n, peer in enumerate(peers))
        self.processes = [
            subprocess.Popen(
                [
                    str(find_etcd()),
                    f"--name=m{n}",
                    f"--data-dir={folder / str(n)}",
                    f"--listen-client-urls=http://{self.endpoints[n]}",
                    f"--advertise-client-urls=http://{self.endpoints[n]}",
                    f"--listen-peer-urls={peers[n]}",
                    f"--initial-advertise-peer-urls={peers[n]}",
                    f"--initial-cluster={members}",
                    "--heartbeat-interval=50",
                    "--election-timeout=500",
                    "--unsafe-no-fsync",
                    "--log-level=error",
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for n in range(3)
        ]

    @property
    def url(self) -> str:
        return "etcd://" + ",".join(self.endpoints)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.stop()


async def test_one_of_three_members_may_die_or_freeze(cluster, until):
    async with opened(cluster.url) as store:
        await until(lambda: _answers(store))
        lease = await store.grant(60)
        async with Watching(store, "/k/", (await store.txn([], [])).revision + 1) as watching:
            for number in range(30):
                if number == 10:
                    # The member in use: the first, unless the start made the client move on.
                    in_use = cluster.endpoints.index(store._connection.endpoint.address)
                    cluster.processes[in_use].send_signal(signal.SIGSTOP)
                if number == 20:
                    cluster.processes[in_use].kill()
                key = f"/k/{number}"

                async def is_there(key: str = key) -> bool:
                    # As a careful caller does: after an unknown outcome, look and try again.
                    with contextlib.suppress(RegistryUnavailable):
                        done = await store.txn([Compare.absent(key)], [Put(key, b"")], [Get(key)])
                        return done.succeeded or done.gets[0] is not None
                    return False

                await until(is_there)
            await until(lambda: len(watching.events) >= 30)
            assert [event.kv.key for event in watching.events] == [f"/k/{number}" for number in range(30)]
        assert store.stats.failovers > 0
        assert await store.keep_alive(lease) > 0


@pytest.mark.parametrize("kind", KINDS)
async def test_dead_endpoints_are_passed_over(etcd, prefix, kind):
    dead, other = _free_ports(2)
    async with opened(f"etcd://127.0.0.1:{dead},localhost:{other},{etcd.endpoint}", kind) as store:
        assert (await store.txn([], [Put(prefix + "k", b"v")])).succeeded
        assert (await store.get(prefix + "k")).value == b"v"
        async with contextlib.aclosing(store.watch(prefix, from_revision=1)) as batches:
            assert (await anext(batches)).events[0].kv.value == b"v"


async def test_a_full_etcd_is_read_only(own_etcd):
    async def alarm(action: Any) -> None:
        async with grpc.aio.insecure_channel(own_etcd.endpoint) as channel:
            call = channel.unary_unary(
                "/etcdserverpb.Maintenance/Alarm",
                request_serializer=pb.AlarmRequest.SerializeToString,
                response_deserializer=pb.AlarmResponse.FromString,
            )
            await call(pb.AlarmRequest(action=action, alarm=pb.AlarmMember(alarm=1).alarm), timeout=5)

    async with opened(own_etcd.url) as store:
        await store.txn([], [Put("/k/a", b"1")])
        await alarm(pb.AlarmRequest.ACTIVATE)
        with pytest.raises(RegistryReadOnly):
            await store.txn([], [Put("/k/a", b"2")])
        assert (await store.get("/k/a")).value == b"1"
        await alarm(pb.AlarmRequest.DEACTIVATE)
        assert (await store.txn([], [Put("/k/a", b"3")])).succeeded


async def test_pages_too_large_for_a_message_are_made_smaller(etcd, prefix, monkeypatch):
    options = dict(etcd_connection._CHANNEL_OPTIONS) | {"grpc.max_receive_message_length": 1_000_000}
    monkeypatch.setattr(etcd_connection, "_CHANNEL_OPTIONS", tuple(options.items()))
    async with opened(etcd.url) as store:
        for number in range(30):
            await store.txn([], [Put(f"{prefix}{number:02}", b"x" * 90_000)])
        listing = await store.list(prefix)
        assert [kv.key for kv in listing.items] == [f"{prefix}{number:02}" for number in range(30)]


@pytest.mark.parametrize("page_keys", [1, 7, 10, 11])
async def test_pages_of_any_size_give_the_same_listing(etcd, prefix, page_keys):
    async with opened(etcd.url) as store:
        await store.txn([], [Put(f"{prefix}{number}", b"") for number in range(10)])
        paged = EtcdStore(EtcdAddress.from_url(etcd.url), page_keys=page_keys)
        assert (await paged.list(prefix)).items == (await store.list(prefix)).items
        await paged.close()


class Script:
    """Stands for the network: answers of attempts, in order; what is left goes to the real etcd."""

    def __init__(self, connection: Any, *, is_done: bool, code: Any, details: str, count: int = 1) -> None:
        self._real, self._is_done, self._left = connection._attempt, is_done, count
        self._error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)
        self.attempts = 0
        connection._attempt = self

    async def __call__(self, *arguments: Any) -> Any:
        self.attempts += 1
        if not self._left:
            return await self._real(*arguments)
        self._left -= 1
        if self._is_done:
            await self._real(*arguments)
        raise self._error


LOST = {"code": grpc.StatusCode.UNAVAILABLE, "details": "Socket closed"}
NOT_SENT = {"code": grpc.StatusCode.UNAVAILABLE, "details": "failed to connect to all addresses; last error: ..."}


async def test_a_transaction_with_unknown_outcome_is_never_called_lost(etcd, prefix):
    async with opened(etcd.url) as store:
        key = prefix + "k"
        # It was done, the answer was lost, and the repetition found the key: nobody knows whose.
        script = Script(store._connection, is_done=True, **LOST)
        with pytest.raises(RegistryUnavailable):
            await store.txn([Compare.absent(key)], [Put(key, b"")])
        assert script.attempts == 2
    async with opened(etcd.url) as store:
        # It was not done: the repetition does it.
        script = Script(store._connection, is_done=False, **LOST)
        assert (await store.txn([Compare.absent(prefix + "l")], [Put(prefix + "l", b"")])).succeeded
        assert script.attempts == 2


async def test_only_what_does_no_harm_is_repeated(etcd, prefix):
    async with opened(etcd.url) as store:
        script = Script(store._connection, is_done=True, **LOST)
        with pytest.raises(RegistryUnavailable):
            await store.txn([], [Put(prefix + "k", b"")])
        assert script.attempts == 1
    async with opened(etcd.url) as store:
        script = Script(store._connection, is_done=False, count=2, **NOT_SENT)
        assert (await store.txn([], [Put(prefix + "k", b"")])).succeeded
        assert script.attempts == 3
    async with opened(etcd.url) as store:
        script = Script(store._connection, is_done=True, count=2, **LOST)
        assert (await store.get(prefix + "k")).value == b""
        assert script.attempts == 3


def ctl(server: EmbeddedEtcd, *arguments: str, user: str = "") -> None:
    login = [f"--user={user}"] if user else []
    etcdctl = find_etcd().parent / "etcdctl"
    subprocess.run(
        [etcdctl, f"--endpoints={server.endpoint}", *login, *arguments],
        check=True,
        capture_output=True,
        timeout=20,
        env={**os.environ, "ETCDCTL_API": "3"},
    )


async def test_tokens_are_renewed_when_etcd_forgets_them(own_etcd, until):
    for words in (["user", "add", "root:s3cret"], ["user", "grant-role", "root", "root"], ["auth", "enable"]):
        ctl(own_etcd, *words)
    url = own_etcd.url.replace("etcd://", "etcd://root:s3cret@")
    async with opened(url) as store, Watching(store, "/k/") as watching:
        assert (await store.txn([], [Put("/k/a", b"")])).succeeded
        await until(lambda: len(watching.events) == 1)
        kill(own_etcd)
        own_etcd.start()
        await until(lambda: _answers(store))
        await store.txn([], [Put("/k/b", b"")])
        await until(lambda: len(watching.events) == 2)
        lease = await store.grant(5)
        assert await store.keep_alive(lease) > 0
        # A restarted etcd may find its tokens in its log again; authentication off and on forgets them for sure.
        before = store.stats.authentications
        ctl(own_etcd, "--user", "root:s3cret", "auth", "disable")
        ctl(own_etcd, "auth", "enable")
        await store.txn([], [Put("/k/c", b"")])
        await until(lambda: len(watching.events) == 3)
        assert store.stats.authentications > before
    for login in ("", "root:wrong@", "nobody:s3cret@"):
        async with opened(own_etcd.url.replace("etcd://", f"etcd://{login}")) as store:
            with pytest.raises(RegistryDenied):
                await store.get("/k/a")
            with pytest.raises(RegistryDenied):
                async with contextlib.aclosing(store.watch("/k/", from_revision=1)) as batches:
                    await anext(batches)
            if login:
                # (etcd grants leases to anyone, but they are of no use.)
                with pytest.raises(RegistryDenied):
                    await Session(store).start()


def test_many_stores_in_threads_do_not_share_loops(etcd, prefix):
    """Channels belong to the loop that first used them."""

    def work(name: str) -> None:
        async def run() -> None:
            async with opened(etcd.url) as store:
                await store.txn([], [Put(prefix + name, b"")])

        asyncio.run(run())

    threads = [threading.Thread(target=work, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    async def count() -> int:
        async with opened(etcd.url) as store:
            return len((await store.list(prefix)).items)

    assert asyncio.run(count()) == 4
