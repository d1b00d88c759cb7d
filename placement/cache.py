"""One instance's copies, in least-recently-used order and accurate to the byte.

Rule of the file: everything that may change which copies an instance holds, and how many bytes they take, goes through
`InstanceCache`, and an illegal move raises and changes nothing. The cache decides; its caller loads and unloads:

    reservation = cache.reserve(name, size_bytes, now_ms)     # None: there can be no room now
    for victim in reservation.victims:                        # already UNLOADING: no request reaches them any more
        free(victim); cache.unloaded(victim)
    while not cache.may_load(name):                           # others' victims are still in memory:
        ...                                                   # wait for the next unload or unpin, evict victims_for(0)
    actual_bytes = load(name)                                 # on an error: cache.forget(name)
    cache.loaded(name, actual_bytes)
    for victim in cache.victims_for(0) or ():                 # the copy was larger than expected
        cache.begin_unload(victim); free(victim); cache.unloaded(victim)

A copy's life: absent, RESERVED (room promised), LOADING (room granted), LOADED, UNLOADING, absent.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from raymesh.registry.records import CopyState


@dataclass(slots=True)
class CachedCopy:
    """One copy as the cache keeps it; for eviction policies to read, for nobody to write."""

    name: str
    state: CopyState
    #: Expected size until the load ends, measured size from then on.
    size_bytes: int
    last_used_ms: int
    #: Requests being answered by the copy. Only LOADED and UNLOADING copies have any; a copy with one is never freed.
    in_flight: int = 0
    #: Times the copy was touched since it was reserved.
    uses: int = 0
    #: How long its load took; 0 when unknown.
    load_ms: int = 0


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room promised for a load. `victims`, oldest-used first, are UNLOADING: free them, then load."""

    name: str
    victims: tuple[str, ...] = ()


#: Puts evictable copies, handed over oldest-used first, into the order they should go. It is read only as far as
#: needed, so the default costs nothing; GDSF would sort by ``uses * load_ms / size_bytes``.
EvictionPolicy = Callable[[Iterable[CachedCopy]], Iterable[CachedCopy]]


def least_recently_used(copies: Iterable[CachedCopy]) -> Iterable[CachedCopy]:
    """The default policy: the copy nobody has used for longest goes first."""
    return copies


_RESERVED: Final = CopyState.RESERVED
_LOADING: Final = CopyState.LOADING
_LOADED: Final = CopyState.LOADED
_UNLOADING: Final = CopyState.UNLOADING


