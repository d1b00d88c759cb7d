"""What an inference request says about itself: its protocol, its model, what of its head is passed on. Pure.

Rule of the file: the front door's word (``x-raymesh-model``) counts most; it has authenticated the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol
from urllib.parse import unquote

from google.protobuf.message import DecodeError

from raymesh.registry.keys import DEFAULT_TENANT, is_valid_id
from raymesh.registry.protos import Messages
from raymesh.runtimes import grpc_http1
from raymesh.runtimes.errors import Code, InvalidInput, ModelNotFound, Reason, RequestError

DEFAULT_DEADLINE_REASON = "the request's deadline passed before it was answered"

_OIP = Messages("raymesh.runtimes", "oip")

#: Headers of one connection, or set anew on every hop.
_NOT_PASSED_ON = frozenset(
    {
        b"connection",
        b"content-length",
        b"expect",
        b"grpc-timeout",
        b"host",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-raymesh-hops",
        b"x-raymesh-model",
        b"x-raymesh-token",
    }
)


class Inference(Protocol):
    """An inference request: what came over HTTP, or an `OwnInference`."""

    method: bytes
    target: bytes
    headers: dict[bytes, bytes]
    body: bytes
    has_left: bool


@dataclass(slots=True)
class OwnInference:
    """An inference request of the gateway's own making: one of a stream."""

    target: bytes
    headers: dict[bytes, bytes]
    body: bytes
    method: bytes = b"POST"
    has_left: bool = False


def is_grpc(request: Inference) -> bool:
    """Whether the caller expects a gRPC answer."""
    return request.headers.get(b"content-type", b"").startswith(grpc_http1.CONTENT_TYPE)


def model_name(request: Inference, *, bytes_max: int) -> str:
    """The full name, ``tenant/id``, of the model that the request is for.

    Raises `InvalidInput` when it names none, `ModelNotFound` when what it names cannot be a model, UNIMPLEMENTED when
    it is no inference.
    """
    name = request.headers.get(b"x-raymesh-model")
    if name is not None:
        tenant, _, model = name.decode("latin-1").partition("/")
        return _full_name(tenant, model)
    if b"mm-vmodel-id" in request.headers:
        vmodel = request.headers[b"mm-vmodel-id"].decode("latin-1")
        raise RequestError(Code.NOT_FOUND, f"vmodel '{vmodel}' is not found", reason=Reason.NOT_REGISTERED)
    given = request.headers.get(b"mm-model-id")
    if given is not None:
        return _full_name(DEFAULT_TENANT, given.decode("latin-1"))
    if is_grpc(request):
        return _full_name(DEFAULT_TENANT, _model_in_body(request, bytes_max))
    return _full_name(DEFAULT_TENANT, _model_in_path(request))


def _full_name(tenant: str, model: str) -> str:
    if not model:
        raise InvalidInput("the request names no model")
    if not (is_valid_id(tenant) and is_valid_id(model)):
        raise ModelNotFound(model)
    return f"{tenant}/{model}"


def _model_in_body(request: Inference, bytes_max: int) -> str:
    if request.target.partition(b"?")[0] != grpc_http1.INFER_TARGET:
        raise RequestError(Code.UNIMPLEMENTED, "unknown method", reason=Reason.UNSUPPORTED)
    encoding = request.headers.get(b"grpc-encoding", b"identity")
    message = grpc_http1.unframe(request.body, encoding=encoding, bytes_max=bytes_max)
    try:
        return str(_OIP.ModelInferRequest.FromString(message).model_name)
    except DecodeError:
        raise InvalidInput("the body is not a ModelInferRequest") from None


def _model_in_path(request: Inference) -> str:
    # Split before decoding: an escaped slash belongs to the name.
    parts = request.target.partition(b"?")[0].decode("latin-1").split("/")
    if len(parts) >= 5 and parts[1:3] == ["v2", "models"] and parts[-1] == "infer":
        return unquote(parts[3])
    if len(parts) == 4 and parts[1:3] == ["v1", "models"]:
        return unquote(parts[3].partition(":")[0])
    raise RequestError(Code.NOT_FOUND, "no such path")


def passed_on_headers(request: Inference, *, name: str, hops: int, remaining_s: float) -> bytes:
    """The header lines to send with the request to a runtime, each ending in CRLF."""
    lines = [b"%b: %b\r\n" % item for item in request.headers.items() if item[0] not in _NOT_PASSED_ON]
    lines.append(b"x-raymesh-model: %b\r\nx-raymesh-hops: %d\r\n" % (name.encode(), hops))
    if is_grpc(request):
        lines.append(b"grpc-timeout: %dm\r\n" % max(1, round(remaining_s * 1000)))
    return b"".join(lines)
