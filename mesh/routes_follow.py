"""Keeps the front door's table true: changes of the view become changes of routes and instances.

Rule of the file: level-triggered. A change only says where to look; what is told is computed from the view as it is
now, and only when it differs from what was told before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from raymesh.mesh.route_table import Route, all_routes, route_of
from raymesh.registry.view import Change, CopyGone, CopyPut, InstanceGone, InstancePut, MeshView, ModelDeleted, ModelPut


class Door(Protocol):
    """What this file and the gateway need of a front door (see `front_door.FrontDoor`)."""

    async def start(self) -> None:
        """Start, or adopt, the proxy."""
        ...

    def set_gateway(self, data_addr: str | None, grpc_addr: str | None, rest_addr: str | None) -> None:
        """Where the gateway's listeners are."""
        ...

    def set_instance(self, instance_id: str, address: str) -> None:
        """A runtime is at `address`."""
        ...

    def remove_instance(self, instance_id: str) -> None:
        """A runtime is gone."""
        ...

    def set_route(self, name: str, instance_ids: Iterable[str]) -> None:
        """Model `name` is held by `instances`."""
        ...

    def del_route(self, name: str) -> None:
        """No runtime holds model `name`."""
        ...

    def resync(self, instances: Mapping[str, str], routes: Mapping[str, Iterable[str]]) -> None:
        """Replace everything."""
        ...

    async def close(self) -> None:
        """Let go of the proxy, which goes on serving."""
        ...


class RoutesFollower:
    """Tells `door` what the view says. `see` must get every change of the view, after the view has it."""

    def __init__(self, view: MeshView, door: Door) -> None:
        self._view = view
        self._door = door
        #: What the door was told.
        self._told: dict[str, Route] = {}

    @property
    def routes(self) -> int:
        """How many models have a route."""
        return len(self._told)

    def resync(self) -> None:
        """Tell everything again."""
        self._told = all_routes(self._view)
        addresses = {name: entry.record.address for name, entry in self._view.instances.items()}
        self._door.resync(addresses, self._told)

    def see(self, changes: Iterable[Change]) -> None:
        """Follow the view."""
        names: dict[str, None] = {}
        for change in changes:
            match change:
                case CopyPut(name, _, _, _) | CopyGone(name, _, _) | ModelPut(name, None, _) | ModelDeleted(name, _):
                    names[name] = None
                case InstancePut(instance, old, new):
                    if old is None or old.record.address != new.record.address:
                        self._door.set_instance(instance, new.record.address)
                    if old is None or old.record.draining != new.record.draining:
                        names.update(dict.fromkeys(self._view.copies_on(instance)))
                case InstanceGone(instance, _):
                    if instance not in self._view.instances:
                        self._door.remove_instance(instance)
                    names.update(dict.fromkeys(self._view.copies_on(instance)))
                case _:
                    pass
        for name in names:
            self._tell(name, route_of(self._view, name))

    def add(self, name: str, instance: str) -> None:
        """A copy was just loaded; the view will say so in a moment."""
        entry = self._view.instances.get(instance)
        if entry is not None and not entry.record.draining:
            self._tell(name, tuple(sorted({*self._told.get(name, ()), instance})))

    def drop(self, name: str) -> None:
        """The model is gone; the view will say so in a moment."""
        self._tell(name, ())

    def _tell(self, name: str, route: Route) -> None:
        if self._told.get(name, ()) == route:
            return
        if route:
            self._told[name] = route
            self._door.set_route(name, route)
        else:
            del self._told[name]
            self._door.del_route(name)
