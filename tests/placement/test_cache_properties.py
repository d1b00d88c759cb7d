"""`InstanceCache` against a naive twin: any sequence of moves, the same answers, and every promise kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from raymesh.placement.cache import InstanceCache
from raymesh.registry.records import CopyState

NAMES = st.sampled_from("abcdefgh")


@dataclass
class TwinCopy:
    state: CopyState
    size_bytes: int
    used_at: tuple[int, int]
    in_flight: int = 0


class Twin:
    """The same promises written the slow and obvious way: sorted scans and sums, nothing kept up to date."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.copies: dict[str, TwinCopy] = {}
        self.promised: list[str] = []
        self.now_ms = 0
        self.moves = 0

    def stamp(self, now_ms: int = 0) -> tuple[int, int]:
        self.now_ms = max(self.now_ms, now_ms)
        self.moves += 1
        return (self.now_ms, self.moves)

    def bytes_in(self, *states: CopyState) -> int:
        return sum(c.size_bytes for c in self.copies.values() if c.state in states)

    def used_bytes(self) -> int:
        return self.bytes_in(CopyState.LOADING, CopyState.LOADED, CopyState.UNLOADING)

    def booked_bytes(self) -> int:
        return self.bytes_in(CopyState.RESERVED, CopyState.LOADING, CopyState.LOADED)

    def in_order(self) -> list[str]:
        return sorted(self.copies, key=lambda name: self.copies[name].used_at)

    def victims_for(self, size_bytes: int) -> tuple[str, ...] | None:
        candidates = [n for n in self.in_order() if self.copies[n].state is CopyState.LOADED]
        candidates = [n for n in candidates if self.copies[n].in_flight == 0]
        for count in range(len(candidates) + 1):
            leaving = sum(self.copies[n].size_bytes for n in candidates[:count])
            if self.booked_bytes() - leaving + size_bytes <= self.capacity_bytes:
                return tuple(candidates[:count])
        return None

    def grant(self) -> None:
        while self.promised:
            copy = self.copies[self.promised[0]]
            if self.used_bytes() + copy.size_bytes > self.capacity_bytes:
                break
            copy.state = CopyState.LOADING
            self.promised.pop(0)


