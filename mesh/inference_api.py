"""The Open Inference Protocol's questions about server and models, over gRPC. (Inference itself never comes here.)

Rule of the file: a mesh loads on demand, so a registered model is ready unless its last load failed.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from raymesh.mesh.catalog import Catalog
from raymesh.mesh.config import Settings
from raymesh.mesh.grpc_service import Method, until_s
from raymesh.mesh.model_metadata import ModelMetadata
from raymesh.mesh.vmodels import Named, VModels
from raymesh.registry.keys import DEFAULT_TENANT, is_valid_id
from raymesh.registry.protos import Messages
from raymesh.runtimes.errors import ModelNotFound
from raymesh.runtimes.oip import MODEL_VERSION, check_version

_SERVICE = "/inference.GRPCInferenceService/"

#: Only what is true; clients switch features on by it.
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")


def server_version() -> str:
    """raymesh's version as installed."""
    try:
        return version("raymesh")
    except PackageNotFoundError:
        return "unknown"


class InferenceApi:
    """The RPCs that the gateway answers itself."""

    def __init__(self, settings: Settings, catalog: Catalog, vmodels: VModels, metadata: ModelMetadata) -> None:
        self._settings = settings
        self._catalog = catalog
        self._vmodels = vmodels
        self._metadata = metadata
        self._messages = Messages("raymesh.runtimes", "oip")

    def methods(self) -> dict[str, Method]:
        """The service, for `grpc_service.Services`."""
        m = self._messages
        return {
            _SERVICE + "ServerLive": Method(self.server_live, m.ServerLiveRequest, m.ServerLiveResponse),
            _SERVICE + "ServerReady": Method(self.server_ready, m.ServerReadyRequest, m.ServerReadyResponse),
            _SERVICE + "ServerMetadata": Method(
                self.server_metadata, m.ServerMetadataRequest, m.ServerMetadataResponse
            ),
            _SERVICE + "ModelReady": Method(self.model_ready, m.ModelReadyRequest, m.ModelReadyResponse),
            _SERVICE + "ModelMetadata": Method(self.model_metadata, m.ModelMetadataRequest, m.ModelMetadataResponse),
        }

    async def server_live(self, request: Any, context: Any) -> Any:
        """The gateway answers."""
        return self._messages.ServerLiveResponse(live=True)

    async def server_ready(self, request: Any, context: Any) -> Any:
        """Requests can be routed (not: every model is loaded)."""
        return self._messages.ServerReadyResponse(ready=self._catalog.is_ready)

    async def server_metadata(self, request: Any, context: Any) -> Any:
        """Name, version, extensions."""
        return self._messages.ServerMetadataResponse(name="raymesh", version=server_version(), extensions=EXTENSIONS)

    async def model_ready(self, request: Any, context: Any) -> Any:
        """Whether a request for the model may be sent. Clients rely on it that an unknown one is no error."""
        entry = await self._vmodels.model_behind(f"{DEFAULT_TENANT}/{request.name}")
        is_ready = entry is not None and await self._catalog.is_model_ready(entry.record.name)
        return self._messages.ModelReadyResponse(ready=is_ready and request.version in {"", MODEL_VERSION})

    async def model_metadata(self, request: Any, context: Any) -> Any:
        """The model's inputs and outputs; loads the model if need be."""
        if not is_valid_id(request.name):
            raise ModelNotFound(request.name)
        check_version(request.name, request.version)
        deadline_s = until_s(context, default_s=self._settings.request_timeout_s)
        resolved = await self._vmodels.resolve(Named(f"{DEFAULT_TENANT}/{request.name}"))
        known = await self._metadata.get(resolved.entry.record.name, until_s=deadline_s)
        answer = self._messages.ModelMetadataResponse(
            name=request.name, versions=[MODEL_VERSION], platform=known.get("platform", "")
        )
        for tensors, described in ((answer.inputs, "inputs"), (answer.outputs, "outputs")):
            for tensor in known.get(described, ()):
                tensors.add(name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"])
        return answer
