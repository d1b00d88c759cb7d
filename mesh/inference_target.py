"""What an inference request says about itself: its protocol, its model, what of its head is passed on. Pure.

Rule of the file: the front door's word (``x-raymesh-model``) counts most; it has authenticated the caller.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import unquote

from google.protobuf.message import DecodeError

from raymesh.mesh.vmodels import Named, VModelNotFound
from raymesh.registry.keys import DEFAULT_TENANT, is_valid_id
from raymesh.registry.protos import Messages
from raymesh.runtimes import grpc_http1
from raymesh.runtimes.errors import Code, InvalidInput, ModelNotFound, Reason, RequestError

DEFAULT_DEADLINE_REASON = "the request's deadline passed before it was answered"

#: Headers that name a model and a vmodel, the one that counts first; as ModelMesh's, its predecessor's included.
_MODEL_HEADERS = (b"mm-model-id", b"mm-model-id-bin", b"tas-model-id")
_VMODEL_HEADERS = (b"mm-vmodel-id", b"mm-vmodel-id-bin")

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
        b"x-raymesh-vmodel",
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


def asked_for(request: Inference, *, bytes_max: int) -> Named:
    """What the request is for.

    A vmodel when it says so in a header. Else what `model_name` says, which may turn out to be a vmodel's name too.
    Raises as `model_name` does, and `InvalidInput` when it names a model and a vmodel.
    """
    routed = request.headers.get(b"x-raymesh-vmodel")
    if routed is not None:
        # Said by the front door, or by a runtime that passed on what a stale route had brought it.
        return Named(_vmodel_name(*routed.decode("latin-1").partition("/")[::2]), is_vmodel=True)
    given = _id_in(request, _VMODEL_HEADERS)
    if given is None:
        return Named(model_name(request, bytes_max=bytes_max))
    if _id_in(request, _MODEL_HEADERS) is not None:
        raise InvalidInput("the request's headers name both a model and a vmodel; give one of them")
    return Named(_vmodel_name(DEFAULT_TENANT, given), is_vmodel=True)


def _vmodel_name(tenant: str, vmodel: str) -> str:
    if not vmodel:
        raise InvalidInput("the request's header names no vmodel")
    if not (is_valid_id(tenant) and is_valid_id(vmodel)):
        raise VModelNotFound(vmodel)
    return f"{tenant}/{vmodel}"


def _id_in(request: Inference, names: tuple[bytes, ...]) -> str | None:
    """The id in the first of these headers that is there; those that end in ``-bin`` are base64 of UTF-8."""
    for name in names:
        value = request.headers.get(name)
        if value is None:
            continue
        if not name.endswith(b"-bin"):
            return value.decode("latin-1")
        try:
            # Senders of gRPC may leave the padding out.
            return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise InvalidInput(f"header {name.decode()}: must be base64 of an id in UTF-8") from None
    return None


def model_name(request: Inference, *, bytes_max: int) -> str:
    """The full name, ``tenant/id``, of the model that the request is for.

    Raises `InvalidInput` when it names none, `ModelNotFound` when what it names cannot be a model, UNIMPLEMENTED when
    it is no inference.
    """
    name = request.headers.get(b"x-raymesh-model")
    if name is not None:
        tenant, _, model = name.decode("latin-1").partition("/")
        return _full_name(tenant, model)
    given = _id_in(request, _MODEL_HEADERS)
    if given is not None:
        return _full_name(DEFAULT_TENANT, given)
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


def passed_on_headers(request: Inference, *, name: str, vmodel: str, hops: int, remaining_s: float) -> bytes:
    """The header lines to send with the request to a runtime, each ending in CRLF.

    `name` is the model's full name; `vmodel` the vmodel's that led to it, which the answer is to name, or "".
    """
    lines = [b"%b: %b\r\n" % item for item in request.headers.items() if item[0] not in _NOT_PASSED_ON]
    lines.append(b"x-raymesh-model: %b\r\nx-raymesh-hops: %d\r\n" % (name.encode(), hops))
    if vmodel:
        lines.append(b"x-raymesh-vmodel: %b\r\n" % vmodel.encode())
    if is_grpc(request):
        lines.append(b"grpc-timeout: %dm\r\n" % max(1, round(remaining_s * 1000)))
    return b"".join(lines)
