"""Which instances the front door may send a model's requests to. Pure.

Rule of the file: the route table is a function of the view; whoever keeps a copy of it (HAProxy) can be compared with
it and put right at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from raymesh.registry.view import MeshView

#: Instance ids in order, the same whatever order the view has them in.
Instances = tuple[str, ...]


class Route(NamedTuple):
    """Where requests for a key go; `model` is the full name of the model that answers, if the key is not that."""

    instances: Instances
    model: str = ""


def vmodel_key(name: str) -> str:
    """The key of the requests that ask for vmodel `name`: ``tenant/@id``. (An id never begins with an ``@``.)"""
    tenant, _, vmodel = name.partition("/")
    return f"{tenant}/@{vmodel}"


def keys_of_vmodel(view: MeshView, name: str) -> Iterator[str]:
    """The keys of vmodel `name`: its own, and its plain name unless that is a registered model's."""
    yield vmodel_key(name)
    if name not in view.models:
        yield name


def route_of(view: MeshView, name: str) -> Instances:
    """Instances with a usable copy of model `name`: loaded, of its present generation, live and not draining."""
    if not view.copies_of(name):
        return ()
    return tuple(sorted(i for i in view.loaded_on(name) if not view.instances[i].record.draining))


def route_at(view: MeshView, key: str) -> Route:
    """The route of a key of the table: a model's name, a `vmodel_key`, or a vmodel's name that is no model's."""
    vmodel = view.vmodels.get(key.replace("/@", "/", 1)) if key not in view.models else None
    if vmodel is None:
        return Route(route_of(view, key))
    return Route(route_of(view, vmodel.record.active_name), vmodel.record.active_name)


def all_routes(view: MeshView) -> dict[str, Route]:
    """The whole table: every model that has a usable copy, and every vmodel whose active model has."""
    names = {name: None for instance in view.instances for name in view.copies_on(instance)}
    keys = [*names, *(key for vmodel in view.vmodels for key in keys_of_vmodel(view, vmodel))]
    return {key: route for key in keys if (route := route_at(view, key)).instances}