class InstanceCache:
    """The copies on one instance.

    Pure: it reads no clock, frees nothing and is for one thread. Two sums of bytes matter:

    * `used_bytes`, what is in memory now: LOADING + LOADED + UNLOADING. A copy that leaves counts until `unloaded`.
    * `booked_bytes`, the world as it will be: RESERVED + LOADING + LOADED. `reserve` decides against this one.

    It promises that neither exceeds `capacity_bytes`, except when a load turned out larger than it was expected to be.
    Then nothing new is granted until the caller has carried out `victims_for(0)`. A RESERVED copy becomes LOADING by
    itself, first come first served, as soon as the memory is really free: ask `may_load`.
    """

    def __init__(self, capacity_bytes: int, *, policy: EvictionPolicy = least_recently_used) -> None:
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}: use 0 or more")
        self._capacity_bytes = capacity_bytes
        self._policy = policy
        #: Every copy, the least recently used first. Time never goes back, so moving a touched copy to the end keeps
        #: this sorted by `last_used_ms`.
        self._copies: OrderedDict[str, CachedCopy] = OrderedDict()
        #: Promised and not yet granted, in the order they were promised.
        self._reserved: dict[str, CachedCopy] = {}
        self._used_bytes = 0
        self._booked_bytes = 0
        #: The latest time seen.
        self._now_ms = 0

    # -- What is here -------------------------------------------------------------------------------------------------

    @property
    def capacity_bytes(self) -> int:
        """Memory this instance may fill with copies."""
        return self._capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes in memory now: LOADING + LOADED + UNLOADING copies."""
        return self._used_bytes

    @property
    def booked_bytes(self) -> int:
        """Bytes in memory once everything under way has ended well: RESERVED + LOADING + LOADED copies."""
        return self._booked_bytes

    def __len__(self) -> int:
        return len(self._copies)

    def __contains__(self, name: object) -> bool:
        return name in self._copies

    def __iter__(self) -> Iterator[str]:
        """All names, least recently used first."""
        return iter(self._copies)

    def copies(self) -> Iterator[CachedCopy]:
        """All copies, least recently used first. Read only."""
        return iter(self._copies.values())

    def state(self, name: str) -> CopyState | None:
        """Where the copy is in its life; None when there is none."""
        copy = self._copies.get(name)
        return copy.state if copy else None

    def is_loaded(self, name: str) -> bool:
        """Whether requests may be answered from the copy."""
        copy = self._copies.get(name)
        return copy is not None and copy.state is _LOADED

    def size_bytes(self, name: str) -> int:
        """The copy's size, 0 when there is none."""
        copy = self._copies.get(name)
        return copy.size_bytes if copy else 0

    def in_flight(self, name: str) -> int:
        """Requests the copy is answering."""
        copy = self._copies.get(name)
        return copy.in_flight if copy else 0

    def lru_age_ms(self, now_ms: int) -> int:
        """How long ago the least recently used loaded copy was used; 0 when none is loaded."""
        for copy in self._copies.values():
            if copy.state is _LOADED:
                return max(0, now_ms - copy.last_used_ms)
        return 0

    # -- Requests: constant time --------------------------------------------------------------------------------------

    def touch(self, name: str, now_ms: int) -> None:
        """The copy is being used; no error when there is none. A time before the latest seen counts as the latest."""
        copy = self._copies.get(name)
        if copy is None:
            return
        if now_ms > self._now_ms:
            self._now_ms = now_ms
        copy.last_used_ms = self._now_ms
        copy.uses += 1
        self._copies.move_to_end(name)

    def pin(self, name: str) -> None:
        """A request is in flight on the copy: it is no victim until `unpin`. Raises `KeyError` unless loaded."""
        copy = self._copies[name]
        if copy.state is not _LOADED:
            raise KeyError(f"{name} is {copy.state}, not loaded")
        copy.in_flight += 1

    def unpin(self, name: str) -> None:
        """A request has ended. Raises `KeyError` without a copy, `ValueError` without a request in flight."""
        copy = self._copies[name]
        if copy.in_flight <= 0:
            raise ValueError(f"{name} has no request in flight")
        copy.in_flight -= 1

    # -- Loads --------------------------------------------------------------------------------------------------------

    def can_ever_fit(self, size_bytes: int) -> bool:
        """Whether a copy of this size fits into an empty instance."""
        return size_bytes <= self._capacity_bytes

    def reserve(self, name: str, size_bytes: int, now_ms: int) -> Reservation | None:
        """Book room for a load and, in the same step, mark what must go for it as UNLOADING.

        None, and nothing has changed, when the room cannot be had now: everything else is loading, in use or leaving,
        or the previous copy of `name` is still UNLOADING (wait for its `unloaded` and ask again). Raises `ValueError`
        when `name` is here or on its way.
        """
        if size_bytes < 0:
            raise ValueError(f"{name}: size_bytes is {size_bytes}: use 0 or more")
        present = self._copies.get(name)
        if present is not None:
            if present.state is _UNLOADING:
                return None
            raise ValueError(f"{name} is already {present.state}")
        victims = self.victims_for(size_bytes)
        if victims is None:
            return None
        for victim in victims:
            self.begin_unload(victim)
        self._now_ms = max(self._now_ms, now_ms)
        copy = CachedCopy(name, _RESERVED, size_bytes, self._now_ms)
        self._copies[name] = self._reserved[name] = copy
        self._booked_bytes += size_bytes
        self._grant()
        return Reservation(name, victims)

    def victims_for(self, size_bytes: int) -> tuple[str, ...] | None:
        """What to evict, in order, so that `size_bytes` more fit once it is gone; None when that cannot be.

        Only loaded copies without a request in flight are named: evicting a loading copy would race the load that
        somebody waits for.
        """
        excess_bytes = self._booked_bytes + size_bytes - self._capacity_bytes
        if excess_bytes <= 0:
            return ()
        if size_bytes > self._capacity_bytes:
            return None
        victims = []
        evictable = (c for c in self._copies.values() if c.state is _LOADED and not c.in_flight)
        for copy in self._policy(evictable):
            victims.append(copy.name)
            excess_bytes -= copy.size_bytes
            if excess_bytes <= 0:
                return tuple(victims)
        return None

    def may_load(self, name: str) -> bool:
        """Whether the memory promised to `name` is free now, so that its load may begin."""
        return self.state(name) is _LOADING

    def loaded(self, name: str, actual_bytes: int, *, load_ms: int = 0) -> None:
        """The load ended well and takes `actual_bytes`, which may overshoot: ask `victims_for(0)` next.

        The copy counts as used now: somebody waits for it, and evicting it unused would mean loading it twice.
        Raises `ValueError` unless the copy was on its way. (A RESERVED one is accepted: what is in memory is a fact.)
        """
        copy = self._arriving(name)
        if actual_bytes < 0:
            raise ValueError(f"{name}: actual_bytes is {actual_bytes}: use 0 or more")
        self._used_bytes += actual_bytes - (copy.size_bytes if copy.state is _LOADING else 0)
        self._booked_bytes += actual_bytes - copy.size_bytes
        self._reserved.pop(name, None)
        copy.state, copy.size_bytes, copy.load_ms = _LOADED, actual_bytes, load_ms
        copy.last_used_ms = self._now_ms
        self._copies.move_to_end(name)
        self._grant()

    def forget(self, name: str) -> None:
        """The load failed or was given up, and its memory is free. Raises `ValueError` unless it was on its way."""
        copy = self._arriving(name)
        self._booked_bytes -= copy.size_bytes
        if copy.state is _LOADING:
            self._used_bytes -= copy.size_bytes
        self._reserved.pop(name, None)
        del self._copies[name]
        self._grant()

    # -- Unloads ------------------------------------------------------------------------------------------------------

    def begin_unload(self, name: str) -> None:
        """The loaded copy leaves: no request may be pinned to it any more, those in flight may end.

        Raises `ValueError` unless it is loaded.
        """
        copy = self._copies.get(name)
        if copy is None or copy.state is not _LOADED:
            raise ValueError(f"{name} is {copy.state if copy else 'absent'}, not loaded")
        copy.state = _UNLOADING
        self._booked_bytes -= copy.size_bytes

    def unloaded(self, name: str) -> None:
        """The memory of an UNLOADING copy is free. Raises `ValueError` unless it was, with no request in flight."""
        copy = self._copies.get(name)
        if copy is None or copy.state is not _UNLOADING:
            raise ValueError(f"{name} is {copy.state if copy else 'absent'}, not unloading")
        if copy.in_flight:
            raise ValueError(f"{name} still has {copy.in_flight} requests in flight")
        self._used_bytes -= copy.size_bytes
        del self._copies[name]
        self._grant()

    # -- Inside -------------------------------------------------------------------------------------------------------

    def _arriving(self, name: str) -> CachedCopy:
        copy = self._copies.get(name)
        if copy is None or copy.state not in (_RESERVED, _LOADING):
            raise ValueError(f"{name} is {copy.state if copy else 'absent'}, not loading")
        return copy

    def _grant(self) -> None:
        """Turn promises into memory, first come first served: a small load never overtakes a large one for ever."""
        while self._reserved:
            copy = next(iter(self._reserved.values()))
            if self._used_bytes + copy.size_bytes > self._capacity_bytes:
                return
            del self._reserved[copy.name]
            copy.state = _LOADING
            self._used_bytes += copy.size_bytes

    def __repr__(self) -> str:
        """For example ``InstanceCache(5/10 a=3:loaded+1 b=2:loading)``: ``+1`` is a request in flight."""
        copies = (
            f" {c.name}={c.size_bytes}:{c.state}{f'+{c.in_flight}' if c.in_flight else ''}"
            for c in self._copies.values()
        )
        return f"InstanceCache({self._used_bytes}/{self._capacity_bytes}{''.join(copies)})"

    def validate(self) -> None:
        """Raise `AssertionError` unless every invariant holds. For tests and simulations; linear time."""
        copies = list(self._copies.values())
        assert all(name == copy.name for name, copy in self._copies.items())
        assert self._used_bytes == sum(c.size_bytes for c in copies if c.state is not _RESERVED), self
        assert self._booked_bytes == sum(c.size_bytes for c in copies if c.state is not _UNLOADING), self
        assert list(self._reserved.values()) == [c for c in self._reserved.values() if c.state is _RESERVED], self
        assert len(self._reserved) == sum(c.state is _RESERVED for c in copies), self
        ages = [c.last_used_ms for c in copies]
        assert ages == sorted(ages) and (not ages or ages[-1] <= self._now_ms), self
        assert all(c.in_flight >= 0 and c.size_bytes >= 0 for c in copies), self
        assert all(c.state in (_LOADED, _UNLOADING) for c in copies if c.in_flight), self
        first = next(iter(self._reserved.values()), None)
        assert first is None or self._used_bytes + first.size_bytes > self._capacity_bytes, self
