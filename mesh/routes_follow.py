"""Keeps the front door's table true: changes of the view become changes of routes and instances.

Rule of the file: level-triggered. A change only says where to look; what is told is computed from the view as it is
now, and only when it differs from what was told before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from raymesh.mesh.route_table import Route, all_routes, keys_of_vmodel, route_at, vmodel_key
from raymesh.registry.view import (
    Change,
    CopyGone,
    CopyPut,
    InstanceGone,
    InstancePut,
    MeshView,
    ModelDeleted,
    ModelPut,
    VModelDeleted,
    VModelPut,
)

log = logging.getLogger(__name__)

_NOWHERE = Route(())


class Door(Protocol):
    """What this file and the gateway need of a front door (see `front_door.FrontDoor`)."""

    async def start(self) -> None:
        """Start, or adopt, the proxy."""
        ...

    def set_gateway(self, data_addr: str | None, grpc_addr: str | None, rest_addr: str | None) -> None:
        """Where the gateway's listeners are."""
        ...

    def set_instance(self, instance_id: str, address: str) -> None:
        """A runtime is at `address`. Raises `ValueError` when that, or the id, is not one."""
        ...

    def remove_instance(self, instance_id: str) -> None:
        """A runtime is gone."""
        ...

    def set_route(self, name: str, instance_ids: Iterable[str], model: str = "") -> None:
        """Requests for `name` go to these instances, and are for `model` if `name` is a vmodel's."""
        ...

    def del_route(self, name: str) -> None:
        """No runtime holds model `name`."""
        ...

    def resync(
        self, instances: Mapping[str, str], routes: Mapping[str, Iterable[str]], models: Mapping[str, str]
    ) -> None:
        """Replace everything; `models` says which model the routes of vmodels lead to."""
        ...

    async def flushed(self) -> None:
        """Return when everything said so far is in force."""
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
        instances = {key: route.instances for key, route in self._told.items()}
        self._door.resync(addresses, instances, {key: route.model for key, route in self._told.items() if route.model})

    def see(self, changes: Iterable[Change]) -> None:
        """Follow the view."""
        names: dict[str, None] = {}
        for change in changes:
            match change:
                case CopyPut(name, _, _, _) | CopyGone(name, _, _) | ModelPut(name, None, _) | ModelDeleted(name, _):
                    names[name] = None
                case VModelPut(name, _, _) | VModelDeleted(name, _):
                    # The plain name as well, which it may share with a model.
                    names.update({vmodel_key(name): None, name: None})
                case InstancePut(instance, old, new):
                    if old is None or old.record.address != new.record.address:
                        self._set_instance(instance, new.record.address)
                    if old is None or old.record.draining != new.record.draining:
                        names.update(dict.fromkeys(self._view.copies_on(instance)))
                case InstanceGone(instance, _):
                    if instance not in self._view.instances:
                        self._door.remove_instance(instance)
                    names.update(dict.fromkeys(self._view.copies_on(instance)))
                case _:
                    pass
        keys = {key: None for name in names for key in self._keys_of(name)}
        for key in keys:
            self._tell(key, route_at(self._view, key))

    def _set_instance(self, instance: str, address: str) -> None:
        try:
            self._door.set_instance(instance, address)
        except ValueError as error:
            # Its requests go through the gateway. One odd record must not keep the rest of the news from the door.
            log.error("no direct traffic to an instance: %s", error)
            self._door.remove_instance(instance)

    def _keys_of(self, name: str) -> Iterator[str]:
        """The keys whose routes depend on model `name`: its own, and those of the vmodels that it answers for."""
        yield name
        for vmodel in self._view.vmodels_of(name):
            yield from keys_of_vmodel(self._view, vmodel)

    def add(self, name: str, instance: str) -> None:
        """A copy was just loaded; the view will say so in a moment."""
        entry = self._view.instances.get(instance)
        if entry is not None and not entry.record.draining:
            instances = tuple(sorted({*self._told.get(name, _NOWHERE).instances, instance}))
            self._tell(name, Route(instances))
            for vmodel in self._view.vmodels_of(name):
                if self._view.vmodels[vmodel].record.active_name == name:
                    for key in keys_of_vmodel(self._view, vmodel):
                        self._tell(key, Route(instances, name))

    def drop(self, name: str) -> None:
        """The model is gone; the view will say so in a moment."""
        self._tell(name, _NOWHERE)

    def drop_vmodel(self, name: str, models: Iterable[str]) -> None:
        """The vmodel is gone, and these models with it; the view will say so in a moment."""
        keys = [vmodel_key(name), *models]
        if self._told.get(name, _NOWHERE).model:
            keys.append(name)
        for key in keys:
            self._tell(key, _NOWHERE)

    def _tell(self, key: str, route: Route) -> None:
        if self._told.get(key, _NOWHERE).instances == route.instances and (
            not route.instances or self._told[key].model == route.model
        ):
            return
        if route.instances:
            self._told[key] = route
            self._door.set_route(key, *route)
        else:
            del self._told[key]
            self._door.del_route(key)
