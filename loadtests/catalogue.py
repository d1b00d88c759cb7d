"""A thousand customers, each with a small real model and the answers it must give.

Every customer draws its own sample of rows from one of the data sets that ship inside scikit-learn, so no two models
are the same and an answer from the wrong one is noticed: `check_distinct` makes sure of it. The expected answers are
computed here, by the library the model was trained with, from the file that is registered.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
#: Expected answers by output name, first dimension POOL_ROWS.
Answers = dict[str, Array]

#: Data sets, and how often each is drawn. digits has 64 columns and ten classes, so fewer of those.
DATA_SETS = ("breast_cancer", "wine", "iris", "diabetes", "digits")
#: Rows kept of each model to ask it about; every one has its expected answer beside it.
POOL_ROWS = 16
#: Models a worker trains before it reports.
SHARE_MODELS = 20
#: Changing what is trained below must change this, or a cached catalogue would be taken for the new one.
RECIPE_VERSION = 4
#: float32 in, float32 out: the largest difference that is rounding and not another model.
TOLERANCE = 2e-5


@dataclasses.dataclass(frozen=True, slots=True)
class TrainedModel:
    """One model on disk with its questions and answers.

    `rows` is float32 (POOL_ROWS, features); `expected` maps each output that is asked for to its answers, first
    dimension POOL_ROWS. Answers are compared with `TOLERANCE` when they are floating point, else exactly.
    """

    name: str
    type: str
    path: Path
    key: str
    data_set: str
    input_name: str
    rows: Array
    expected: Mapping[str, Array]

    @property
    def uri(self) -> str:
        """Where the mesh finds the file."""
        return self.path.absolute().as_uri()

    def explain_wrong(self, first: int, count: int, outputs: Mapping[str, Array]) -> str:
        """What is wrong with the `outputs` for rows `first` to `first + count`; the empty string when all is right."""
        for name, answers in self.expected.items():
            want = answers[first : first + count]
            got = outputs.get(name)
            if got is None:
                return f"{self.name}: no output {name!r}, only {sorted(outputs)}"
            if got.size != want.size:
                return f"{self.name}: {name} has shape {got.shape}, expected {want.shape}"
            got = got.reshape(want.shape)
            if want.dtype.kind == "f":
                if not np.allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE):
                    return f"{self.name}: {name} is {got.tolist()}, expected {want.tolist()}"
            elif not np.array_equal(got, want):
                return f"{self.name}: {name} is {got.tolist()}, expected {want.tolist()}"
        return ""


@functools.cache
def load_data(data_set: str) -> tuple[Array, Array]:
    """Features (float32) and targets of one of scikit-learn's own data sets."""
    from sklearn import datasets

    features, target = getattr(datasets, f"load_{data_set}")(return_X_y=True)
    return features.astype(np.float32), target


def sample_rows(data_set: str, rng: np.random.Generator) -> tuple[Array, Array]:
    """One customer's share: features and targets of 50 to 80 percent of the rows, every class among them."""
    features, target = load_data(data_set)
    order = rng.permutation(len(features))
    kept = order[: int(len(order) * rng.uniform(0.5, 0.8))]
    if data_set != "diabetes":
        one_of_each = [np.flatnonzero(target == label)[:2] for label in np.unique(target)]
        kept = np.concatenate([kept, *one_of_each])
    return features[kept], target[kept]


def rows_to_ask(data_set: str) -> Array:
    """The same `POOL_ROWS` rows for every model of a data set, so that models can be told apart by their answers."""
    features, _ = load_data(data_set)
    return features[np.random.default_rng(7).permutation(len(features))[:POOL_ROWS]]


