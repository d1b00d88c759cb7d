from __future__ import annotations

import importlib.util

import pytest

from raymesh.runtimes.errors import LoadFailed
from raymesh.runtimes.frameworks import registry


def test_known_types_load_their_adapter() -> None:
    for name in registry.available_types():
        framework = registry.framework_for(name)
        assert framework.type == name
        assert registry.framework_for(name) is framework


def test_an_unknown_type_lists_the_known_ones() -> None:
    with pytest.raises(LoadFailed, match="unknown model type 'tf'; this mesh serves: onnx, sklearn, xgboost"):
        registry.framework_for("tf")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skops" else find(name))
    assert "sklearn" not in registry.available_types()
    with pytest.raises(LoadFailed, match=r"need skops on the server: pip install 'raymesh\[sklearn\]'"):
        registry.framework_for("sklearn")
