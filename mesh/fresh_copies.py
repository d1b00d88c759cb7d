"""Copies that were just loaded and that the watch has not told of yet.

Rule of the file: no I/O, no clock. A placement's answer is newer than the view for some milliseconds; it is remembered
here so that the next request neither loads the model again nor waits for the watch. The view's word replaces it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from raymesh.registry.view import Change, CopyGone, CopyPut, InstanceGone, MeshView, ModelDeleted

#: A watch event is milliseconds away; what has not come after this long is not coming (the copy was evicted at once).
KEEP_S = 10.0


class Placed(NamedTuple):
    """A loaded copy: where it is (`address` is the instance's ``host:port``) and for which generation of its model."""

    instance: str
    address: str
    generation: int


class FreshCopies:
    """Placements by model name, until the view shows them, something speaks against them, or `KEEP_S` have passed."""

    def __init__(self) -> None:
        self._by_model: dict[str, dict[str, tuple[Placed, float]]] = {}
        #: When each entry ends, oldest first: what `add` sweeps.
        self._ends: dict[tuple[str, str], float] = {}

    def add(self, name: str, placed: Placed, view: MeshView, now_s: float) -> None:
        """Remember that model `name` was just loaded, unless `view` knows; `now_s` is on any steady clock."""
        self.forget(name, placed.instance)
        shown = view.copies_of(name).get(placed.instance)
        if shown is not None and shown.record.generation >= placed.generation:
            return
        while self._ends:
            oldest, end_s = next(iter(self._ends.items()))
            if end_s > now_s:
                break
            self.forget(*oldest)
        self._by_model.setdefault(name, {})[placed.instance] = (placed, now_s + KEEP_S)
        self._ends[name, placed.instance] = now_s + KEEP_S

    def of(self, name: str, generation: int, now_s: float) -> tuple[Placed, ...]:
        """The remembered copies of that generation of the model."""
        here = self._by_model.get(name)
        if not here:
            return ()
        return tuple(placed for placed, end_s in here.values() if placed.generation == generation and end_s > now_s)

    def forget(self, name: str, instance: str) -> None:
        """The copy is said to be gone; no error when it is not remembered."""
        here = self._by_model.get(name)
        if here and here.pop(instance, None) is not None:
            del self._ends[name, instance]
            if not here:
                del self._by_model[name]

    def see(self, changes: Iterable[Change]) -> None:
        """Let go of what the view has caught up with. Older generations' news says nothing about a newer copy."""
        if not self._ends:
            return
        for change in changes:
            match change:
                case CopyPut(name, instance, _, new):
                    self._forget_up_to(name, instance, new.record.generation)
                case CopyGone(name, instance, old):
                    self._forget_up_to(name, instance, old.record.generation)
                case ModelDeleted(name, old_model):
                    for instance in list(self._by_model.get(name, ())):
                        self._forget_up_to(name, instance, old_model.create_revision)
                case InstanceGone(instance, _):
                    for name, other in [key for key in self._ends if key[1] == instance]:
                        self.forget(name, other)
                case _:
                    pass

    def _forget_up_to(self, name: str, instance: str, generation: int) -> None:
        entry = self._by_model.get(name, {}).get(instance)
        if entry is not None and entry[0].generation <= generation:
            self.forget(name, instance)

    def __len__(self) -> int:
        return len(self._ends)
