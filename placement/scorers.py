"""How good a place is: each scorer gives an instance a penalty, and the first that tells two instances apart decides.

Rule of the file: a scorer is ``(request, instance, view) -> int``, lower is better, never raises. Penalties are coarse
on purpose: instances that are about equally good must come out equal, so that `policy.choose` can spread over them.
What an instance reports is up to a heartbeat old, and an exact comparison would send everything to one winner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from raymesh.placement.view import ClusterView, InstanceView, PlacementRequest

Scorer = Callable[[PlacementRequest, InstanceView, ClusterView], int]


def needs_eviction(request: PlacementRequest, instance: InstanceView, _: ClusterView) -> int:
    """0 when the model fits into free memory, else 1: an eviction may be somebody's cold request a moment later."""
    free_bytes = instance.capacity_bytes - instance.used_bytes - instance.pending_bytes
    return 1 if request.model.size_bytes > free_bytes else 0


def load_queue(_: PlacementRequest, instance: InstanceView, __: ClusterView) -> int:
    """How many rounds of loads are ahead: 0 while a load slot is free. The caller waits for every one of them."""
    loads = instance.loads_in_progress
    if instance.pending_loads > loads:
        loads = instance.pending_loads
    return loads // instance.load_slots


def young_victims(request: PlacementRequest, instance: InstanceView, _: ClusterView) -> int:
    """When something must go: prefer where it has been unused for longest, in steps of a factor of two."""
    free_bytes = instance.capacity_bytes - instance.used_bytes - instance.pending_bytes
    return -instance.lru_age_ms.bit_length() if request.model.size_bytes > free_bytes else 0


def busy_quarter(_: PlacementRequest, instance: InstanceView, __: ClusterView) -> int:
    """How busy it is with requests, in quarters: finer differences are noise of one reporting period."""
    return int(instance.busy * 4)


#: In order of weight. A free load slot comes before the age of the victims: a queue costs this caller for sure,
#: a younger victim costs somebody perhaps.
SCORERS: Final[tuple[Scorer, ...]] = (needs_eviction, load_queue, young_victims, busy_quarter)


def penalty(request: PlacementRequest, instance: InstanceView, view: ClusterView) -> tuple[int, ...]:
    """All penalties in order of weight: the smallest tuple is the best place."""
    return tuple([score(request, instance, view) for score in SCORERS])


def is_roomier(a: InstanceView, b: InstanceView) -> bool:
    """Whether `a` has the larger free share, then fewer copies, then the smaller id: spreads equally good places."""
    free_a, free_b = a.free_bytes * b.capacity_bytes, b.free_bytes * a.capacity_bytes
    if free_a != free_b:
        return free_a > free_b
    return (a.copies, a.id) < (b.copies, b.id)
