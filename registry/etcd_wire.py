"""The registry's values as etcd's messages, and etcd's errors as ours.

Rule of the file: translation only; no connection is known here. Both etcd clients (`etcd.py`, `etcd3_store.py`) use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import Any

import grpc

from raymesh.registry.protos import Messages
from raymesh.registry.store import (
    Compare,
    Event,
    Get,
    KeyValue,
    LeaseGone,
    Op,
    Put,
    RegistryDenied,
    RegistryError,
    RegistryReadOnly,
    RequestTooLarge,
    RevisionCompacted,
    TxnResult,
)

#: etcd's messages, in a private pool.
pb = Messages("raymesh.registry", "etcd")


class Failure(Enum):
    """What a failed attempt means for the next one."""

    #: The request was not carried out; anyone may try again.
    NOT_DONE = auto()
    #: It may have been carried out, or may yet be.
    UNKNOWN = auto()
    #: Our token is not known (any more): authenticate and try again.
    TOKEN = auto()


def prefix_end(prefix: str) -> bytes:
    """The first key after all that begin with `prefix`, as etcd's ``range_end`` (NUL for the empty prefix: all)."""
    data = prefix.encode().rstrip(b"\xff")
    return data[:-1] + bytes([data[-1] + 1]) if data else b"\0"


def read_kv(kv: Any) -> KeyValue:
    """A key from its message. A key that is not UTF-8 is none of ours; it is kept readable, not fatal."""
    return KeyValue(kv.key.decode(errors="replace"), kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def read_events(events: Iterable[Any]) -> list[Event]:
    """The events of a watch response."""
    return [Event(event.type == pb.Event.DELETE, read_kv(event.kv)) for event in events]


def write_compare(compare: Compare) -> list[Any]:
    """A compare as one message, or two when it names both revisions."""
    key, messages = compare.key.encode(), []
    if compare.mod_revision is not None:
        messages.append(pb.Compare(key=key, target=pb.Compare.MOD, mod_revision=compare.mod_revision))
    if compare.create_revision is not None:
        messages.append(pb.Compare(key=key, target=pb.Compare.CREATE, create_revision=compare.create_revision))
    return messages


def write_op(op: Op) -> Any:
    """An operation of a transaction as its message."""
    key = op.key.encode()
    if isinstance(op, Put):
        return pb.RequestOp(request_put=pb.PutRequest(key=key, value=op.value, lease=op.lease))
    if isinstance(op, Get):
        return pb.RequestOp(request_range=pb.RangeRequest(key=key))
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))


def write_txn(compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op]) -> Any:
    """A whole transaction as its message."""
    return pb.TxnRequest(
        compare=[message for compare in compares for message in write_compare(compare)],
        success=[write_op(op) for op in success],
        failure=[write_op(op) for op in failure],
    )


def read_txn(response: Any) -> TxnResult:
    """How a transaction ended, from its response."""
    ranges = (r.response_range for r in response.responses if r.WhichOneof("response") == "response_range")
    gets = tuple(read_kv(found.kvs[0]) if found.kvs else None for found in ranges)
    return TxnResult(response.succeeded, response.header.revision, gets)


def write_watch(prefix: str, from_revision: int) -> Any:
    """The request that creates a watch of `prefix`."""
    create = pb.WatchCreateRequest(
        key=prefix.encode() or b"\0",
        range_end=prefix_end(prefix),
        start_revision=from_revision,
        progress_notify=True,
        fragment=True,
    )
    return pb.WatchRequest(create_request=create)


# Texts of etcd's `api/v3rpc/rpctypes/error.go`. It is the text that tells them apart: codes are shared by many.
_NOT_DONE = (
    "failed to connect to all addresses",  # gRPC's own: there was no connection to send on
    "etcdserver: no leader",
    "etcdserver: too many requests",
    "etcdserver: not capable",
    "etcdserver: server stopped",
)
_TOKEN = ("etcdserver: invalid auth token", "etcdserver: revision of auth store is old", "user name is empty")
_DENIED = ("authentication failed", "permission denied", "authentication is not enabled")
_UNKNOWN_CODES = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    # A stream reset by a dying server or a proxy comes as one of these.
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}


def read_failure(code: grpc.StatusCode, details: str) -> Failure | RegistryError:
    """What a gRPC error from etcd means: something to try again, or what to raise."""
    if any(text in details for text in _TOKEN) or code is grpc.StatusCode.UNAUTHENTICATED:
        return Failure.TOKEN
    if any(text in details for text in _NOT_DONE):
        return Failure.NOT_DONE
    if any(text in details for text in _DENIED) or code is grpc.StatusCode.PERMISSION_DENIED:
        return RegistryDenied(details)
    if "space exceeded" in details:
        return RegistryReadOnly(details)
    if "lease not found" in details:
        return LeaseGone(details)
    if "required revision" in details:
        # Compacted, or in the future of a store that lost its data: the history asked for is gone either way.
        return RevisionCompacted(0)
    if "request is too large" in details or "too many operations" in details or "duplicate key" in details:
        return RequestTooLarge(details)
    if code in _UNKNOWN_CODES:
        return Failure.UNKNOWN
    return RegistryError(f"{code.name}: {details}")
