"""Which instances the front door may send a model's requests to. Pure.

Rule of the file: the route table is a function of the view; whoever keeps a copy of it (HAProxy) can be compared with
it and put right at any time.
"""

from __future__ import annotations

from raymesh.registry.view import MeshView

#: Instance ids in order, the same whatever order the view has them in.
Route = tuple[str, ...]


def route_of(view: MeshView, name: str) -> Route:
    """Instances with a usable copy of model `name`: loaded, of its present generation, live and not draining."""
    if not view.copies_of(name):
        return ()
    return tuple(sorted(i for i in view.loaded_on(name) if not view.instances[i].record.draining))


def all_routes(view: MeshView) -> dict[str, Route]:
    """The whole table: every model that has a usable copy."""
    routes: dict[str, Route] = {}
    for instance in view.instances:
        for name in view.copies_on(instance):
            if name not in routes and (route := route_of(view, name)):
                routes[name] = route
    return routes
