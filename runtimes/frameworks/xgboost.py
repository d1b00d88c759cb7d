"""XGBoost models: ``.json``, ``.ubj`` (also named ``.bst`` or ``.model``), or a folder with one such file.

Rule of the file: answers are XGBoost's. Treelite's predictor (`gtil`) gives them several times faster for small
batches, from less memory and from damaged files without a crash. It serves a model when, for the first model of its
kind in this process, it agreed with XGBoost; otherwise XGBoost itself does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xgboost

from raymesh.runtimes.errors import LoadFailed
from raymesh.runtimes.frameworks.base import Array, LoadedModel, LoadOptions, Tensors, TensorSpec
from raymesh.runtimes.frameworks.files import find_model_file, read_model_file
from raymesh.runtimes.frameworks.inputs import check_input
from raymesh.runtimes.frameworks.xgboost_file import check_model, is_json, model_kind

if TYPE_CHECKING:
    from raymesh.runtimes.frameworks.gtil import GtilModel

_log = logging.getLogger(__name__)

SUFFIXES = (".json", ".ubj", ".bst", ".model")
_WHAT = "an XGBoost model"
#: From this many rows on, XGBoost's blocked prediction saves more than reading the model again costs (measured for 50
#: trees: GTIL 2.1 µs a row, XGBoost 0.4 µs a row and 0.3 ms to read; the first time 7 ms more to check the file).
BULK_ROWS = 2048
#: Largest relative difference that still counts as XGBoost's answer: FP32 sums in another order.
TOLERANCE = 2e-6
#: Whether GTIL agreed with XGBoost, by kind of model (`model_kind` and the shape of an answer).
_agreed: dict[tuple[bytes, tuple[int, ...]], bool] = {}


class _FastModel:
    """A model served by treelite's predictor."""

    platform = "xgboost"
    is_batchable = True

    def __init__(self, trees: GtilModel, source: Path, threads: int) -> None:
        self._trees = trees
        self._source = source
        self._threads = threads
        self._is_checked = False
        self.inputs: tuple[TensorSpec, ...] = (_input_spec(trees.feature_count),)
        self.outputs: tuple[TensorSpec, ...] = (_output_spec(trees.row_shape),)

    def predict(self, inputs: Tensors, outputs: Sequence[str]) -> dict[str, Array]:
        """FP32 answers, ``[n]`` or ``[n, k]``, for one numeric tensor ``[n, features]``; NaN is missing."""
        rows = check_input(self.inputs[0], inputs)
        answer = self._predict_bulk(rows) if rows.shape[0] >= BULK_ROWS else self._trees.predict(rows)
        return {"output-0": answer}

    def close(self) -> None:
        """Free the memory now."""
        self._trees.close()

    def _predict_bulk(self, rows: Array) -> Array:
        # XGBoost reads the file for this one request: its form of the model would double the memory if it stayed.
        try:
            data = self._source.read_bytes()
            if not self._is_checked:
                check_model(data)
                self._is_checked = True
            return _predict(_read_booster(data, self._threads), rows)
        except (OSError, LoadFailed, xgboost.core.XGBoostError):  # the disk cache may have dropped the file since
            return self._trees.predict(rows)


class _BoosterModel:
    """A model served by XGBoost itself: linear, DART, categorical, and whatever treelite does not know."""

    platform = "xgboost"
    is_batchable = True

    def __init__(self, booster: xgboost.Booster) -> None:
        self._booster: Any = booster
        self._predict = _predict
        features = booster.num_features()
        row = np.zeros((1, features), dtype=np.float32)
        try:
            sample = _predict(booster, row)
        except xgboost.core.XGBoostError:
            self._predict = _predict_copied
            sample = _predict_copied(booster, row)
        self.inputs: tuple[TensorSpec, ...] = (_input_spec(features),)
        self.outputs: tuple[TensorSpec, ...] = (_output_spec(sample.shape[1:]),)

    def predict(self, inputs: Tensors, outputs: Sequence[str]) -> dict[str, Array]:
        """FP32 answers, ``[n]`` or ``[n, k]``, for one numeric tensor ``[n, features]``; NaN is missing."""
        rows = check_input(self.inputs[0], inputs)
        if self._booster is None:
            raise RuntimeError("the model is closed")
        if not len(rows):
            return {"output-0": np.empty((0, *self.outputs[0].shape[1:]), dtype=np.float32)}
        return {"output-0": self._predict(self._booster, rows)}

    def close(self) -> None:
        """Free the memory now."""
        self._booster = None


