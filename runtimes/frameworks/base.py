"""What a framework adapter is: a way to load a model file, and the loaded model it yields.

Rule of the folder: one adapter, one framework import, about a hundred lines, and it passes `check_framework`
(`runtimes/testing.py`). An adapter is imported only when the first model of its type is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

Array = npt.NDArray[Any]
#: Tensors by name. BYTES tensors are object arrays of ``bytes``.
Tensors = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model: OIP datatype (``FP32``, ``INT64``, ``BYTES`` …), shape with -1 for free dims."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What the mesh tells an adapter. `parameters` is the parsed JSON of the registration's `key` (``{}`` if empty)."""

    threads: int = 1
    trust_pickle: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)


class LoadedModel(Protocol):
    """A model in memory. `predict` is called from one thread at a time."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    #: OIP metadata `platform`, for example ``xgboost`` or ``onnxruntime_onnx``.
    platform: str
    #: Whether rows of several requests may be concatenated along axis 0 into one `predict`.
    is_batchable: bool

    def predict(self, inputs: Tensors, outputs: Sequence[str]) -> dict[str, Array]:
        """Answers for `inputs`. `outputs` names those wanted (empty: all), already checked against `self.outputs`.

        Inputs arrive as C-contiguous arrays of the declared (or a compatible) dtype; a single unnamed-by-us input may
        arrive under any name (see `check_inputs`). Raises `runtimes.errors.InvalidInput` naming the input when a
        tensor does not fit the model; anything else raised counts as the model's own failure.
        """
        ...

    def close(self) -> None:
        """Free the memory now; the model is of no use afterwards."""
        ...


class Framework(Protocol):
    """Loads one kind of model."""

    #: The `type` users register models under, for example ``xgboost``.
    type: str

    def load(self, path: Path, options: LoadOptions) -> LoadedModel:
        """The model stored at `path` (a file or a folder).

        Raises `runtimes.errors.LoadFailed` with a message for users: what is wrong with the file and which formats
        are accepted. Must not execute code from the file unless `options.trust_pickle`.
        """
        ...
