"""The made-up traffic: seeded, and shaped as it says."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workload import ChangeKind, Zipf, plan_churn


def test_zipf_gives_each_rank_its_share() -> None:
    rng = random.Random(1)
    zipf = Zipf(100, 1.0, rng)
    counts = Counter(zipf.draw(rng) for _ in range(100_000))
    # Harmonic number of 100 = 5.187: the first rank gets 19.3 %, the second half of that, the tenth a tenth.
    first = counts[zipf.by_rank[0]]
    assert first == pytest.approx(19_280, rel=0.05)
    assert counts[zipf.by_rank[1]] == pytest.approx(first / 2, rel=0.1)
    assert counts[zipf.by_rank[9]] == pytest.approx(first / 10, rel=0.15)


@given(st.integers(1, 500), st.floats(0, 3), st.integers())
def test_zipf_draws_only_slots_there_are(size: int, exponent: float, seed: int) -> None:
    rng = random.Random(seed)
    zipf = Zipf(size, exponent, rng)
    assert sorted(zipf.by_rank) == list(range(size))
    assert all(0 <= zipf.draw(rng) < size for _ in range(20))


@given(st.integers(0, 60), st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.integers())
def test_a_churn_plan_changes_each_customer_once(
    customers: int, added: int, retrained: int, removed: int, seed: int
) -> None:
    counts = {"added": added, "retrained": retrained, "removed": removed}
    if retrained + removed > customers:
        with pytest.raises(ValueError, match="more than"):
            plan_churn(customers, **counts, seconds=10, rng=random.Random(seed))
        return
    plan = plan_churn(customers, **counts, seconds=10, rng=random.Random(seed))
    assert plan == plan_churn(customers, **counts, seconds=10, rng=random.Random(seed))
    assert Counter(change.kind for change in plan) == Counter({ChangeKind(kind): n for kind, n in counts.items() if n})
    assert len({change.customer for change in plan}) == len(plan)
    assert [change.at_s for change in plan] == sorted(change.at_s for change in plan)
    for change in plan:
        assert 0.5 <= change.at_s <= 9
        assert (change.customer >= customers) == (change.kind is ChangeKind.ADDED)
