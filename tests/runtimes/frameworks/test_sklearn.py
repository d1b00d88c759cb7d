from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import skops.io
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingRegressor,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, PolynomialFeatures, StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from raymesh.runtimes.errors import InvalidInput, LoadFailed
from raymesh.runtimes.frameworks import sklearn as adapter
from raymesh.runtimes.frameworks.base import LoadOptions
from raymesh.runtimes.testing import Case, check_framework

RNG = np.random.default_rng(3)
X = RNG.normal(size=(120, 4))
Y = (X[:, 0] + X[:, 1] > 0).astype(int) + (X[:, 2] > 1)


def load(path: Path, **options: Any) -> Any:
    return adapter.FRAMEWORK.load(path, LoadOptions(**options))


def dump(estimator: Any, folder: Path, name: str = "model.skops") -> Path:
    path = folder / name
    if name.endswith("skops"):
        skops.io.dump(estimator, path)
    elif name.endswith("joblib"):
        joblib.dump(estimator, path)
    else:
        path.write_bytes(pickle.dumps(estimator))
    return path


def example(count: int) -> dict[str, Any]:
    return {"input-0": np.random.default_rng(count).normal(size=(count, 4))}


@pytest.mark.parametrize("name", ["m.skops", "m.joblib", "m.pkl"])
@pytest.mark.filterwarnings("ignore")  # damaged pickles warn about all sorts of things
def test_contract(name: str, tmp_path: Path) -> None:
    estimator = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, Y)
    options = LoadOptions(trust_pickle=not name.endswith("skops"), parameters={"method": "predict_proba"})
    case = Case(
        lambda folder: dump(estimator, folder, name),
        example,
        lambda inputs: {"output-0": estimator.predict_proba(inputs["input-0"])},
        options=options,
        # A damaged pickle may run whatever its bytes happen to mean: only the sure cases are tried.
        fuzz_count=60 if name.endswith("skops") else 0,
    )
    check_framework(adapter.FRAMEWORK, case, tmp_path)


