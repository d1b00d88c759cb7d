"""Who asks for what, and what changes when: pure and seeded, the same on every machine."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import random
from enum import StrEnum


class Zipf:
    """Draws slots 0 to `size` - 1 with popularity 1 / rank ** `exponent`; `rng` decides which slot has which rank."""

    def __init__(self, size: int, exponent: float, rng: random.Random) -> None:
        if size < 1:
            raise ValueError("a Zipf distribution needs at least one slot")
        weights = [rank**-exponent for rank in range(1, size + 1)]
        self._cumulative = list(itertools.accumulate(weights))
        #: Slots from the most popular to the least.
        self.by_rank = list(range(size))
        rng.shuffle(self.by_rank)

    def draw(self, rng: random.Random) -> int:
        """One slot."""
        point = rng.random() * self._cumulative[-1]
        return self.by_rank[min(bisect.bisect_right(self._cumulative, point), len(self.by_rank) - 1)]


class ChangeKind(StrEnum):
    """What happens to a customer while others are served."""

    ADDED = "added"
    RETRAINED = "retrained"
    REMOVED = "removed"


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Change:
    """At `at_s` seconds into the traffic, `kind` happens to customer number `customer`."""

    at_s: float
    kind: ChangeKind
    customer: int


def plan_churn(
    customers: int, *, added: int, retrained: int, removed: int, seconds: float, rng: random.Random
) -> list[Change]:
    """The changes of a run, in time order, between 5 and 90 percent of its length.

    Customers 0 to `customers` - 1 are there from the start, the `added` ones come after them in number. Nobody is both
    retrained and removed, and no one changes twice. Raises `ValueError` when there are too few customers for that.
    """
    if retrained + removed > customers:
        raise ValueError(f"{retrained} retrained and {removed} removed are more than the {customers} customers")
    chosen = rng.sample(range(customers), retrained + removed)
    changing = [
        *((ChangeKind.ADDED, customers + number) for number in range(added)),
        *((ChangeKind.RETRAINED, customer) for customer in chosen[:retrained]),
        *((ChangeKind.REMOVED, customer) for customer in chosen[retrained:]),
    ]
    return sorted(Change(seconds * rng.uniform(0.05, 0.9), kind, customer) for kind, customer in changing)
