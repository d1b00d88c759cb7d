from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from raymesh.runtimes.errors import LoadFailed, Unavailable
from raymesh.runtimes.storage.cache import DiskCache
from raymesh.runtimes.storage.provider import FetchLimits, Fingerprint


class FakeProvider:
    """Artifacts from a dict of bytes, with a count of fetches and a hook while one is going on."""

    schemes: tuple[str, ...] = ("fake",)

    def __init__(self, **artifacts: bytes) -> None:
        self.artifacts = artifacts
        self.fetches = 0
        self.settled = True
        self.during: Any = lambda: None

    def fingerprint(self, uri: str, limits: FetchLimits) -> Fingerprint:
        data = self._data(uri)
        return Fingerprint(hashlib.md5(data).hexdigest(), len(data), self.settled)

    def fetch(self, uri: str, dest_dir: Path, limits: FetchLimits) -> None:
        self.fetches += 1
        data = self._data(uri)
        self.during()
        (dest_dir / f"model{Path(uri).suffix}").write_bytes(data)

    def _data(self, uri: str) -> bytes:
        try:
            return self.artifacts[Path(uri).stem]
        except KeyError:
            raise LoadFailed(f"model '{uri}' does not exist") from None


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider(a=b"a" * 100, b=b"b" * 100, c=b"c" * 100, again=b"a" * 100)


@pytest.fixture
def cache(tmp_path: Path, provider: FakeProvider) -> Iterator[DiskCache]:
    made = DiskCache(tmp_path / "cache", 250, [provider])
    yield made
    assert not list((tmp_path / "cache/tmp").iterdir()), "nothing is left behind"


def blobs(tmp_path: Path) -> set[str]:
    return {next(iter(p.iterdir())).read_bytes()[:1].decode() for p in (tmp_path / "cache/blobs").iterdir()}


def use(cache: DiskCache, uri: str, at_s: float) -> None:
    """Fetch and release, with `at_s` as the time of use (times of a file system are too coarse to wait for)."""
    with cache.fetch(uri) as artifact:
        os.utime(artifact.path.parent, (at_s, at_s))


def test_a_fetch_gives_the_content_and_its_digest(cache: DiskCache) -> None:
    with cache.fetch("fake://x/a.ubj") as artifact:
        assert artifact.path.name == "model.ubj"
        assert artifact.path.read_bytes() == b"a" * 100
        assert artifact.digest == hashlib.sha256(b"a" * 100).hexdigest()
        assert artifact.size_bytes == 100


def test_an_unchanged_artifact_is_fetched_once(cache: DiskCache, provider: FakeProvider, tmp_path: Path) -> None:
    for _ in range(3):
        cache.fetch("fake://x/a.ubj").release()
    DiskCache(tmp_path / "cache", 250, [provider]).fetch("fake://x/a.ubj").release()
    assert provider.fetches == 1


def test_a_changed_artifact_is_fetched_again_and_the_old_copy_stays_as_it_was(
    cache: DiskCache, provider: FakeProvider
) -> None:
    old = cache.fetch("fake://x/a.ubj")
    provider.artifacts["a"] = b"new"
    with cache.fetch("fake://x/a.ubj") as new:
        assert new.path.read_bytes() == b"new"
    assert old.path.read_bytes() == b"a" * 100


def test_an_artifact_that_changed_a_moment_ago_is_not_remembered(cache: DiskCache, provider: FakeProvider) -> None:
    provider.settled = False
    first = cache.fetch("fake://x/a.ubj")
    assert cache.fetch("fake://x/a.ubj").digest == first.digest
    assert provider.fetches == 2


def test_the_same_content_is_kept_once(cache: DiskCache, tmp_path: Path) -> None:
    one, two = cache.fetch("fake://x/a.ubj"), cache.fetch("fake://y/again.ubj")
    assert one.path == two.path
    assert cache.used_bytes() == 100


def test_the_same_content_under_another_suffix(cache: DiskCache) -> None:
    one, two = cache.fetch("fake://x/a.ubj"), cache.fetch("fake://y/again.json")
    assert (one.path.name, two.path.name) == ("model.ubj", "model.json")
    assert one.path.read_bytes() == two.path.read_bytes()


def test_the_least_recently_used_goes_first(cache: DiskCache, tmp_path: Path) -> None:
    now = time.time()
    use(cache, "fake://x/a.ubj", now - 20)
    use(cache, "fake://x/b.ubj", now - 30)
    use(cache, "fake://x/c.ubj", now)
    assert blobs(tmp_path) == {"a", "c"}
    assert cache.used_bytes() <= 250


