"""What a storage provider is: the way to the files behind one kind of URI.

Rule of the folder: a provider only copies; hashing, caching, eviction and locking are the cache's. Errors are
`LoadFailed` (trying again does not help) or `Unavailable`, in terms of the URI the user registered.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from raymesh.runtimes.errors import LoadFailed


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Bounds of one fetch. The file count keeps a mistaken ``/`` from being copied for minutes."""

    bytes_max: int
    files_max: int = 10_000


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells an unchanged artifact from a changed one without reading it, and its size.

    `is_settled` is False when the source changed so lately that another change could go unseen (file times have a
    resolution of milliseconds); such a fingerprint must not be remembered.
    """

    text: str
    size_bytes: int
    is_settled: bool = True


class Provider(Protocol):
    """Reads artifacts of some URI schemes. Called from several threads."""

    #: Lower-case schemes, for example ``("file", "")``; ``""`` stands for a plain path.
    schemes: tuple[str, ...]

    def fingerprint(self, uri: str, limits: FetchLimits) -> Fingerprint:
        """The artifact's fingerprint now. Raises `LoadFailed` when it is missing, unreadable or over `limits`."""
        ...

    def fetch(self, uri: str, dest_dir: Path, limits: FetchLimits) -> None:
        """Copy the artifact into the empty folder `dest_dir`, as its only entry.

        A file becomes ``model<suffix>``, a folder becomes ``model/``. Raises as `fingerprint` does; what was already
        copied is the caller's to remove.
        """
        ...


def scheme_of(uri: str) -> str:
    """The lower-case scheme of `uri`, ``""`` for a plain path; raises `LoadFailed` when it is no URI at all."""
    if uri.startswith("/"):
        return ""
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if not scheme:
        raise LoadFailed(f"model path '{uri}' must be absolute (/models/…) or a URI (file:///models/…)")
    return scheme.lower()
