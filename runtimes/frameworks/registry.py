"""Which framework adapter serves which `type` of model.

Rule of the file: nothing heavy is imported here. An adapter, and with it its library, is imported when the first model
of its type is loaded; what is installed is found out without importing.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import cast

from raymesh.runtimes.errors import LoadFailed
from raymesh.runtimes.frameworks.base import Framework


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where an adapter lives, the packages it imports, and the pip extra that installs them."""

    module: str
    packages: tuple[str, ...]
    extra: str


_PACKAGE = "raymesh.runtimes.frameworks"
_ENTRIES: dict[str, _Entry] = {
    "onnx": _Entry(f"{_PACKAGE}.onnx", ("onnxruntime",), "onnx"),
    "sklearn": _Entry(f"{_PACKAGE}.sklearn", ("sklearn", "skops"), "sklearn"),
    "xgboost": _Entry(f"{_PACKAGE}.xgboost", ("xgboost",), "xgboost"),
}
_loaded: dict[str, Framework] = {}


def available_types() -> tuple[str, ...]:
    """The model types this environment can load, sorted; nothing is imported to find out."""
    return tuple(sorted(name for name, entry in _ENTRIES.items() if not _missing(entry)))


def framework_for(model_type: str) -> Framework:
    """The adapter for `model_type`, imported on first use.

    Call it before measuring a load: the first call imports the library (about a second, and 100 MB for XGBoost).
    Raises `LoadFailed` listing the types there are, or naming the pip extra that is not installed.
    """
    framework = _loaded.get(model_type)
    if framework is not None:
        return framework
    entry = _ENTRIES.get(model_type)
    if entry is None:
        raise LoadFailed(
            f"unknown model type '{model_type}'; this mesh serves: {', '.join(available_types()) or 'none'}"
        )
    missing = _missing(entry)
    if missing:
        raise LoadFailed(
            f"models of type '{model_type}' need {' and '.join(missing)} on the server: "
            f"pip install 'raymesh[{entry.extra}]'"
        )
    framework = cast(Framework, importlib.import_module(entry.module).FRAMEWORK)
    return _loaded.setdefault(model_type, framework)


def _missing(entry: _Entry) -> tuple[str, ...]:
    return tuple(package for package in entry.packages if importlib.util.find_spec(package) is None)
