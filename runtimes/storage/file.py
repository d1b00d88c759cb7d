"""Models on a file system every node sees: ``/models/m.ubj`` or ``file:///models/m.ubj``, a file or a folder.

Rule of the file: nothing outside what was registered is ever copied. Links are resolved before a byte is read; inside a
folder they must stay in the folder, and everything must lie under the allowed roots where some are set.
"""
# ruff: noqa: PTH102, PTH103, PTH112, PTH113, PTH114, PTH116, PTH118, PTH120, PTH122, PTH123
# os calls on purpose: descriptors, flags, and no path object per step.

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from raymesh.runtimes.errors import LoadFailed
from raymesh.runtimes.storage.provider import FetchLimits, Fingerprint

#: A file changed less than this ago could change again within the same timestamp (kernel ticks: 1 to 10 ms).
_SETTLED_AFTER_NS = 20_000_000
_COPY_BYTES = 1 << 20


class FileProvider:
    """Plain absolute paths and ``file://`` URIs. With `roots`, only what lies in one of those folders."""

    schemes: tuple[str, ...] = ("", "file")

    def __init__(self, roots: tuple[Path, ...] = ()) -> None:
        self._roots = tuple(os.path.realpath(root) for root in roots)

    def fingerprint(self, uri: str, limits: FetchLimits) -> Fingerprint:
        """Times, size and inode of the file, or of every file in the folder."""
        source = self._source(uri)
        try:
            info = os.stat(source)
            if stat.S_ISREG(info.st_mode):
                _check_limits(uri, info.st_size, 1, limits)
                return Fingerprint(_identity(info), info.st_size, _is_settled(info.st_mtime_ns, info.st_ctime_ns))
            if not stat.S_ISDIR(info.st_mode):
                raise LoadFailed(f"model '{uri}' is neither a file nor a folder")
            digest, size_bytes, newest_ns = hashlib.sha256(), 0, info.st_mtime_ns
            for count, (name, path) in enumerate(_files_in(uri, source), start=1):
                info = os.stat(path)
                size_bytes += info.st_size
                newest_ns = max(newest_ns, info.st_mtime_ns, info.st_ctime_ns)
                _check_limits(uri, size_bytes, count, limits)
                digest.update(f"{name}\0{_identity(info)}\n".encode(errors="surrogateescape"))
        except OSError as error:
            _fail(uri, error)
        return Fingerprint(digest.hexdigest(), size_bytes, _is_settled(newest_ns))

    def fetch(self, uri: str, dest_dir: Path, limits: FetchLimits) -> None:
        """Copy the file or folder into `dest_dir` (see `Provider.fetch`)."""
        source = self._source(uri)
        left_bytes = limits.bytes_max
        try:
            if not os.path.isdir(source):
                _copy(uri, source, os.path.join(dest_dir, "model" + _suffix(uri)), left_bytes)
                return
            target = os.path.join(dest_dir, "model")
            os.mkdir(target)
            for count, (name, path) in enumerate(_files_in(uri, source), start=1):
                _check_limits(uri, 0, count, limits)
                os.makedirs(os.path.dirname(os.path.join(target, name)), exist_ok=True)
                left_bytes -= _copy(uri, path, os.path.join(target, name), left_bytes)
        except OSError as error:
            _fail(uri, error)

    def _source(self, uri: str) -> str:
        """The real path behind `uri`; raises `LoadFailed` when it is outside the roots."""
        path = uri
        if not uri.startswith("/"):
            parts = urlsplit(uri)
            path = unquote(parts.path)
            if parts.netloc not in ("", "localhost") or not path.startswith("/"):
                raise LoadFailed(f"model '{uri}': expected file:///absolute/path, without a host")
        if "\0" in path:
            raise LoadFailed("the model's path holds a NUL character")
        real = os.path.realpath(path)
        if self._roots and not any(_is_within(real, root) for root in self._roots):
            # The same words whether it exists or not: the answer must not be a way to look around the disk.
            raise LoadFailed(f"model '{uri}' is not in a folder this mesh may read models from")
        return real


def _suffix(uri: str) -> str:
    suffix = os.path.splitext(unquote(uri.rstrip("/")))[1].lower()
    return suffix if suffix[1:].isalnum() else ""


def _files_in(uri: str, folder: str) -> Iterator[tuple[str, str]]:
    """(relative name, real path) of every file in `folder`, in the order of names; never leaves the folder."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                raise LoadFailed(f"model '{uri}' holds a link to a folder ('{name}'); copy the files instead")
        for name in sorted(names):
            real = os.path.realpath(os.path.join(parent, name))
            if not _is_within(real, folder):
                raise LoadFailed(f"model '{uri}' holds a link that leads out of its folder ('{name}')")
            if not os.path.isfile(real):
                raise LoadFailed(f"model '{uri}' holds something that is not a file ('{name}')")
            yield os.path.relpath(os.path.join(parent, name), folder), real


def _copy(uri: str, source: str, target: str, bytes_max: int) -> int:
    """Copy one regular file, read-only at its new place; returns its size in bytes."""
    # NOFOLLOW: the path is already resolved, so a link here was put there a moment ago. NONBLOCK: a pipe must not hang.
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as reader:
        info = os.fstat(reader.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise LoadFailed(f"model '{uri}' is not a regular file")
        _check_limits(uri, info.st_size, 1, FetchLimits(bytes_max))
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        with open(out, "wb", buffering=0) as writer:
            shutil.copyfileobj(reader, writer, _COPY_BYTES)
            return writer.tell()


def _check_limits(uri: str, size_bytes: int, files: int, limits: FetchLimits) -> None:
    if files > limits.files_max:
        raise LoadFailed(f"model '{uri}' has more than {limits.files_max} files")
    if size_bytes > limits.bytes_max:
        raise LoadFailed(f"model '{uri}' is larger than the node's disk cache; raise disk_cache_bytes")


def _identity(info: os.stat_result) -> str:
    # The change time too: unlike the modification time nobody can set it back.
    return f"{info.st_dev}:{info.st_ino}:{info.st_size}:{info.st_mtime_ns}:{info.st_ctime_ns}"


def _is_settled(*times_ns: int) -> bool:
    return time.time_ns() - max(times_ns) > _SETTLED_AFTER_NS


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _fail(uri: str, error: OSError) -> NoReturn:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE):
        raise error  # the node's fault, not the model's
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise LoadFailed(f"model '{uri}' does not exist on this node") from None
    if isinstance(error, PermissionError):
        raise LoadFailed(f"model '{uri}' may not be read by the mesh") from None
    raise LoadFailed(f"model '{uri}' cannot be read: {error.strerror or type(error).__name__}") from None