class XGBoostFramework:
    """Loads models of type ``xgboost``."""

    type = "xgboost"

    def load(self, path: Path, options: LoadOptions) -> LoadedModel:
        """The model at `path`; raises `LoadFailed` when it is not one that XGBoost can read."""
        source = find_model_file(path, SUFFIXES, _WHAT)
        data = read_model_file(source)
        text = is_json(data)
        kind = model_kind(data)
        trees = _load_trees(data, text, options.threads)
        if trees is not None and _is_trusted(kind, trees, data):
            return _FastModel(trees, source, options.threads)
        check_model(data)
        try:
            return _BoosterModel(_read_booster(data, options.threads))
        except (xgboost.core.XGBoostError, ValueError) as error:
            _log.info("xgboost cannot load a model: %s", error)
            raise LoadFailed(
                f"XGBoost {xgboost.__version__} cannot read the model; save it with Booster.save_model('model.ubj')"
            ) from None


FRAMEWORK = XGBoostFramework()


def _load_trees(data: bytes, text: bool, threads: int) -> GtilModel | None:
    try:
        from raymesh.runtimes.frameworks import gtil
    except (ImportError, AttributeError, OSError):  # treelite is missing, or not the library we know
        return None
    try:
        return gtil.load(data, is_json=text, threads=threads)
    except gtil.GtilUnsupported as reason:
        _log.debug("treelite cannot load a model, XGBoost will: %s", reason)
        return None


def _is_trusted(kind: bytes, trees: GtilModel, data: bytes) -> bool:
    """Whether GTIL answers like XGBoost for this kind of model; found out once, on random rows with missing values."""
    key = (kind, trees.row_shape)
    known = _agreed.get(key)
    if known is not None:
        return known
    check_model(data)
    rng = np.random.default_rng(0)
    rows = rng.normal(scale=3.0, size=(64, trees.feature_count)).astype(np.float32)
    rows[rng.random(rows.shape) < 0.2] = np.nan
    try:
        wanted = _predict(_read_booster(data, 1), rows)
        agreed = is_same_answer(trees.predict(rows), wanted)
    except xgboost.core.XGBoostError as error:
        _log.info("xgboost cannot load a model: %s", error)
        raise LoadFailed(f"XGBoost {xgboost.__version__} cannot read the model, or the file is damaged") from None
    if not agreed:
        _log.info("treelite answers differently for this kind of model; XGBoost serves it")
    _agreed[key] = agreed
    return agreed


def is_same_answer(ours: Array, theirs: Array) -> bool:
    """Whether two FP32 answers agree to `TOLERANCE`, relative to the largest value (sums cancel)."""
    if ours.shape != theirs.shape:
        return False
    scale = max(1.0, float(np.abs(theirs).max(initial=0.0)))
    return bool(np.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * scale))


def _read_booster(data: bytes, threads: int) -> xgboost.Booster:
    booster = xgboost.Booster(params={"nthread": max(1, threads), "verbosity": 0})
    booster.load_model(bytearray(data))
    return booster


def _predict(booster: xgboost.Booster, rows: Array) -> Array:
    answer: Array = booster.inplace_predict(rows, validate_features=False)
    return answer


def _predict_copied(booster: xgboost.Booster, rows: Array) -> Array:
    """For linear models, which have no in-place prediction."""
    answer: Array = booster.predict(xgboost.DMatrix(rows, nthread=1), validate_features=False)
    return answer


def _input_spec(features: int) -> TensorSpec:
    return TensorSpec("input-0", "FP32", (-1, features))


def _output_spec(row_shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec("output-0", "FP32", (-1, *row_shape))
