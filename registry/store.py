"""The `Store` protocol: the little of etcd that the mesh needs, and the errors it can end in.

Rule of the file: every store behaves like etcd v3 (one revision counter, compare-and-set on revisions, leases, watches
that replay history). `registry/memory.py` and `registry/etcd.py` pass the same conformance suite.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

#: Most operations (and compares) of one transaction: etcd's default ``--max-txn-ops``.
TXN_OPS_MAX = 128
#: Largest value: etcd's default ``--max-request-bytes`` is 1.5 MiB for the whole request, so leave room for the rest.
VALUE_BYTES_MAX = 1_400_000


class RegistryError(Exception):
    """The registry could not do what was asked."""


class RegistryUnavailable(RegistryError):
    """No endpoint answered in time. A write may or may not have happened: read back before repeating it."""


class RegistryReadOnly(RegistryError):
    """The store is out of space (etcd's NOSPACE alarm) and takes no writes until an operator makes room."""


class RegistryDenied(RegistryError):
    """The store refused our credentials."""


class RevisionCompacted(RegistryError):
    """The history asked for is gone; list again and watch from there."""

    def __init__(self, compact_revision: int) -> None:
        super().__init__(f"history before revision {compact_revision} was compacted")
        self.compact_revision = compact_revision


class LeaseGone(RegistryError):
    """The lease a key was to be put on has expired or was revoked; nothing was written."""


class RequestTooLarge(RegistryError):
    """More than `TXN_OPS_MAX` operations, a value over `VALUE_BYTES_MAX`, or a key written twice; nothing was sent."""


class KeyValue(NamedTuple):
    """One key as the store holds it."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


class Event(NamedTuple):
    """One change. `kv.value` is empty and `kv.mod_revision` is the delete's revision when `is_delete`."""

    is_delete: bool
    kv: KeyValue


class WatchBatch(NamedTuple):
    """The events of one store answer, whole transactions only; `revision` is safe to resume after."""

    events: tuple[Event, ...]
    revision: int


class Listing(NamedTuple):
    """Every key under a prefix, at one revision, in key order."""

    items: tuple[KeyValue, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition of a transaction: the key's mod revision (0: the key does not exist) or create revision equals."""

    key: str
    mod_revision: int | None = None
    create_revision: int | None = None

    @classmethod
    def absent(cls, key: str) -> Compare:
        """The key does not exist."""
        return cls(key, create_revision=0)


@dataclass(frozen=True, slots=True)
class Put:
    """Write a key, on a lease unless 0."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a key; removing what is absent is no error."""

    key: str


@dataclass(frozen=True, slots=True)
class Get:
    """Read a key inside a transaction."""

    key: str


Op = Put | Delete | Get


def check_txn(compares: Sequence[Compare], *branches: Sequence[Op]) -> None:
    """Raise `RequestTooLarge` for a transaction that etcd with its default limits would refuse."""
    if len(compares) > TXN_OPS_MAX or any(len(branch) > TXN_OPS_MAX for branch in branches):
        raise RequestTooLarge(f"a transaction of more than {TXN_OPS_MAX} operations")
    for branch in branches:
        written = [op.key for op in branch if not isinstance(op, Get)]
        if len(set(written)) != len(written):
            raise RequestTooLarge("a transaction that writes one key twice")
        size_bytes = sum(len(op.value) for op in branch if isinstance(op, Put))
        if size_bytes > VALUE_BYTES_MAX:
            raise RequestTooLarge(f"{size_bytes} bytes of values in one transaction, at most {VALUE_BYTES_MAX}")


class TxnResult(NamedTuple):
    """How a transaction ended. `gets` answers its `Get` operations in order (None: absent)."""

    succeeded: bool
    revision: int
    gets: tuple[KeyValue | None, ...] = ()


class Store(Protocol):
    """A strongly consistent key-value store with leases and watches.

    Every method has a deadline of its own and raises only `RegistryError`s: `RegistryUnavailable` when no endpoint
    answered, `RegistryReadOnly` when out of space, `RegistryDenied` on bad credentials, `LeaseGone` when a put names
    a lease that ended, `RequestTooLarge` before sending what the store would refuse.
    """

    async def get(self, key: str) -> KeyValue | None:
        """The key, read linearizably; None when absent."""
        ...

    async def list(self, prefix: str, *, revision: int = 0) -> Listing:
        """All keys under `prefix` at one revision (0: now), fetched in pages. Raises `RevisionCompacted`."""
        ...

    async def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        """If every compare holds do `success`, else `failure`, atomically. At most 128 operations."""
        ...

    async def grant(self, ttl_s: int) -> int:
        """A new lease; its id is never reused."""
        ...

    async def keep_alive(self, lease: int) -> int:
        """Renew a lease. Its time to live in seconds, 0 when it no longer exists (expired or revoked)."""
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease and delete the keys on it; no error when it is gone already."""
        ...

    def watch(self, prefix: str, *, from_revision: int) -> AsyncGenerator[WatchBatch, None]:
        """Every change under `prefix` from `from_revision` on, without gap or repetition, for ever.

        Survives lost connections and restarted servers by resuming. Raises `RevisionCompacted` when the revision to
        resume from is gone (also when the store has lost its data). May yield batches without events (progress).
        Leave it with ``aclose()`` (`contextlib.aclosing`), which ends the watch at the store.
        """
        ...

    async def close(self) -> None:
        """Let go of connections; the store is of no use afterwards."""
        ...
