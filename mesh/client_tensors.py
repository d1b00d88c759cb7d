"""numpy arrays as Open Inference Protocol tensors and back, for the client.

Rule of the file: no I/O. Little endian and row major on the wire; BYTES tensors are object arrays of ``bytes``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from raymesh.runtimes import tensors
from raymesh.runtimes.errors import InvalidInput

Array = npt.NDArray[Any]

#: The one input of a caller who passes an array without a name.
SINGLE_INPUT_NAME = "input-0"

#: The field of ``InferTensorContents`` a datatype travels in when an answer is not raw.
_CONTENTS_FIELDS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


class TensorError(ValueError):
    """A tensor that the protocol cannot carry, or an answer that is not what the protocol allows."""


def datatype_of(array: Array) -> str:
    """The OIP datatype for an array's dtype; raises `TensorError` when there is none (complex, datetime …)."""
    if array.dtype.name == "bfloat16":
        return "BF16"
    try:
        return tensors.datatype_of(array)
    except TypeError:
        raise TensorError(f"dtype {array.dtype} has no tensor datatype; convert it, for example to float32") from None


def encode(array: Array) -> bytes:
    """The raw bytes of a tensor: little endian, row major; BYTES as ``<u32 length><bytes>`` per element."""
    if array.dtype.kind == "O":
        for value in array.reshape(-1):
            if not isinstance(value, str | bytes):
                raise TensorError(f"a BYTES tensor holds str or bytes, not {type(value).__name__}")
    elif array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return tensors.to_raw(array)


def decode(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> Array:
    """An array from tensor `name`'s raw bytes; it may be written to. Raises `TensorError`.

    BF16 becomes ``ml_dtypes.bfloat16`` where that package is installed, else float32 with the same values.
    """
    try:
        array = tensors.from_raw(name, datatype, tuple(shape), bytes(data))
    except InvalidInput as error:
        raise TensorError(_of_answer(error)) from None
    if datatype == "BF16":
        return _as_bf16(array)
    return array if array.flags.writeable else array.copy()


def from_list(name: str, datatype: str, shape: Sequence[int], data: Any) -> Array:
    """An array from tensor `name`'s JSON `data`, nested or flat. Raises `TensorError`."""
    try:
        array = tensors.from_json(name, datatype, tuple(shape), data)
    except InvalidInput as error:
        raise TensorError(error.message) from None
    return _as_bf16(array) if datatype == "BF16" else array


def to_list(array: Array) -> list[Any]:
    """An array as JSON data, flat and row major; BYTES as text (bytes that are not UTF-8 are escaped)."""
    if array.dtype.kind in "OSU":
        return [v.decode(errors="backslashreplace") if isinstance(v, bytes) else str(v) for v in array.reshape(-1)]
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    flat: list[Any] = array.reshape(-1).tolist()
    return flat


def as_inputs(inputs: Mapping[str, Any] | Any) -> dict[str, Array]:
    """What a caller passed as arrays by name. Raises `TensorError` when empty or not arrays."""
    if not isinstance(inputs, Mapping):
        inputs = {SINGLE_INPUT_NAME: inputs}
    if not inputs:
        raise TensorError("no inputs; pass an array or a mapping of names to arrays")
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    for name, array in arrays.items():
        try:
            datatype_of(array)
        except TensorError as error:
            raise TensorError(f"input {name!r}: {error}") from None
    return arrays


def rest_request(inputs: Mapping[str, Array], outputs: Sequence[str], request_id: str) -> tuple[bytes, int]:
    """The body of a REST inference request with binary tensors, and the length of its JSON header in bytes."""
    entries, blobs = [], []
    for name, array in inputs.items():
        blob = encode(array)
        blobs.append(blob)
        entries.append({
            "name": name,
            "datatype": datatype_of(array),
            "shape": list(array.shape),
            "parameters": {"binary_data_size": len(blob)},
        })  # fmt: skip
    header: dict[str, Any] = {"id": request_id, "inputs": entries}
    if outputs:
        header["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    else:
        header["parameters"] = {"binary_data_output": True}
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join((text, *blobs)), len(text)


def rest_answer(body: bytes, header_bytes: int | None) -> tuple[dict[str, Array], str]:
    """The outputs and the id of a REST answer. `header_bytes` is its ``Inference-Header-Content-Length``, if any."""
    try:
        header = json.loads(body[:header_bytes] if header_bytes is not None else body)
        offset = header_bytes or 0
        outputs: dict[str, Array] = {}
        for tensor in header["outputs"]:
            size = (tensor.get("parameters") or {}).get("binary_data_size")
            if size is None:
                array = from_list(tensor["name"], tensor["datatype"], tensor["shape"], tensor["data"])
            else:
                blob = memoryview(body)[offset : offset + size]
                array = decode(tensor["name"], tensor["datatype"], tensor["shape"], blob)
                offset += size
            outputs[tensor["name"]] = array
        return outputs, str(header.get("id") or "")
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        # The error itself may quote the whole body.
        raise TensorError(f"the answer is not an inference response ({type(error).__name__})") from None


def fill_rpc_request(message: Any, inputs: Mapping[str, Array], outputs: Sequence[str]) -> None:
    """Write tensors into a ``ModelInferRequest``, all of them raw."""
    for name, array in inputs.items():
        tensor = message.inputs.add(name=name, datatype=datatype_of(array))
        tensor.shape.extend(array.shape)
        message.raw_input_contents.append(encode(array))
    for name in outputs:
        message.outputs.add(name=name)


def rpc_answer(message: Any) -> dict[str, Array]:
    """The outputs of a ``ModelInferResponse``, raw or typed. Raises `TensorError`."""
    raw = message.raw_output_contents
    if raw and len(raw) != len(message.outputs):
        raise TensorError(f"the answer has {len(message.outputs)} outputs and the bytes of {len(raw)}")
    outputs: dict[str, Array] = {}
    for index, tensor in enumerate(message.outputs):
        if raw:
            outputs[tensor.name] = decode(tensor.name, tensor.datatype, tensor.shape, raw[index])
        elif tensor.datatype == "BYTES":
            flat = np.empty(len(tensor.contents.bytes_contents), dtype=object)
            flat[:] = list(tensor.contents.bytes_contents)
            outputs[tensor.name] = flat.reshape(tuple(tensor.shape))
        else:
            field = _CONTENTS_FIELDS.get(tensor.datatype)
            if field is None:
                raise TensorError(f"output {tensor.name!r}: {tensor.datatype} travels as raw bytes only")
            values = list(getattr(tensor.contents, field))
            outputs[tensor.name] = from_list(tensor.name, tensor.datatype, tensor.shape, values)
    return outputs


def quote_name(name: str) -> str:
    """A model's name as one path segment."""
    return quote(name, safe="")


def _as_bf16(array: Array) -> Array:
    """`array` (float32) as bfloat16 if there is such a dtype here; exact, because it was widened from it."""
    try:
        import ml_dtypes
    except ImportError:
        return array
    return array.astype(ml_dtypes.bfloat16)


def _of_answer(error: InvalidInput) -> str:
    # The codec is the server's, which reads inputs; here it read an answer.
    return "the answer's " + error.message.replace("input ", "output ", 1)
