from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xgboost
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymesh.runtimes.errors import InvalidInput, LoadFailed
from raymesh.runtimes.frameworks import gtil
from raymesh.runtimes.frameworks import xgboost as adapter
from raymesh.runtimes.frameworks.base import LoadOptions
from raymesh.runtimes.frameworks.xgboost_file import check_model, is_json, model_kind
from raymesh.runtimes.testing import Case, check_framework

FEATURES = 5
OBJECTIVES = [
    "reg:squarederror",
    "reg:logistic",
    "reg:gamma",
    "reg:tweedie",
    "reg:absoluteerror",
    "count:poisson",
    "survival:cox",
    "binary:logistic",
    "binary:logitraw",
    "binary:hinge",
    "multi:softprob",
    "multi:softmax",
    "rank:ndcg",
    "rank:pairwise",
]


def load(path: Path, **options: Any) -> Any:
    return adapter.FRAMEWORK.load(path, LoadOptions(**options))


def some_rows(count: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    rows = rng.normal(scale=2.0, size=(count, FEATURES)).astype(np.float32)
    rows[rng.random(rows.shape) < 0.1] = np.nan
    return rows


def xgboost_answer(booster: Any, rows: Any) -> Any:
    if "gblinear" in booster.save_config():
        return booster.predict(xgboost.DMatrix(rows))
    return booster.inplace_predict(rows)


def assert_same(model: Any, booster: Any, rows: Any) -> None:
    answer = model.predict({"x": rows}, ())["output-0"]
    assert adapter.is_same_answer(answer, xgboost_answer(booster, rows))
    assert answer.dtype == np.float32


@pytest.mark.parametrize("name", ["model.ubj", "model.json", "model.bst", "model.model"])
@pytest.mark.filterwarnings("ignore:.*model format.*:UserWarning")
def test_contract(name: str, booster: Any, tmp_path: Path) -> None:
    trained = booster(objective="multi:softprob")

    def make(folder: Path) -> Path:
        trained.save_model(folder / name)
        return folder / name

    case = Case(
        make,
        example=lambda n: {"input-0": some_rows(n)},
        expected=lambda inputs: {"output-0": xgboost_answer(trained, inputs["input-0"])},
        fuzz_count=120,
    )
    check_framework(adapter.FRAMEWORK, case, tmp_path)


def test_contract_of_the_fallback(booster: Any, tmp_path: Path) -> None:
    trained = booster(booster="gblinear")

    def make(folder: Path) -> Path:
        trained.save_model(folder / "m.ubj")
        return folder / "m.ubj"

    case = Case(
        make,
        example=lambda n: {"input-0": np.nan_to_num(some_rows(n))},
        expected=lambda inputs: {"output-0": xgboost_answer(trained, inputs["input-0"])},
        fuzz_count=120,
    )
    check_framework(adapter.FRAMEWORK, case, tmp_path)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_answers_as_xgboost(objective: str, booster: Any, save: Any) -> None:
    trained = booster(objective=objective)
    model = load(save(trained))
    for count in (1, 2, 33):
        assert_same(model, trained, some_rows(count, seed=count))


@pytest.mark.parametrize(
    "params",
    [
        {"booster": "dart", "rate_drop": 0.5},
        {"booster": "gblinear"},
        {"num_parallel_tree": 3, "subsample": 0.7},
        {"base_score": 12.5},
        {"base_score": 0.25, "objective": "binary:logistic"},
        {"max_depth": 0, "max_leaves": 6, "grow_policy": "lossguide", "tree_method": "hist"},
        {"gamma": 1e9},  # every tree is one leaf
        {"monotone_constraints": "(1,0,0,0,-1)"},
    ],
    ids=lambda params: ",".join(params),
)
def test_every_kind_of_booster_answers_as_xgboost(params: dict[str, Any], booster: Any, save: Any) -> None:
    trained = booster(**params)
    assert_same(load(save(trained)), trained, some_rows(20))


@pytest.mark.parametrize("strategy", ["one_output_per_tree", "multi_output_tree"])
def test_several_targets(strategy: str, rows: Any, save: Any) -> None:
    target = np.nan_to_num(rows[:, :2])
    params = {"max_depth": 3, "nthread": 1, "multi_strategy": strategy, "tree_method": "hist"}
    trained = xgboost.train(params, xgboost.DMatrix(rows, label=target), 5)
    model = load(save(trained))
    assert model.outputs[0].shape == (-1, 2)
    assert_same(model, trained, some_rows(9))


def test_categorical_splits(rows: Any, save: Any) -> None:
    data = np.abs(np.round(np.nan_to_num(rows) * 3)).astype(np.float32)
    kinds = ["c", "q", "q", "q", "q"]
    matrix = xgboost.DMatrix(data, label=data[:, 0] % 3, feature_types=kinds, enable_categorical=True)
    trained = xgboost.train({"max_depth": 3, "nthread": 1, "tree_method": "hist", "max_cat_to_onehot": 1}, matrix, 5)
    assert_same(load(save(trained)), trained, data[:30])


def test_trees_are_served_from_the_packed_form(booster: Any, save: Any) -> None:
    for objective in ("reg:squarederror", "binary:logistic", "multi:softprob", "rank:ndcg"):
        assert isinstance(load(save(booster(objective=objective))), adapter._FastModel), objective


def test_specs(booster: Any, save: Any) -> None:
    model = load(save(booster(objective="multi:softprob")))
    assert (model.inputs[0].name, model.inputs[0].datatype, model.inputs[0].shape) == ("input-0", "FP32", (-1, 5))
    assert (model.outputs[0].name, model.outputs[0].datatype, model.outputs[0].shape) == ("output-0", "FP32", (-1, 3))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    depth=st.integers(1, 6),
    rounds=st.integers(1, 12),
    objective=st.sampled_from(["reg:squarederror", "binary:logistic", "multi:softprob", "count:poisson"]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e6, 1e30]),
    seed=st.integers(0, 1000),
)
def test_random_models_answer_as_xgboost(
    depth: int, rounds: int, objective: str, scale: float, seed: int, booster: Any, save: Any
) -> None:
    trained = booster(rounds, max_depth=depth, objective=objective)
    model = load(save(trained))
    rows = some_rows(17, seed) * np.float32(scale)
    rows[0] = np.nan
    rows[1] = 0.0
    assert_same(model, trained, rows)


