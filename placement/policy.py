"""`choose`: the instance a model should be loaded on, and for every other one the reason why not.

Rule of the file: filter, score, then two random picks of the best and the roomier one of them. All best places look
alike through coarse scores and reports that are a heartbeat old; taking the roomiest of all would send every decision
of every controller to the same instance until its next report ("herding"), while two random picks spread nearly as
evenly as perfect knowledge would (the power of two choices). Same request, view and random state: same decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymesh.placement.filters import FILTERS, Reason
from raymesh.placement.scorers import SCORERS, is_roomier
from raymesh.placement.view import ClusterView, InstanceView, PlacementRequest

if TYPE_CHECKING:
    from random import Random

#: Reasons that pass by themselves; with any of them in the way, asking again later makes sense.
_PASSING = frozenset({Reason.HOLDS, Reason.FAILED, Reason.DRAINING, Reason.TRIED})


#: Candidates scored for one decision. In a larger mesh each decision looks at that many from a random instance on: the
#: best of 200 is hardly worse than the best of 1,000, and found in a fifth of the time.
SCORED_MAX = 200


@dataclass(frozen=True, slots=True)
class Decision:
    """The chosen instance's id, None when there is none; `reasons` says why not, by id, for what was rejected.

    Without a choice every instance has its reason.
    """

    instance: str | None
    reasons: Mapping[str, Reason]
    #: Whether the choice will have to evict something first.
    needs_eviction: bool = False

    @property
    def is_retryable(self) -> bool:
        """Whether the same request may find a place later without anybody changing the model or adding instances."""
        return self.instance is not None or any(reason in _PASSING for reason in self.reasons.values())

    def explain(self) -> str:
        """The reasons in one line for an error message, for example ``2 × draining, 1 × too small for the model``."""
        if not self.reasons:
            return "no instance is up" if self.instance is None else ""
        reasons = list(self.reasons.values())
        return ", ".join(f"{reasons.count(r)} × {r}" for r in Reason if r in reasons)


def choose(request: PlacementRequest, view: ClusterView, rng: Random) -> Decision:
    """Where to load the model. Books nothing: reserve the answer in the ledger before anything else happens.

    `view` should hold the ledger's reservations (`Ledger.merged`). About 1 µs per instance, at most about
    `SCORED_MAX` µs unless most instances are rejected.
    """
    instances = view.instances
    if len(instances) > SCORED_MAX:
        offset = int(rng.random() * len(instances))
        instances = instances[offset:] + instances[:offset]
    scored = 0
    reasons: dict[str, Reason] = {}
    best: list[InstanceView] = []
    lowest: tuple[int, ...] | None = None
    # Plain loops instead of `rejection` and `penalty`: this is the whole cost of a decision.
    for instance in instances:
        for check in FILTERS:
            reason = check(request, instance, view)
            if reason is not None:
                reasons[instance.id] = reason
                break
        else:
            penalty = tuple([score(request, instance, view) for score in SCORERS])
            if lowest is None or penalty < lowest:
                best, lowest = [instance], penalty
            elif penalty == lowest:
                best.append(instance)
            scored += 1
            if scored == SCORED_MAX:
                break
    if lowest is None:
        return Decision(None, reasons)
    chosen = best[0]
    if len(best) > 1:
        # Two different picks without `sample`, which costs as much as ten filters.
        first = int(rng.random() * len(best))
        second = int(rng.random() * (len(best) - 1))
        chosen, other = best[first], best[second + (second >= first)]
        if is_roomier(other, chosen):
            chosen = other
    return Decision(chosen.id, reasons, needs_eviction=bool(lowest[0]))
