"""Keep a `MeshView` true: list, watch, and re-list when the history is gone.

Rule of the file: the view only ever moves to something the store said. While the store is away the last view stands.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from raymesh.registry.backoff import Backoff
from raymesh.registry.store import RegistryError, RevisionCompacted, Store
from raymesh.registry.view import Change, MeshView

log = logging.getLogger(__name__)

#: Watches of some etcd releases are known to lose events; a full comparison at least this often puts that right.
AUDIT_PERIOD_S = 300.0


async def follow(
    store: Store,
    prefix: str,
    view: MeshView,
    on_changes: Callable[[tuple[Change, ...]], None],
    *,
    synced: asyncio.Event | None = None,
    audit_period_s: float = AUDIT_PERIOD_S,
    on_difference: Callable[[tuple[Change, ...]], None] | None = None,
) -> None:
    """Feed `view` from `store` for ever (cancel to end).

    `on_changes` is called after the view has changed, with what changed, never with nothing; it must be quick and must
    not block (it runs in the loop; put work into a queue). What it raises ends `follow`. `synced` is set once the view
    has been filled from the store and its changes were passed on; `view.is_synced` says the same. `on_difference` is
    told what a periodic comparison had to put right (those changes are passed to `on_changes` as well). An unreachable
    store raises nothing: it is waited for.
    """
    await _Follower(store, prefix, view, on_changes, on_difference, audit_period_s).run(synced or asyncio.Event())


class _Follower:
    def __init__(
        self,
        store: Store,
        prefix: str,
        view: MeshView,
        on_changes: Callable[[tuple[Change, ...]], None],
        on_difference: Callable[[tuple[Change, ...]], None] | None,
        audit_period_s: float,
    ) -> None:
        self._store, self._prefix, self._view = store, prefix, view
        self._on_changes, self._on_difference = on_changes, on_difference
        self._audit_period_s = audit_period_s
        #: Keys of the events applied since an audit took its revision; None while there is no audit.
        self._touched: set[str] | None = None

    async def run(self, synced: asyncio.Event) -> None:
        backoff = Backoff()
        while True:
            try:
                listing = await self._store.list(self._prefix)
                self._tell(self._view.replace(listing))
                synced.set()
                backoff.reset()
                await self._watch(listing.revision + 1)
            except RevisionCompacted as error:
                log.info("re-listing %s: %s", self._prefix, error)
            except RegistryError as error:
                log.warning("the view of %s stands at revision %d: %s", self._prefix, self._view.revision, error)
            await asyncio.sleep(backoff.next_s())

    async def _watch(self, from_revision: int) -> None:
        auditing = asyncio.create_task(self._audit_for_ever())
        try:
            async with contextlib.aclosing(self._store.watch(self._prefix, from_revision=from_revision)) as batches:
                async for batch in batches:
                    if self._touched is not None:
                        self._touched.update(event.kv.key for event in batch.events)
                    self._tell(self._view.apply(batch.events, batch.revision))
                    if auditing.done():
                        # It only ends by an error, which is ours to raise.
                        await auditing
        finally:
            self._touched = None
            auditing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await auditing

    async def _audit_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._audit_period_s)
            try:
                await self._audit()
            except RegistryError as error:
                log.info("the view of %s could not be compared: %s", self._prefix, error)

    async def _audit(self) -> None:
        """Compare the view with a listing at the view's own revision, while events go on being applied."""
        self._touched = touched = set[str]()
        try:
            listing = await self._store.list(self._prefix, revision=self._view.revision)
            changes = self._view.repair(listing, frozenset(touched))
        finally:
            self._touched = None
        if changes:
            log.error("the watch of %s had lost %d changes, e.g. %s", self._prefix, len(changes), changes[0])
            if self._on_difference:
                self._on_difference(changes)
            self._tell(changes)

    def _tell(self, changes: tuple[Change, ...]) -> None:
        if changes:
            self._on_changes(changes)
