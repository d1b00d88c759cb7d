"""What loaded models cost in memory: measured when it can be, predicted when it cannot.

Rule of the file: a size is never too good to be true. Measurements have a floor, overlapping loads are not measured at
all (each would count the other's bytes), and a prediction leans on what was measured for artifacts of the same type
and like size.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import psutil

T = TypeVar("T")

#: Least a copy is counted with: its Python objects, table entries, and what the mesh keeps about it.
FLOOR_BYTES = 4096
#: CPython takes small objects from pools that malloc never sees; a block of those is this large on average.
_PYTHON_BLOCK_BYTES = 64
#: Bytes in memory per byte of artifact before anything of a type was measured.
PRIOR_FACTORS: dict[str, float] = {"xgboost": 1.2, "sklearn": 1.5, "onnx": 2.0}
_PRIOR_FACTOR = 2.0
#: Share of the newest measurement in a learned size: old enough to be steady, new enough to follow a workload.
_EWMA_SHARE = 0.2
#: cgroup v1 says "no limit" with a number near 2^63.
_UNLIMITED_BYTES = 1 << 60


class _Mallinfo2(ctypes.Structure):
    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """The C library when it is glibc 2.33 or later (it has mallinfo2), else None."""
    libc = ctypes.CDLL(None)
    try:
        libc.mallinfo2.restype = _Mallinfo2
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
    except AttributeError:
        return None
    return libc


def allocated_bytes() -> int:
    """Bytes this process has in use: malloc's (all threads' arenas, and what it mapped) and CPython's own blocks.

    Falls back to the resident set without glibc. Only differences mean something.
    """
    libc = _libc()
    if libc is None:
        return int(psutil.Process().memory_info().rss)
    info = libc.mallinfo2()
    return int(info.uordblks + info.hblkhd) + sys.getallocatedblocks() * _PYTHON_BLOCK_BYTES


def measured_load(load: Callable[[], T], artifact_bytes: int) -> tuple[T, int]:
    """`load()` and the bytes it left allocated, at least `FLOOR_BYTES` and a quarter of the artifact.

    Counts whatever the whole process allocated meanwhile: call it with no other load running (see `LoadMeter`).
    Requests served at the same time add their buffers for as long as they last: noise of some KB.
    """
    before = allocated_bytes()
    result = load()
    return result, sound_size_bytes(allocated_bytes() - before, artifact_bytes)


def sound_size_bytes(measured_bytes: int, artifact_bytes: int) -> int:
    """`measured_bytes`, but never less than a model of that artifact can be believed to take."""
    return max(measured_bytes, FLOOR_BYTES, artifact_bytes // 4)


class SizeModel:
    """Learned sizes in memory, by model type and size of artifact. Pure: it is told what was measured.

    Keeps, per type and power of two of the artifact's size, a moving average of (artifact, memory) bytes; between two
    known sizes it interpolates, beyond them it adds the prior factor. One factor per type would not do: a 0.4 KB ONNX
    file takes 41 KB in memory, and a 100 MB file does not take 10 GB.
    """

    def __init__(self) -> None:
        #: Per type: bucket → (artifact bytes, memory bytes), both moving averages.
        self._known: dict[str, dict[int, tuple[float, float]]] = {}

    def observe(self, type: str, artifact_bytes: int, size_bytes: int) -> None:
        """Learn that an artifact of `type` with `artifact_bytes` took `size_bytes` in memory."""
        buckets = self._known.setdefault(type, {})
        bucket = max(0, artifact_bytes).bit_length()
        artifact, size = buckets.get(bucket, (float(artifact_bytes), float(size_bytes)))
        buckets[bucket] = (
            artifact + _EWMA_SHARE * (artifact_bytes - artifact),
            size + _EWMA_SHARE * (size_bytes - size),
        )

    def predict(self, type: str, artifact_bytes: int) -> int:
        """The bytes an artifact is expected to take in memory."""
        factor = PRIOR_FACTORS.get(type, _PRIOR_FACTOR)
        points = sorted(self._known.get(type, {}).values())
        below = [point for point in points if point[0] <= artifact_bytes]
        above = [point for point in points if point[0] > artifact_bytes]
        if below and above:
            (x0, y0), (x1, y1) = below[-1], above[0]
            size = y0 + (y1 - y0) * (artifact_bytes - x0) / (x1 - x0)
        elif below:
            x0, y0 = below[-1]
            size = y0 + factor * (artifact_bytes - x0)
        elif above:
            size = above[0][1]
        else:
            size = factor * artifact_bytes + FLOOR_BYTES
        return sound_size_bytes(int(size), artifact_bytes)


class LoadMeter:
    """Sizes for loads that may run at the same time in several threads.

    A load that ran alone is measured and taught to the `SizeModel`; one that overlapped another is predicted from it.
    """

    def __init__(self, sizes: SizeModel | None = None) -> None:
        self.sizes = sizes or SizeModel()
        self._lock = threading.Lock()
        self._running = 0
        self._started = 0

    def load(self, type: str, artifact_bytes: int, load: Callable[[], T]) -> tuple[T, int]:
        """`load()` and the bytes its result takes; whatever `load` raises passes through."""
        with self._lock:
            is_alone = self._running == 0
            self._running += 1
            self._started += 1
            started = self._started
        try:
            result, size_bytes = measured_load(load, artifact_bytes)
        finally:
            with self._lock:
                self._running -= 1
                is_alone = is_alone and self._started == started
        with self._lock:
            if not is_alone:
                return result, self.sizes.predict(type, artifact_bytes)
            self.sizes.observe(type, artifact_bytes, size_bytes)
        return result, size_bytes


def memory_capacity_bytes(root: Path = Path("/")) -> int:
    """Memory this process may use: the machine's, or less where its cgroup (v2 or v1) or one above says so.

    `root` is where ``proc`` and ``sys`` are found, for tests.
    """
    limits = [int(psutil.virtual_memory().total)]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            limits += _limits_upwards(mount, path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits_upwards(mount / "memory", path, "memory.limit_in_bytes")
    return min(limits)


def release_unused() -> None:
    """Give freed memory back to the system (after evictions; takes milliseconds with a large heap)."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def _limits_upwards(mount: Path, path: str, name: str) -> list[int]:
    """The limits of the group `path` and of all groups above it; a container may see only the topmost."""
    limits = []
    group = mount / path.lstrip("/")
    for folder in (group, *group.parents):
        try:
            text = (folder / name).read_text().strip()
        except OSError:
            text = "max"
        if text.isdigit() and int(text) < _UNLIMITED_BYTES:
            limits.append(int(text))
        if folder == mount:
            break
    return limits
