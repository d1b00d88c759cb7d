"""Import `etcd3` 0.12.0 (2020) under today's protobuf.

Its generated modules register descriptors in a way protobuf 4 and later refuse. Here a module with the same names, made
of the messages of our private pool, takes their place before `etcd3` is imported. Nothing gets into protobuf's default
pool, and no environment variable slows protobuf down for the whole process.
"""

from __future__ import annotations

import contextlib
import sys
import types
from typing import Any

from raymesh.registry.etcd_wire import pb

_STUBS: dict[str, dict[str, tuple[str, str]]] = {
    "KV": {
        "Range": ("Range", "unary_unary"),
        "Put": ("Put", "unary_unary"),
        "DeleteRange": ("DeleteRange", "unary_unary"),
        "Txn": ("Txn", "unary_unary"),
        "Compact": ("Compaction", "unary_unary"),
    },
    "Watch": {"Watch": ("Watch", "stream_stream")},
    "Lease": {
        "LeaseGrant": ("LeaseGrant", "unary_unary"),
        "LeaseRevoke": ("LeaseRevoke", "unary_unary"),
        "LeaseKeepAlive": ("LeaseKeepAlive", "stream_stream"),
    },
    "Auth": {"Authenticate": ("Authenticate", "unary_unary")},
    "Maintenance": {"Alarm": ("Alarm", "unary_unary"), "Status": ("Status", "unary_unary")},
    # The client makes one of these too; the mesh calls none of its methods.
    "Cluster": {},
}


def load_etcd3() -> Any:
    """The `etcd3` module. Raises `ImportError` when it is not installed, or was imported by other means before."""
    loaded = sys.modules.get("etcd3")
    if loaded is not None:
        if getattr(sys.modules.get("etcd3.etcdrpc"), "is_raymesh_shim", False):
            return loaded
        raise ImportError("etcd3 was imported before raymesh's etcd3 store; create the store first")
    sys.modules["etcd3.etcdrpc"] = _Rpc("etcd3.etcdrpc")
    try:
        import etcd3
    except BaseException:
        del sys.modules["etcd3.etcdrpc"]
        raise
    return etcd3


def make_client(etcd3: Any, **arguments: Any) -> Any:
    """An `etcd3.Etcd3Client` whose watcher thread ends when the client is closed."""

    class Watcher(etcd3.watch.Watcher):  # type: ignore[misc]
        def _run(self) -> None:
            # etcd3's thread calls `Watch` again for ever; on a closed channel gRPC raises ValueError.
            with contextlib.suppress(ValueError):
                super()._run()

    client = etcd3.client(**arguments)
    client.watcher = Watcher(
        etcd3.etcdrpc.WatchStub(client.channel), client.timeout, client.call_credentials, client.metadata
    )
    return client


class _Rpc(types.ModuleType):
    """Stands for the package ``etcd3.etcdrpc``: messages by name, and a stub class for each service."""

    is_raymesh_shim = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        for service, methods in _STUBS.items():
            setattr(self, f"{service}Stub", _make_stub(service, methods))

    def __getattr__(self, name: str) -> Any:
        return getattr(pb, name)


def _make_stub(service: str, methods: dict[str, tuple[str, str]]) -> type:
    def __init__(self: Any, channel: Any) -> None:
        for method, (message, kind) in methods.items():
            callable_ = getattr(channel, kind)(
                f"/etcdserverpb.{service}/{method}",
                request_serializer=getattr(pb, f"{message}Request").SerializeToString,
                response_deserializer=getattr(pb, f"{message}Response").FromString,
            )
            setattr(self, method, callable_)

    return type(f"{service}Stub", (), {"__init__": __init__})
