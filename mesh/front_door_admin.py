"""The connection to HAProxy's admin socket.

Rule of the file: it carries commands and answers, and knows nothing of models. Lost or hung is an `OSError`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from raymesh.mesh.front_door_config import ADMIN_SOCKET

_log = logging.getLogger(__name__)

#: A HAProxy that does not answer for this long is hung.
_ANSWER_TIMEOUT_S = 5.0


def _ignore() -> None:
    """Nobody wants to know."""


class Admin(asyncio.Protocol):
    """One interactive connection to HAProxy's admin socket; answers come in the order of the commands."""

    def __init__(self) -> None:
        self.pid = 0
        self.description = ""
        self.on_lost: Callable[[], None] = _ignore
        self.is_lost = False
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._answers: list[str] = []
        self._wanted = 0
        self._done: asyncio.Future[None] | None = None

    async def ask(self, commands: Sequence[str]) -> list[str]:
        """Write commands at once and return what HAProxy says to each.

        Raises `ConnectionError` when the connection is lost and `TimeoutError` when HAProxy hangs.
        """
        if self._transport is None or self.is_lost:
            raise ConnectionResetError("admin connection lost")
        self._answers, self._wanted = [], len(commands)
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write("".join(f"{command}\n" for command in commands).encode())
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            await self._done
        return self._answers

    async def tell(self, commands: Sequence[str]) -> None:
        """As `ask`, for commands that say nothing when all is well; logs the others."""
        for command, answer in zip(commands, await self.ask(commands), strict=True):
            # A new address is confirmed in words ("... changed from ...", "no need to change ...").
            if answer and not (" addr " in command and "chang" in answer):
                _log.error("front door: %s: HAProxy says %s", command, answer)

    async def identify(self) -> None:
        """Enter interactive mode and learn who answers."""
        info = (await self.ask(["prompt", "show info"]))[-1]
        fields = dict(line.partition(": ")[::2] for line in info.splitlines())
        self.pid = int(fields["Pid"])
        self.description = fields.get("description", "")

    async def live_slots(self) -> dict[int, str]:
        """Address by slot, for the slots in use."""
        live: dict[int, str] = {}
        header: list[str] = []
        for line in (await self.ask(["show servers state runtimes"]))[0].splitlines():
            if line.startswith("# "):
                header = line[2:].split()
            elif header and line:
                server = dict(zip(header, line.split(), strict=False))
                # An administrative state of 0 is "not in maintenance".
                if server["srv_name"].startswith("r") and server["srv_admin_state"] == "0":
                    host = server["srv_addr"]
                    host = f"[{host}]" if ":" in host else host
                    live[int(server["srv_name"][1:])] = f"{host}:{server['srv_port']}"
        return live

    def close(self) -> None:
        """Close the connection; HAProxy does not mind."""
        self.on_lost = _ignore
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        # A cast: uvloop's transports are asyncio transports in all but ancestry.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Split at prompts: each answer ends with an empty line and ``> ``."""
        *answers, self._buffer = (self._buffer + data).split(b"\n> ")
        self._answers += [answer.decode(errors="replace").strip() for answer in answers]
        if self._done is not None and not self._done.done() and len(self._answers) >= self._wanted:
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """HAProxy is gone (or closed the connection): wake whoever waits."""
        self.is_lost = True
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionResetError("HAProxy closed the admin connection"))
        self.on_lost()


async def connect(directory: Path) -> Admin | None:
    """A connection to the HAProxy that runs in `directory`; None if none answers."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    admin = Admin()
    try:
        # Through the directory's descriptor, because a socket's path may not be longer than ~100 bytes.
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            await asyncio.get_running_loop().create_unix_connection(
                lambda: admin, f"/proc/self/fd/{handle}/{ADMIN_SOCKET}"
            )
        await admin.identify()
    except (OSError, TimeoutError, KeyError, ValueError):
        admin.close()
        return None
    finally:
        os.close(handle)
    return admin
