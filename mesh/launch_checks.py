"""What is checked before a mesh is started, and how starting one may end.

Rule of the file: every check has a deadline, and its error names what the user can change.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import http.client
import socket

import psutil

#: How long the registry may take to answer; with Python's own start this stays within ten seconds.
REGISTRY_TIMEOUT_S = 6.0


class ExitCode(enum.IntEnum):
    """What `raymesh` ends with."""

    OK = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3
    PORT_TAKEN = 4
    ALREADY_RUNNING = 5
    NOT_READY = 6
    INTERRUPTED = 130


class LaunchError(Exception):
    """The mesh was not started; the message is for the user and `exit_code` for the shell."""

    def __init__(self, exit_code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def check_port(host: str, port: int) -> None:
    """Raise `LaunchError` unless a server can listen on `port` here; says who has it if that can be seen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As HAProxy does; connections of a stopped mesh that linger in TIME_WAIT are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                message = f"port {port} on {host} is taken{_owner_of(port)}; choose another one with --port"
                raise LaunchError(ExitCode.PORT_TAKEN, message) from None
            raise LaunchError(ExitCode.USAGE, f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def check_registry(url: str, timeout_s: float = REGISTRY_TIMEOUT_S) -> None:
    """Raise `LaunchError` unless the registry at `url` answers within `timeout_s`."""
    from raymesh.registry.etcd import EtcdStore
    from raymesh.registry.store import RegistryError

    async def read() -> None:
        store = EtcdStore.from_url(url)
        try:
            async with asyncio.timeout(timeout_s):
                await store.get("/raymesh/")
        finally:
            await store.close()

    try:
        asyncio.run(read())
    except ValueError as error:
        raise LaunchError(ExitCode.USAGE, str(error)) from None
    except (RegistryError, TimeoutError, OSError) as error:
        shown = url.rpartition("@")[2] if "@" in url else url.partition("://")[2]
        raise LaunchError(
            ExitCode.UNREACHABLE, f"the registry at {shown} does not answer: {error or 'no answer in time'}"
        ) from None


def is_ready(endpoint: str, timeout_s: float = 1.0) -> bool:
    """Whether the mesh at `endpoint` (``host:port``) takes requests."""
    connection = http.client.HTTPConnection(endpoint, timeout=timeout_s)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _owner_of(port: int) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("inet"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})" if connection.pid else ""
    return ""
