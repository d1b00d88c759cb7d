from __future__ import annotations

import threading
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymesh.runtimes.memory import (
    FLOOR_BYTES,
    LoadMeter,
    SizeModel,
    allocated_bytes,
    measured_load,
    memory_capacity_bytes,
    release_unused,
    sound_size_bytes,
)

MIB = 1 << 20


def test_a_measured_load_counts_what_it_left() -> None:
    result, size = measured_load(lambda: bytearray(8 * MIB), 1000)
    assert len(result) == 8 * MIB
    assert 8 * MIB <= size < 9 * MIB


def test_small_objects_count_too() -> None:
    _, size = measured_load(lambda: [object() for _ in range(100_000)], 0)
    assert 100_000 * 16 < size < 100_000 * 200


def test_memory_taken_in_another_thread_counts() -> None:
    def load() -> list[bytearray]:
        kept: list[bytearray] = []
        thread = threading.Thread(target=lambda: kept.extend(bytearray(50_000) for _ in range(40)))
        thread.start()
        thread.join()
        return kept

    _, size = measured_load(load, 0)
    assert 1_900_000 < size < 4_000_000


def test_a_size_is_never_too_good_to_be_true() -> None:
    _, size = measured_load(lambda: None, 0)
    assert size >= FLOOR_BYTES
    assert sound_size_bytes(-5, 8 * MIB) == 2 * MIB


def test_release_unused_is_harmless() -> None:
    before = allocated_bytes()
    release_unused()
    assert allocated_bytes() <= before + MIB


def test_an_untaught_size_model_uses_the_prior() -> None:
    sizes = SizeModel()
    assert sizes.predict("xgboost", 100_000) == 120_000 + FLOOR_BYTES
    assert sizes.predict("unheard of", 0) >= FLOOR_BYTES


def test_a_size_model_learns_and_follows() -> None:
    sizes = SizeModel()
    sizes.observe("xgboost", 80_000, 90_000)
    assert sizes.predict("xgboost", 80_000) == 90_000
    for _ in range(30):
        sizes.observe("xgboost", 80_000, 200_000)
    assert sizes.predict("xgboost", 80_000) == pytest.approx(200_000, rel=0.01)


def test_small_files_do_not_make_large_ones_look_huge() -> None:
    sizes = SizeModel()
    for _ in range(5):
        sizes.observe("onnx", 440, 41_000)  # 93 bytes for each byte of file
    assert sizes.predict("onnx", 100 * MIB) == pytest.approx(200 * MIB, rel=0.01)
    sizes.observe("onnx", 100 * MIB, 110 * MIB)
    assert 41_000 < sizes.predict("onnx", 10 * MIB) < 20 * MIB
    assert sizes.predict("onnx", 440) == 41_000


@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), max_size=20),
    st.lists(st.integers(0, 10**10), min_size=1, max_size=5),
)
def test_predictions_are_sound_whatever_was_seen(seen: list[tuple[int, int]], asked: list[int]) -> None:
    sizes = SizeModel()
    for artifact, size in seen:
        sizes.observe("t", artifact, size)
    for artifact in asked:
        size = sizes.predict("t", artifact)
        assert size >= max(FLOOR_BYTES, artifact // 4)
        assert size <= max(size for _, size in [*seen, (0, 0)]) + 2 * artifact + FLOOR_BYTES + 1


def test_a_load_that_overlaps_another_is_predicted() -> None:
    sizes = SizeModel()
    sizes.observe("t", 1000, 50_000)
    meter = LoadMeter(sizes)
    _, alone = meter.load("t", 1000, lambda: bytearray(MIB))
    assert alone >= MIB
    learned = sizes.predict("t", 1000)
    inside = meter.load("t", 1000, lambda: meter.load("t", 1000, lambda: bytearray(8 * MIB)))
    (_, inner), outer = inside
    assert inner == outer == learned == sizes.predict("t", 1000), "neither was measured"
    assert meter.load("t", 1000, lambda: bytearray(2 * MIB))[1] >= 2 * MIB, "alone again"


def test_a_failed_load_is_over() -> None:
    meter = LoadMeter()

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        meter.load("t", 0, fail)
    assert meter.load("t", 0, lambda: bytearray(MIB))[1] >= MIB


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "1048576\n"}, MIB),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "1048576\n"}, MIB),
        # Inside a container: its own group is the root of what it sees.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "2097152\n"}, 2 * MIB),
        ({"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/memory.max": "2097152\n"}, 2 * MIB),
        (
            {
                "proc/self/cgroup": "9:cpu:/x\n5:memory:/docker/1\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "1048576\n",
            },
            MIB,
        ),
        (
            {"proc/self/cgroup": "5:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"},
            None,
        ),
    ],
)
def test_capacity_is_the_tightest_limit(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    assert memory_capacity_bytes(write(tmp_path, files)) == (expected or total)
