"""ONNX models on ONNX Runtime: an ``.onnx`` file, or a folder with exactly one (external weights beside it).

Rule of the file: small models must stay small. A session of its own defaults takes 190 KB and an arena that only
grows; here a session has no arena, no threads, and the full set of graph optimizations only where they can pay.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from raymesh.runtimes.errors import LoadFailed
from raymesh.runtimes.frameworks.base import Array, LoadedModel, LoadOptions, Tensors, TensorSpec
from raymesh.runtimes.frameworks.files import find_model_file
from raymesh.runtimes.frameworks.inputs import check_inputs, decode_strings, encode_strings

_log = logging.getLogger(__name__)

SUFFIXES = (".onnx",)
_WHAT = "an ONNX model"
#: Files up to this size get the basic optimizations only: 41 instead of 75 KB for a linear model and half the load
#: time; fused and re-laid-out kernels are for networks, which are larger.
BASIC_BYTES_MAX = 64 * 1024
_FATAL = 4
_DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float": "FP32",
    "double": "FP64",
    "string": "BYTES",
}
#: What a classifier converted without ``zipmap=False`` answers: per row, a map from class to probability.
_MAPS = {"seq(map(int64,tensor(float)))", "seq(map(string,tensor(float)))"}


class OnnxModel:
    """A loaded model; keeps its session only."""

    platform = "onnxruntime_onnx"

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = tuple(_spec("input", node) for node in session.get_inputs())
        self.outputs = tuple(_spec("output", node) for node in session.get_outputs())
        self._names = [spec.name for spec in self.inputs]
        self._all = [spec.name for spec in self.outputs]
        self._maps = {node.name for node in session.get_outputs() if node.type in _MAPS}
        self._texts = {spec.name for spec in self.outputs if spec.datatype == "BYTES"}
        self._takes_text = any(spec.datatype == "BYTES" for spec in self.inputs)
        specs = self.inputs + self.outputs
        self.is_batchable = bool(self.inputs) and all(spec.shape[:1] == (-1,) for spec in specs)

    def predict(self, inputs: Tensors, outputs: Sequence[str]) -> dict[str, Array]:
        """Answers for `inputs`, cast to the declared dtypes; only the outputs asked for are computed."""
        arrays = check_inputs(self.inputs, inputs)
        if self._takes_text:
            arrays = [decode_strings(array) if array.dtype == object else array for array in arrays]
        names = list(outputs) or self._all
        values = self._session.run(names, dict(zip(self._names, arrays, strict=True)))
        answers = dict(zip(names, values, strict=True))
        for name in self._maps.intersection(names):
            # The maps list the classes in the order of the labels, the same in every row.
            answers[name] = np.array([list(row.values()) for row in answers[name]], dtype=np.float32)
        for name in self._texts.intersection(names):
            answers[name] = encode_strings(answers[name])
        return answers

    def close(self) -> None:
        """Free the memory now."""
        self._session = None


class OnnxFramework:
    """Loads models of type ``onnx``."""

    type = "onnx"

    def load(self, path: Path, options: LoadOptions) -> LoadedModel:
        """The model at `path`; raises `LoadFailed` when ONNX Runtime cannot read or serve it."""
        source = find_model_file(path, SUFFIXES, _WHAT)
        try:
            session = onnxruntime.InferenceSession(
                str(source),
                _session_options(source, options.threads),
                providers=["CPUExecutionProvider"],
                enable_fallback=0,  # it would print to stdout and try a second time
            )
            return OnnxModel(session)
        except LoadFailed:
            raise
        except Exception as error:
            # ONNX Runtime's exceptions share no base class; their texts name files of the server.
            _log.info("onnxruntime cannot load a model: %s", error)
            raise LoadFailed(
                f"ONNX Runtime {onnxruntime.__version__} cannot read the model ({type(error).__name__}): it is not "
                "ONNX, is damaged, or uses an operator or version this runtime does not have"
            ) from None


FRAMEWORK = OnnxFramework()


def _session_options(source: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(1, threads)
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.enable_cpu_mem_arena = False
    options.log_severity_level = _FATAL
    # Threads of a larger pool would spin between requests and take the cores from other models.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if source.stat().st_size <= BASIC_BYTES_MAX:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return options


def _spec(role: str, node: Any) -> TensorSpec:
    """The spec of a graph input or output; free and symbolic dimensions are -1."""
    if node.type in _MAPS:
        return TensorSpec(node.name, "FP32", (-1, -1))
    datatype = _DATATYPES.get(node.type.removeprefix("tensor(").removesuffix(")"))
    if not node.type.startswith("tensor(") or datatype is None:
        raise LoadFailed(
            f"{role} '{node.name}' is of type '{node.type}', which the inference protocol cannot carry; "
            "export the model with plain tensors"
        )
    return TensorSpec(node.name, datatype, tuple(dim if isinstance(dim, int) else -1 for dim in node.shape or ()))