def test_answers_on_the_thresholds(booster: Any, save: Any) -> None:
    # A row that lies exactly on a split must take the same branch as in XGBoost.
    trained = booster()
    splits = [float(v) for line in trained.get_dump() for v in _split_values(line)]
    rows = np.array([[value] * FEATURES for value in splits], dtype=np.float32)
    assert_same(load(save(trained)), trained, rows)


def _split_values(dump: str) -> list[str]:
    return [part.split("]")[0] for part in dump.split("<")[1:]]


def test_a_bulk_request_goes_to_xgboost_and_survives_the_loss_of_the_file(booster: Any, save: Any) -> None:
    trained = booster()
    path = save(trained)
    model = load(path)
    rows = some_rows(adapter.BULK_ROWS)
    assert_same(model, trained, rows)
    path.unlink()
    assert_same(model, trained, rows)


def test_without_treelite_xgboost_serves(booster: Any, save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_load_trees", lambda *_: None)
    trained = booster()
    model = load(save(trained))
    assert isinstance(model, adapter._BoosterModel)
    assert_same(model, trained, some_rows(5))


def test_a_kind_that_disagrees_is_served_by_xgboost(booster: Any, save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_agreed", {})
    monkeypatch.setattr(adapter, "is_same_answer", lambda ours, theirs: False)
    assert isinstance(load(save(booster())), adapter._BoosterModel)


def test_an_unknown_treelite_layout_is_refused(booster: Any, save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = save(booster()).read_bytes()
    monkeypatch.setattr(gtil, "_FORMATS", gtil._FORMATS[::-1])
    with pytest.raises(gtil.GtilUnsupported):
        gtil.load(data, is_json=False)


def test_a_closed_model_does_not_crash(booster: Any, save: Any) -> None:
    model = load(save(booster()))
    model.close()
    model.close()
    with pytest.raises(RuntimeError):
        model.predict({"x": some_rows(1)}, ())


def test_no_rows(booster: Any, save: Any) -> None:
    for params in ({"objective": "multi:softprob"}, {"booster": "gblinear"}):
        answer = load(save(booster(**params))).predict({"x": some_rows(0)}, ())["output-0"]
        assert answer.shape[0] == 0


def test_an_input_names_itself_in_the_error(booster: Any, save: Any) -> None:
    model = load(save(booster()))
    with pytest.raises(InvalidInput, match=r"input 'x': expected FP32 \[-1,5\].*got FP32 \[2,4\]"):
        model.predict({"x": np.zeros((2, 4), np.float32)}, ())


def test_the_kind_of_a_model_ignores_its_numbers(booster: Any, save: Any) -> None:
    one, other = (save(booster(rounds), f"{rounds}.ubj").read_bytes() for rounds in (5, 8))
    logistic = save(booster(objective="binary:logistic"), "l.ubj").read_bytes()
    assert model_kind(one) == model_kind(other) != model_kind(logistic)


@pytest.mark.parametrize("name", ["m.ubj", "m.json"])
def test_sound_models_pass_the_check(name: str, booster: Any, save: Any) -> None:
    for params in ({}, {"booster": "dart"}, {"booster": "gblinear"}, {"objective": "multi:softmax"}):
        data = save(booster(**params), name).read_bytes()
        assert is_json(data) == name.endswith("json")
        check_model(data)


def _broken_trees() -> list[tuple[str, int, int]]:
    return [
        ("left_children", 1, 0),
        ("left_children", 0, 10**6),
        ("left_children", 0, -5),
        ("right_children", 0, 10**6),
        ("split_indices", 0, 10**8),
        ("split_indices", 0, -3),
        ("split_indices", 0, FEATURES),
        ("parents", 1, 99_999_999),
        ("split_type", 0, 1),
    ]


@pytest.mark.parametrize(("field", "at", "value"), _broken_trees())
def test_trees_that_point_outside_are_refused(field: str, at: int, value: int, booster: Any, save: Any) -> None:
    # XGBoost 3.2 dies on most of these.
    path = save(booster(), "m.json")
    document = json.loads(path.read_text())
    document["learner"]["gradient_booster"]["model"]["trees"][0][field][at] = value
    data = json.dumps(document, separators=(",", ":")).encode()
    with pytest.raises(LoadFailed):
        check_model(data)


def test_absurd_numbers_of_classes_are_refused(booster: Any, save: Any) -> None:
    path = save(booster(objective="multi:softprob"), "m.json")
    path.write_text(path.read_text().replace('"num_class":"3"', '"num_class":"1000000000"'))
    with pytest.raises(LoadFailed):
        load(path)


def test_the_old_binary_format_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(b"binf" + bytes(100))
    with pytest.raises(LoadFailed, match=r"save_model\('model.ubj'\)"):
        load(tmp_path / "m.model")


def test_nothing_heavy_is_imported_to_list_the_types() -> None:
    code = (
        "import sys; from raymesh.runtimes.frameworks.registry import available_types; print(available_types());"
        "assert not {'xgboost', 'treelite', 'sklearn', 'skops', 'onnxruntime'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "xgboost" in done.stdout
