"""The frozen views that decisions are made on.

Rule of the file: a view is facts, taken at one moment and never changed. "What if" is `dataclasses.replace`. Nothing in
here reads a clock: `ClusterView.now_ms` is the only time a decision knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

from raymesh.registry.records import CopyRecord, CopyState, InstanceRecord, LoadFailure, ModelRecord

#: Expected size of a model nobody has ever loaded, when its shell knows nothing better either (ModelMesh's default).
DEFAULT_SIZE_BYTES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceView:
    """One instance as a decision sees it: what it last reported plus what is on its way there.

    `types` empty means that it serves every type. `revision` is that of the record it was made from.
    """

    id: str
    capacity_bytes: int
    used_bytes: int = 0
    pool: str = ""
    types: frozenset[str] = frozenset()
    labels: frozenset[str] = frozenset()
    load_slots: int = 1
    loads_in_progress: int = 0
    copies: int = 0
    lru_age_ms: int = 0
    busy: float = 0.0
    is_draining: bool = False
    revision: int = 0
    #: Reserved by this controller and not yet in the instance's own report (see `placement.ledger`).
    pending_bytes: int = 0
    pending_loads: int = 0

    @property
    def free_bytes(self) -> int:
        """Room without evicting anything, after all that is on its way has arrived; negative when there is none."""
        return self.capacity_bytes - self.used_bytes - self.pending_bytes

    @property
    def loads(self) -> int:
        """Loads under way. Nearly all reported ones are also pending ones, hence the larger and not the sum."""
        return max(self.loads_in_progress, self.pending_loads)

    @classmethod
    def from_record(cls, record: InstanceRecord, *, revision: int = 0) -> Self:
        """What the registry says; `revision` is the record's mod revision."""
        return cls(
            id=record.id,
            capacity_bytes=record.capacity_bytes,
            used_bytes=record.used_bytes,
            pool=record.pool,
            types=frozenset(record.types),
            labels=frozenset(record.labels),
            load_slots=max(1, record.load_slots),
            loads_in_progress=record.loads_in_progress,
            copies=record.copies,
            lru_age_ms=record.lru_age_ms,
            busy=record.busy,
            is_draining=record.draining,
            revision=revision,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelView:
    """One model as a decision sees it. `copies` holds those of the model's current generation only, by instance."""

    name: str
    type: str
    size_bytes: int
    generation: int = 0
    failures: tuple[LoadFailure, ...] = ()
    copies: Mapping[str, CopyState] = field(default_factory=dict)
    #: Labels an instance must carry, all of them.
    labels: frozenset[str] = frozenset()

    @classmethod
    def from_records(
        cls,
        record: ModelRecord,
        generation: int,
        copies: Iterable[tuple[str, CopyRecord]] = (),
        *,
        size_hint_bytes: int = DEFAULT_SIZE_BYTES,
    ) -> Self:
        """What the registry says; `copies` are (instance id, record); `size_hint_bytes` if never loaded."""
        return cls(
            name=record.name,
            type=record.type,
            size_bytes=record.size_bytes or size_hint_bytes,
            generation=generation,
            failures=record.failures,
            copies={instance: copy.state for instance, copy in copies if copy.generation == generation},
        )

    def unexpired_failures(self, now_ms: int) -> tuple[LoadFailure, ...]:
        """The failures that still count."""
        return tuple(f for f in self.failures if f.expires_ms > now_ms)


@dataclass(frozen=True, slots=True)
class ClusterView:
    """All instances at one moment.

    `now_ms` is milliseconds since the Unix epoch, the clock of `LoadFailure.expires_ms`; `revision` is the registry's.
    """

    now_ms: int
    revision: int
    instances: tuple[InstanceView, ...]

    @classmethod
    def from_records(cls, now_ms: int, revision: int, records: Iterable[tuple[InstanceRecord, int]]) -> Self:
        """The view of (record, its mod revision) pairs, in order of instance id so that decisions repeat."""
        views = (InstanceView.from_record(record, revision=mod_revision) for record, mod_revision in records)
        return cls(now_ms, revision, tuple(sorted(views, key=lambda instance: instance.id)))

    def instance(self, instance_id: str) -> InstanceView | None:
        """The instance, None when it is not (or no longer) here. Linear time."""
        return next((i for i in self.instances if i.id == instance_id), None)


class InstanceViews:
    """Views of the instances, each rebuilt only when its record changes, so that a decision need not pay for it."""

    def __init__(self) -> None:
        self._views: dict[str, InstanceView] = {}
        self._sorted: tuple[InstanceView, ...] | None = ()

    def put(self, record: InstanceRecord, revision: int) -> None:
        """The instance reported itself; `revision` is the record's mod revision."""
        self._views[record.id] = InstanceView.from_record(record, revision=revision)
        self._sorted = None

    def remove(self, instance_id: str) -> None:
        """The instance is gone; no error when it was not here."""
        if self._views.pop(instance_id, None) is not None:
            self._sorted = None

    def at(self, now_ms: int, revision: int) -> ClusterView:
        """All of them as one view, in order of instance id."""
        if self._sorted is None:
            self._sorted = tuple(self._views[instance_id] for instance_id in sorted(self._views))
        return ClusterView(now_ms, revision, self._sorted)


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """Which model needs a place, and where not to put it (instances already tried)."""

    model: ModelView
    excluded: frozenset[str] = frozenset()
