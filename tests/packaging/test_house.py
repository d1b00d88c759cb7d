"""Our own rules, kept by tests: names, sizes, words, and that raymesh shares a process with the official clients."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("mesh", "placement", "registry", "runtimes")

#: A longer file is a question; one in this table has an answer.
FILE_LINES_MAX = 500
LONGER_FILES = {
    "tests/mesh/test_client.py": "both clients against the same dummy servers",
    "tests/mesh/test_front_door.py": "one HAProxy and its fakes serve all of its tests",
    "tests/registry/test_etcd_faults.py": "one proxy that breaks things serves all of its tests",
    "tests/runtimes/test_http1.py": "a protocol's cases, one after the other",
    "tests/runtimes/test_loading.py": "one loader, its store and its models serve all of its tests",
    "tests/runtimes/test_upstream.py": "one scripted peer serves all of its tests",
    "tests/runtimes/test_runtime.py": "one runtime and its fakes serve all of its tests",
}
FUNCTION_LINES_MAX = 90
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}


def tracked_files(*suffixes: str) -> list[Path]:
    """The files git knows or would add, so that build outputs and caches do not count."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    paths = [ROOT / name for name in listed]
    return [path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes)]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in an interpreter of its own, outside the checkout."""
    return subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120)


def modules() -> list[str]:
    """Every module of the four folders, by its import name."""
    names = []
    for path in tracked_files(".py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in FOLDERS:
            names.append(".".join(("raymesh", *(part for part in parts if part != "__init__"))))
    return sorted(names)


def test_flat_names_are_never_imported() -> None:
    # A module imported under two names is two modules: its classes differ, and isinstance and match break silently.
    imports = "\n".join(f"import {name}" for name in ("raymesh.mesh.cli", "raymesh.mesh.app", "raymesh.mesh.client"))
    done = run_python(f"{imports}\nimport sys\nprint(sorted({set(FOLDERS)!r} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("order", ["raymesh first", "raymesh last"])
@pytest.mark.parametrize("theirs", ["tritonclient.grpc, tritonclient.http", "kserve"])
def test_raymesh_shares_a_process_with_an_official_client(theirs: str, order: str) -> None:
    # All of them carry protobuf messages called inference.ModelInferRequest; two in one descriptor pool is fatal (and
    # tritonclient.grpc and kserve do clash with one another, which is why each is tried on its own).
    imports = ["import raymesh.mesh.client, raymesh.runtimes.server", f"import {theirs}"]
    if order == "raymesh last":
        imports.reverse()
    done = run_python("\n".join(imports))
    assert done.returncode == 0, done.stderr


def test_files_are_named_for_what_they_do() -> None:
    nameless = [str(path.relative_to(ROOT)) for path in tracked_files(".py") if path.stem in NAMES_THAT_SAY_NOTHING]
    assert nameless == []


def test_the_tests_are_no_package() -> None:
    # tests/placement/__init__.py would shadow raymesh's own folder in pytest's eyes.
    assert [name for name in map(str, tracked_files(".py")) if "/tests/" in name and name.endswith("__init__.py")] == []


def test_files_and_functions_can_be_read_in_one_go() -> None:
    too_long = []
    for path in tracked_files(".py"):
        name = str(path.relative_to(ROOT))
        text = path.read_text(encoding="utf-8")
        lines = text.count("\n")
        if lines > FILE_LINES_MAX and name not in LONGER_FILES:
            too_long.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES_MAX:
                    too_long.append(f"{name}:{node.lineno} {node.name}: {length} lines")
    assert too_long == []


def test_the_repository_names_no_workplace() -> None:
    # Paths and hosts of one machine mean nothing on another. (The patterns are split so that this file passes.)
    patterns = (r"(?<![\w.])/wor" + r"k/", r"/opt/py" + r"pi", r"/ro" + r"ot/", "shared/refer" + "ence")
    banned = re.compile("|".join(patterns))
    found = []
    for path in tracked_files(".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".cfg", ".lua", ".proto", ""):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if banned.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


@pytest.mark.parametrize("module", modules())
def test_every_module_says_what_it_is_for(module: str) -> None:
    path = ROOT / Path(*module.split(".")[1:])
    source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    assert ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))), f"{source} has no module docstring"
