"""The records of the registry, as frozen values, and their JSON codec.

Rule of the file: a record is data about the mesh, never behaviour. Every record is one small key in the store
(ARCHITECTURE section 4). Values are JSON objects with a version field ``v``; fields this version does not know are
kept in ``extra`` and written back, so that a rolling upgrade never loses what a newer process wrote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Self

import orjson

#: Version written into every value. A reader accepts any version: fields are only ever added.
RECORD_VERSION = 1


class RecordError(ValueError):
    """A registry value that cannot be read as the record its key promises."""


class CopyState(StrEnum):
    """Where a copy is in its life on one instance (see the vocabulary in the docs)."""

    RESERVED = "reserved"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """What all records share: unknown fields ride along in ``extra``."""

    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def encode(self) -> bytes:
        """This record as a JSON value for the store."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return orjson.dumps({**self.extra, "v": RECORD_VERSION, **body})

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """The record in a store value; raises `RecordError` on anything that is not one."""
        try:
            raw = orjson.loads(value)
            if not isinstance(raw, dict):
                raise RecordError(f"{cls.__name__}: expected a JSON object")
            raw.pop("v", None)
            known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
            extra = {name: raw.pop(name) for name in list(raw) if name not in known}
            record = cls._from_fields(raw, extra)
            record._check_types()
            return record
        except RecordError:
            raise
        except (orjson.JSONDecodeError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RecordError(f"{cls.__name__}: {error}") from error

    @classmethod
    def _from_fields(cls, fields: dict[str, Any], extra: dict[str, Any]) -> Self:
        return cls(**fields, extra=extra)

    def _check_types(self) -> None:
        """Raise `RecordError` when a plain field holds another type than it should: better here than in a decision."""
        for name, types in _plain_fields(type(self)):
            if type(getattr(self, name)) not in types:
                raise RecordError(f"{type(self).__name__}: {name} is a {type(getattr(self, name)).__name__}")


#: What a field of each plain type may hold; JSON writes a whole float as an int.
_PLAIN_TYPES: dict[Any, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "float": (float, int)}


#: Name and types of the plain fields of each record class, filled on first use.
_PLAIN_FIELDS: dict[type, tuple[tuple[str, tuple[type, ...]], ...]] = {}


def _plain_fields(kind: type[_Record]) -> tuple[tuple[str, tuple[type, ...]], ...]:
    fields = _PLAIN_FIELDS.get(kind)
    if fields is None:
        fields = tuple((f.name, _PLAIN_TYPES[f.type]) for f in dataclasses.fields(kind) if f.type in _PLAIN_TYPES)
        _PLAIN_FIELDS[kind] = fields
    return fields


@dataclasses.dataclass(frozen=True, slots=True)
class LoadFailure:
    """Why a load failed on one instance, and until when that counts."""

    instance: str
    message: str
    at_ms: int
    expires_ms: int

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> LoadFailure:
        """A failure as read from JSON. Fields this version does not know are let go: failures expire soon anyway."""
        return cls(str(fields["instance"]), str(fields["message"]), int(fields["at_ms"]), int(fields["expires_ms"]))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord(_Record):
    """One registered model: ``models/<tenant>/<id>``. Immutable in what it serves (type, path, key).

    Times are milliseconds since the Unix epoch; sizes are bytes, 0 when not yet observed. The model's *generation* is
    the create revision of its key: re-registering an id after an unregister is a new generation.
    """

    tenant: str
    id: str
    type: str
    path: str
    key: str = ""
    size_bytes: int = 0
    last_used_ms: int = 0
    failures: tuple[LoadFailure, ...] = ()
    #: How many vmodels have it as their active model or as their target (one that has it as both counts once).
    refs: int = 0
    #: Created by a vmodel and to be deleted with the last of its `refs`.
    auto_delete: bool = False

    @property
    def name(self) -> str:
        """The model's full name, ``tenant/id``."""
        return f"{self.tenant}/{self.id}"

    def serves_same_as(self, other: ModelRecord) -> bool:
        """Whether both name the same thing to serve (what makes a second registration idempotent)."""
        return (self.type, self.path, self.key) == (other.type, other.path, other.key)

    @classmethod
    def _from_fields(cls, fields: dict[str, Any], extra: dict[str, Any]) -> Self:
        failures = tuple(LoadFailure.from_fields(f) for f in fields.pop("failures", ()))
        return cls(**fields, failures=failures, extra=extra)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VModelRecord(_Record):
    """One vmodel, a mutable alias of models of its tenant: ``vmodels/<tenant>/<id>``.

    `active` is the id of the model that answers. `target` is the same, or, in a transition, the id of the model that is
    to take over as soon as it is loaded. `failure` says why it could not be loaded ("": it was not tried, or is being),
    `retry_at_ms` (milliseconds since the Unix epoch) from when on it is tried again. `owner` is "" for nobody's.
    """

    tenant: str
    id: str
    active: str
    target: str
    owner: str = ""
    #: The target is to be loaded even if the active model is not.
    loads_target: bool = False
    failure: str = ""
    retry_at_ms: int = 0

    @property
    def name(self) -> str:
        """The vmodel's full name, ``tenant/id``."""
        return f"{self.tenant}/{self.id}"

    @property
    def active_name(self) -> str:
        """The full name of the active model."""
        return f"{self.tenant}/{self.active}"

    @property
    def target_name(self) -> str:
        """The full name of the target model."""
        return f"{self.tenant}/{self.target}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InstanceRecord(_Record):
    """One runtime process that holds models: ``instances/<id>``, on its lease.

    ``epoch`` is the lease id the instance lives under; a new lease is a new epoch. ``address`` is ``host:port`` of its
    data server. ``busy`` is the busy fraction of the last reporting period, 0.0 to 1.0. ``lru_age_ms`` is how long ago
    the least recently used copy was used (0 when empty).
    """

    id: str
    address: str
    pool: str
    epoch: int
    node: str = ""
    device: str = "cpu"
    capacity_bytes: int = 0
    used_bytes: int = 0
    device_capacity_bytes: int = 0
    device_used_bytes: int = 0
    load_slots: int = 1
    loads_in_progress: int = 0
    copies: int = 0
    lru_age_ms: int = 0
    busy: float = 0.0
    draining: bool = False
    types: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    @classmethod
    def _from_fields(cls, fields: dict[str, Any], extra: dict[str, Any]) -> Self:
        for name in ("types", "labels"):
            texts = fields.get(name, [])
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise RecordError(f"InstanceRecord: {name} is not a list of texts")
            fields[name] = tuple(texts)
        return cls(**fields, extra=extra)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CopyRecord(_Record):
    """One copy: model ``tenant/id`` on one instance: ``copies/<tenant>/<id>/<instance>``, on the instance's lease.

    ``generation`` is the create revision of the model record the copy was loaded for; a copy whose generation is not
    the model's is stale and must not be routed to.
    """

    state: CopyState
    generation: int
    size_bytes: int = 0
    loaded_at_ms: int = 0
    load_ms: int = 0

    @classmethod
    def _from_fields(cls, fields: dict[str, Any], extra: dict[str, Any]) -> Self:
        return cls(state=CopyState(fields.pop("state")), **fields, extra=extra)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GatewayRecord(_Record):
    """One gateway: ``gateways/<id>``, on its lease. ``data_address`` is where a runtime passes a stale route on to."""

    id: str
    data_address: str
    node: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LeaderRecord(_Record):
    """The placement controller in charge: ``leader``, on its lease. ``address`` is its control server."""

    id: str
    address: str
    epoch: int = 0