def train_xgboost(data_set: str, rng: np.random.Generator, path: Path) -> tuple[str, Answers]:
    """Fifty trees, saved as UBJSON."""
    import xgboost

    features, target = sample_rows(data_set, rng)
    rows = rows_to_ask(data_set)
    parameters: dict[str, Any] = {
        "max_depth": int(rng.integers(2, 5)),
        "eta": float(rng.uniform(0.1, 0.3)),
        "nthread": 1,
        "seed": int(rng.integers(1 << 30)),
    }
    rounds = 50
    classes = len(np.unique(target))
    if data_set == "diabetes":
        parameters["objective"] = "reg:squarederror"
    elif classes == 2:
        parameters["objective"] = "binary:logistic"
    else:
        # One tree per class and round: fewer rounds keep the models of one size.
        parameters |= {"objective": "multi:softprob", "num_class": classes}
        rounds = max(5, 50 // classes)
    booster = xgboost.train(parameters, xgboost.DMatrix(features, target), rounds)
    booster.save_model(path)
    fresh = xgboost.Booster(params={"nthread": 1}, model_file=str(path))
    return "", {"output-0": fresh.inplace_predict(rows)}


def train_sklearn(data_set: str, rng: np.random.Generator, path: Path) -> tuple[str, Answers]:
    """A scaled linear model or a small forest, saved with skops (no pickle)."""
    import skops.io
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, target = sample_rows(data_set, rng)
    rows = rows_to_ask(data_set)
    seed = int(rng.integers(1 << 30))
    is_linear = bool(rng.integers(2))
    if data_set == "diabetes":
        inner = Ridge() if is_linear else RandomForestRegressor(6, max_depth=4, random_state=seed, n_jobs=1)
    elif is_linear:
        inner = LogisticRegression(C=float(rng.uniform(0.1, 1.0)), max_iter=200, tol=1e-2)
    else:
        inner = RandomForestClassifier(6, max_depth=4, random_state=seed, n_jobs=1)
    model = make_pipeline(StandardScaler(), inner).fit(features, target)
    skops.io.dump(model, path)
    fresh = skops.io.load(path, trusted=skops.io.get_untrusted_types(file=path))
    if data_set == "diabetes":
        return "", {"output-0": fresh.predict(rows)}
    # Probabilities, since two customers' models often agree on the label.
    return '{"method": "predict_proba"}', {"output-0": fresh.predict_proba(rows)}


def train_onnx(data_set: str, rng: np.random.Generator, path: Path) -> tuple[str, Answers]:
    """A multi-layer perceptron or a linear model, converted by skl2onnx."""
    import onnxruntime
    import skl2onnx
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, target = sample_rows(data_set, rng)
    rows = rows_to_ask(data_set)
    inner = Ridge() if data_set == "diabetes" else LogisticRegression(C=float(rng.uniform(0.1, 1.0)), tol=1e-2)
    model = make_pipeline(StandardScaler(), inner).fit(features, target)
    options = {} if data_set == "diabetes" else {id(inner): {"zipmap": False}}
    tensor = FloatTensorType([None, features.shape[1]])
    converted = skl2onnx.to_onnx(model, initial_types=[("X", tensor)], options=options, target_opset=17)
    path.write_bytes(converted.SerializeToString())
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return "", dict(zip(names, session.run(names, {"X": rows}), strict=True))


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """One type of model: how it is trained, its file's ending, the name of its input.

    `train` writes the file and returns the registration's `key` and the expected answers.
    """

    type: str
    suffix: str
    input_name: str
    train: Callable[[str, np.random.Generator, Path], tuple[str, Answers]]


KINDS = (
    Kind("xgboost", ".ubj", "input-0", train_xgboost),
    Kind("sklearn", ".skops", "input-0", train_sklearn),
    Kind("onnx", ".onnx", "X", train_onnx),
)
#: Of twenty models, how many are of each kind: the mix of a tabular shop.
SHARES = ("xgboost",) * 12 + ("sklearn",) * 4 + ("onnx",) * 4


class Order(NamedTuple):
    """A model to train: whose, and which of that customer's models (1, then 2 when retrained)."""

    customer: int
    version: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the models besides their orders. `only_type` and `only_data_set` narrow the mix to one."""

    seed: int
    only_type: str = ""
    only_data_set: str = ""


def train_one(recipe: Recipe, order: Order, folder: Path) -> TrainedModel:
    """The model of an order: the same recipe and order give the same model."""
    kind_name = recipe.only_type or SHARES[order.customer % len(SHARES)]
    kind = next(kind for kind in KINDS if kind.type == kind_name)
    # A customer stays with its data set; each version draws rows of its own.
    drawn = DATA_SETS[int(np.random.default_rng([recipe.seed, order.customer]).integers(len(DATA_SETS)))]
    data_set = recipe.only_data_set or drawn
    rng = np.random.default_rng([recipe.seed, order.customer, order.version])
    name = f"customer-{order.customer:05d}-{data_set.replace('_', '-')}-v{order.version}"
    path = folder / f"{name}{kind.suffix}"
    key, expected = kind.train(data_set, rng, path)
    return TrainedModel(name, kind.type, path, key, data_set, kind.input_name, rows_to_ask(data_set), expected)


def train_share(recipe: Recipe, orders: list[Order], folder: str) -> list[TrainedModel]:
    """A worker's share of the training."""
    # Small samples and few iterations are meant; a thousand convergence warnings would hide the rest.
    warnings.filterwarnings("ignore")
    return [train_one(recipe, order, Path(folder)) for order in orders]


def train_catalogue(
    folder: Path,
    orders: Sequence[Order],
    recipe: Recipe,
    *,
    fresh: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[Order, TrainedModel]:
    """The models of `orders` under `folder`, trained on all cores; taken from the folder when they are there already.

    `progress` is told how many more models are done, each time some are. `fresh` trains them again. Raises
    `ValueError` when two models could not be told apart by their answers.
    """
    stamp = hashlib.sha256(repr((RECIPE_VERSION, recipe, list(orders), library_versions())).encode()).hexdigest()
    index_path = folder / "catalogue.pickle"
    if not fresh and index_path.is_file():
        kept = pickle.loads(index_path.read_bytes())
        if kept["stamp"] == stamp and kept["folder"] == str(folder.absolute()):
            progress(len(orders))
            models: dict[Order, TrainedModel] = kept["models"]
            return models
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trained: list[TrainedModel] = []
    with one_thread_each(), spawned_pool() as pool:
        shares = [
            pool.submit(train_share, recipe, list(orders[first : first + SHARE_MODELS]), str(folder.absolute()))
            for first in range(0, len(orders), SHARE_MODELS)
        ]
        for done in concurrent.futures.as_completed(shares):
            progress(len(done.result()))
        trained = [model for share in shares for model in share.result()]
    check_distinct(trained)
    models = dict(zip(orders, trained, strict=True))
    index_path.write_bytes(pickle.dumps({"stamp": stamp, "folder": str(folder.absolute()), "models": models}))
    return models


def spawned_pool() -> concurrent.futures.ProcessPoolExecutor:
    """One worker per core. Spawned, for the libraries' threads do not survive a fork."""
    return concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Workers started inside use one thread each: the parallelism is over models."""
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(dict.fromkeys(variables, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def library_versions() -> list[str]:
    """The libraries whose version decides what is trained."""
    return [f"{name} {version(name)}" for name in ("xgboost", "scikit-learn", "skops", "skl2onnx", "numpy")]


def check_distinct(models: Sequence[TrainedModel]) -> None:
    """Raises `ValueError` if one model's answers would pass for another's: a check of answers would be blind there."""
    from scipy.spatial import KDTree

    groups: dict[tuple[object, ...], list[TrainedModel]] = {}
    for model in models:
        shapes = tuple((name, answers.shape) for name, answers in sorted(model.expected.items()))
        groups.setdefault((model.data_set, shapes), []).append(model)
    for group in groups.values():
        points = np.array([np.concatenate([m.expected[n].ravel() for n in sorted(m.expected)]) for m in group], float)
        # A tree finds the few pairs close enough for the real comparison; all pairs would take minutes.
        radius = TOLERANCE * (1 + float(np.abs(points).max()))
        for one, other in KDTree(points).query_pairs(radius, p=np.inf):
            if not group[one].explain_wrong(0, POOL_ROWS, group[other].expected):
                raise ValueError(
                    f"{group[one].name} and {group[other].name} give the same answers; train with another seed"
                )
