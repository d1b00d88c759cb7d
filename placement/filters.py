"""Where a model may go: each filter answers why an instance is out of the question, or None.

Rule of the file: a filter is ``(request, instance, view) -> Reason | None``, never raises, and looks at one instance
only. They run on every instance for every decision, so each is a line or two. The first reason found is the one kept:
`FILTERS` begins with what says most to the reader of an error.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Final

from raymesh.placement.view import ClusterView, InstanceView, PlacementRequest


class Reason(StrEnum):
    """Why an instance cannot take a model, in words for users."""

    TRIED = "already tried"
    HOLDS = "holds or is loading a copy"
    TYPE = "does not serve this type"
    LABEL = "lacks a required label"
    TOO_SMALL = "too small for the model"
    FAILED = "the load failed there recently"
    DRAINING = "draining"


Filter = Callable[[PlacementRequest, InstanceView, ClusterView], Reason | None]


def is_tried(request: PlacementRequest, instance: InstanceView, _: ClusterView) -> Reason | None:
    """Tried before in this placement, or the caller knows that it does not work."""
    return Reason.TRIED if instance.id in request.excluded else None


def holds_copy(request: PlacementRequest, instance: InstanceView, _: ClusterView) -> Reason | None:
    """One instance holds at most one copy of a model, whatever state it is in."""
    return Reason.HOLDS if instance.id in request.model.copies else None


def lacks_type(request: PlacementRequest, instance: InstanceView, _: ClusterView) -> Reason | None:
    """An instance that lists no types serves them all."""
    return Reason.TYPE if instance.types and request.model.type not in instance.types else None


def lacks_label(request: PlacementRequest, instance: InstanceView, _: ClusterView) -> Reason | None:
    """Every label the model asks for must be there."""
    wanted = request.model.labels
    return Reason.LABEL if wanted and not wanted <= instance.labels else None


def is_too_small(request: PlacementRequest, instance: InstanceView, _: ClusterView) -> Reason | None:
    """The model would not fit even if the instance were empty."""
    return Reason.TOO_SMALL if request.model.size_bytes > instance.capacity_bytes else None


def failed_here(request: PlacementRequest, instance: InstanceView, view: ClusterView) -> Reason | None:
    """The model failed to load on this very instance and the failure has not expired."""
    for failure in request.model.failures:
        if failure.instance == instance.id and failure.expires_ms > view.now_ms:
            return Reason.FAILED
    return None


def is_draining(_: PlacementRequest, instance: InstanceView, __: ClusterView) -> Reason | None:
    """The instance is about to leave."""
    return Reason.DRAINING if instance.is_draining else None


FILTERS: Final[tuple[Filter, ...]] = (
    is_tried,
    holds_copy,
    lacks_type,
    lacks_label,
    is_too_small,
    failed_here,
    is_draining,
)


def rejection(request: PlacementRequest, instance: InstanceView, view: ClusterView) -> Reason | None:
    """The first reason against the instance; None when it may take the model."""
    for check in FILTERS:
        reason = check(request, instance, view)
        if reason is not None:
            return reason
    return None
