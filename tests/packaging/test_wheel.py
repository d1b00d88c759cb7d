"""The wheel holds `raymesh/` and nothing else, and all of it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("mesh", "placement", "registry", "runtimes")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel built from what git tracks, outside the checkout so that nothing stale can slip in."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked(".py", ".toml", ".md", ".lua", ".proto", ".binpb", ".typed", ""):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    # No isolation: the build needs no network, only the setuptools that is here.
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), str(source)],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def tracked(*suffixes: str) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return [name for name in listed if Path(name).suffix in suffixes and (ROOT / name).is_file()]


def of_the_folders(*suffixes: str) -> set[str]:
    return {f"raymesh/{name}" for name in tracked(*suffixes) if name.split("/")[0] in FOLDERS}


def test_raymesh_is_the_only_top_level_name(wheel_names: set[str]) -> None:
    top = {name.split("/")[0] for name in wheel_names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"raymesh"}


def test_the_modules_are_those_of_the_four_folders(wheel_names: set[str]) -> None:
    assert {name for name in wheel_names if name.endswith(".py")} == of_the_folders(".py")


def test_the_files_read_at_run_time_are_inside(wheel_names: set[str]) -> None:
    needed = of_the_folders(".binpb", ".lua", ".typed")
    assert any(name.endswith(".binpb") for name in needed)
    assert needed <= wheel_names


def test_the_licence_goes_along(wheel_names: set[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)
