"""Writes of vmodels: read the records, plan the change, write all of it in one transaction or start over.

Rule of the file: what is written is decided in `placement.vmodels` on the records as they are in the registry; every
record that changes is compared with the one that was read, so a plan is carried out on the facts it was made for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from raymesh.placement.vmodels import Plan, models_of
from raymesh.registry.keys import Keys
from raymesh.registry.records import ModelRecord, RecordError, VModelRecord
from raymesh.registry.store import Compare, Delete, Get, KeyValue, Op, Put, Store
from raymesh.registry.view import Entry, VModelEntry
from raymesh.runtimes.errors import Reason, Unavailable

#: Lost races before a change is given up; each means that somebody else wrote one of a handful of records in between.
TRIES_MAX = 20

#: Takes the vmodel's record and those of the models it refers to, by id; None: nothing is to be written.
Decide = Callable[[VModelRecord | None, Mapping[str, ModelRecord]], Plan | None]


class Written(NamedTuple):
    """The vmodel after a change, None when it is gone; (full name, generation) of the models that went with it."""

    entry: VModelEntry | None
    deleted: tuple[tuple[str, int], ...] = ()


class VModelWrites:
    """Changes vmodels by compare-and-set."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys

    async def read(self, name: str) -> VModelEntry | None:
        """Vmodel `name` (``tenant/id``) straight from the registry. Raises `RegistryError`."""
        tenant, _, vmodel = name.partition("/")
        kv = await self._store.get(self._keys.vmodel(tenant, vmodel))
        record = _vmodel_in(kv)
        return None if kv is None or record is None else Entry(record, kv.create_revision, kv.mod_revision)

    async def write(self, name: str, decide: Decide, *, also: str = "") -> Written | None:
        """Carry out what `decide` plans for vmodel `name`; None when it plans nothing.

        `also` is the id of a model whose record `decide` needs besides those of the vmodel. Whatever `decide` raises
        ends the change. Raises `RegistryError`, `Unavailable` when others change the same records all the time.
        """
        tenant, _, vmodel = name.partition("/")
        key = self._keys.vmodel(tenant, vmodel)
        for _ in range(TRIES_MAX):
            present = await self._store.get(key)
            old = _vmodel_in(present)
            ids = sorted(models_of(old) | ({also} if also else set()))
            gets = [Get(self._keys.model(tenant, model)) for model in ids]
            found = (await self._store.txn([], gets)).gets if gets else ()
            kvs = {model: kv for model, kv in zip(ids, found, strict=True) if kv is not None}
            plan = decide(old, _models_in(kvs))
            if plan is None:
                return None
            if plan.vmodel == old and not plan.models:
                assert present is not None and old is not None
                return Written(Entry(old, present.create_revision, present.mod_revision))
            compares = [Compare(key, mod_revision=present.mod_revision if present else 0)]
            ops: list[Op] = [Delete(key) if plan.vmodel is None else Put(key, plan.vmodel.encode())]
            for model, record in plan.models.items():
                model_key = self._keys.model(tenant, model)
                compares.append(Compare(model_key, mod_revision=kvs[model].mod_revision if model in kvs else 0))
                ops.append(Delete(model_key) if record is None else Put(model_key, record.encode()))
            result = await self._store.txn(compares, ops)
            if result.succeeded:
                deleted = tuple((f"{tenant}/{model}", kvs[model].create_revision) for model in plan.deleted)
                if plan.vmodel is None:
                    return Written(None, deleted)
                created = present.create_revision if present else result.revision
                return Written(Entry(plan.vmodel, created, result.revision), deleted)
        raise Unavailable(
            f"vmodel '{vmodel}' or its models are being changed all the time", reason=Reason.REGISTRY_UNAVAILABLE
        )


def _vmodel_in(kv: KeyValue | None) -> VModelRecord | None:
    # As in the view: what cannot be read counts as absent.
    try:
        return VModelRecord.decode(kv.value) if kv is not None else None
    except RecordError:
        return None


def _models_in(kvs: Mapping[str, KeyValue]) -> dict[str, ModelRecord]:
    models = {}
    for model, kv in kvs.items():
        try:
            models[model] = ModelRecord.decode(kv.value)
        except RecordError:
            continue
    return models
