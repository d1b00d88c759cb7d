"""The node's disk cache of model files, addressed by content and shared by all runtimes of the node.

Rule of the file: the file system is the only state. Every step is one atomic rename or one advisory lock, so any
process may die at any point and the others carry on; whatever is found damaged is thrown away and fetched again.

Layout under the root (one file system):

    blobs/<sha256>/model.ubj   an artifact, in a folder named by its content; the folder's mtime is its last use
    index/<sha256 of the uri>  fingerprint → digest, so that an unchanged source is neither read nor hashed again
    tmp/<random>/              being fetched, held by a shared lock; without one it is a dead process's leftover
    locks/<00-ff>              one fetch of a URI at a time over all processes, striped
    usage                      bytes in blobs/, a hint; recounted whenever something is evicted

Artifacts are copied, not hard-linked: the user may rewrite the source in place, and a registered model never changes.
"""
# ruff: noqa: PTH100, PTH102, PTH103, PTH104, PTH108, PTH110, PTH112, PTH116, PTH118, PTH123, PTH208
# os calls on purpose: a path object per step would double the cost of a hit.

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from raymesh.runtimes.errors import LoadFailed, Reason, Unavailable
from raymesh.runtimes.storage.file import FileProvider
from raymesh.runtimes.storage.provider import FetchLimits, Fingerprint, Provider, scheme_of

_log = logging.getLogger(__name__)

#: Hexadecimal digits of a URI's hash that name its lock: 256 locks, so that few fetches wait for a stranger's.
_STRIPE_DIGITS = 2
#: Eviction makes this share of the capacity free at once, so that a full cache is not scanned for every new artifact.
_EVICT_SHARE = 0.1
#: A folder in tmp/ is locked an instant after it was made; younger ones than this are never taken for leftovers.
_LEFTOVER_AGE_S = 60.0
#: How often a source that changes while it is copied is copied again.
_ATTEMPTS = 3
_READ_BYTES = 1 << 20


