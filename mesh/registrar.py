"""Creates model records, many in one transaction when many are asked for at once.

Rule of the file: nobody waits for company. A registration that comes alone is sent at once; those that come while a
transaction is under way share the next one. Each caller gets the outcome of its own model, whatever the others are.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from raymesh.registry.store import Compare, Get, KeyValue, Put, RegistryError, Store

#: Records in one transaction. etcd takes 128 operations; beyond some dozens there is nothing left to gain.
BATCH_MAX = 64
#: Bytes of values in one transaction (etcd's requests end at 1.5 MiB). One record alone is always sent.
BATCH_BYTES_MAX = 512 * 1024
#: Transactions under way at once: while etcd writes one to disk the next is on its way. Only full ones, though: many
#: small ones cost more than they hasten.
IN_FLIGHT_MAX = 2


class Created(NamedTuple):
    """How it went: the key's create revision when it is new, else what was there."""

    revision: int = 0
    present: KeyValue | None = None


@dataclass(slots=True)
class _Wish:
    key: str
    value: bytes
    outcome: asyncio.Future[Created]


class Registrar:
    """`create` puts a key that must not be there yet. Belongs to one event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: deque[_Wish] = deque()
        self._writing: set[asyncio.Task[None]] = set()
        #: Keys in transactions under way: two wishes for one key never travel together.
        self._keys: set[str] = set()

    async def create(self, key: str, value: bytes) -> Created:
        """Put `key` if it is absent. Raises what the store raises; then it may or may not have happened."""
        wish = _Wish(key, value, asyncio.get_running_loop().create_future())
        self._waiting.append(wish)
        self._send()
        return await wish.outcome

    async def create_many(self, items: Iterable[tuple[str, bytes]]) -> list[Created | RegistryError]:
        """`create` for many keys at once, all different: for each how it went, or what `create` would have raised."""
        loop = asyncio.get_running_loop()
        wishes = [_Wish(key, value, loop.create_future()) for key, value in items]
        self._waiting.extend(wishes)
        self._send()
        outcomes: list[Created | RegistryError] = []
        for outcome in await asyncio.gather(*(wish.outcome for wish in wishes), return_exceptions=True):
            if not isinstance(outcome, Created | RegistryError):
                raise outcome
            outcomes.append(outcome)
        return outcomes

    def _send(self) -> None:
        while self._waiting and self._may_send():
            batch = self._take()
            if not batch:
                return
            self._keys.update(wish.key for wish in batch)
            task = asyncio.get_running_loop().create_task(self._write(batch))
            self._writing.add(task)
            task.add_done_callback(self._done)

    def _may_send(self) -> bool:
        if not self._writing:
            return True
        return len(self._waiting) >= BATCH_MAX and len(self._writing) < IN_FLIGHT_MAX

    def _done(self, task: asyncio.Task[None]) -> None:
        self._writing.discard(task)
        self._send()

    def _take(self) -> list[_Wish]:
        batch: list[_Wish] = []
        later: list[_Wish] = []
        keys = set(self._keys)
        size_bytes = 0
        while self._waiting and len(batch) < BATCH_MAX:
            wish = self._waiting[0]
            if wish.outcome.done():
                # Its caller has left before it was sent.
                self._waiting.popleft()
                continue
            size_bytes += len(wish.value)
            if batch and size_bytes > BATCH_BYTES_MAX:
                break
            self._waiting.popleft()
            (later if wish.key in keys else batch).append(wish)
            keys.add(wish.key)
        self._waiting.extendleft(reversed(later))
        return batch

    async def _write(self, batch: list[_Wish]) -> None:
        compares = [Compare.absent(wish.key) for wish in batch]
        puts = [Put(wish.key, wish.value) for wish in batch]
        try:
            result = await self._store.txn(compares, puts, [Get(wish.key) for wish in batch])
            if result.succeeded:
                for wish in batch:
                    _settle(wish, Created(revision=result.revision))
                return
            # Some are there already, so none was written: those are answered, the others go again without them.
            absent = []
            for wish, present in zip(batch, result.gets, strict=True):
                if present is None:
                    absent.append(wish)
                else:
                    _settle(wish, Created(present=present))
            self._waiting.extendleft(reversed(absent))
        except RegistryError as error:
            for wish in batch:
                if not wish.outcome.done():
                    wish.outcome.set_exception(type(error)(*error.args))
        except BaseException:
            for wish in batch:
                wish.outcome.cancel()
            raise
        finally:
            self._keys.difference_update(wish.key for wish in batch)


def _settle(wish: _Wish, created: Created) -> None:
    if not wish.outcome.done():
        wish.outcome.set_result(created)
