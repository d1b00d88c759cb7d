"""The Open Inference Protocol on the wire: infer requests in, answers out, REST and gRPC.

Rule of the file: pure codecs. A request becomes an `InferRequest` of numpy arrays, whichever protocol it came in; an
answer is encoded for the protocol it came in. Field by field: the protocol's v2 documents, the binary tensor data
extension, and Triton's practice where clients rely on it (`raw_output_contents` always; JSON errors always).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from raymesh.registry.protos import Messages
from raymesh.runtimes import grpc_http1, tensors
from raymesh.runtimes.content_encoding import JSON_BYTES_MIN, encode_body
from raymesh.runtimes.errors import Code, InvalidInput, Reason, RequestError
from raymesh.runtimes.tensors import Array

MESSAGES = Messages("raymesh.runtimes", "oip")
_ModelInferRequest = MESSAGES.ModelInferRequest
_ModelInferResponse = MESSAGES.ModelInferResponse

#: A model id is one immutable version; the protocol wants a number.
MODEL_VERSION = "1"
#: Inputs or outputs one request may name.
TENSORS_MAX = 1024
#: Longest error message in an answer; a client may name its input anything.
_MESSAGE_MAX = 4096
_VERSION_MAX = 40
#: Where typed contents of a datatype are, and the dtype that holds whatever may be there.
_CONTENT_FIELDS = {
    "BOOL": ("bool_contents", np.dtype(np.bool_)),
    "INT8": ("int_contents", np.dtype(np.int64)),
    "INT16": ("int_contents", np.dtype(np.int64)),
    "INT32": ("int_contents", np.dtype(np.int64)),
    "INT64": ("int64_contents", np.dtype(np.int64)),
    "UINT8": ("uint_contents", np.dtype(np.int64)),
    "UINT16": ("uint_contents", np.dtype(np.int64)),
    "UINT32": ("uint_contents", np.dtype(np.int64)),
    "UINT64": ("uint64_contents", np.dtype(np.uint64)),
    "FP32": ("fp32_contents", np.dtype(np.float32)),
    "FP64": ("fp64_contents", np.dtype(np.float64)),
    "BYTES": ("bytes_contents", np.dtype(object)),
}


@dataclass(slots=True)
class InferRequest:
    """A decoded infer request. `outputs` names those wanted, empty for all; `binary` says which go out as bytes."""

    model_name: str
    id: str
    inputs: dict[str, Array]
    outputs: tuple[str, ...]
    is_grpc: bool
    #: What the client calls the model if that is not the model's id (it asked for a vmodel); answers name this then.
    alias: str = ""
    #: REST only: the outputs wanted as binary data, or True/False for all of them.
    binary: Mapping[str, bool] | bool = False
    #: REST only: the encoding a large JSON answer may have (``gzip``, ``deflate``), empty for none.
    accepts: bytes = b""
    #: Makes the whole HTTP answer from the outputs, for protocols other than OIP.
    encode: Callable[[Mapping[str, Array]], bytes] | None = None

    @property
    def rows(self) -> int:
        """Rows along axis 0 of the first input (1 for a scalar)."""
        for array in self.inputs.values():
            return array.shape[0] if array.ndim else 1
        return 0


def check_version(model: str, asked: str) -> None:
    """Raise NOT_FOUND for a version other than the one there is. An empty one means any."""
    if asked and asked != MODEL_VERSION:
        raise RequestError(
            Code.NOT_FOUND,
            f"Request for unknown model: '{model}' version {asked[:_VERSION_MAX]} is not found; "
            f"the only version is {MODEL_VERSION}",
            reason=Reason.NOT_REGISTERED,
        )


# -- gRPC ------------------------------------------------------------------------------------------------------------


def decode_grpc(message: bytes) -> InferRequest:
    """The request in a serialized ``ModelInferRequest``. Raises `InvalidInput` naming the input."""
    try:
        request = _ModelInferRequest.FromString(message)
    except Exception:
        raise InvalidInput("the message is not a ModelInferRequest") from None
    if request.model_version:
        check_version(request.model_name, request.model_version)
    inputs = request.inputs
    raws = request.raw_input_contents
    if len(inputs) > TENSORS_MAX or len(request.outputs) > TENSORS_MAX:
        raise InvalidInput(f"more than {TENSORS_MAX} inputs or outputs")
    if raws and len(raws) != len(inputs):
        raise InvalidInput(f"raw_input_contents has {len(raws)} entries for {len(inputs)} inputs")
    arrays: dict[str, Array] = {}
    for index, tensor in enumerate(inputs):
        name = tensor.name
        if name in arrays:
            raise InvalidInput(f"input '{name}' is given twice")
        if raws:
            if tensor.HasField("contents"):
                raise InvalidInput(f"input '{name}': contents and raw_input_contents are both set; use one")
            arrays[name] = tensors.from_raw(name, tensor.datatype, tensor.shape, raws[index])
        else:
            arrays[name] = _from_contents(name, tensor)
    wanted = request.outputs
    outputs = tuple(o.name for o in wanted) if wanted else ()
    if len(set(outputs)) != len(outputs):
        raise InvalidInput("an output is asked for twice")
    return InferRequest(request.model_name, request.id, arrays, outputs, is_grpc=True)


def _from_contents(name: str, tensor: Any) -> Array:
    datatype = tensor.datatype
    shape = tensors.check_shape(name, list(tensor.shape))
    if datatype not in _CONTENT_FIELDS:
        raise InvalidInput(
            f"input '{name}': {datatype} has no typed contents; send it in raw_input_contents"
            if datatype in {"FP16", "BF16"}
            else f"input '{name}': unknown datatype {datatype!r}; use one of {tensors.KNOWN}"
        )
    field, wide_dtype = _CONTENT_FIELDS[datatype]
    values = getattr(tensor.contents, field)
    count = math.prod(shape)
    if len(values) != count:
        raise InvalidInput(f"input '{name}': shape {list(shape)} needs {count} elements in {field}, got {len(values)}")
    if datatype == "BYTES":
        array: Array = np.empty(count, dtype=object)
        array[:] = list(values)
        return array.reshape(shape)
    # The dtype is given: numpy would make floats of integers around 2^63.
    wide = np.array(values, dtype=wide_dtype)
    dtype = tensors.DTYPES[datatype]
    if count and dtype.kind in "iu" and dtype.itemsize < 8:
        info = np.iinfo(dtype)
        if int(wide.min()) < info.min or int(wide.max()) > info.max:
            raise InvalidInput(f"input '{name}': data does not fit {datatype} ({info.min} to {info.max})")
    return wide.astype(dtype).reshape(shape)


class GrpcEncoder:
    """Encodes one model's answers as ``ModelInferResponse``.

    What does not change between answers of one shape (names, datatypes, shapes) is serialized once and kept; only the
    id and the raw tensors are added per answer. Protobuf allows the parts in any order.
    """

    #: Distinct output shapes whose fixed part is kept; more than that starts over.
    SHAPES_MAX = 64

    def __init__(self, model_name: str, model_version: str) -> None:
        self._model_name = model_name
        self._model_version = model_version
        self._fixed: dict[tuple[Any, ...], bytes] = {}

    def encode(self, outputs: Mapping[str, Array], request_id: str, headers: bytes = b"", *, alias: str = "") -> bytes:
        """A whole HTTP/1.1 answer with these outputs, in their order, from the model or, given one, from its alias."""
        key: tuple[Any, ...] = tuple([(name, a.dtype, a.shape) for name, a in outputs.items()])
        if alias:
            key = (alias, *key)
        message = self._fixed.get(key)
        if message is None:
            message = self._encode_fixed(alias or self._model_name, outputs)
            if len(self._fixed) >= self.SHAPES_MAX:
                self._fixed.clear()
            self._fixed[key] = message
        if request_id:
            identifier = request_id.encode()
            message += b"\x1a" + grpc_http1.varint(len(identifier)) + identifier  # field 3: id
        for array in outputs.values():
            raw = tensors.to_raw(array)
            message += b"\x32" + grpc_http1.varint(len(raw)) + raw  # field 6: raw_output_contents
        return grpc_http1.answer(message, headers)

    def _encode_fixed(self, model_name: str, outputs: Mapping[str, Array]) -> bytes:
        response = _ModelInferResponse(model_name=model_name, model_version=self._model_version)
        for name, array in outputs.items():
            response.outputs.add(name=name, datatype=tensors.datatype_of(array), shape=array.shape)
        return bytes(response.SerializeToString())


# -- REST ------------------------------------------------------------------------------------------------------------


def decode_rest(model_name: str, body: bytes, header_length: bytes | None) -> InferRequest:
    """The request in a REST body. `header_length` is ``Inference-Header-Content-Length``, None when absent.

    Raises `InvalidInput` naming the input or field.
    """
    head, binary = _split_body(body, header_length)
    try:
        value = orjson.loads(head)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"the request is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidInput("the request must be a JSON object with 'inputs'")
    entries = value.get("inputs")
    if not isinstance(entries, list) or len(entries) > TENSORS_MAX:
        raise InvalidInput(f"'inputs' must be an array of at most {TENSORS_MAX} tensors")
    arrays: dict[str, Array] = {}
    at = 0
    for entry in entries:
        name, array, at = _read_input(entry, binary, at)
        if name in arrays:
            raise InvalidInput(f"input '{name}' is given twice")
        arrays[name] = array
    if at != len(binary):
        raise InvalidInput(f"{len(binary) - at} bytes of binary data belong to no input")
    identifier = value.get("id", "")
    if not isinstance(identifier, str):
        raise InvalidInput("'id' must be a string")
    outputs, wants_binary = _read_outputs(value)
    return InferRequest(model_name, identifier, arrays, outputs, is_grpc=False, binary=wants_binary)


def _split_body(body: bytes, header_length: bytes | None) -> tuple[bytes, memoryview[int]]:
    if header_length is None:
        return body, memoryview(b"")
    # No number of bytes takes more digits, and `int` refuses thousands of them in a way of its own.
    if not header_length.isdigit() or len(header_length) > 18 or int(header_length) > len(body):
        raise InvalidInput("Inference-Header-Content-Length must be the number of JSON bytes at the body's start")
    length = int(header_length)
    return body[:length], memoryview(body)[length:]


def _read_input(entry: Any, binary: memoryview[int], at: int) -> tuple[str, Array, int]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise InvalidInput("every input must be an object with a 'name'")
    name, shape, datatype = entry["name"], entry.get("shape"), entry.get("datatype")
    if not isinstance(shape, list):
        raise InvalidInput(f"input '{name}': 'shape' must be an array of integers")
    if not isinstance(datatype, str):
        raise InvalidInput(f"input '{name}': 'datatype' must be one of {tensors.KNOWN}")
    parameters = entry.get("parameters") or {}
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        if "data" not in entry:
            raise InvalidInput(f"input '{name}': 'data' or 'parameters.binary_data_size' is required")
        return name, tensors.from_json(name, datatype, shape, entry["data"]), at
    if "data" in entry:
        raise InvalidInput(f"input '{name}': 'data' and 'binary_data_size' are both given; use one")
    if type(size) is not int or size < 0 or at + size > len(binary):
        raise InvalidInput(f"input '{name}': binary_data_size {size!r} does not fit the {len(binary) - at} bytes left")
    shape = tensors.check_shape(name, shape)
    # A copy: where the JSON ended says nothing about alignment, and frameworks get a pointer.
    return name, tensors.from_raw(name, datatype, shape, bytes(binary[at : at + size])), at + size


def _read_outputs(value: dict[str, Any]) -> tuple[tuple[str, ...], Mapping[str, bool] | bool]:
    parameters = value.get("parameters")
    everything = isinstance(parameters, dict) and parameters.get("binary_data_output") is True
    entries = value.get("outputs")
    if not entries:
        return (), everything
    if not isinstance(entries, list) or len(entries) > TENSORS_MAX:
        raise InvalidInput(f"'outputs' must be an array of at most {TENSORS_MAX} names")
    binary: dict[str, bool] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise InvalidInput("every output must be an object with a 'name'")
        own = entry.get("parameters")
        name = entry["name"]
        if name in binary:
            raise InvalidInput(f"output '{name}' is asked for twice")
        binary[name] = own.get("binary_data", everything) is True if isinstance(own, dict) else everything
    return tuple(binary), binary


_JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n"
_BINARY_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ninference-header-content-length: %d\r\n%b"
    b"content-length: %d\r\n\r\n"
)


def encode_rest(
    model_name: str, model_version: str, request: InferRequest, outputs: Mapping[str, Array], headers: bytes = b""
) -> bytes:
    """A whole HTTP/1.1 answer: JSON, followed by the binary tensors that were asked for.

    In JSON a NaN is null. Raises `InvalidInput` for outputs JSON cannot carry, `TypeError` for those OIP cannot.
    """
    entries: list[dict[str, Any]] = []
    raws: list[bytes] = []
    binary = request.binary
    for name, array in outputs.items():
        entry: dict[str, Any] = {
            "name": name,
            "datatype": tensors.datatype_of(array),
            "shape": list(array.shape),
        }
        if binary if isinstance(binary, bool) else binary.get(name, False):
            raw = tensors.to_raw(array)
            entry["parameters"] = {"binary_data_size": len(raw)}
            raws.append(raw)
        else:
            entry["data"] = tensors.to_json(name, array)
        entries.append(entry)
    value: dict[str, Any] = {"model_name": model_name, "model_version": model_version, "outputs": entries}
    if request.id:
        value["id"] = request.id
    head = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    # Cheaper than to look at every number: without this word there is neither NaN nor infinity.
    if b"null" in head:
        for entry in entries:
            if "data" in entry:
                tensors.check_json(entry["name"], outputs[entry["name"]])
    if not raws:
        return json_answer(head, request.accepts, headers)
    size = len(head) + sum(map(len, raws))
    return b"".join((_BINARY_HEAD % (len(head), headers, size), head, *raws))


def json_answer(body: bytes, accepts: bytes, headers: bytes = b"") -> bytes:
    """A whole HTTP/1.1 answer with a JSON body, in the encoding `accepts` when it is large enough to be worth it."""
    if accepts and len(body) >= JSON_BYTES_MIN:
        body = encode_body(body, accepts)
        headers += b"content-encoding: %b\r\nvary: accept-encoding\r\n" % accepts
    return _JSON_HEAD % (headers, len(body)) + body


def error_answer(error: RequestError, *, is_grpc: bool) -> bytes:
    """A whole HTTP/1.1 answer that carries `error`, in the protocol the request came in."""
    if is_grpc:
        return grpc_http1.error_answer(error)
    body = orjson.dumps({"error": error.message[:_MESSAGE_MAX]})
    extra = b"x-raymesh-reason: %b\r\n" % error.reason.encode() if error.reason else b""
    if error.retry_after_s:
        extra += b"retry-after: %d\r\n" % max(1, round(error.retry_after_s))
    return b"HTTP/1.1 %d Error\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n%b" % (
        error.http_status,
        extra,
        len(body),
        body,
    )
