"""What the controller learns about models, written back to their records by compare-and-set.

Rule of the file: a note is about one generation; when the record is gone or another one, the note is dropped. Notes
never stand in the way of a placement: a registry that cannot be reached costs the note, not the answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from raymesh.registry.records import LoadFailure, ModelRecord, RecordError
from raymesh.registry.store import Compare, Get, Put, RegistryError, RequestTooLarge, Store
from raymesh.registry.view import Change, Entry, MeshView, ModelDeleted, ModelEntry, ModelPut

log = logging.getLogger(__name__)

#: Unexpired failures kept on a record, the newest; more tell a reader nothing new.
FAILURES_MAX = 8
#: Lost races before a note is given up; each means that somebody else wrote the same record in between.
TRIES_MAX = 5
#: A size is written again when it differs from the recorded one by more than this fraction.
SIZE_CHANGE = 0.10
#: How long a size waits for others to share its transaction. It serves the model's next load; the caller that waits for
#: this one must not share the machine with its writing.
SIZES_PERIOD_S = 0.2
#: Sizes in one transaction: few enough to fit, as records are small.
SIZES_MAX = 64


def with_failure(record: ModelRecord, failure: LoadFailure) -> ModelRecord:
    """The record with one more failure; expired ones and the instance's earlier one go."""
    others = [f for f in record.failures if f.expires_ms > failure.at_ms and f.instance != failure.instance]
    return replace(record, failures=(*others, failure)[-FAILURES_MAX:])


def with_load(record: ModelRecord, size_bytes: int) -> ModelRecord:
    """The record after a good load: no failures, and the size when it is news."""
    is_news = abs(size_bytes - record.size_bytes) > SIZE_CHANGE * record.size_bytes
    return replace(record, failures=(), size_bytes=size_bytes if size_bytes and is_news else record.size_bytes)


class ModelNotes:
    """Writes notes, and knows the records it wrote until the view shows them.

    `see` must get every change of the view, after the view has it: else what was written is kept for ever.
    """

    def __init__(self, store: Store, view: MeshView) -> None:
        self._store = store
        self._view = view
        #: Records written by us and newer than the view's, by model name.
        self._written: dict[str, ModelEntry] = {}
        #: Sizes to be written, with the entries they are about.
        self._sizes: dict[str, tuple[ModelEntry, int]] = {}
        self._sizing: asyncio.Task[None] | None = None

    def see(self, changes: Iterable[Change]) -> None:
        """Let go of the records that the view has caught up with."""
        if self._written:
            for change in changes:
                if isinstance(change, ModelPut | ModelDeleted) and change.name in self._written:
                    self.entry(change.name)

    def entry(self, name: str) -> ModelEntry | None:
        """The newest of what the view shows and what was written here; None when the view knows no such model."""
        seen, written = self._view.models.get(name), self._written.get(name)
        if written is None:
            return seen
        if seen and seen.create_revision == written.create_revision and seen.mod_revision < written.mod_revision:
            return written
        del self._written[name]
        return seen

    def latest(self, entry: ModelEntry) -> ModelEntry:
        """The same generation's newest record (its failures and size change meanwhile)."""
        known = self.entry(entry.record.name)
        if known is None or known.create_revision != entry.create_revision or known.mod_revision < entry.mod_revision:
            return entry
        return known

    def write_size_soon(self, entry: ModelEntry, size_bytes: int) -> None:
        """Have a measured size on the model's record, within `SIZES_PERIOD_S` and together with others."""
        self._sizes[entry.record.name] = (entry, size_bytes)
        if self.is_idle:
            self._sizing = asyncio.create_task(self._write_sizes(), name="write sizes")

    @property
    def is_idle(self) -> bool:
        """Whether no size waits to be written."""
        return self._sizing is None or self._sizing.done()

    async def close(self) -> None:
        """Drop what is not written yet."""
        if self._sizing is not None:
            self._sizing.cancel()
            await asyncio.gather(self._sizing, return_exceptions=True)

    async def _write_sizes(self) -> None:
        while self._sizes:
            await asyncio.sleep(SIZES_PERIOD_S)
            sizes = list(self._sizes.values())
            self._sizes = {}
            for first in range(0, len(sizes), SIZES_MAX):
                await self._write_together(sizes[first : first + SIZES_MAX])

    async def _write_together(self, sizes: Sequence[tuple[ModelEntry, int]]) -> None:
        """One transaction; when a record in it has changed, one for each."""
        changes = {}
        for entry, size_bytes in sizes:
            latest = self.latest(entry)
            record = with_load(latest.record, size_bytes)
            if record != latest.record:
                changes[self._view.keys.model(record.tenant, record.id)] = (latest, record, size_bytes)
        compares = [Compare(key, mod_revision=latest.mod_revision) for key, (latest, _, _) in changes.items()]
        puts = [Put(key, record.encode()) for key, (_, record, _) in changes.items()]
        if not changes:
            return
        revision = 0
        try:
            result = await self._store.txn(compares, puts)
            revision = result.revision if result.succeeded else 0
        except RequestTooLarge:
            pass
        except RegistryError as error:
            log.warning("%d sizes not written: %s", len(changes), error)
            return
        for latest, record, size_bytes in changes.values():
            if revision:
                self._remember(Entry(record, latest.create_revision, revision))
            else:
                await self.write(record.name, latest, partial(with_load, size_bytes=size_bytes))

    async def write(self, name: str, entry: ModelEntry, change: Callable[[ModelRecord], ModelRecord]) -> bool:
        """Apply `change` to the model's record. False when it was not written (gone, unreachable, contended)."""
        tenant, _, model = name.partition("/")
        key = self._view.keys.model(tenant, model)
        for _ in range(TRIES_MAX):
            record = change(entry.record)
            if record == entry.record:
                return True
            compare = Compare(key, mod_revision=entry.mod_revision)
            try:
                result = await self._store.txn([compare], [Put(key, record.encode())], [Get(key)])
                if result.succeeded:
                    self._remember(Entry(record, entry.create_revision, result.revision))
                    return True
                present = result.gets[0]
                if present is None or present.create_revision != entry.create_revision:
                    return False
                entry = Entry(ModelRecord.decode(present.value), present.create_revision, present.mod_revision)
            except (RegistryError, RecordError) as error:
                log.warning("note on %s not written: %s", name, error)
                return False
        log.warning("note on %s not written: its record changes all the time", name)
        return False

    def _remember(self, entry: ModelEntry) -> None:
        self._written[entry.record.name] = entry
        # The watch may have been faster than the answer: then there is nothing to remember.
        self.entry(entry.record.name)
