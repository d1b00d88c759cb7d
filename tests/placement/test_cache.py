"""`InstanceCache`, move by move."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from raymesh.placement.cache import CachedCopy, InstanceCache, Reservation
from raymesh.registry.records import CopyState


def filled(capacity_bytes: int, **sizes: int) -> InstanceCache:
    """A cache with loaded copies, the first one used longest ago (at 1 ms, 2 ms, …)."""
    cache = InstanceCache(capacity_bytes)
    for at_ms, (name, size_bytes) in enumerate(sizes.items(), start=1):
        assert cache.reserve(name, size_bytes, at_ms) == Reservation(name)
        cache.loaded(name, size_bytes)
    cache.validate()
    return cache


def test_repr_tells_the_whole_state() -> None:
    cache = filled(10, a=3, b=2)
    cache.reserve("c", 1, 5)
    cache.pin("b")
    assert repr(cache) == "InstanceCache(6/10 a=3:loaded b=2:loaded+1 c=1:loading)"


@pytest.mark.parametrize(
    ("size_bytes", "victims"),
    [
        (4, ()),  # 6 used + 4 = 10
        (5, ("a",)),  # 11: one over, a frees 1
        (6, ("a", "b")),  # 12: two over, a frees 1, b frees 2
        (7, ("a", "b")),  # 13: three over, a and b free exactly 3
        (8, ("a", "b", "c")),  # 14
        (10, ("a", "b", "c")),  # everything goes
        (11, None),  # larger than the instance
    ],
)
def test_victims_are_the_oldest_and_no_more_than_needed(size_bytes: int, victims: tuple[str, ...] | None) -> None:
    cache = filled(10, a=1, b=2, c=3)
    assert cache.victims_for(size_bytes) == victims
    reservation = cache.reserve("new", size_bytes, 9)
    assert (reservation and reservation.victims) == victims
    cache.validate()


def test_touch_saves_a_copy_from_being_the_next_victim() -> None:
    cache = filled(6, a=2, b=2, c=2)
    cache.touch("a", 10)
    assert list(cache) == ["b", "c", "a"]
    assert cache.victims_for(1) == ("b",)
    assert cache.lru_age_ms(12) == 10  # b was used at 2


def test_a_late_touch_counts_as_now_and_never_ages_a_copy() -> None:
    cache = filled(6, a=2, b=2)
    cache.touch("b", 100)
    cache.touch("a", 50)
    assert list(cache) == ["b", "a"]
    cache.validate()


def test_touching_what_is_gone_is_no_error() -> None:
    cache = InstanceCache(1)
    cache.touch("a", 1)
    assert "a" not in cache


def test_a_pinned_copy_is_no_victim() -> None:
    cache = filled(4, a=2, b=2)
    cache.pin("a")
    cache.pin("a")
    assert cache.reserve("c", 2, 9) == Reservation("c", ("b",))
    cache.unpin("a")
    assert cache.reserve("d", 2, 9) is None  # one request of two is still there
    cache.unpin("a")
    assert cache.reserve("d", 2, 9) == Reservation("d", ("a",))


def test_what_cannot_be_reserved_changes_nothing() -> None:
    cache = filled(4, a=2)
    cache.reserve("b", 2, 5)  # loading
    cache.pin("a")
    before = repr(cache)
    assert cache.reserve("c", 1, 9) is None
    assert repr(cache) == before
    assert cache.can_ever_fit(4) and not cache.can_ever_fit(5)


def test_room_is_promised_at_once_and_granted_when_the_victim_is_gone() -> None:
    cache = filled(4, a=4)
    assert cache.reserve("b", 3, 9) == Reservation("b", ("a",))
    assert not cache.is_loaded("a")  # no request reaches it any more
    assert (cache.used_bytes, cache.booked_bytes) == (4, 3)
    assert not cache.may_load("b")
    cache.unloaded("a")
    assert cache.may_load("b")
    assert (cache.used_bytes, cache.booked_bytes) == (3, 3)


def test_a_load_without_victims_of_its_own_waits_for_those_of_others() -> None:
    cache = filled(10, a=10)
    assert cache.reserve("b", 3, 9) == Reservation("b", ("a",))
    assert cache.reserve("c", 3, 9) == Reservation("c")  # 3 + 3 of 10 once a is gone ...
    assert not cache.may_load("c")  # ... but 10 + 3 now
    cache.unloaded("a")
    assert cache.may_load("b") and cache.may_load("c")


def test_promises_are_kept_in_order() -> None:
    cache = filled(10, a=4, b=6)
    cache.reserve("big", 7, 9)  # evicts a and b
    cache.reserve("small", 3, 9)
    cache.unloaded("a")  # 6 used: small would fit, but big was first
    assert not cache.may_load("big") and not cache.may_load("small")
    cache.unloaded("b")
    assert cache.may_load("big") and cache.may_load("small")


def test_a_load_larger_than_expected_says_whom_to_evict() -> None:
    cache = filled(10, a=4, b=4)
    cache.reserve("c", 2, 9)
    assert cache.victims_for(0) == ()
    cache.loaded("c", 5)  # 13 of 10: a goes
    assert (cache.used_bytes, cache.victims_for(0)) == (13, ("a",))
    cache.begin_unload("a")
    cache.unloaded("a")
    assert (cache.used_bytes, cache.victims_for(0)) == (9, ())
    cache.validate()


def test_a_load_smaller_than_expected_gives_its_room_back() -> None:
    cache = filled(10, a=4)
    cache.reserve("b", 6, 9)
    assert cache.victims_for(1) == ("a",)
    cache.loaded("b", 1)
    assert cache.victims_for(5) == ()


def test_a_failed_load_leaves_nothing_behind() -> None:
    cache = filled(4, a=4)
    cache.reserve("b", 4, 9)
    cache.forget("b")  # before its room was granted
    cache.unloaded("a")
    assert (len(cache), cache.used_bytes, cache.booked_bytes) == (0, 0, 0)
    cache.reserve("b", 4, 9)
    cache.forget("b")  # after
    assert (len(cache), cache.used_bytes, cache.booked_bytes) == (0, 0, 0)
    cache.validate()


def test_a_model_on_its_way_out_cannot_be_reserved_until_it_is_gone() -> None:
    cache = filled(10, a=2)
    cache.begin_unload("a")
    assert cache.reserve("a", 2, 9) is None
    cache.unloaded("a")
    assert cache.reserve("a", 2, 9) == Reservation("a")


def test_an_unload_waits_for_requests_in_flight() -> None:
    cache = filled(10, a=2)
    cache.pin("a")
    cache.begin_unload("a")
    with pytest.raises(ValueError, match="in flight"):
        cache.unloaded("a")
    with pytest.raises(KeyError):
        cache.pin("a")
    cache.unpin("a")
    cache.unloaded("a")
    assert "a" not in cache


@pytest.mark.parametrize(
    ("move", "error"),
    [
        (lambda c: c.reserve("loaded", 1, 9), ValueError),
        (lambda c: c.reserve("loading", 1, 9), ValueError),
        (lambda c: c.reserve("x", -1, 9), ValueError),
        (lambda c: c.loaded("loaded", 1), ValueError),
        (lambda c: c.loaded("x", 1), ValueError),
        (lambda c: c.loaded("loading", -1), ValueError),
        (lambda c: c.forget("loaded"), ValueError),
        (lambda c: c.forget("x"), ValueError),
        (lambda c: c.begin_unload("loading"), ValueError),
        (lambda c: c.begin_unload("x"), ValueError),
        (lambda c: c.unloaded("loaded"), ValueError),
        (lambda c: c.unloaded("x"), ValueError),
        (lambda c: c.pin("loading"), KeyError),
        (lambda c: c.pin("x"), KeyError),
        (lambda c: c.unpin("loaded"), ValueError),
        (lambda c: c.unpin("x"), KeyError),
    ],
)
def test_an_illegal_move_raises_and_changes_nothing(
    move: Callable[[InstanceCache], object], error: type[Exception]
) -> None:
    cache = filled(10, loaded=2)
    cache.reserve("loading", 2, 5)
    before = repr(cache)
    with pytest.raises(error):
        move(cache)
    assert repr(cache) == before
    cache.validate()


def test_another_policy_chooses_other_victims() -> None:
    def gdsf(copies: object) -> list[CachedCopy]:
        return sorted(copies, key=lambda c: c.uses * c.load_ms / c.size_bytes)  # type: ignore[call-overload]

    cache = InstanceCache(4, policy=gdsf)
    for name, load_ms in (("dear", 1000), ("cheap", 1)):
        cache.reserve(name, 2, 1)
        cache.loaded(name, 2, load_ms=load_ms)
        cache.touch(name, 2)
    assert cache.victims_for(1) == ("cheap",)  # least recently used would be dear


def test_questions_about_what_is_not_there() -> None:
    cache = InstanceCache(4)
    assert (cache.state("a"), cache.is_loaded("a"), cache.size_bytes("a"), cache.in_flight("a")) == (None, False, 0, 0)
    assert (cache.lru_age_ms(5), cache.may_load("a"), list(cache.copies())) == (0, False, [])
    with pytest.raises(ValueError):
        InstanceCache(-1)


def test_states_on_the_way() -> None:
    cache = filled(2, a=2)
    cache.reserve("b", 2, 9)
    assert (cache.state("a"), cache.state("b")) == (CopyState.UNLOADING, CopyState.RESERVED)
    cache.unloaded("a")
    assert cache.state("b") is CopyState.LOADING
    cache.loaded("b", 2)
    assert cache.state("b") is CopyState.LOADED
