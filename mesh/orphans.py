"""Copies nobody may use any more: their model is gone or is another one now. Pure.

Rule of the file: `unregisterModel` unloads what it knows of; this is the net under it, for runtimes that could not be
reached at that moment.
"""

from __future__ import annotations

from collections.abc import Iterable

from raymesh.registry.view import Change, CopyPut, MeshView, ModelDeleted, ModelPut


def suspects(changes: Iterable[Change]) -> set[str]:
    """Names of the models whose copies these changes may have orphaned."""
    names = set()
    for change in changes:
        match change:
            case ModelDeleted(name, _) | ModelPut(name, None, _) | CopyPut(name, _, None, _):
                names.add(name)
            case _:
                pass
    return names


def orphans(view: MeshView, names: Iterable[str]) -> list[tuple[str, str]]:
    """(model name, instance) of the copies of these models that were not loaded for their model's present generation.

    The view follows the store in order and a copy is written after its model, so what differs here differs for good.
    """
    return [
        (name, instance)
        for name in sorted(names)
        for instance, copy in sorted(view.copies_of(name).items())
        if copy.record.generation != view.generation(name) and instance in view.instances
    ]
