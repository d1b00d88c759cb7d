"""gRPC server reflection (v1 and v1alpha) from our private descriptor pools, for grpcurl and its like.

Rule of the file: it knows descriptors, nothing of the mesh. Our own, because grpcio-reflection of today needs a newer
protobuf than the clients we live beside.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

from google.protobuf import descriptor_pb2

from raymesh.mesh.grpc_service import BothStreams
from raymesh.registry.protos import Messages
from raymesh.runtimes.errors import Code

_METHOD = "/grpc.reflection.{}.ServerReflection/ServerReflectionInfo"
_VERSIONS = {"v1": "reflection", "v1alpha": "reflection_v1alpha"}


class ReflectionApi:
    """Describes the services of `pools`, and itself."""

    def __init__(self, pools: Iterable[Messages]) -> None:
        self._own = {version: Messages("raymesh.mesh", name) for version, name in _VERSIONS.items()}
        self._pools = [messages.pool for messages in (*pools, *self._own.values())]
        files = [
            pool.FindFileByName(name)
            for messages, pool in zip((*pools, *self._own.values()), self._pools, strict=True)
            for name in messages.files
        ]
        self._services = sorted({service.full_name for file in files for service in file.services_by_name.values()})

    @property
    def services(self) -> frozenset[str]:
        """The full names of the services described."""
        return frozenset(self._services)

    def methods(self) -> dict[str, BothStreams]:
        """Both versions of the service, for `grpc_service.Services`."""
        return {
            _METHOD.format(version): BothStreams(
                _Version(self, messages).info, messages.ServerReflectionRequest, messages.ServerReflectionResponse
            )
            for version, messages in self._own.items()
        }

    def answer(self, request: Any) -> dict[str, Any]:
        """The fields of the response to a ServerReflectionRequest of either version."""
        kind = request.WhichOneof("message_request")
        if kind == "list_services":
            return {"list_services_response": {"service": [{"name": name} for name in self._services]}}
        if kind == "file_by_filename":
            return self._file("FindFileByName", request.file_by_filename)
        if kind == "file_containing_symbol":
            return self._file("FindFileContainingSymbol", self._without_method(request.file_containing_symbol))
        if kind == "all_extension_numbers_of_type" and self._has_message(request.all_extension_numbers_of_type):
            # proto3 has no extensions.
            base = request.all_extension_numbers_of_type
            return {"all_extension_numbers_response": {"base_type_name": base}}
        if kind is None:
            return _error(Code.INVALID_ARGUMENT, "the request asks for nothing")
        return _error(Code.NOT_FOUND, "not found")

    def _without_method(self, symbol: str) -> str:
        """The service of a method, for which alone the pool's search by symbol is blind; else `symbol` itself."""
        service, _, _ = symbol.rpartition(".")
        return service if service in self._services else symbol

    def _file(self, method: str, name: str) -> dict[str, Any]:
        for pool in self._pools:
            try:
                file = getattr(pool, method)(name)
            except KeyError:
                continue
            # Our files import nothing, so one is all there is to send.
            proto = descriptor_pb2.FileDescriptorProto()
            file.CopyToProto(proto)
            return {"file_descriptor_response": {"file_descriptor_proto": [proto.SerializeToString()]}}
        return _error(Code.NOT_FOUND, f"{name[:200]} is not found")

    def _has_message(self, name: str) -> bool:
        for pool in self._pools:
            try:
                pool.FindMessageTypeByName(name)
            except KeyError:
                continue
            return True
        return False


class _Version:
    """One version of the service: the same under another name."""

    def __init__(self, api: ReflectionApi, messages: Messages) -> None:
        self._api = api
        self._messages = messages

    async def info(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            yield self._messages.ServerReflectionResponse(
                valid_host=request.host, original_request=request, **self._api.answer(request)
            )


def _error(code: Code, message: str) -> dict[str, Any]:
    return {"error_response": {"error_code": int(code), "error_message": message}}
