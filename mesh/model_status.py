"""What to say about a model: its status, its errors, its copies. Pure; the same on gRPC and REST.

Rule of the file: the worst news never hides the best. A model with a usable copy is LOADED whatever failed elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

from raymesh.registry.records import CopyState
from raymesh.registry.view import MeshView, ModelEntry


class Status(IntEnum):
    """`mmesh.ModelStatusInfo.ModelStatus`, by its numbers on the wire."""

    NOT_FOUND = 0
    NOT_LOADED = 1
    LOADING = 2
    LOADED = 3
    LOADING_FAILED = 4
    UNKNOWN = 5


class CopyStatus(NamedTuple):
    """One copy, or one failed attempt to have one. `time_ms` is since the Unix epoch, 0 when not known yet."""

    instance: str
    status: Status
    time_ms: int


class ModelStatus(NamedTuple):
    """A model's status. `copies` are the newest first; `errors` are why loads failed, the newest first."""

    status: Status
    errors: tuple[str, ...] = ()
    copies: tuple[CopyStatus, ...] = ()


NOT_FOUND = ModelStatus(Status.NOT_FOUND)

_COPY_STATUS = {
    CopyState.RESERVED: Status.LOADING,
    CopyState.LOADING: Status.LOADING,
    CopyState.LOADED: Status.LOADED,
    CopyState.UNLOADING: Status.UNKNOWN,
}


def status_of(
    entry: ModelEntry, view: MeshView, *, fresh: Iterable[str] = (), is_loading: bool = False, now_ms: int
) -> ModelStatus:
    """The status of a registered model.

    `fresh` are instances known to hold a copy that the view does not show yet; `is_loading` says that a load was asked
    for and has not ended; `now_ms` is wall-clock time, which failures expire by.
    """
    record = entry.record
    copies = [
        CopyStatus(instance, _COPY_STATUS[copy.record.state], copy.record.loaded_at_ms)
        for instance, copy in view.copies_of(record.name).items()
        if copy.record.generation == entry.create_revision and instance in view.instances
    ]
    known = {copy.instance for copy in copies}
    copies += [CopyStatus(instance, Status.LOADED, 0) for instance in fresh if instance not in known]
    failures = sorted(
        (f for f in record.failures if f.expires_ms > now_ms), key=lambda failure: failure.at_ms, reverse=True
    )
    statuses = {copy.status for copy in copies}
    if Status.LOADED in statuses:
        status = Status.LOADED
    elif is_loading or Status.LOADING in statuses:
        status = Status.LOADING
    elif failures:
        status = Status.LOADING_FAILED
    else:
        status = Status.NOT_LOADED
    copies += [CopyStatus(f.instance, Status.LOADING_FAILED, f.at_ms) for f in failures]
    # A fresh copy (time 0) is the newest there is.
    copies.sort(key=lambda copy: (copy.time_ms == 0, copy.time_ms), reverse=True)
    return ModelStatus(status, tuple(f.message for f in failures), tuple(copies))


def is_ready(status: ModelStatus) -> bool:
    """Whether a request for the model may be sent: a mesh loads on demand, so only a known failure says no."""
    return status.status in {Status.NOT_LOADED, Status.LOADING, Status.LOADED}