@pytest.mark.parametrize(
    "estimator",
    [
        LinearRegression(),
        RandomForestClassifier(5, max_depth=3, random_state=0, n_jobs=-1),
        RandomForestRegressor(5, max_depth=3, random_state=0),
        DecisionTreeClassifier(max_depth=3),
        GradientBoostingClassifier(n_estimators=4, random_state=0),
        HistGradientBoostingClassifier(max_iter=4, random_state=0),
        AdaBoostClassifier(n_estimators=3, random_state=0),
        BaggingRegressor(n_estimators=3, max_features=0.5, random_state=0),
        IsolationForest(n_estimators=5, max_features=0.5, random_state=0),
        make_pipeline(StandardScaler(), PolynomialFeatures(2), RandomForestClassifier(4, random_state=0)),
        CalibratedClassifierCV(LogisticRegression(), cv=2),
        MLPClassifier((4,), max_iter=5, random_state=0),
        KMeans(2, n_init=1, random_state=0),
        SVC(),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_common_estimators_answer_as_the_library(estimator: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not trained to the end
        estimator.fit(X, Y)
    model = load(dump(estimator, tmp_path))
    rows = example(9)["input-0"]
    answer = model.predict({"x": rows}, ())["output-0"]
    np.testing.assert_allclose(answer, estimator.predict(rows), rtol=1e-9)
    assert model.outputs[0].shape == (-1,)


def test_class_labels_are_bytes(tmp_path: Path) -> None:
    labels = np.array(["no", "ja", "schön"])[Y]
    model = load(dump(LogisticRegression().fit(X, labels), tmp_path))
    assert model.outputs[0].datatype == "BYTES"
    answer = model.predict({"x": X[:20]}, ())["output-0"]
    assert {item.decode() for item in answer} <= {"no", "ja", "schön"}


def test_columns_of_text(tmp_path: Path) -> None:
    table = np.array([["a", "x"], ["b", "y"], ["a", "y"], ["b", "x"]], dtype=object)
    estimator = make_pipeline(OneHotEncoder(), LogisticRegression()).fit(table, [0, 1, 0, 1])
    model = load(dump(estimator, tmp_path))
    sent = np.array([[b"a", b"x"], [b"b", b"x"]], dtype=object)
    assert model.predict({"x": sent}, ())["output-0"].tolist() == [0, 1]
    with pytest.raises(InvalidInput, match=r"input 'x'.*unknown categories"):
        model.predict({"x": np.array([[b"zz", b"x"]], dtype=object)}, ())


def test_documents(tmp_path: Path) -> None:
    estimator = make_pipeline(CountVectorizer(), MultinomialNB()).fit(["good day", "bad night"], ["+", "-"])
    model = load(dump(estimator, tmp_path, "m.joblib"), trust_pickle=True)
    assert (model.inputs[0].datatype, model.inputs[0].shape) == ("BYTES", (-1,))
    answer = model.predict({"x": np.array([b"good good", b"bad"], dtype=object)}, ())["output-0"]
    assert answer.tolist() == [b"+", b"-"]


def test_models_fitted_on_named_columns(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=["a", "b", "c", "d"])
    estimator = LogisticRegression().fit(frame, Y)
    model = load(dump(estimator, tmp_path))
    assert model.predict({"x": X[:7]}, ())["output-0"].tolist() == estimator.predict(frame[:7]).tolist()


def test_bad_values_are_the_callers_fault(tmp_path: Path) -> None:
    model = load(dump(LogisticRegression().fit(X, Y), tmp_path))
    with pytest.raises(InvalidInput, match="input 'x': Input X contains NaN"):
        model.predict({"x": np.full((1, 4), np.nan)}, ())


@pytest.mark.parametrize("name", ["m.joblib", "m.pkl", "m.pickle"])
def test_pickles_need_trust(name: str, tmp_path: Path) -> None:
    path = dump(LogisticRegression().fit(X, Y), tmp_path, name)
    with pytest.raises(LoadFailed, match=r"skops.*ONNX.*--trust-pickle"):
        load(path)
    assert load(path, trust_pickle=True).outputs[0].datatype == "INT64"


def test_an_untrusted_pickle_is_not_even_opened(tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    class Touch:
        def __reduce__(self) -> Any:
            return (Path.touch, (mark,))

    (tmp_path / "m.pkl").write_bytes(pickle.dumps(Touch()))
    with pytest.raises(LoadFailed):
        load(tmp_path / "m.pkl")
    assert not mark.exists()


def test_types_that_are_not_trusted_are_named(tmp_path: Path) -> None:
    path = dump(KNeighborsClassifier().fit(X, Y), tmp_path)
    with pytest.raises(LoadFailed, match=r"not trusted: .*KDTree.*ONNX"):
        load(path)
    assert load(path, trust_pickle=True).predict({"x": X[:3]}, ())["output-0"].shape == (3,)


def _broken(estimator: Any, change: Any) -> Any:
    """`estimator` with the nodes of one of its trees changed, as a file could hold them."""
    tree = estimator.estimators_[0].tree_ if hasattr(estimator, "estimators_") else estimator.tree_
    state = tree.__getstate__()
    change(state["nodes"])
    tree.__setstate__(state)
    return estimator


@pytest.mark.parametrize(
    ("field", "value"), [("left_child", 10**6), ("right_child", 0), ("feature", 400), ("feature", -9)]
)
@pytest.mark.parametrize("kind", [DecisionTreeClassifier, RandomForestClassifier])
def test_trees_that_point_outside_are_refused(kind: Any, field: str, value: int, tmp_path: Path) -> None:
    # Predicting with one of these reads outside the process's memory, or never ends.
    estimator = kind(max_depth=3, random_state=0).fit(X, Y)

    def change(nodes: Any) -> None:
        nodes[field][0] = value

    path = dump(_broken(estimator, change), tmp_path)
    with pytest.raises(LoadFailed, match="points outside itself"):
        load(path)


def test_histogram_trees_that_point_outside_are_refused(tmp_path: Path) -> None:
    estimator = HistGradientBoostingClassifier(max_iter=2, random_state=0).fit(X, Y)
    estimator._predictors[0][0].nodes["left"][0] = 10**6
    with pytest.raises(LoadFailed, match="points outside itself"):
        load(dump(estimator, tmp_path))


def test_a_lie_about_the_number_of_features_is_refused(tmp_path: Path) -> None:
    estimator = GradientBoostingClassifier(n_estimators=2).fit(X, Y)
    estimator.n_features_in_ = 1
    with pytest.raises(LoadFailed, match="points outside itself"):
        load(dump(estimator, tmp_path))


def test_methods(tmp_path: Path) -> None:
    estimator = LogisticRegression().fit(X, Y)
    path = dump(estimator, tmp_path)
    model = load(path, parameters={"method": "predict_proba"})
    assert (model.outputs[0].datatype, model.outputs[0].shape) == ("FP64", (-1, 3))
    with pytest.raises(LoadFailed, match="expected one of predict, predict_proba"):
        load(path, parameters={"method": "__init__"})
    with pytest.raises(LoadFailed, match="has no 'transform'"):
        load(path, parameters={"method": "transform"})


def test_saved_thread_counts_do_not_count(tmp_path: Path) -> None:
    estimator = make_pipeline(StandardScaler(), RandomForestClassifier(2, n_jobs=-1)).fit(X, Y)
    model = load(dump(estimator, tmp_path))
    assert model._call.__self__.steps[-1][1].n_jobs == 1
