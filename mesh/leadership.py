"""One controller in charge: a key on a lease, taken only when nobody has it.

Rule of the file: who is fenced leads no more. Two leaders at once can happen for a moment (a frozen process that does
not know yet); they cost a double load and never a wrong answer, for runtimes publish with compare-and-set.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from raymesh.registry.records import LeaderRecord
from raymesh.registry.session import Session
from raymesh.registry.store import Compare
from raymesh.registry.view import Change, LeaderChanged, MeshView

log = logging.getLogger(__name__)


class Leadership:
    """Stands for election whenever there is no leader, until cancelled. `is_leader` is what the session still backs.

    Feed it: `see` with the view's changes, `dropped` from the session's `on_dropped`, `wake` after a new epoch.
    """

    def __init__(self, identity: str, address: str, session: Session, view: MeshView) -> None:
        self._id = identity
        self._address = address
        self._session = session
        self._view = view
        self._is_elected = False
        self._wake = asyncio.Event()

    @property
    def is_leader(self) -> bool:
        """Whether this process may place."""
        return self._is_elected and not self._session.is_fenced

    def see(self, changes: Iterable[Change]) -> None:
        """Notice a new leader or the lack of one."""
        for change in changes:
            if isinstance(change, LeaderChanged):
                if change.new is not None and change.new.record.id != self._id:
                    self._lose("another controller leads")
                self._wake.set()

    def dropped(self, key: str) -> None:
        """The session could not keep `key`: somebody else took it meanwhile."""
        if key == self._view.keys.leader:
            self._lose("the leader key is gone")
            self._wake.set()

    def wake(self) -> None:
        """Look again."""
        self._wake.set()

    async def campaign(self) -> None:
        """Run for leader for ever (cancel to end)."""
        while True:
            self._wake.clear()
            if not self._is_elected and self._view.leader is None and not self._session.is_fenced:
                record = LeaderRecord(id=self._id, address=self._address, epoch=self._session.epoch)
                key = self._view.keys.leader
                self._is_elected = await self._session.publish(key, record.encode(), compare=Compare.absent(key))
                if self._is_elected:
                    log.info("controller %s leads", self._id)
                # A lost race shows in the view as the winner's key, which wakes us; so does its end.
            await self._wake.wait()

    def _lose(self, why: str) -> None:
        if self._is_elected:
            log.warning("controller %s leads no more: %s", self._id, why)
        self._is_elected = False
