"""scikit-learn models: ``.skops`` always; ``.joblib``, ``.pkl``, ``.pickle`` only where pickles are trusted.

Rule of the file: no code from a file runs unless the mesh was started with ``--trust-pickle``. A ``.skops`` file may
name only types that skops itself trusts, and the few reviewed here (`_REVIEWED`), whose content is checked.
"""

from __future__ import annotations

import io
import logging
import pickle
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import joblib  # type: ignore[import-untyped]
import numpy as np
import skops.io
from skops.io.exceptions import UntrustedTypesFoundException

from raymesh.runtimes.errors import InvalidInput, LoadFailed
from raymesh.runtimes.frameworks.base import Array, LoadedModel, LoadOptions, Tensors, TensorSpec
from raymesh.runtimes.frameworks.files import find_model_file, read_model_file
from raymesh.runtimes.frameworks.inputs import check_input, decode_strings, encode_strings, oip_datatype
from raymesh.runtimes.frameworks.sklearn_trees import check_trees

_log = logging.getLogger(__name__)
_ONE_AT_A_TIME = threading.Lock()

_PICKLES = (".joblib", ".pkl", ".pickle")
SUFFIXES = (".skops", *_PICKLES)
_WHAT = "a scikit-learn model"
_METHODS = ("predict", "predict_proba", "predict_log_proba", "decision_function", "transform")
#: Types skops does not trust by itself: trees, because their content can crash the process (`check_trees` looks at it),
#: and plain Python classes of scikit-learn that do nothing when they are made.
_REVIEWED = frozenset(
    {
        "sklearn.tree._tree.Tree",
        "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
        "sklearn.calibration._CalibratedClassifier",
        "sklearn.calibration._SigmoidCalibration",
        "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
        "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
    }
)
_TRUSTED = sorted(_REVIEWED)


class SklearnModel:
    """A loaded estimator and the method that answers requests."""

    platform = "sklearn"
    is_batchable = True

    def __init__(self, estimator: Any, method: str) -> None:
        self._call: Callable[[Any], Any] = getattr(estimator, method)
        self._columns = _column_names(estimator)
        features = getattr(estimator, "n_features_in_", None)
        # Without a number of features it reads text: a vectorizer takes a list of documents.
        self._takes_text = features is None
        shape = (-1,) if features is None else (-1, int(features))
        self.inputs: tuple[TensorSpec, ...] = (TensorSpec("input-0", "BYTES" if self._takes_text else "FP64", shape),)
        self.outputs: tuple[TensorSpec, ...] = (self._output_spec(estimator, method),)
        self._gives_text = self.outputs[0].datatype == "BYTES"

    def predict(self, inputs: Tensors, outputs: Sequence[str]) -> dict[str, Array]:
        """Answers for one tensor ``[n, features]`` of any numeric dtype (or BYTES, for categorical columns)."""
        ((name, array),) = inputs.items() if len(inputs) == 1 else ((("", None)),)
        spec = self.inputs[0]
        if array is not None and array.dtype.kind in "OSU" and not self._takes_text:
            spec = TensorSpec(spec.name, "BYTES", spec.shape)
        rows = check_input(spec, inputs, cast=False)
        if rows.dtype.kind in "OSU":
            rows = decode_strings(rows)
        try:
            answer = _dense(self._call(self._framed(rows)))
        except (ValueError, TypeError) as error:
            # scikit-learn's own words for a NaN, an unknown category, text instead of numbers.
            raise InvalidInput(f"input '{name}': {str(error).splitlines()[0]}") from None
        return {"output-0": encode_strings(answer) if self._gives_text else answer}

    def close(self) -> None:
        """Free the memory now."""
        self._call = _closed

    def _framed(self, rows: Array) -> Any:
        if self._columns is None:
            return rows
        import pandas  # type: ignore[import-untyped]  # only for models that were fitted on named columns

        return pandas.DataFrame(rows, columns=self._columns)

    def _output_spec(self, estimator: Any, method: str) -> TensorSpec:
        """What the model answers, seen by asking it; estimators that refuse zeros are described from their classes."""
        spec = self.inputs[0]
        probe: Array = np.array([""], dtype=object) if self._takes_text else np.zeros((1, spec.shape[1]))
        try:
            answer = self._call(self._framed(probe))
        except Exception as error:
            _log.debug("no answer for a row of zeros: %s", error)
            labels = np.asarray(getattr(estimator, "classes_", np.zeros(0)))
            shape = (-1,) if method == "predict" else (-1, -1)
            return TensorSpec("output-0", oip_datatype(labels.dtype) if method == "predict" else "FP64", shape)
        if isinstance(answer, list) or not hasattr(answer, "shape"):
            raise LoadFailed(
                f"'{method}' of this estimator does not give one array; convert the model to ONNX to serve several"
            )
        array = _dense(answer)
        return TensorSpec("output-0", oip_datatype(array.dtype), (-1, *array.shape[1:]))


