"""What the client asks and how it reads the answers, for both protocols.

Rule of the file: no I/O. A call is a value that says what to send and how to read what comes back; `client.py` sends
it, from a thread or from a coroutine. Management is gRPC (``mmesh.ModelMesh``, ``raymesh.v1.Mesh``) and listing is REST
whatever the protocol chosen for inference: the mesh has one port for both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from raymesh.mesh import client_tensors
from raymesh.mesh.client_tensors import Array
from raymesh.registry.protos import Messages
from raymesh.runtimes.errors import HTTP_STATUS, Code, Reason

T = TypeVar("T")

_oip = Messages("raymesh.runtimes", "oip")
_mmesh = Messages("raymesh.mesh", "mmesh")
_raymesh = Messages("raymesh.mesh", "raymesh")

_INFERENCE = "/inference.GRPCInferenceService/"
_MANAGEMENT = "/mmesh.ModelMesh/"
_MESH = "/raymesh.v1.Mesh/"

#: Models per page of a listing: an answer of some 100 KB.
_PAGE_MODELS = 1000

_CODES = {status: code for code, status in reversed(HTTP_STATUS.items())} | {
    200: Code.UNKNOWN,
    400: Code.INVALID_ARGUMENT,
    405: Code.UNIMPLEMENTED,
    408: Code.DEADLINE_EXCEEDED,
    413: Code.INVALID_ARGUMENT,
    500: Code.INTERNAL,
    502: Code.UNAVAILABLE,
}


class MeshError(Exception):
    """The mesh, or the way to it, said no.

    `code` is the gRPC status code on both protocols, `reason` one of `runtimes.errors.Reason` or "" when the mesh gave
    none. Worth trying again only when `code` is UNAVAILABLE or RESOURCE_EXHAUSTED, after `retry_after_s` (0: no hint).
    """

    def __init__(self, code: Code, message: str, reason: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.reason = reason
        self.retry_after_s = retry_after_s


class ModelSpec(NamedTuple):
    """A model to register. `key` is the adapter's parameters as a JSON object, or empty."""

    name: str
    uri: str
    type: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class CopyInfo:
    """One copy of a model. `time_ms` is when it entered its state, in milliseconds since 1970 (0: unknown)."""

    instance: str
    status: str
    time_ms: int


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """How a model is doing: NOT_FOUND, NOT_LOADED, LOADING, LOADED, LOADING_FAILED or UNKNOWN, and why."""

    status: str
    errors: tuple[str, ...] = ()
    copies: tuple[CopyInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class VModelStatus:
    """How a vmodel is doing: NOT_FOUND, DEFINED, TRANSITIONING, TRANSITION_FAILED or UNKNOWN.

    `active` is the model that answers; `target` is the same or, in a transition, the model that is to take over, and
    `target_status` then says how that goes.
    """

    status: str
    active: str = ""
    target: str = ""
    owner: str = ""
    active_status: ModelStatus = ModelStatus("NOT_FOUND")
    target_status: ModelStatus | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer: arrays by output name; `cold` when the request waited for the model to be loaded."""

    outputs: dict[str, Array]
    cold: bool
    id: str


@dataclass(frozen=True, slots=True)
class RegisterSummary:
    """What `register_many` did: how many are registered now, and (name, message) of each that is not."""

    registered: int
    failed: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class RpcCall(Generic[T]):
    """A unary gRPC call. `read` takes the answer and the initial metadata."""

    path: str
    request: Any
    answer_class: Any
    read: Callable[[Any, Mapping[str, str]], T]


@dataclass(frozen=True, slots=True)
class HttpCall(Generic[T]):
    """An HTTP request. `read` takes the body of a 200 and the headers, names in lower case."""

    method: str
    path: str
    read: Callable[[bytes, Mapping[str, str]], T]
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


Call = RpcCall[T] | HttpCall[T]


# ---- management -------------------------------------------------------------------------------------------------


def register(spec: ModelSpec, *, load: bool = False, sync: bool = True) -> RpcCall[ModelStatus]:
    """Register a model; the same registration again is no error."""
    request = _mmesh.RegisterModelRequest(modelId=spec.name, loadNow=load, sync=sync)
    request.modelInfo.type = spec.type
    request.modelInfo.path = spec.uri
    request.modelInfo.key = spec.key
    return RpcCall(_MANAGEMENT + "registerModel", request, _mmesh.ModelStatusInfo, _read_status)


def register_one(spec: ModelSpec) -> RpcCall[tuple[MeshError | None, ...]]:
    """`register` of one model among many: what counts is that it did not fail."""
    call = register(spec)
    return RpcCall(call.path, call.request, call.answer_class, lambda _answer, _meta: (None,))


def register_bulk(specs: Sequence[ModelSpec]) -> RpcCall[tuple[MeshError | None, ...]]:
    """Register many models in one call; the answer has an error or None for each, in their order."""
    request = _raymesh.RegisterModelsRequest()
    for spec in specs:
        request.models.add(model_id=spec.name, type=spec.type, path=spec.uri, key=spec.key)

    def read(answer: Any, _metadata: Mapping[str, str]) -> tuple[MeshError | None, ...]:
        if [result.model_id for result in answer.results] != [spec.name for spec in specs]:
            raise MeshError(Code.INTERNAL, "the answer is about other models than the request")
        return tuple(_read_result(result) for result in answer.results)

    return RpcCall(_MESH + "RegisterModels", request, _raymesh.RegisterModelsResponse, read)


def unregister(name: str) -> RpcCall[None]:
    """Forget a model; one that does not exist is no error."""
    request = _mmesh.UnregisterModelRequest(modelId=name)
    return RpcCall(
        _MANAGEMENT + "unregisterModel", request, _mmesh.UnregisterModelResponse, lambda _answer, _meta: None
    )


def status(name: str) -> RpcCall[ModelStatus]:
    """How a model is doing."""
    request = _mmesh.GetStatusRequest(modelId=name)
    return RpcCall(_MANAGEMENT + "getModelStatus", request, _mmesh.ModelStatusInfo, _read_status)


def ensure_loaded(name: str, *, sync: bool) -> RpcCall[ModelStatus]:
    """Load a model unless it is; wait for that if `sync`."""
    request = _mmesh.EnsureLoadedRequest(modelId=name, sync=sync)
    return RpcCall(_MANAGEMENT + "ensureLoaded", request, _mmesh.ModelStatusInfo, _read_status)


def set_vmodel(
    name: str,
    target: str | ModelSpec,
    *,
    owner: str = "",
    load: bool = False,
    sync: bool = True,
    update_only: bool = False,
    force: bool = False,
    auto_delete: bool = False,
    expected_target: str = "",
) -> RpcCall[VModelStatus]:
    """Create a vmodel or give it a new target, which is created if it comes as a spec."""
    model = target if isinstance(target, str) else target.name
    request = _mmesh.SetVModelRequest(
        vModelId=name,
        targetModelId=model,
        owner=owner,
        loadNow=load,
        sync=sync,
        updateOnly=update_only,
        force=force,
        autoDeleteTargetModel=auto_delete,
        expectedTargetModelId=expected_target,
    )
    if isinstance(target, ModelSpec):
        request.modelInfo.type = target.type
        request.modelInfo.path = target.uri
        request.modelInfo.key = target.key
    return RpcCall(_MANAGEMENT + "setVModel", request, _mmesh.VModelStatusInfo, _read_vmodel)


def delete_vmodel(name: str, *, owner: str = "") -> RpcCall[None]:
    """Delete a vmodel; one that does not exist is no error."""
    request = _mmesh.DeleteVModelRequest(vModelId=name, owner=owner)
    return RpcCall(_MANAGEMENT + "deleteVModel", request, _mmesh.DeleteVModelResponse, lambda _answer, _meta: None)


def vmodel_status(name: str, *, owner: str = "") -> RpcCall[VModelStatus]:
    """How a vmodel is doing."""
    request = _mmesh.GetVModelStatusRequest(vModelId=name, owner=owner)
    return RpcCall(_MANAGEMENT + "getVModelStatus", request, _mmesh.VModelStatusInfo, _read_vmodel)


def list_page(after: str) -> HttpCall[tuple[list[dict[str, Any]], str]]:
    """One page of the models, and what to ask for next ("": that was the last)."""
    path = f"/v2/models?limit={_PAGE_MODELS}" + (f"&after={client_tensors.quote_name(after)}" if after else "")

    def read(body: bytes, _headers: Mapping[str, str]) -> tuple[list[dict[str, Any]], str]:
        page = _read_json(body)
        return list(page.get("models") or ()), str(page.get("next") or "")

    return HttpCall("GET", path, read)


# ---- inference --------------------------------------------------------------------------------------------------


def predict(protocol: str, name: str, inputs: Mapping[str, Any] | Any, outputs: Sequence[str]) -> Call[Prediction]:
    """Ask a model. Raises `MeshError` (INVALID_ARGUMENT) for inputs no tensor can carry."""
    request_id = os.urandom(8).hex()
    try:
        arrays = client_tensors.as_inputs(inputs)
        if protocol == "rest":
            body, header_bytes = client_tensors.rest_request(arrays, outputs, request_id)
            headers = {
                "content-type": "application/octet-stream",
                "inference-header-content-length": str(header_bytes),
            }
            return HttpCall("POST", f"{_model_path(name)}/infer", _read_rest_prediction, body, headers)
        request = _oip.ModelInferRequest(model_name=name, id=request_id)
        client_tensors.fill_rpc_request(request, arrays, outputs)
    except ValueError as error:
        raise MeshError(Code.INVALID_ARGUMENT, str(error), Reason.BAD_INPUT) from None
    return RpcCall(_INFERENCE + "ModelInfer", request, _oip.ModelInferResponse, _read_rpc_prediction)


def metadata(protocol: str, name: str) -> Call[dict[str, Any]]:
    """What a model takes and gives: ``{"name", "versions", "platform", "inputs": […], "outputs": […]}``."""
    if protocol == "rest":
        return HttpCall("GET", _model_path(name), lambda body, _headers: _read_json(body))
    request = _oip.ModelMetadataRequest(name=name)
    return RpcCall(_INFERENCE + "ModelMetadata", request, _oip.ModelMetadataResponse, _read_metadata)


def ready(protocol: str) -> Call[bool]:
    """Whether the mesh can route requests."""
    if protocol == "rest":
        return HttpCall("GET", "/v2/health/ready", lambda _body, _headers: True)
    request = _oip.ServerReadyRequest()
    return RpcCall(
        _INFERENCE + "ServerReady", request, _oip.ServerReadyResponse, lambda answer, _meta: bool(answer.ready)
    )


# ---- errors -----------------------------------------------------------------------------------------------------


def rpc_error(code: int, details: str, metadata: Mapping[str, str]) -> MeshError:
    """The error of a gRPC call from its status and its metadata, initial and trailing together."""
    return MeshError(Code(code), details, metadata.get("x-raymesh-reason", ""), _seconds(metadata.get("retry-after")))


def http_error(status_code: int, headers: Mapping[str, str], body: bytes) -> MeshError:
    """The error of an HTTP answer that is not 200: ``{"error": …}`` from the mesh, anything from what is between."""
    code = _CODES.get(status_code, Code.UNKNOWN)
    message, reason = "", headers.get("x-raymesh-reason", "")
    try:
        answer = json.loads(body)
        if isinstance(answer, dict):
            message = str(answer.get("error", ""))
            reason = reason or str(answer.get("reason", ""))
            code = Code(answer.get("code", code))
    except ValueError:
        pass
    if reason == Reason.LOAD_FAILED and code is Code.INVALID_ARGUMENT:
        # HTTP has one status for a bad request and for a model that cannot be loaded; the caller's input was fine.
        code = Code.FAILED_PRECONDITION
    return MeshError(code, message or f"HTTP {status_code}", reason, _seconds(headers.get("retry-after")))


# ---- reading ----------------------------------------------------------------------------------------------------


def _model_path(name: str) -> str:
    return f"/v2/models/{client_tensors.quote_name(name)}"


def _read_status(answer: Any, _metadata: Mapping[str, str]) -> ModelStatus:
    copies = tuple(CopyInfo(copy.location, _status_name(copy.copyStatus), copy.time) for copy in answer.modelCopyInfos)
    return ModelStatus(_status_name(answer.status), tuple(answer.errors), copies)


def _read_vmodel(answer: Any, metadata: Mapping[str, str]) -> VModelStatus:
    value = _mmesh.VModelStatusInfo.DESCRIPTOR.enum_types_by_name["VModelStatus"].values_by_number.get(answer.status)
    return VModelStatus(
        status=str(value.name) if value is not None else "UNKNOWN",
        active=answer.activeModelId,
        target=answer.targetModelId,
        owner=answer.owner,
        active_status=_read_status(answer.activeModelStatus, metadata),
        target_status=_read_status(answer.targetModelStatus, metadata)
        if answer.HasField("targetModelStatus")
        else None,
    )


def _status_name(number: int) -> str:
    value = _mmesh.ModelStatusInfo.DESCRIPTOR.enum_types_by_name["ModelStatus"].values_by_number.get(number)
    return str(value.name) if value is not None else "UNKNOWN"


def _read_result(result: Any) -> MeshError | None:
    if result.outcome in (_raymesh.RegisterModelsResponse.CREATED, _raymesh.RegisterModelsResponse.EXISTED):
        return None
    try:
        code = Code(result.code)
    except ValueError:
        code = Code.UNKNOWN
    return MeshError(code, result.message, result.reason, result.retry_after_s)


def _read_rpc_prediction(answer: Any, metadata: Mapping[str, str]) -> Prediction:
    try:
        return Prediction(client_tensors.rpc_answer(answer), _is_cold(metadata), answer.id)
    except ValueError as error:
        raise MeshError(Code.INTERNAL, str(error)) from None


def _read_rest_prediction(body: bytes, headers: Mapping[str, str]) -> Prediction:
    try:
        length = headers.get("inference-header-content-length")
        outputs, request_id = client_tensors.rest_answer(body, None if length is None else int(length))
    except ValueError as error:
        raise MeshError(Code.INTERNAL, str(error)) from None
    return Prediction(outputs, _is_cold(headers), request_id)


def _read_metadata(answer: Any, _metadata: Mapping[str, str]) -> dict[str, Any]:
    def tensors(entries: Any) -> list[dict[str, Any]]:
        return [{"name": e.name, "datatype": e.datatype, "shape": list(e.shape)} for e in entries]

    model = {"name": answer.name, "platform": answer.platform}
    return (
        model
        | {"inputs": tensors(answer.inputs), "outputs": tensors(answer.outputs)}
        | ({"versions": list(answer.versions)} if answer.versions else {})
    )


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise MeshError(Code.INTERNAL, "the answer is not a JSON object; is this the port of a mesh?")
    return value


def _is_cold(headers: Mapping[str, str]) -> bool:
    return headers.get("x-raymesh-cold", "") == "1"


def _seconds(text: str | None) -> float:
    # `Retry-After` may be a date as well; that form is not used by the mesh, and a guess is worse than no hint.
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0
