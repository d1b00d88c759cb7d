"""The V1 protocol (``:predict``) and its CloudEvents envelope: instances in, predictions out.

Rule of the file: pure codecs, as in `oip`: a request becomes an `InferRequest` with the model's own names and
datatypes, for V1 says neither. A caller who sends a CloudEvent gets one, in the mode (binary or structured) of its own.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from raymesh.runtimes import oip, tensors
from raymesh.runtimes.errors import InvalidInput
from raymesh.runtimes.frameworks.base import TensorSpec
from raymesh.runtimes.oip import InferRequest
from raymesh.runtimes.tensors import Array

STRUCTURED = b"application/cloudevents+json"
_STRUCTURED_HEADER = b"content-type: application/cloudevents+json\r\n"
#: What an answer says about itself, as KServe's do.
EVENT_TYPE = "io.kserve.inference.response"
EVENT_SOURCE = "io.kserve.inference."

#: Headers that together make a request a CloudEvent in binary mode.
_BINARY_MARKS = (b"ce-id", b"ce-source", b"ce-specversion", b"ce-type")
_VERSIONS = frozenset({"1.0", "0.3"})


def decode(
    model_name: str, inputs: Sequence[TensorSpec], body: bytes, headers: Mapping[bytes, bytes], accepts: bytes = b""
) -> InferRequest:
    """The request in a V1 body (without ``Content-Encoding``) for a model with these inputs.

    `accepts` is the encoding a large answer may have. Raises `InvalidInput` naming what is wrong.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"Unrecognized request format: {error}") from None
    envelope: Callable[[bytes], bytes] = lambda answer: oip.json_answer(answer, accepts)  # noqa: E731
    if all(mark in headers for mark in _BINARY_MARKS):
        _check_version(headers[b"ce-specversion"].decode("latin-1"))
        envelope = _binary_event(model_name)
    elif headers.get(b"content-type", b"").partition(b";")[0].strip() == STRUCTURED or _is_structured(value):
        value = _open_structured(value)
        envelope = _structured_event(model_name)
    arrays = _read(inputs, value)

    def encode(outputs: Mapping[str, Array]) -> bytes:
        return envelope(_predictions(outputs))

    return InferRequest(model_name, "", arrays, (), is_grpc=False, encode=encode)


# -- instances ---------------------------------------------------------------------------------------------------------


def _read(inputs: Sequence[TensorSpec], value: Any) -> dict[str, Array]:
    if not isinstance(value, dict) or ("instances" in value) == ("inputs" in value):
        raise InvalidInput('Expected a JSON object with either "instances" or "inputs"')
    field = "instances" if "instances" in value else "inputs"
    given = value[field]
    if field == "inputs" and isinstance(given, dict):
        # By columns: {"inputs": {"a": [...], "b": [...]}}.
        columns = given
    elif not isinstance(given, list):
        raise InvalidInput(f'Expected "{field}" to be a list')
    elif given and isinstance(given[0], dict):
        columns = _columns(field, given)
    elif len(inputs) != 1:
        names = ", ".join(f"'{spec.name}'" for spec in inputs)
        raise InvalidInput(f'the model has several inputs: each of "{field}" must be an object with {names}')
    else:
        columns = {inputs[0].name: given}
    specs = {spec.name: spec for spec in inputs}
    for name in columns:
        if name not in specs:
            raise InvalidInput(f"the model has no input '{name}'")
    for name in specs:
        if name not in columns:
            raise InvalidInput(f"input '{name}' is missing")
    return {name: _read_column(specs[name], columns[name]) for name in specs}


def _columns(field: str, rows: list[Any]) -> dict[str, list[Any]]:
    names = rows[0].keys()
    for row in rows:
        if not isinstance(row, dict) or row.keys() != names:
            raise InvalidInput(f'all of "{field}" must be objects with the same names')
    return {name: [row[name] for row in rows] for name in names}


def _read_column(spec: TensorSpec, data: Any) -> Array:
    if not isinstance(data, list):
        raise InvalidInput(f"input '{spec.name}': data must be a JSON array")
    shape = [len(data)]
    inner = data
    # Only the first of each level is looked at; that the others agree is checked when it is flattened.
    while inner and isinstance(inner[0], list) and len(shape) <= tensors.DIMS_MAX:
        inner = inner[0]
        shape.append(len(inner))
    if not data:
        # No rows: their shape is what the model says.
        shape += [max(0, dim) for dim in spec.shape[1:]]
    return tensors.from_json(spec.name, spec.datatype, shape, data)


# -- predictions -------------------------------------------------------------------------------------------------------


def _predictions(outputs: Mapping[str, Array]) -> bytes:
    """``{"predictions": …}``: the rows of a single output; of several, one object per row.

    Raises `InvalidInput` for outputs JSON cannot carry.
    """
    rows = {name: _rows(name, array) for name, array in outputs.items()}
    if len(rows) == 1:
        (predictions,) = rows.values()
    elif len({len(array) if isinstance(array, list) or array.ndim else -1 for array in rows.values()}) == 1:
        predictions = [dict(zip(rows, row, strict=True)) for row in zip(*map(list, rows.values()), strict=True)]
    else:
        predictions = rows
    text = orjson.dumps({"predictions": predictions}, option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" in text:
        for name, array in outputs.items():
            tensors.check_json(name, array)
    return text


def _rows(name: str, array: Array) -> Any:
    """`array` with its shape, as orjson can write it."""
    if array.dtype.kind in "OSU":
        texts = np.empty(array.size, dtype=object)
        texts[:] = tensors.to_json(name, array)
        return texts.reshape(array.shape).tolist()
    flat = tensors.to_json(name, array)
    if isinstance(flat, list):
        return array.tolist()
    return np.ascontiguousarray(array) if array.ndim else array.tolist()


# -- CloudEvents -------------------------------------------------------------------------------------------------------


def _is_structured(value: Any) -> bool:
    """Whether a JSON body is a CloudEvent, whatever its content type says."""
    return isinstance(value, dict) and all(name in value for name in ("id", "source", "specversion", "type", "data"))


def _open_structured(value: Any) -> Any:
    if not isinstance(value, dict) or "data" not in value:
        raise InvalidInput("the CloudEvent has no 'data' (JSON)")
    for name in ("id", "source", "type"):
        if not isinstance(value.get(name), str):
            raise InvalidInput(f"the CloudEvent has no '{name}'")
    _check_version(value.get("specversion"))
    return value["data"]


def _check_version(version: Any) -> None:
    if version not in _VERSIONS:
        raise InvalidInput("the CloudEvent's specversion must be 1.0 (or 0.3)")


def _attributes(model_name: str) -> dict[str, str]:
    return {
        "specversion": "1.0",
        "id": str(uuid.uuid4()),
        "source": EVENT_SOURCE + model_name,
        "type": EVENT_TYPE,
        "time": datetime.datetime.now(datetime.UTC).isoformat(),
    }


def _binary_event(model_name: str) -> Callable[[bytes], bytes]:
    def encode(answer: bytes) -> bytes:
        lines = [f"ce-{name}: {value}\r\n" for name, value in _attributes(model_name).items()]
        return oip.json_answer(answer, b"", "".join(lines).encode())

    return encode


def _structured_event(model_name: str) -> Callable[[bytes], bytes]:
    def encode(answer: bytes) -> bytes:
        event = {**_attributes(model_name), "data": orjson.Fragment(answer)}
        body = orjson.dumps(event)
        return b"HTTP/1.1 200 OK\r\n%bcontent-length: %d\r\n\r\n%b" % (_STRUCTURED_HEADER, len(body), body)

    return encode