class CacheMachine(RuleBasedStateMachine):
    @initialize(capacity_bytes=st.integers(0, 20))
    def begin(self, capacity_bytes: int) -> None:
        self.cache = InstanceCache(capacity_bytes)
        self.twin = Twin(capacity_bytes)
        #: What loads have taken beyond what was expected of them; only that may overfill the cache.
        self.overshoot_bytes = 0

    def state(self, name: str) -> CopyState | None:
        copy = self.twin.copies.get(name)
        return copy.state if copy else None

    def names(self, *states: CopyState) -> list[str]:
        return [name for name in sorted(self.twin.copies) if self.twin.copies[name].state in states]

    @rule(name=NAMES, size_bytes=st.integers(0, 12), now_ms=st.integers(0, 100))
    def reserve(self, name: str, size_bytes: int, now_ms: int) -> None:
        state = self.state(name)
        if state not in (None, CopyState.UNLOADING):
            return
        before = repr(self.cache)
        reservation = self.cache.reserve(name, size_bytes, now_ms)
        victims = None if state is CopyState.UNLOADING else self.twin.victims_for(size_bytes)
        assert (reservation.victims if reservation else None) == victims
        if victims is None:
            assert repr(self.cache) == before
            return
        for victim in victims:
            assert self.twin.copies[victim].in_flight == 0
            assert self.twin.copies[victim].state is CopyState.LOADED
            self.twin.copies[victim].state = CopyState.UNLOADING
        self.twin.copies[name] = TwinCopy(CopyState.RESERVED, size_bytes, self.twin.stamp(now_ms))
        self.twin.promised.append(name)
        self.twin.grant()

    @precondition(lambda self: self.names(CopyState.RESERVED, CopyState.LOADING))
    @rule(data=st.data(), actual_bytes=st.none() | st.integers(0, 15))
    def loaded(self, data: Any, actual_bytes: int | None) -> None:
        name = data.draw(st.sampled_from(self.names(CopyState.RESERVED, CopyState.LOADING)))
        copy = self.twin.copies[name]
        if copy.state is CopyState.RESERVED:
            self.overshoot_bytes += copy.size_bytes  # its caller did not wait for the room
        actual_bytes = copy.size_bytes if actual_bytes is None else actual_bytes
        self.overshoot_bytes += max(0, actual_bytes - copy.size_bytes)
        self.cache.loaded(name, actual_bytes)
        copy.state, copy.size_bytes, copy.used_at = CopyState.LOADED, actual_bytes, self.twin.stamp()
        if name in self.twin.promised:
            self.twin.promised.remove(name)
        self.twin.grant()

    @precondition(lambda self: self.names(CopyState.RESERVED, CopyState.LOADING))
    @rule(data=st.data())
    def forget(self, data: Any) -> None:
        name = data.draw(st.sampled_from(self.names(CopyState.RESERVED, CopyState.LOADING)))
        self.cache.forget(name)
        del self.twin.copies[name]
        if name in self.twin.promised:
            self.twin.promised.remove(name)
        self.twin.grant()

    @rule(name=NAMES, now_ms=st.integers(0, 100))
    def touch(self, name: str, now_ms: int) -> None:
        self.cache.touch(name, now_ms)
        if name in self.twin.copies:
            self.twin.copies[name].used_at = self.twin.stamp(now_ms)

    @precondition(lambda self: self.names(CopyState.LOADED))
    @rule(data=st.data())
    def pin(self, data: Any) -> None:
        name = data.draw(st.sampled_from(self.names(CopyState.LOADED)))
        self.cache.pin(name)
        self.twin.copies[name].in_flight += 1

    @precondition(lambda self: any(c.in_flight for c in self.twin.copies.values()))
    @rule(data=st.data())
    def unpin(self, data: Any) -> None:
        name = data.draw(st.sampled_from([n for n in sorted(self.twin.copies) if self.twin.copies[n].in_flight]))
        self.cache.unpin(name)
        self.twin.copies[name].in_flight -= 1

    @precondition(lambda self: self.names(CopyState.LOADED))
    @rule(data=st.data())
    def begin_unload(self, data: Any) -> None:
        name = data.draw(st.sampled_from(self.names(CopyState.LOADED)))
        self.cache.begin_unload(name)
        self.twin.copies[name].state = CopyState.UNLOADING

    @precondition(lambda self: self.names(CopyState.UNLOADING))
    @rule(data=st.data())
    def unloaded(self, data: Any) -> None:
        name = data.draw(st.sampled_from(self.names(CopyState.UNLOADING)))
        if self.twin.copies[name].in_flight:
            return
        self.cache.unloaded(name)
        del self.twin.copies[name]
        self.twin.grant()

    @invariant()
    def agrees_with_the_twin(self) -> None:
        if not hasattr(self, "twin"):
            return
        self.cache.validate()
        assert list(self.cache) == self.twin.in_order()
        assert {n: self.cache.state(n) for n in self.cache} == {n: c.state for n, c in self.twin.copies.items()}
        assert self.cache.used_bytes == self.twin.used_bytes()
        assert self.cache.booked_bytes == self.twin.booked_bytes()
        for size_bytes in (0, 3, 20):
            assert self.cache.victims_for(size_bytes) == self.twin.victims_for(size_bytes)

    @invariant()
    def is_never_overfull_but_for_surprises(self) -> None:
        if not hasattr(self, "twin"):
            return
        limit_bytes = self.cache.capacity_bytes + self.overshoot_bytes
        assert self.cache.used_bytes <= limit_bytes
        assert self.cache.booked_bytes <= limit_bytes


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
