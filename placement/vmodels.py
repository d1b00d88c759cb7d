"""Vmodels: what a call makes of one, and when its target takes over.

Rule of the file: a plan is all records that change, to be written in one transaction or not at all; so the reference
counts of the models are true at every revision. Nothing here knows how a model gets loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from raymesh.registry.records import LoadFailure, ModelRecord, VModelRecord

#: When a target is tried again that failed for a reason which does not expire by itself (no room, a time-out).
RETRY_MS = 30_000
#: Shortest pause before a failed target is tried again: failures may be about to expire.
RETRY_MIN_MS = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SetVModel:
    """One ``setVModel`` call. Model ids are without their tenant, which is the vmodel's."""

    tenant: str
    id: str
    target: str
    #: The target's record if it is to be created (or must be there with the same type, path and key); None: it must
    #: be there.
    created: ModelRecord | None = None
    owner: str = ""
    updates_only: bool = False
    loads_now: bool = False
    is_forced: bool = False
    #: The target the vmodel must have now, "" for any. Equal to `target`: the vmodel may also be absent.
    expected_target: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Records to write: the vmodel's and the models' that change, by id; None deletes."""

    vmodel: VModelRecord | None
    models: Mapping[str, ModelRecord | None] = field(default_factory=dict)

    @property
    def deleted(self) -> tuple[str, ...]:
        """Ids of the models that go."""
        return tuple(sorted(model for model, record in self.models.items() if record is None))


@dataclass(frozen=True, slots=True)
class Refusal:
    """The call must fail; `code` names a gRPC status."""

    code: str
    message: str


def models_of(vmodel: VModelRecord | None) -> frozenset[str]:
    """Ids of the models that the vmodel refers to."""
    return frozenset() if vmodel is None else frozenset({vmodel.active, vmodel.target})


def takes_over(vmodel: VModelRecord, loaded: Collection[str]) -> bool:
    """Whether the target may become the active model, given the ids of the models that have a loaded copy.

    It may when it can answer, or when the active model could not answer without a load either.
    """
    return vmodel.target in loaded or not (vmodel.active in loaded or vmodel.loads_target)


# -- plans -------------------------------------------------------------------------------------------------------------


def plan_set(
    wish: SetVModel, vmodel: VModelRecord | None, models: Mapping[str, ModelRecord], loaded: Collection[str]
) -> Plan | Refusal:
    """What a ``setVModel`` call writes. `models` are the records there are of the models it touches, by id."""
    refusal = _refusal(wish, vmodel, models.get(wish.target))
    if refusal is not None:
        return refusal
    if vmodel is None:
        new = VModelRecord(tenant=wish.tenant, id=wish.id, active=wish.target, target=wish.target, owner=wish.owner)
    else:
        # The same call again keeps what it began, and tries a target that had failed once more.
        loads_target = wish.loads_now or (vmodel.loads_target and vmodel.target == wish.target)
        new = replace(vmodel, target=wish.target, loads_target=loads_target, failure="", retry_at_ms=0)
        if new.active == new.target or wish.is_forced or takes_over(new, loaded):
            new = _with_target_active(new)
    created = wish.created
    if created is not None and vmodel is not None and (active := models.get(vmodel.active)) is not None:
        # The newcomer is as important to the cache as what it is to replace.
        created = replace(created, last_used_ms=active.last_used_ms or created.last_used_ms)
    return _plan(vmodel, new, {**({wish.target: created} if created else {}), **models})


def plan_flip(vmodel: VModelRecord | None, target: str, models: Mapping[str, ModelRecord]) -> Plan | None:
    """What is written when `target` takes over; None when it is not the target any more, or is active already."""
    if vmodel is None or vmodel.target != target or vmodel.active == target:
        return None
    return _plan(vmodel, _with_target_active(vmodel), models)


def plan_failure(vmodel: VModelRecord | None, target: str, message: str, retry_at_ms: int) -> Plan | None:
    """What is written when `target` cannot be loaded; None when it is not waited for any more."""
    if vmodel is None or vmodel.target != target or vmodel.active == target:
        return None
    return Plan(replace(vmodel, failure=message or "it cannot be loaded", retry_at_ms=retry_at_ms))


def plan_delete(vmodel: VModelRecord | None, owner: str, models: Mapping[str, ModelRecord]) -> Plan | None:
    """What ``deleteVModel`` writes; None when there is nothing to delete, or (`owner` not "") it is somebody else's."""
    if vmodel is None or (owner and owner != vmodel.owner):
        return None
    return _plan(vmodel, None, models)


