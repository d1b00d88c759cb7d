"""The models the demo is checked with: reproducible, and told apart by their answers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from catalogue import POOL_ROWS, Order, Recipe, check_distinct, train_one


@pytest.mark.parametrize("kind", ["xgboost", "sklearn", "onnx"])
def test_the_same_order_gives_the_same_answers(tmp_path: Path, kind: str) -> None:
    recipe = Recipe(1, kind, "wine")
    (tmp_path / "again").mkdir()
    one, again = train_one(recipe, Order(5), tmp_path), train_one(recipe, Order(5), tmp_path / "again")
    assert one.explain_wrong(0, POOL_ROWS, again.expected) == ""


def test_a_retrained_customer_has_another_model(tmp_path: Path) -> None:
    recipe = Recipe(1)
    old, new = train_one(recipe, Order(5, 1), tmp_path), train_one(recipe, Order(5, 2), tmp_path)
    assert old.name != new.name
    assert old.data_set == new.data_set
    assert old.explain_wrong(0, POOL_ROWS, new.expected) != ""


def test_wrong_answers_are_explained(tmp_path: Path) -> None:
    model = train_one(Recipe(1, "xgboost", "diabetes"), Order(1), tmp_path)
    right = model.expected["output-0"]
    assert model.explain_wrong(2, 3, {"output-0": right[2:5]}) == ""
    assert model.explain_wrong(2, 3, {"output-0": right[2:5].reshape(3, 1)}) == ""
    assert "expected" in model.explain_wrong(2, 3, {"output-0": right[3:6]})
    assert "shape" in model.explain_wrong(2, 3, {"output-0": right[:2]})
    assert "no output" in model.explain_wrong(2, 3, {})
    assert "expected" in model.explain_wrong(2, 3, {"output-0": np.full(3, np.nan, np.float32)})


def test_models_with_the_same_answers_are_refused(tmp_path: Path) -> None:
    models = [train_one(Recipe(1, "xgboost", "iris"), Order(number), tmp_path) for number in range(4)]
    check_distinct(models)
    twin = dataclasses.replace(models[0], name="twin")
    with pytest.raises(ValueError, match="twin"):
        check_distinct([*models, twin])