def test_a_hit_is_a_use(cache: DiskCache, tmp_path: Path) -> None:
    now = time.time()
    use(cache, "fake://x/a.ubj", now - 30)
    use(cache, "fake://x/b.ubj", now - 20)
    cache.fetch("fake://x/a.ubj").release()
    cache.fetch("fake://x/c.ubj").release()
    assert blobs(tmp_path) == {"a", "c"}


def test_what_is_in_use_stays(cache: DiskCache, tmp_path: Path) -> None:
    old = time.time() - 100
    held = cache.fetch("fake://x/a.ubj")
    os.utime(held.path.parent, (old, old))
    use(cache, "fake://x/b.ubj", old + 50)
    cache.fetch("fake://x/c.ubj").release()
    assert blobs(tmp_path) == {"a", "c"}
    also = cache.fetch("fake://x/c.ubj")
    # Nothing can go: rather too much on disk than a load that fails.
    with cache.fetch("fake://x/b.ubj") as artifact:
        assert artifact.path.exists() and held.path.exists() and also.path.exists()


def test_a_dropped_artifact_releases_itself(cache: DiskCache) -> None:
    artifact = cache.fetch("fake://x/a.ubj")
    descriptor = artifact._lock
    del artifact
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_n_threads_one_fetch(cache: DiskCache, provider: FakeProvider) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(cache.fetch, ["fake://x/a.ubj"] * 32))
    assert provider.fetches == 1
    assert len({a.digest for a in found}) == 1
    assert cache.used_bytes() == 100


def test_a_failed_fetch_can_be_tried_again(cache: DiskCache, provider: FakeProvider) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    provider.during = fail
    with pytest.raises(Unavailable, match="No space left"):
        cache.fetch("fake://x/a.ubj")
    provider.during = lambda: None
    assert cache.fetch("fake://x/a.ubj").size_bytes == 100


def test_a_source_that_changes_while_it_is_read(cache: DiskCache, provider: FakeProvider) -> None:
    versions = iter([b"v2", b"v3", b"v4", b"v5"])
    provider.during = lambda: provider.artifacts.update(a=next(versions))
    with pytest.raises(LoadFailed, match="keeps changing"):
        cache.fetch("fake://x/a.ubj")
    provider.during = lambda: None
    assert cache.fetch("fake://x/a.ubj").path.read_bytes() == b"v4"


def test_missing_and_unknown(cache: DiskCache) -> None:
    with pytest.raises(LoadFailed, match="does not exist"):
        cache.fetch("fake://x/nothing.ubj")
    with pytest.raises(LoadFailed, match=r"no storage for 's3://'.*fake://"):
        cache.fetch("s3://bucket/m.ubj")


def test_a_truncated_blob_is_replaced(cache: DiskCache, provider: FakeProvider) -> None:
    with cache.fetch("fake://x/a.ubj") as artifact:
        path = artifact.path
    path.chmod(0o644)
    path.write_bytes(b"a")  # what a power loss leaves
    with cache.fetch("fake://x/a.ubj") as artifact:
        assert artifact.path.read_bytes() == b"a" * 100
    assert provider.fetches == 2


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b'{"fingerprint": 3}', b"\xff\xfe", b"null"])
def test_a_damaged_index_only_costs_a_fetch(garbage: bytes, cache: DiskCache, tmp_path: Path) -> None:
    cache.fetch("fake://x/a.ubj").release()
    for entry in (tmp_path / "cache/index").iterdir():
        entry.write_bytes(garbage)
    (tmp_path / "cache/usage").write_bytes(garbage)
    with cache.fetch("fake://x/a.ubj") as artifact:
        assert artifact.path.read_bytes() == b"a" * 100
    for name in "bc":
        cache.fetch(f"fake://x/{name}.ubj").release()
    assert cache.used_bytes() <= 250


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(
    cache: DiskCache, provider: FakeProvider, tmp_path: Path
) -> None:
    tmp = tmp_path / "cache/tmp"
    (tmp / "dead").mkdir()
    (tmp / "dead/model.ubj").write_bytes(b"half")
    (tmp / "dead.usage").write_bytes(b"1")
    for name in ("dead", "dead.usage"):
        os.utime(tmp / name, (1, 1))
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        for entry in tmp.iterdir():
            os.utime(entry, (1, 1))
        inside.set()
        assert go_on.wait(10)

    provider.during = wait
    with ThreadPoolExecutor(1) as threads:
        fetching = threads.submit(cache.fetch, "fake://x/a.ubj")
        assert inside.wait(10)
        DiskCache(tmp_path / "cache", 250, [provider])
        left = {entry.name for entry in tmp.iterdir()}
        go_on.set()
        assert fetching.result(10).path.read_bytes() == b"a" * 100
    assert len(left) == 1 and "dead" not in left


