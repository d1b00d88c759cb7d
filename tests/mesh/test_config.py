import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymesh.mesh.config import Settings, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("1048576", 1048576),
        ("512MiB", 512 * 1024**2),
        ("2GiB", 2 * 1024**3),
        ("2 gib", 2 * 1024**3),
        (" 1.5GB ", 1_500_000_000),
        ("3KB", 3000),
        ("1TiB", 1024**4),
        ("7B", 7),
        ("9007199254740993", 9007199254740993),  # 2**53 + 1: no float on the way
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "2 G", "-1", "1e9", "2GiB3", "two", "1,5GB"])
def test_what_is_no_size_says_what_would_be(text: str) -> None:
    with pytest.raises(ValueError, match="GiB"):
        parse_size(text)


@given(st.integers(0, 2**70), st.sampled_from(["", "B", "KiB", "MiB", "GiB", "TiB"]))
def test_whole_sizes_are_exact(number: int, unit: str) -> None:
    power = ["", "KiB", "MiB", "GiB", "TiB"].index(unit.replace("B", "", 1) if unit == "B" else unit)
    assert parse_size(f"{number}{unit}") == number * 1024**power


def test_sizes_for_people() -> None:
    assert [format_size(n) for n in (0, 640, 2048, 3 * 1024**3, 2**50)] == [
        "0 B", "640 B", "2.0 KiB", "3.0 GiB", "1024.0 TiB",
    ]  # fmt: skip


def test_the_environment_fills_in_and_options_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYMESH_PORT", "9000")
    monkeypatch.setenv("RAYMESH_MEMORY_BYTES", "1GiB")
    monkeypatch.setenv("RAYMESH_TRUST_PICKLE", "yes")
    settings = Settings.from_env(host="0.0.0.0")
    assert (settings.port, settings.memory_bytes, settings.trust_pickle) == (9000, 1024**3, True)
    assert settings.endpoint == "127.0.0.1:9000"
    assert Settings.from_env(port=1).port == 1


@pytest.mark.parametrize(("name", "text"), [("PORT", "x"), ("TRUST_PICKLE", "maybe"), ("MEMORY_BYTES", "2 cups")])
def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(f"RAYMESH_{name}", text)
    with pytest.raises(ValueError, match=f"RAYMESH_{name}"):
        Settings.from_env()


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 0},
        {"port": 70000},
        {"mesh": "a/b"},
        {"host": ""},
        {"registry": "http://h"},
        {"runtimes": -1},
        {"memory_bytes": 2},
        {"lease_ttl_s": 0},
    ],
)
def test_settings_that_cannot_be_meant_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).removesuffix("_bytes")):
        Settings(**wrong).validate()
    Settings().validate()


def test_ray_gets_a_folder_short_enough_for_its_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(state_dir=Path("/srv/mesh")).ray_temp_dir == Path("/srv/mesh/ray")
    long = Settings(state_dir=tmp_path / ("x" * 60))
    # Ray adds "/session_<26 characters>_<pid>/sockets/plasma_store"; an AF_UNIX path ends at 107.
    socket = f"{long.ray_temp_dir}/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
    assert len(os.fsencode(socket)) <= 107
    assert long.ray_temp_dir == Settings(state_dir=tmp_path / ("x" * 60)).ray_temp_dir
    assert long.ray_temp_dir != Settings(state_dir=tmp_path / ("y" * 60)).ray_temp_dir


def test_a_state_dir_is_the_same_for_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings().resolved().state_dir == tmp_path / ".raymesh"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings(state_dir=Path("~/m")).resolved().state_dir == tmp_path / "m"
