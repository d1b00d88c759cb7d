"""Every setting of a mesh, with its unit and the reason for its default."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any, Self

from raymesh.registry.keys import ID_RULE, is_valid_id

#: Suffixes of `parse_size` in bytes: binary (KiB) and decimal (KB) multiples, told apart as storage vendors do.
_UNITS_BYTES = {
    "": 1,
    "B": 1,
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
}
_SIZE_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")

#: Less than this for all models together is a typing mistake (a unit left out), not a mesh.
MEMORY_BYTES_MIN = 1024 * 1024

#: Longest temporary folder Ray can use: its sockets add 64 characters and AF_UNIX paths end at 107.
_RAY_TEMP_DIR_CHARACTERS_MAX = 40


def parse_size(text: str) -> int:
    """`text` such as ``2GiB``, ``1.5 GB``, ``512MiB`` or ``1048576`` in bytes; upper and lower case are the same.

    Raises `ValueError` saying what is allowed.
    """
    match = _SIZE_PATTERN.fullmatch(text)
    units = {unit.upper(): factor for unit, factor in _UNITS_BYTES.items()}
    if match is None or match[2].upper() not in units:
        raise ValueError(f"{text!r} is not a size; write bytes or a number with KiB, MiB, GiB, TiB, KB, MB, GB, TB")
    factor: int = units[match[2].upper()]
    # Whole numbers never go through a float, which is exact only up to 2**53.
    return round(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor


def format_size(size_bytes: int) -> str:
    """`size_bytes` for people: ``2.0 GiB``, ``640 B``."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one mesh runs with. Built once (CLI flags or environment) and handed to every process."""

    mesh: str = "default"
    #: ``etcd://h1:2379,h2:2379`` (``etcds://`` for TLS, ``user:password@`` in front of the hosts).
    registry: str = "etcd://127.0.0.1:2379"
    #: Where clients connect; one port for everything.
    host: str = "127.0.0.1"
    port: int = 8033
    #: Runtime processes of the CPU pool on this machine; 0 means one per core.
    runtimes: int = 0
    #: Memory for models, all runtimes together, in bytes; 0 means half of what the machine (or its cgroup) has.
    memory_bytes: int = 0
    #: Sockets, logs, disk cache and, with the embedded etcd, the registry's data.
    state_dir: Path = Path(".raymesh")
    #: Shared by the processes of one mesh; runtimes and gateways answer only callers that show it.
    internal_token: str = ""
    #: Pickle formats execute code when loaded; off unless every user of the mesh is trusted.
    trust_pickle: bool = False
    #: Life of an instance's lease: how long a dead process stays in the registry.
    lease_ttl_s: int = 5
    #: Longest a load may take, fetch included, before it counts as failed.
    load_timeout_s: float = 90.0
    #: Longest a cold request waits when its caller set no deadline.
    request_timeout_s: float = 60.0
    #: How long a load failure keeps a model from being tried on the same instance again (ModelMesh: 15 min).
    failure_expiry_s: float = 900.0
    #: Largest request or answer body, in bytes.
    message_bytes_max: int = 64 * 1024 * 1024
    #: Bytes of model files each node keeps on disk.
    disk_cache_bytes: int = 10 * 1024**3
    #: Loads a runtime works on at the same time.
    load_slots: int = 2

    @classmethod
    def from_env(cls, **overrides: Any) -> Self:
        """Defaults, then ``RAYMESH_<NAME>`` from the environment, then `overrides`.

        Raises `ValueError` naming the variable when a value does not parse.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            variable = f"RAYMESH_{field.name.upper()}"
            text = os.environ.get(variable)
            if text is None:
                continue
            try:
                values[field.name] = _parse(field.name, type(field.default), text)
            except ValueError as error:
                raise ValueError(f"{variable}={text!r}: {error}") from None
        return cls(**{**values, **overrides})

    def resolved(self) -> Self:
        """The same with `state_dir` absolute, so that every process means the same folder whatever its own is."""
        return dataclasses.replace(self, state_dir=Path(os.path.abspath(self.state_dir.expanduser())))  # noqa: PTH100

    def validate(self) -> None:
        """Raise `ValueError` naming the setting that cannot be meant, and what would be allowed."""
        if not is_valid_id(self.mesh):
            raise ValueError(f"mesh {self.mesh!r}: use {ID_RULE}")
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port {self.port}: use 1 to 65535")
        if not self.host:
            raise ValueError("host is empty; use 127.0.0.1 for this machine only, 0.0.0.0 for every interface")
        if not self.registry.startswith(("etcd://", "etcds://")):
            raise ValueError(f"registry {self.registry!r}: use etcd://host:port[,host:port…] or etcds:// for TLS")
        for name in ("runtimes", "memory_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: use 0 (choose for me) or more")
        if 0 < self.memory_bytes < MEMORY_BYTES_MIN:
            least = format_size(MEMORY_BYTES_MIN)
            raise ValueError(f"memory of {format_size(self.memory_bytes)} holds no model; give {least} or more")
        for name in ("lease_ttl_s", "load_timeout_s", "request_timeout_s", "message_bytes_max", "load_slots"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be more than 0")

    @property
    def endpoint(self) -> str:
        """``host:port`` to connect to from this machine (an address to bind to such as 0.0.0.0 is none)."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def ray_temp_dir(self) -> Path:
        """Where Ray keeps its sockets and logs: in the state dir, or a short path of its own if that is too long."""
        inside = self.resolved().state_dir / "ray"
        if len(os.fsencode(inside)) <= _RAY_TEMP_DIR_CHARACTERS_MAX:
            return inside
        digest = hashlib.sha256(os.fsencode(inside)).hexdigest()[:10]
        return Path(tempfile.gettempdir()) / f"raymesh-{os.getuid()}-{digest}"


def _parse(name: str, kind: type, text: str) -> Any:
    if kind is bool:
        return _parse_bool(text)
    return parse_size(text) if name.endswith("_bytes") or name == "message_bytes_max" else kind(text)


def _parse_bool(text: str) -> bool:
    if text.lower() in {"1", "true", "yes", "on"}:
        return True
    if text.lower() in {"0", "false", "no", "off", ""}:
        return False
    raise ValueError("use true or false")
