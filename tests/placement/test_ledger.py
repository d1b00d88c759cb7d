"""`Ledger`: what is decided counts at once and until the instance itself has reported it."""

from __future__ import annotations

import pytest

from raymesh.placement.ledger import Ledger
from raymesh.placement.view import ClusterView, InstanceView


def view(revision: int = 1, **used_bytes: int) -> ClusterView:
    """Instances of 100 bytes that reported themselves at `revision`."""
    return ClusterView(
        0,
        revision,
        tuple(InstanceView(id=i, capacity_bytes=100, used_bytes=u, revision=revision) for i, u in used_bytes.items()),
    )


def free_bytes(ledger: Ledger, cluster: ClusterView) -> dict[str, int]:
    return {i.id: i.free_bytes for i in ledger.merged(cluster).instances}


def test_an_empty_ledger_changes_nothing() -> None:
    cluster = view(a=10)
    assert Ledger().merged(cluster) is cluster


def test_reservations_take_room_and_a_load_slot() -> None:
    ledger, cluster = Ledger(), view(a=10, b=10)
    ledger.reserve("m", "a", 30)
    ledger.reserve("n", "a", 5)
    assert free_bytes(ledger, cluster) == {"a": 55, "b": 90}  # 100 - 10 - 30 - 5
    assert [i.pending_loads for i in ledger.merged(cluster).instances] == [2, 0]
    assert ledger.loading("m") == ["a"]
    ledger.forget("m", "a")
    assert free_bytes(ledger, cluster) == {"a": 85, "b": 90}
    ledger.forget("m", "a")
    ledger.forget("n", "a")
    assert len(ledger) == 0
    assert ledger.merged(cluster) is cluster


def test_a_settled_load_counts_until_the_instance_reports_itself_again() -> None:
    ledger = Ledger()
    ledger.reserve("m", "a", 30)
    ledger.settled("m", "a", revision=5, size_bytes=40)
    old = view(revision=5, a=10)
    assert free_bytes(ledger, old) == {"a": 50}  # the measured size; the report at 5 may not have it
    assert ledger.merged(old).instances[0].pending_loads == 0
    assert ledger.loading("m") == []
    assert free_bytes(ledger, view(revision=6, a=50)) == {"a": 50}  # now it is in the report, and once
    assert len(ledger) == 0


def test_a_running_load_counts_whatever_is_reported() -> None:
    ledger = Ledger()
    ledger.reserve("m", "a", 30)
    assert free_bytes(ledger, view(revision=9, a=10)) == {"a": 60}


def test_reservations_on_a_lost_instance_end() -> None:
    ledger = Ledger()
    ledger.reserve("m", "a", 30)
    ledger.reserve("m", "b", 30)
    ledger.merged(view(a=0, b=0))
    assert free_bytes(ledger, view(b=0)) == {"b": 70}
    assert [(p.model, p.instance) for p in ledger] == [("m", "b")]
    ledger.settled("m", "a", revision=3)  # its answer comes late
    assert free_bytes(ledger, view(a=0, b=0)) == {"a": 100, "b": 70}


def test_the_same_load_is_booked_once() -> None:
    ledger = Ledger()
    ledger.reserve("m", "a", 1)
    with pytest.raises(ValueError, match="already"):
        ledger.reserve("m", "a", 1)
    ledger.settled("m", "a", revision=1)
    ledger.reserve("m", "a", 2)  # it was evicted and is wanted again
    assert repr(ledger) == "Ledger(m@a=2)"


def test_views_of_unchanged_instances_are_reused() -> None:
    ledger, cluster = Ledger(), view(a=0, b=0)
    ledger.reserve("m", "a", 1)
    first = ledger.merged(cluster)
    assert ledger.merged(cluster).instances[0] is first.instances[0]
    assert first.instances[1] is cluster.instances[1]
    ledger.reserve("n", "a", 1)
    assert ledger.merged(cluster).instances[0].pending_bytes == 2
