"""Registry URLs, TLS, and our messages beside those of others."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from raymesh.registry.embedded import find_etcd
from raymesh.registry.etcd import EtcdStore
from raymesh.registry.etcd_connection import EtcdAddress
from raymesh.registry.etcd_wire import Failure, prefix_end, read_failure
from raymesh.registry.store import (
    LeaseGone,
    Put,
    RegistryDenied,
    RegistryError,
    RegistryReadOnly,
    RegistryUnavailable,
    RequestTooLarge,
    RevisionCompacted,
)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("etcd://h", EtcdAddress(("h:2379",))),
        ("etcd://h1:1,h2,10.0.0.3:3", EtcdAddress(("h1:1", "h2:2379", "10.0.0.3:3"))),
        ("etcd://[::1]:5,[fe80::2]", EtcdAddress(("[::1]:5", "[fe80::2]:2379"))),
        ("etcd://u:p%40ss%2F@h:1", EtcdAddress(("h:1",), "u", "p@ss/")),
        ("etcds://h/?ca=/a&cert=/b&key=/c", EtcdAddress(("h:2379",), "", "", True, "/a", "/b", "/c")),
        ("etcds://u:p@h", EtcdAddress(("h:2379",), "u", "p", True)),
    ],
)
def test_urls(url, address):
    assert EtcdAddress.from_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "", "h:2379", "http://h", "etcd://", "etcd://h,", "etcd://h:port", "etcd://h:99999", "etcd://h/path", "etcd://h#x",
        "etcd://h?ca=x", "etcds://h?cert=x", "etcds://h?key=x", "etcds://h?nonsense=1", "etcd://@",
    ],
)  # fmt: skip
def test_odd_urls_are_refused_without_telling_the_password(url):
    with pytest.raises(ValueError) as caught:
        EtcdStore.from_url(url.replace("://", "://user:s3cret@", 1))
    assert "s3cret" not in str(caught.value)


def test_an_address_does_not_print_its_password():
    assert "s3cret" not in repr(EtcdAddress.from_url("etcd://u:s3cret@h"))


@pytest.mark.parametrize(("prefix", "end"), [("/a/", b"/a0"), ("a", b"b"), ("", b"\0"), ("é", b"\xc3\xaa")])
def test_prefix_end(prefix, end):
    assert prefix_end(prefix) == end


@pytest.mark.parametrize(
    ("code", "details", "meaning"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses; last error: x", Failure.NOT_DONE),
        ("UNAVAILABLE", "etcdserver: no leader", Failure.NOT_DONE),
        ("RESOURCE_EXHAUSTED", "etcdserver: too many requests", Failure.NOT_DONE),
        ("UNAVAILABLE", "Socket closed", Failure.UNKNOWN),
        ("UNAVAILABLE", "etcdserver: request timed out", Failure.UNKNOWN),
        ("UNAVAILABLE", "etcdserver: leader changed", Failure.UNKNOWN),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", Failure.UNKNOWN),
        ("UNAUTHENTICATED", "etcdserver: invalid auth token", Failure.TOKEN),
        ("INVALID_ARGUMENT", "etcdserver: user name is empty", Failure.TOKEN),
        ("INVALID_ARGUMENT", "etcdserver: authentication failed, invalid user ID or password", RegistryDenied),
        ("PERMISSION_DENIED", "etcdserver: permission denied", RegistryDenied),
        ("RESOURCE_EXHAUSTED", "etcdserver: mvcc: database space exceeded", RegistryReadOnly),
        ("NOT_FOUND", "etcdserver: requested lease not found", LeaseGone),
        ("OUT_OF_RANGE", "etcdserver: mvcc: required revision has been compacted", RevisionCompacted),
        ("OUT_OF_RANGE", "etcdserver: mvcc: required revision is a future revision", RevisionCompacted),
        ("INVALID_ARGUMENT", "etcdserver: request is too large", RequestTooLarge),
        ("INVALID_ARGUMENT", "etcdserver: something new", RegistryError),
    ],
)
def test_what_etcds_errors_mean(code, details, meaning):
    failure = read_failure(grpc.StatusCode[code], details)
    assert failure is meaning or type(failure) is meaning


def test_etcd3_is_loaded_without_touching_the_default_pool():
    code = (
        "from raymesh.registry.etcd3_store import Etcd3Store\n"
        "Etcd3Store.from_url('etcd://127.0.0.1:1')\n"
        "from google.protobuf import descriptor_pool\n"
        "try:\n"
        "    descriptor_pool.Default().FindMessageTypeByName('etcdserverpb.PutRequest')\n"
        "except KeyError:\n"
        "    print('private')\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "private", done.stderr


def test_etcd3_refuses_to_send_a_password_in_the_clear():
    from raymesh.registry.etcd3_store import Etcd3Store

    with pytest.raises(ValueError, match="TLS"):
        Etcd3Store.from_url("etcd://u:p@h")


def make_certificates(folder: Path) -> None:
    """A CA, a server and a client signed by it, and a client of another CA."""

    def run(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=folder, timeout=30)

    for ca in ("ca", "other"):
        run("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", f"/CN={ca}", "-keyout", f"{ca}.key", "-out", f"{ca}.pem")  # fmt: skip
    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for name, ca in (("server", "ca"), ("client", "ca"), ("stranger", "other")):
        run("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
            "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        run("x509", "-req", "-in", f"{name}.csr", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial",
            "-days", "2", "-extfile", "ext", "-out", f"{name}.pem")  # fmt: skip


@pytest.fixture(scope="module")
def tls_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """An etcd that asks for client certificates: the folder of the certificates, and its endpoint."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    process = subprocess.Popen(
        [
            str(find_etcd()), f"--data-dir={folder / 'data'}", f"--listen-client-urls=https://{endpoint}",
            f"--advertise-client-urls=https://{endpoint}", "--listen-peer-urls=http://127.0.0.1:0",
            "--initial-advertise-peer-urls=http://127.0.0.1:0", "--initial-cluster=default=http://127.0.0.1:0",
            f"--cert-file={folder / 'server.pem'}", f"--key-file={folder / 'server.key'}",
            "--client-cert-auth", f"--trusted-ca-file={folder / 'ca.pem'}",
            "--heartbeat-interval=50", "--election-timeout=500", "--unsafe-no-fsync",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    yield folder, endpoint
    process.kill()
    process.wait()


@pytest.mark.parametrize("kind", ["etcd", "etcd3"])
def test_mutual_tls(tls_etcd, kind):
    from raymesh.registry.etcd3_store import Etcd3Store

    folder, endpoint = tls_etcd
    url = f"etcds://{endpoint}?ca={folder}/ca.pem&cert={folder}/client.pem&key={folder}/client.key"

    async def run() -> None:
        store = (EtcdStore if kind == "etcd" else Etcd3Store).from_url(url)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(RegistryUnavailable):
                await store.txn([], [Put("/k", b"v")])
                break
            assert time.monotonic() < deadline
        async with contextlib.aclosing(store.watch("/k", from_revision=1)) as batches:
            assert (await anext(batches)).events[0].kv.value == b"v"
        await store.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "query",
    [
        "ca={0}/other.pem&cert={0}/client.pem&key={0}/client.key",
        "ca={0}/ca.pem&cert={0}/stranger.pem&key={0}/stranger.key",
        "ca={0}/ca.pem",
    ],
)
def test_strangers_get_nowhere_over_tls(tls_etcd, query):
    folder, endpoint = tls_etcd

    async def run() -> None:
        store = EtcdStore.from_url(f"etcds://{endpoint}?{query.format(folder)}", timeout_s=1.0)
        with pytest.raises(RegistryUnavailable):
            await store.get("/k")
        await store.close()

    asyncio.run(run())


def test_missing_tls_files_are_named():
    async def run() -> None:
        store = EtcdStore.from_url("etcds://127.0.0.1:1?ca=/no/such/file")
        with pytest.raises(RegistryDenied, match="/no/such/file"):
            await store.get("/k")
        await store.close()

    asyncio.run(run())