def _refusal(wish: SetVModel, vmodel: VModelRecord | None, target: ModelRecord | None) -> Refusal | None:
    if vmodel is None:
        if wish.updates_only:
            return Refusal("NOT_FOUND", f"vmodel '{wish.id}' is not found")
        if wish.expected_target not in {"", wish.target}:
            return Refusal("FAILED_PRECONDITION", f"vmodel '{wish.id}' is not found")
    elif wish.owner and wish.owner != vmodel.owner:
        return Refusal("ALREADY_EXISTS", f'vmodel {wish.id} already exists with different owner "{vmodel.owner}"')
    elif wish.target != vmodel.target and wish.expected_target not in {"", vmodel.target}:
        # With the target as wished already, the call is one that was made before and is repeated.
        return Refusal(
            "FAILED_PRECONDITION",
            f"vmodel '{wish.id}' has the target '{vmodel.target}', not the expected '{wish.expected_target}'",
        )
    if target is None and wish.created is None:
        return Refusal("NOT_FOUND", f"target model '{wish.target}' is not found")
    if target is not None and wish.created is not None and not target.serves_same_as(wish.created):
        return Refusal(
            "ALREADY_EXISTS", f"target model '{wish.target}' is already registered with another type, path or key"
        )
    return None


def _with_target_active(vmodel: VModelRecord) -> VModelRecord:
    return replace(vmodel, active=vmodel.target, loads_target=False, failure="", retry_at_ms=0)


def _plan(old: VModelRecord | None, new: VModelRecord | None, models: Mapping[str, ModelRecord]) -> Plan:
    """The change of a vmodel from `old` to `new`, with what it does to the models' reference counts."""
    before, after = models_of(old), models_of(new)
    changed: dict[str, ModelRecord | None] = {}
    for model in sorted(before ^ after):
        record = models.get(model)
        if record is None:
            continue
        refs = max(0, record.refs + (1 if model in after else -1))
        changed[model] = None if refs == 0 and record.auto_delete else replace(record, refs=refs)
    return Plan(new, changed)


# -- transitions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flip:
    """Write `plan_flip`."""


@dataclass(frozen=True, slots=True)
class LoadTarget:
    """Have a copy of the target loaded; then ask again, or write `plan_failure`."""


@dataclass(frozen=True, slots=True)
class Wait:
    """The target cannot be loaded; ask again at `until_ms`, or when something has changed."""

    until_ms: int


Step = Flip | LoadTarget | Wait


def next_step(vmodel: VModelRecord, loaded: Collection[str], now_ms: int) -> Step | None:
    """What to do about a vmodel; None when it is not in transition. `loaded` as for `takes_over`."""
    if vmodel.active == vmodel.target:
        return None
    if takes_over(vmodel, loaded):
        return Flip()
    if vmodel.failure and now_ms < vmodel.retry_at_ms:
        return Wait(vmodel.retry_at_ms)
    return LoadTarget()


def retry_at_ms(failures: Iterable[LoadFailure], now_ms: int) -> int:
    """When a target that failed is to be tried again: as soon as the first of its failures has expired."""
    expiries = [f.expires_ms for f in failures if f.expires_ms > now_ms]
    return max(min(expiries), now_ms + RETRY_MIN_MS) if expiries else now_ms + RETRY_MS