def test_fetch_async(cache: DiskCache, provider: FakeProvider) -> None:
    async def run() -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(cache.fetch_async("fake://x/a.ubj")) for _ in range(5)]
        assert {task.result().size_bytes for task in tasks} == {100}

    asyncio.run(run())
    assert provider.fetches == 1


def test_files_and_folders_for_real(tmp_path: Path) -> None:
    source = tmp_path / "m"
    source.mkdir()
    for name in ("m.onnx", "weights.bin"):
        (source / name).write_bytes(name.encode())
        os.utime(source / name, (1, 1))
    cache = DiskCache(tmp_path / "cache", 1 << 20)
    with cache.fetch(f"{source}/m.onnx") as file, cache.fetch(f"file://{source}") as folder:
        assert file.path.read_bytes() == b"m.onnx"
        assert sorted(p.name for p in folder.path.iterdir()) == ["m.onnx", "weights.bin"]
        assert folder.size_bytes == 17
        # The user rewrites in place: what was fetched does not change.
        (source / "m.onnx").write_bytes(b"M.ONNX")
        assert file.path.read_bytes() == (folder.path / "m.onnx").read_bytes() == b"m.onnx"
    with cache.fetch(f"file://{source}") as folder:
        assert (folder.path / "m.onnx").read_bytes() == b"M.ONNX"


def test_a_model_larger_than_the_cache(tmp_path: Path) -> None:
    (tmp_path / "m.ubj").write_bytes(bytes(300))
    with pytest.raises(LoadFailed, match="disk_cache_bytes"):
        DiskCache(tmp_path / "cache", 250).fetch(str(tmp_path / "m.ubj"))


def _churn(root: Path, models: list[str], seed: int, failures: Any) -> None:
    import random

    rng = random.Random(seed)
    cache = DiskCache(root, 4000)
    for _ in range(150):
        name = rng.choice(models)
        with cache.fetch(name) as artifact:
            expected = Path(name).read_bytes()
            if artifact.path.read_bytes() != expected or artifact.digest != hashlib.sha256(expected).hexdigest():
                failures.put(name)


def test_processes_share_a_cache_under_churn(tmp_path: Path) -> None:
    models = []
    for number in range(12):
        path = tmp_path / f"{number}.ubj"
        path.write_bytes(bytes([number]) * 1000)
        os.utime(path, (1, 1))
        models.append(str(path))
    context = multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    workers = [context.Process(target=_churn, args=(tmp_path / "cache", models, seed, failures)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert failures.empty()
    # Evictions of the three may have crossed; one more insertion brings it under the limit.
    (tmp_path / "last.ubj").write_bytes(b"last")
    cache = DiskCache(tmp_path / "cache", 4000)
    (tmp_path / "cache/usage").unlink()
    cache.fetch(str(tmp_path / "last.ubj")).release()
    assert cache.used_bytes() <= 4000
    assert not list((tmp_path / "cache/tmp").iterdir())


def test_a_process_that_dies_while_fetching_blocks_nobody(tmp_path: Path) -> None:
    (tmp_path / "m.ubj").write_bytes(b"m")
    context = multiprocessing.get_context("fork")
    root = tmp_path / "cache"

    def die() -> None:
        provider = FakeProvider(m=b"m")
        provider.during = lambda: os._exit(9)
        DiskCache(root, 1000, [provider]).fetch("fake://x/m.ubj")

    worker = context.Process(target=die)
    worker.start()
    worker.join(30)
    assert worker.exitcode == 9
    assert len(list((root / "tmp").iterdir())) == 1
    for entry in (root / "tmp").iterdir():
        os.utime(entry, (1, 1))
    cache = DiskCache(root, 1000, [FakeProvider(m=b"m")])
    assert cache.fetch("fake://x/m.ubj").path.read_bytes() == b"m"
    assert not list((root / "tmp").iterdir())
