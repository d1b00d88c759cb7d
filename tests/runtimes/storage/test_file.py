from __future__ import annotations

import os
from pathlib import Path

import pytest

from raymesh.runtimes.errors import LoadFailed
from raymesh.runtimes.storage.file import FileProvider
from raymesh.runtimes.storage.provider import FetchLimits, scheme_of

LIMITS = FetchLimits(bytes_max=1 << 20, files_max=20)


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    (tmp_path / "dest").mkdir()
    return tmp_path / "dest"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    (folder / "m.ubj").write_bytes(b"model")
    (folder / "sub/x.bin").write_bytes(b"x")
    return folder


def fetched(dest: Path) -> dict[str, bytes]:
    return {str(p.relative_to(dest)): p.read_bytes() for p in sorted(dest.rglob("*")) if p.is_file()}


def test_a_file_by_path_and_by_uri(source: Path, dest: Path) -> None:
    provider = FileProvider()
    provider.fetch(f"{source}/m.ubj", dest, LIMITS)
    assert fetched(dest) == {"model.ubj": b"model"}
    assert not (dest / "model.ubj").stat().st_mode & 0o222, "read-only in the cache"
    text = {provider.fingerprint(uri, LIMITS).text for uri in (f"{source}/m.ubj", f"file://{source}/m.ubj")}
    assert len(text) == 1


def test_escapes_in_uris(source: Path, dest: Path) -> None:
    (source / "a b#.json").write_bytes(b"1")
    FileProvider().fetch(f"file://{source}/a%20b%23.json", dest, LIMITS)
    assert fetched(dest) == {"model.json": b"1"}


def test_a_folder(source: Path, dest: Path) -> None:
    FileProvider().fetch(str(source), dest, LIMITS)
    assert fetched(dest) == {"model/m.ubj": b"model", "model/sub/x.bin": b"x"}
    assert FileProvider().fingerprint(str(source), LIMITS).size_bytes == 6


def test_every_change_shows_in_the_fingerprint(source: Path) -> None:
    provider = FileProvider()

    def both() -> tuple[str, str]:
        return tuple(provider.fingerprint(str(p), LIMITS).text for p in (source / "m.ubj", source))  # type: ignore[return-value]

    before = both()
    os.utime(source / "m.ubj", ns=(1, 1))
    assert both()[0] != before[0] and both()[1] != before[1]
    before = both()
    (source / "new").write_bytes(b"model")
    (source / "new").replace(source / "m.ubj")
    os.utime(source / "m.ubj", ns=(1, 1))
    assert both()[0] != before[0], "same size and time, another file"


def test_a_fresh_file_is_not_settled(source: Path) -> None:
    (source / "m.ubj").write_bytes(b"other")
    assert not FileProvider().fingerprint(f"{source}/m.ubj", LIMITS).is_settled


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models/m.ubj", "must be absolute"),
        ("", "must be absolute"),
        ("m", "must be absolute"),
    ],
)
def test_what_is_no_uri(uri: str, message: str) -> None:
    with pytest.raises(LoadFailed, match=message):
        scheme_of(uri)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("/nowhere/m.ubj", "'/nowhere/m.ubj' does not exist on this node"),
        ("file://host/m.ubj", "without a host"),
        ("/dev/null", "neither a file nor a folder"),
        ("/etc/passwd/x", "does not exist"),
        ("/m\0.ubj", "NUL"),
    ],
)
def test_what_cannot_be_read(uri: str, message: str) -> None:
    with pytest.raises(LoadFailed, match=message):
        FileProvider().fingerprint(uri, LIMITS)


def test_limits(source: Path, dest: Path) -> None:
    provider = FileProvider()
    for limits, message in ((FetchLimits(4), "larger than"), (FetchLimits(100, files_max=1), "more than 1 files")):
        with pytest.raises(LoadFailed, match=message):
            provider.fingerprint(str(source), limits)
        with pytest.raises(LoadFailed, match=message):
            provider.fetch(str(source), dest, limits)
        for leftover in dest.rglob("*.ubj"):
            leftover.unlink()
        (dest / "model").rmdir()


def test_links_may_not_leave_the_folder(source: Path, dest: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (source / "inner").symlink_to("m.ubj")
    assert FileProvider().fingerprint(str(source), LIMITS)
    (source / "link").symlink_to(tmp_path / "secret")
    for act in (FileProvider().fingerprint, lambda uri, limits: FileProvider().fetch(uri, dest, limits)):
        with pytest.raises(LoadFailed, match=r"leads out of its folder \('link'\)") as caught:
            act(str(source), LIMITS)
        assert "secret" not in str(caught.value).replace(str(source), "")
    (source / "link").unlink()
    (source / "folder").symlink_to(tmp_path)
    with pytest.raises(LoadFailed, match="link to a folder"):
        FileProvider().fingerprint(str(source), LIMITS)


def test_a_pipe_does_not_hang(source: Path) -> None:
    os.mkfifo(source / "pipe")
    with pytest.raises(LoadFailed, match=r"not a file \('pipe'\)"):
        FileProvider().fingerprint(str(source), LIMITS)
    with pytest.raises(LoadFailed):
        FileProvider().fingerprint(f"{source}/pipe", LIMITS)


def test_roots(source: Path, tmp_path: Path) -> None:
    provider = FileProvider((source,))
    assert provider.fingerprint(f"{source}/m.ubj", LIMITS)
    (tmp_path / "source-not").mkdir()
    (tmp_path / "source-not/m.ubj").write_bytes(b"1")
    (source / "out").symlink_to("/etc/hostname")
    outside = [
        f"{source}/../source-not/m.ubj",
        f"{source}/out",
        "/etc/hostname",
        "/nowhere",
        f"file://{source}/%2e%2e/x",
    ]
    for uri in outside:
        with pytest.raises(LoadFailed, match="not in a folder this mesh may read"):
            provider.fingerprint(uri, LIMITS)
