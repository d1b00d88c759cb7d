"""What the controller learns about models, written back to their records by compare-and-set.

Rule of the file: a note is about one generation; when the record is gone or another one, the note is dropped. Notes
never stand in the way of a placement: a registry that cannot be reached costs the note, not the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from raymesh.registry.records import LoadFailure, ModelRecord, RecordError
from raymesh.registry.store import Compare, Get, Put, RegistryError, Store
from raymesh.registry.view import Entry, MeshView, ModelEntry

log = logging.getLogger(__name__)

#: Unexpired failures kept on a record, the newest; more tell a reader nothing new.
FAILURES_MAX = 8
#: Lost races before a note is given up; each means that somebody else wrote the same record in between.
TRIES_MAX = 5
#: A size is written again when it differs from the recorded one by more than this fraction.
SIZE_CHANGE = 0.10


def with_failure(record: ModelRecord, failure: LoadFailure) -> ModelRecord:
    """The record with one more failure; expired ones and the instance's earlier one go."""
    others = [f for f in record.failures if f.expires_ms > failure.at_ms and f.instance != failure.instance]
    return replace(record, failures=(*others, failure)[-FAILURES_MAX:])


def with_load(record: ModelRecord, size_bytes: int) -> ModelRecord:
    """The record after a good load: no failures, and the size when it is news."""
    is_news = abs(size_bytes - record.size_bytes) > SIZE_CHANGE * record.size_bytes
    return replace(record, failures=(), size_bytes=size_bytes if size_bytes and is_news else record.size_bytes)


class ModelNotes:
    """Writes notes, and knows the records it wrote until the view shows them."""

    def __init__(self, store: Store, view: MeshView) -> None:
        self._store = store
        self._view = view
        #: Records written by us and newer than the view's, by model name.
        self._written: dict[str, ModelEntry] = {}

    def entry(self, name: str) -> ModelEntry | None:
        """The newest of what the view shows and what was written here; None when the view knows no such model."""
        seen, written = self._view.models.get(name), self._written.get(name)
        if written is None:
            return seen
        if seen and seen.create_revision == written.create_revision and seen.mod_revision < written.mod_revision:
            return written
        del self._written[name]
        return seen

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
                    self._written[name] = Entry(record, entry.create_revision, result.revision)
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