class Artifact:
    """A model's files on this node. While it is not released (or collected) the cache will not evict them.

    `path` is a file or a folder; `digest` the SHA-256 of its content (names included, for a folder).
    """

    __slots__ = ("_lock", "digest", "path", "size_bytes")

    def __init__(self, path: Path, digest: str, size_bytes: int, lock: int) -> None:
        self.path = path
        self.digest = digest
        self.size_bytes = size_bytes
        self._lock = lock

    def release(self) -> None:
        """Allow eviction; the files may be gone at any time after."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class DiskCache:
    """At most `capacity_bytes` of artifacts under `root`, least recently used ones going first.

    Safe to use from many threads and processes at once. More than the capacity is on disk only while artifacts in use
    leave nothing to evict.
    """

    def __init__(self, root: Path, capacity_bytes: int, providers: Sequence[Provider] | None = None) -> None:
        self._root = os.path.abspath(root)
        self._capacity_bytes = capacity_bytes
        self._limits = FetchLimits(bytes_max=capacity_bytes)
        if providers is None:
            providers = (FileProvider(),)
        self._providers = {scheme: provider for provider in providers for scheme in provider.schemes}
        for folder in ("blobs", "index", "tmp", "locks"):
            os.makedirs(os.path.join(self._root, folder), exist_ok=True)
        self._remove_leftovers()

    def fetch(self, uri: str) -> Artifact:
        """The artifact behind `uri`, from the cache when the source has not changed since.

        Blocks (a copy and a hash; about 0.2 ms for a small cached file). Raises `LoadFailed` when the source is
        missing, unreadable, too large or of an unknown scheme, `Unavailable` when this node's disk fails.
        """
        provider = self._provider(uri)
        fingerprint = provider.fingerprint(uri, self._limits)
        found = self._lookup(uri, fingerprint)
        if found is not None:
            return found
        try:
            with self._locked(_name_of(uri)[:_STRIPE_DIGITS]):
                # Someone else may have fetched it while we waited.
                return self._lookup(uri, fingerprint) or self._fetch(uri, provider)
        except OSError as error:
            _log.warning("disk cache: %s", error)
            reason = error.strerror or type(error).__name__
            raise Unavailable(f"the node's disk cache failed: {reason}", reason=Reason.NO_CAPACITY) from None

    async def fetch_async(self, uri: str) -> Artifact:
        """`fetch` without blocking the event loop, except for the look at an artifact that is already here."""
        provider = self._provider(uri)
        if "" in provider.schemes:  # local files: a fingerprint is a few calls of stat
            found = self._lookup(uri, provider.fingerprint(uri, self._limits))
            if found is not None:
                return found
        return await asyncio.to_thread(self.fetch, uri)

    def used_bytes(self) -> int:
        """Bytes of artifacts on disk, counted now."""
        return sum(size for _, size, _ in self._blobs())

    def _provider(self, uri: str) -> Provider:
        scheme = scheme_of(uri)
        provider = self._providers.get(scheme)
        if provider is None:
            known = ", ".join(f"{s}://" for s in sorted(self._providers) if s)
            raise LoadFailed(f"no storage for '{scheme}://' on this mesh; it reads absolute paths and {known}")
        return provider

    # -- what is here ------------------------------------------------------------------------------------------------

    def _lookup(self, uri: str, fingerprint: Fingerprint) -> Artifact | None:
        try:
            with open(self._at("index", _name_of(uri)), "rb") as reader:
                entry = json.loads(reader.read())
            if entry["fingerprint"] != fingerprint.text:
                return None
            return self._open(entry["digest"], entry["name"], entry["size_bytes"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _open(self, digest: str, name: str, size_bytes: int) -> Artifact | None:
        """The blob, protected from eviction; None when it is not (or no longer, or not wholly) here."""
        folder = self._at("blobs", digest)
        path = os.path.join(folder, name)
        try:
            lock = _lock_folder(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return None
        try:
            # After the lock: an evictor may have removed it in between. A file cut short by a power loss is not it.
            info = os.stat(path)
            if stat.S_ISDIR(info.st_mode) or info.st_size == size_bytes:
                os.utime(folder)
                return Artifact(Path(path), digest, size_bytes, lock)
        except OSError:
            pass
        os.close(lock)
        return None

    # -- bringing it here --------------------------------------------------------------------------------------------

    def _fetch(self, uri: str, provider: Provider) -> Artifact:
        for _ in range(_ATTEMPTS):
            before = provider.fingerprint(uri, self._limits)
            with self._temporary() as (folder, lock):
                provider.fetch(uri, Path(folder), self._limits)
                if provider.fingerprint(uri, self._limits).text != before.text:
                    continue
                (name,) = os.listdir(folder)
                digest, size_bytes = _digest(os.path.join(folder, name))
                artifact = self._publish(folder, lock, name, digest, size_bytes)
            if artifact is not None:
                if before.is_settled:
                    self._remember(uri, before, artifact)
                return artifact
        raise LoadFailed(f"model '{uri}' keeps changing while it is being read")

    def _publish(self, folder: str, lock: int, name: str, digest: str, size_bytes: int) -> Artifact | None:
        target = self._at("blobs", digest)
        existing = self._open(digest, name, size_bytes)
        if existing is not None:
            return existing
        self._make_room(size_bytes)
        try:
            os.rename(folder, target)
        except OSError:
            return self._join(folder, name, digest, size_bytes)
        self._add_usage(size_bytes)
        os.utime(target)
        # The lock was taken on the folder before it had this name, so it was never evictable.
        return Artifact(Path(target, name), digest, size_bytes, os.dup(lock))

    def _join(self, folder: str, name: str, digest: str, size_bytes: int) -> Artifact | None:
        """The same content is here under another suffix (add ours), or damaged (replace it)."""
        target = self._at("blobs", digest)
        try:
            lock = _lock_folder(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock = -1
        try:
            if os.path.isdir(os.path.join(folder, name)):
                if lock < 0:
                    return None
                shutil.rmtree(os.path.join(target, name), ignore_errors=True)
            # A rename replaces a damaged file; who has the old one open keeps it.
            os.rename(os.path.join(folder, name), os.path.join(target, name))
        except OSError:
            return None
        finally:
            if lock >= 0:
                os.close(lock)
        self._add_usage(size_bytes)
        return self._open(digest, name, size_bytes)

    def _remember(self, uri: str, fingerprint: Fingerprint, artifact: Artifact) -> None:
        entry: dict[str, Any] = {
            "fingerprint": fingerprint.text,
            "digest": artifact.digest,
            "name": artifact.path.name,
            "size_bytes": artifact.size_bytes,
        }
        # In place, under the URI's lock: half an entry does not parse, which only costs a fetch. New names are what
        # takes time here (a file system journals them), so there is no temporary file.
        with open(self._at("index", _name_of(uri)), "w") as writer:
            json.dump(entry, writer)

    # -- making room -------------------------------------------------------------------------------------------------

    def _make_room(self, size_bytes: int) -> None:
        if self._usage() + size_bytes <= self._capacity_bytes:
            return
        with self._locked("evict"):
            blobs = sorted(self._blobs())
            used = sum(size for _, size, _ in blobs)
            goal = self._capacity_bytes - size_bytes - int(self._capacity_bytes * _EVICT_SHARE)
            if used + size_bytes > self._capacity_bytes:
                for _, size, digest in blobs:
                    if used <= goal:
                        break
                    if self._evict(digest):
                        used -= size
            with self._locked("usage"):
                self._write_usage(used)

    def _evict(self, digest: str) -> bool:
        folder = self._at("blobs", digest)
        try:
            lock = _lock_folder(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            # Renamed first: the blob is there wholly or not at all, whatever happens to us.
            doomed = self._at("tmp", secrets.token_hex(8))
            os.rename(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            return True
        except OSError:
            return False
        finally:
            os.close(lock)

    def _blobs(self) -> Iterator[tuple[int, int, str]]:
        """(last use in ns, bytes, digest) of every blob."""
        for entry in os.scandir(self._at("blobs")):
            with contextlib.suppress(OSError):
                used_ns = entry.stat(follow_symlinks=False).st_mtime_ns
                files = (os.path.join(parent, name) for parent, _, names in os.walk(entry.path) for name in names)
                size = sum(os.lstat(file).st_size for file in files)
                yield used_ns, size, entry.name

    def _usage(self) -> int:
        """The hint of bytes in use; more than the capacity (so: count) when there is none."""
        try:
            with open(self._at("usage")) as reader:
                return int(reader.read(20))
        except (OSError, ValueError):
            return self._capacity_bytes + 1

    def _add_usage(self, size_bytes: int) -> None:
        with self._locked("usage"):
            if (used := self._usage()) <= self._capacity_bytes:
                self._write_usage(used + size_bytes)

    def _write_usage(self, used: int) -> None:
        # In place and of one width: whoever reads at the same time sees one number or the other.
        descriptor = os.open(self._at("usage"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(descriptor, b"%020d" % used, 0)
        finally:
            os.close(descriptor)

    # -- files and locks ---------------------------------------------------------------------------------------------

    def _at(self, *names: str) -> str:
        return os.path.join(self._root, *names)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """An exclusive lock over all processes (and threads: each opens the file anew)."""
        descriptor = os.open(self._at("locks", name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[tuple[str, int]]:
        """A folder under a shared lock, removed at the end unless it was renamed away."""
        folder = self._at("tmp", secrets.token_hex(8))
        os.mkdir(folder, 0o755)
        lock = _lock_folder(folder, fcntl.LOCK_SH)
        try:
            yield folder, lock
        finally:
            if os.path.exists(folder):
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)

    def _remove_leftovers(self) -> None:
        """What processes that died while fetching or evicting left behind; living ones hold a lock on theirs."""
        for entry in os.scandir(self._at("tmp")):
            try:
                lock = _lock_folder(entry.path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            try:
                if time.time() - entry.stat(follow_symlinks=False).st_mtime < _LEFTOVER_AGE_S:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)
            except OSError:
                pass
            finally:
                os.close(lock)


def _name_of(uri: str) -> str:
    return hashlib.sha256(uri.encode(errors="surrogateescape")).hexdigest()


def _lock_folder(path: str, operation: int) -> int:
    """A descriptor of `path` that holds the lock; raises `BlockingIOError` when another one does."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, operation)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _digest(path: str) -> tuple[str, int]:
    """SHA-256 of a file's content, or of a folder's names and contents; and the bytes in all."""
    digest = hashlib.sha256()
    if not os.path.isdir(path):
        size_bytes = _hash_file(path, digest)
        return digest.hexdigest(), size_bytes
    size_bytes = 0
    for parent, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            inner = hashlib.sha256()
            full = os.path.join(parent, name)
            size_bytes += _hash_file(full, inner)
            relative = os.path.relpath(full, path).encode(errors="surrogateescape")
            digest.update(b"%d:%s%s" % (len(relative), relative, inner.digest()))
    return digest.hexdigest(), size_bytes


def _hash_file(path: str, digest: Any) -> int:
    size_bytes = 0
    with open(path, "rb", buffering=0) as reader:
        while chunk := reader.read(_READ_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
    return size_bytes
