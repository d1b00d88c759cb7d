"""Small models, made once by the libraries that users make them with."""

from __future__ import annotations

import os

# One thread per process, as in a runtime: the frameworks read this when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import Any

import numpy as np
import pytest

FEATURES = 5


@pytest.fixture(scope="session")
def rows() -> Any:
    """FP32 training rows with some missing values."""
    rng = np.random.default_rng(7)
    data = rng.normal(size=(200, FEATURES)).astype(np.float32)
    data[rng.random(data.shape) < 0.05] = np.nan
    return data


@pytest.fixture(scope="session")
def booster(rows: Any) -> Any:
    """A factory of boosters by parameters, each trained once."""
    import xgboost

    made: dict[str, Any] = {}

    def make(rounds: int = 8, **params: Any) -> Any:
        key = repr((rounds, sorted(params.items())))
        if key not in made:
            target = np.nan_to_num(rows[:, 0]) * 2 + np.nan_to_num(rows[:, 1]) ** 2
            objective = params.get("objective", "reg:squarederror")
            group = None
            if objective.startswith("multi:"):
                target = np.digitize(target, [-0.5, 1.0])
                params.setdefault("num_class", 3)
            elif objective.startswith("binary:") or objective == "reg:logistic":
                target = target > 0.5
            elif objective.startswith("rank:"):
                target, group = np.digitize(target, [-0.5, 1.0]), [50] * 4
            elif objective != "reg:squarederror":
                target = np.abs(target) + 0.1
            data = xgboost.DMatrix(rows, label=target)
            if group:
                data.set_group(group)
            made[key] = xgboost.train({"max_depth": 3, "nthread": 1, "seed": 1, **params}, data, rounds)
        return made[key]

    return make


@pytest.fixture
def save(tmp_path: Path) -> Any:
    """Writes a booster to a file of the given name."""

    def write(model: Any, name: str = "model.ubj") -> Path:
        model.save_model(tmp_path / name)
        return tmp_path / name

    return write
