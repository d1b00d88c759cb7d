"""`Attempts`: every placement ends, within its bounds, with the reason that helps its caller most."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymesh.placement.attempts import (
    LOAD_FAILURES_MAX,
    LOAD_PLACES_MAX,
    Attempts,
    GiveUp,
    Loaded,
    LoadFailed,
    Recorded,
    RecordFailure,
    Refused,
    TryLoad,
    UseCopy,
)
from raymesh.placement.ledger import Ledger
from raymesh.placement.view import ClusterView, InstanceView, ModelView
from raymesh.registry.records import CopyState, LoadFailure


def model(**fields: Any) -> ModelView:
    return ModelView(**{"name": "t/m", "type": "onnx", "size_bytes": 10, **fields})


def cluster(*names: str, **fields: Any) -> ClusterView:
    return ClusterView(1_000, 1, tuple(InstanceView(id=n, **{"capacity_bytes": 100, **fields}) for n in names))


def attempts(ledger: Ledger | None = None, **options: Any) -> Attempts:
    return Attempts("t/m", Random(1), Ledger() if ledger is None else ledger, **options)


def test_a_loaded_copy_is_used_and_nothing_is_booked() -> None:
    ledger = Ledger()
    copies = {"a": CopyState.LOADED, "b": CopyState.LOADING}
    assert attempts(ledger).start(model(copies=copies), cluster("a", "b")) == UseCopy("a")
    assert len(ledger) == 0


@pytest.mark.parametrize(
    ("excluded", "draining", "used"),
    [((), False, "a"), (("a",), False, "b"), ((), True, "b"), (("b",), True, "a")],
)
def test_which_copy_is_used(excluded: tuple[str, ...], draining: bool, used: str) -> None:
    """The less busy one, unless it drains, and never one the caller ruled out."""
    a = InstanceView(id="a", capacity_bytes=1, busy=0.1, is_draining=draining)
    b = InstanceView(id="b", capacity_bytes=1, busy=0.9)
    both = model(copies={"b": CopyState.LOADED, "a": CopyState.LOADED})
    assert attempts(excluded=excluded).start(both, ClusterView(0, 1, (a, b))) == UseCopy(used)


def test_a_copy_on_an_instance_that_is_gone_does_not_count() -> None:
    assert attempts().start(model(copies={"gone": CopyState.LOADED}), cluster("a")) == TryLoad("a", 10)


def test_load_and_use() -> None:
    ledger = Ledger()
    placement = attempts(ledger)
    assert placement.start(model(), cluster("a")) == TryLoad("a", 10)
    assert [(p.model, p.instance, p.size_bytes) for p in ledger] == [("t/m", "a", 10)]  # booked before any await
    assert placement.next(Loaded(12), model(), cluster("a")) == UseCopy("a")
    assert [(p.size_bytes, p.settled_revision) for p in ledger] == [(12, 1)]
    placement.abandon()
    assert len(ledger) == 1  # settled: nothing to let go


def test_a_failure_is_recorded_and_the_model_tried_elsewhere() -> None:
    ledger = Ledger()
    placement = attempts(ledger, failure_expiry_ms=50)
    first = placement.start(model(), cluster("a", "b"))
    assert isinstance(first, TryLoad)
    failure = LoadFailure(first.instance, "not an onnx file", 1_000, 1_050)
    assert placement.next(LoadFailed("not an onnx file"), model(), cluster("a", "b")) == RecordFailure(failure)
    assert len(ledger) == 0
    second = placement.next(Recorded(), model(failures=(failure,)), cluster("a", "b"))
    assert isinstance(second, TryLoad) and second.instance != first.instance


def test_three_failures_are_enough_even_when_they_cannot_be_recorded() -> None:
    placement, names = attempts(), ("a", "b", "c", "d", "e")
    step = placement.start(model(), cluster(*names))
    for number in range(LOAD_FAILURES_MAX):
        assert isinstance(step, TryLoad)
        assert isinstance(placement.next(LoadFailed(f"bad {number}"), model(), cluster(*names)), RecordFailure)
        step = placement.next(Recorded(), model(), cluster(*names))
    assert isinstance(step, GiveUp)
    assert (step.code, step.reason) == ("FAILED_PRECONDITION", "LOAD_FAILED")


def test_a_model_that_failed_everywhere_fails_fast_with_the_latest_reason() -> None:
    failures = (LoadFailure("a", "old", 1, 9_999), LoadFailure("b", "new", 2, 9_999))
    gave_up = GiveUp("FAILED_PRECONDITION", "LOAD_FAILED", "new")
    assert attempts().start(model(failures=failures), cluster("a", "b")) == gave_up  # on all instances
    assert attempts().start(model(failures=failures), cluster("a", "b", "c")) == TryLoad("c", 10)
    three = (*failures, LoadFailure("gone", "older", 0, 9_999))
    assert attempts().start(model(failures=three), cluster("a", "b", "c")) == gave_up  # three are enough
    expired = tuple(LoadFailure(f.instance, f.message, f.at_ms, 1_000) for f in three)
    assert isinstance(attempts().start(model(failures=expired), cluster("a")), TryLoad)


def test_five_places_are_enough() -> None:
    placement, names = attempts(), tuple("abcdefgh")
    step = placement.start(model(), cluster(*names))
    tried = []
    while isinstance(step, TryLoad):
        tried.append(step.instance)
        step = placement.next(Refused("FENCED", "no lease"), model(), cluster(*names))
    assert len(tried) == len(set(tried)) == LOAD_PLACES_MAX
    assert step == GiveUp("UNAVAILABLE", "FENCED", "no lease")


def test_a_copy_that_appears_meanwhile_is_used() -> None:
    placement = attempts()
    placement.start(model(), cluster("a", "b", "c"))
    appeared = model(copies={"c": CopyState.LOADED})
    step = placement.next(Refused("NO_INSTANCE"), appeared, cluster("a", "b", "c"))
    assert step == UseCopy("c")


@pytest.mark.parametrize(
    ("wanted", "where", "gave_up"),
    [
        (model(), cluster(), GiveUp("UNAVAILABLE", "NO_INSTANCE", "no instance: no instance is up")),
        (model(), cluster("a", is_draining=True), GiveUp("UNAVAILABLE", "DRAINING", "no instance: 1 × draining")),
        (
            model(),
            cluster("a", types=frozenset({"torch"})),
            GiveUp("FAILED_PRECONDITION", "UNSUPPORTED", "no instance serves models of type 'onnx'"),
        ),
        (
            model(size_bytes=101),
            cluster("a", "b"),
            GiveUp("RESOURCE_EXHAUSTED", "NO_CAPACITY", "101 bytes fit nowhere: 2 × too small for the model"),
        ),
        (
            model(copies={"a": CopyState.UNLOADING}),
            cluster("a"),
            GiveUp("UNAVAILABLE", "NO_INSTANCE", "no instance: 1 × holds or is loading a copy"),
        ),
    ],
)
def test_nowhere_to_go(wanted: ModelView, where: ClusterView, gave_up: GiveUp) -> None:
    assert attempts().start(wanted, where) == gave_up


def test_no_room_is_said_even_when_the_last_place_was_unreachable() -> None:
    placement = attempts()
    placement.start(model(), cluster("a", "b"))
    assert isinstance(placement.next(Refused("NO_CAPACITY", "all in use"), model(), cluster("a", "b")), TryLoad)
    step = placement.next(Refused("NO_INSTANCE"), model(), cluster("a", "b"))
    assert step == GiveUp("RESOURCE_EXHAUSTED", "NO_CAPACITY", "all in use")


def test_what_is_abandoned_is_not_booked_any_more() -> None:
    ledger = Ledger()
    placement = attempts(ledger)
    placement.start(model(), cluster("a"))
    placement.abandon()
    placement.abandon()
    assert len(ledger) == 0


def test_two_placements_of_one_model_never_load_it_twice_in_one_place() -> None:
    ledger = Ledger()
    assert attempts(ledger).start(model(), cluster("a")) == TryLoad("a", 10)
    assert isinstance(attempts(ledger).start(model(), cluster("a")), GiveUp)
    assert attempts(ledger).start(model(), cluster("a", "b")) == TryLoad("b", 10)


def test_concurrent_placements_do_not_pile_up() -> None:
    """Room for one model of 60 on each of four instances of 100, one stale view: every one gets its own instance."""
    ledger, view, places = Ledger(), cluster("a", "b", "c", "d"), set()
    for number in range(4):
        step = Attempts(f"t/{number}", Random(number), ledger).start(model(name=f"t/{number}", size_bytes=60), view)
        assert isinstance(step, TryLoad)
        places.add(step.instance)
    assert len(places) == 4


def test_steps_and_outcomes_must_belong_together() -> None:
    ledger = Ledger()
    placement = attempts(ledger)
    with pytest.raises(ValueError, match="does not answer"):
        placement.next(Loaded(), model(), cluster("a"))
    placement.start(model(), cluster("a"))
    with pytest.raises(ValueError, match="does not answer"):
        placement.next(Recorded(), model(), cluster("a"))
    with pytest.raises(ValueError, match="once"):
        placement.start(model(), cluster("a"))
    assert len(ledger) == 1
    assert placement.next(Loaded(), model(), cluster("a")) == UseCopy("a")  # the wrong answers changed nothing
    with pytest.raises(ValueError, match="does not answer"):
        placement.next(Loaded(), model(), cluster("a"))


OUTCOMES = st.sampled_from(
    [Loaded(3), LoadFailed("bad"), Refused("NO_CAPACITY"), Refused("NO_INSTANCE"), Refused("LOAD_TIMEOUT")]
)


@given(
    st.integers(0, 8),
    st.lists(st.sampled_from("abcdefgh"), max_size=4, unique=True),
    st.lists(OUTCOMES, min_size=6, max_size=6),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=300, deadline=None)
def test_every_placement_ends_within_its_bounds(
    size: int, failed_before: list[str], outcomes: list[Any], is_recorded: bool, seed: int
) -> None:
    view = cluster(*"abcdefgh"[:size])
    recorded = [LoadFailure(name, "before", 0, 9_999) for name in failed_before]
    ledger = Ledger()
    placement = Attempts("t/m", Random(seed), ledger)
    step = placement.start(model(failures=tuple(recorded)), view)
    tried: list[str] = []
    failures = 0
    while isinstance(step, TryLoad | RecordFailure):
        outcome: Any = Recorded()
        if isinstance(step, TryLoad):
            assert step.instance not in tried and step.instance not in failed_before
            assert [p.instance for p in ledger] == [step.instance]
            outcome = outcomes[len(tried)]
            tried.append(step.instance)
            failures += isinstance(outcome, LoadFailed)
        elif is_recorded:
            recorded.append(step.failure)
        step = placement.next(outcome, model(failures=tuple(recorded)), view)
        assert len(tried) <= LOAD_PLACES_MAX
        assert failures == 0 or failures + len(failed_before) <= LOAD_FAILURES_MAX
    if isinstance(step, UseCopy):
        assert isinstance(outcomes[len(tried) - 1], Loaded) and step.instance == tried[-1]
    else:
        assert step.message
        assert (step.reason == "LOAD_FAILED") == (step.code == "FAILED_PRECONDITION")
        assert all(p.settled_revision is not None for p in ledger)
    placement.abandon()
    assert not ledger.loading("t/m")