class SklearnFramework:
    """Loads models of type ``sklearn``. Parameter ``method``: the estimator's method to serve (default ``predict``)."""

    type = "sklearn"

    def load(self, path: Path, options: LoadOptions) -> LoadedModel:
        """The estimator at `path`; raises `LoadFailed` for damaged files and for types that are not trusted."""
        source = find_model_file(path, SUFFIXES, _WHAT)
        data = read_model_file(source)
        read = _load_pickle if source.suffix.lower() in _PICKLES else _load_skops
        estimator = read(data, options)
        method = options.parameters.get("method", "predict")
        if method not in _METHODS:
            raise LoadFailed(f"parameter 'method': expected one of {', '.join(_METHODS)}")
        if not callable(getattr(estimator, method, None)):
            raise LoadFailed(f"the model ({type(estimator).__name__}) has no '{method}'")
        _set_threads(estimator, options.threads)
        return SklearnModel(estimator, method)


FRAMEWORK = SklearnFramework()


def _closed(rows: Any) -> Any:
    raise RuntimeError("the model is closed")


def _load_pickle(data: bytes, options: LoadOptions) -> Any:
    if not options.trust_pickle:
        raise LoadFailed(
            "this is a pickle, which can run any code when loaded, and this mesh does not trust pickles; save "
            "the model with skops.io.dump(model, 'model.skops') or as ONNX, or start the mesh with --trust-pickle"
        )
    try:
        return joblib.load(io.BytesIO(data))
    except Exception as error:
        _log.info("cannot unpickle a model: %s", error)
        reason = "it is damaged" if isinstance(error, (EOFError, pickle.UnpicklingError)) else type(error).__name__
        raise LoadFailed(
            f"the pickle cannot be loaded ({reason}); it must fit the server's scikit-learn and Python"
        ) from None


def _load_skops(data: bytes, options: LoadOptions) -> Any:
    try:
        # One at a time: loading imports what the model is made of, and of two threads that import modules which need
        # each other, each may see half of the other's. Both would hold the GIL anyway.
        with _ONE_AT_A_TIME:
            estimator = _read_skops(data, options)
        check_trees(estimator)
    except LoadFailed:
        raise
    except Exception as error:
        _log.info("skops cannot load a model: %s", error)
        raise LoadFailed(
            f"the file is not a skops file that this server's skops {skops.__version__} can read, or it is damaged"
        ) from None
    return estimator


def _read_skops(data: bytes, options: LoadOptions) -> Any:
    try:
        # What was reviewed is trusted from the start: a second reading of the file takes as long as the first.
        return skops.io.loads(data, trusted=_TRUSTED)
    except UntrustedTypesFoundException:
        types = skops.io.get_untrusted_types(data=data)
        refused = [] if options.trust_pickle else sorted(set(types) - _REVIEWED)
        if refused:
            raise LoadFailed(
                f"the file holds types that are not trusted: {', '.join(refused[:10])}; "
                "convert the model to ONNX, or start the mesh with --trust-pickle"
            ) from None
        return skops.io.loads(data, trusted=types)


def _dense(answer: Any) -> Array:
    """A transformer's sparse answer as an array; anything else as it is."""
    return np.asarray(answer.toarray() if hasattr(answer, "toarray") else answer)


def _set_threads(estimator: Any, threads: int) -> None:
    """One thread per model call unless told otherwise: a file saved with ``n_jobs=-1`` would take every core."""
    if not hasattr(estimator, "get_params"):
        return
    names = [name for name in estimator.get_params() if name.rpartition("__")[2] == "n_jobs"]
    if names:
        estimator.set_params(**dict.fromkeys(names, max(1, threads)))


def _column_names(estimator: Any) -> list[str] | None:
    """The columns of the frame the estimator was fitted on, when it was and pandas is here; None otherwise."""
    names = getattr(estimator, "feature_names_in_", None)
    if names is None:
        return None
    try:
        import pandas  # noqa: F401
    except ImportError:
        return None
    return [str(name) for name in names]
