"""The controller's own reservations: what it has decided and the registry does not show yet.

Rule of the file: a decision is in the ledger before anything is awaited, so that two decisions made in the same
millisecond do not both count on the same free bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from raymesh.placement.view import ClusterView, InstanceView


@dataclass(frozen=True, slots=True)
class Pending:
    """One reservation. `settled_revision` is None while the load runs."""

    model: str
    instance: str
    size_bytes: int
    settled_revision: int | None = None


class Ledger:
    """The reservations of one controller, merged into the views it decides on.

    A reservation begins with the decision (`reserve`). It is gone with `forget` (the load did not happen) or, after
    `settled` (it did), as soon as the instance has reported itself at a later registry revision: until then its report
    lacks the new copy. `merged` also drops the reservations on instances that are gone.

    NB: an instance that reports in the middle of a load already counts it, so for the rest of that load its bytes
    count twice. That errs on the side of room and lasts as long as a load; its load slot is not counted twice.
    """

    def __init__(self) -> None:
        #: By instance, then by model; no empty inner dicts.
        self._pending: dict[str, dict[str, Pending]] = {}
        #: By instance: what `merged` made of which view. Valid while that view is the same object and no reservation
        #: on the instance has changed.
        self._merged: dict[str, tuple[InstanceView, InstanceView]] = {}

    def reserve(self, model: str, instance: str, size_bytes: int) -> None:
        """Book the room that was just decided on. Raises `ValueError` when that very load is already booked."""
        here = self._pending.get(instance, {})
        present = here.get(model)
        if present is not None and present.settled_revision is None:
            raise ValueError(f"{model} is already being loaded on {instance}")
        self._put(Pending(model, instance, size_bytes))

    def settled(self, model: str, instance: str, *, revision: int, size_bytes: int = 0) -> None:
        """The load ended well, seen when the registry was at `revision`; `size_bytes` is measured (0: as expected).

        No error when the reservation is gone already (the instance was lost, for example).
        """
        present = self._pending.get(instance, {}).get(model)
        if present is not None:
            self._put(replace(present, size_bytes=size_bytes or present.size_bytes, settled_revision=revision))

    def forget(self, model: str, instance: str) -> None:
        """The load did not happen; no error when there is no such reservation."""
        here = self._pending.get(instance)
        if here is None or here.pop(model, None) is None:
            return
        self._merged.pop(instance, None)
        if not here:
            del self._pending[instance]

    def loading(self, model: str) -> list[str]:
        """The instances where `model` is being loaded by this controller's doing."""
        here = ((instance, pending.get(model)) for instance, pending in self._pending.items())
        return sorted(instance for instance, p in here if p is not None and p.settled_revision is None)

    def merged(self, view: ClusterView) -> ClusterView:
        """`view` plus the reservations on its instances. Drops those that have ended or whose instance is gone."""
        if not self._pending:
            return view
        instances = list(view.instances)
        found = [n for n, instance in enumerate(instances) if instance.id in self._pending]
        if len(found) < len(self._pending):
            here = {instances[n].id for n in found}
            for gone in [instance for instance in self._pending if instance not in here]:
                del self._pending[gone]
                self._merged.pop(gone, None)
        for n in found:
            instances[n] = self._merge(instances[n])
        return ClusterView(view.now_ms, view.revision, tuple(instances))

    def _put(self, pending: Pending) -> None:
        self._pending.setdefault(pending.instance, {})[pending.model] = pending
        self._merged.pop(pending.instance, None)

    def _merge(self, view: InstanceView) -> InstanceView:
        cached = self._merged.get(view.id)
        if cached is not None and cached[0] is view:
            return cached[1]
        here = self._pending[view.id]
        for model, p in list(here.items()):
            if p.settled_revision is not None and view.revision > p.settled_revision:
                del here[model]
        if not here:
            del self._pending[view.id]
            self._merged.pop(view.id, None)
            return view
        merged = replace(
            view,
            pending_bytes=sum(p.size_bytes for p in here.values()),
            pending_loads=sum(p.settled_revision is None for p in here.values()),
        )
        self._merged[view.id] = (view, merged)
        return merged

    def __iter__(self) -> Iterator[Pending]:
        return (pending for here in self._pending.values() for pending in here.values())

    def __len__(self) -> int:
        return sum(map(len, self._pending.values()))

    def __repr__(self) -> str:
        body = ", ".join(
            f"{p.model}@{p.instance}={p.size_bytes}{'' if p.settled_revision is None else '!'}" for p in self
        )
        return f"Ledger({body})"
