"""Triton's RPCs beside the Open Inference Protocol: configuration, statistics, the model repository.

Rule of the file: translation only; what is true is in `model_repository`.
"""

from __future__ import annotations

from typing import Any

from raymesh.mesh.config import Settings
from raymesh.mesh.grpc_service import Method, until_s
from raymesh.mesh.model_repository import ModelRepository
from raymesh.registry.protos import Messages
from raymesh.runtimes.errors import InvalidInput

_SERVICE = "/inference.GRPCInferenceService/"


class RepositoryApi:
    """The RPCs that Triton's and KServe's clients add to the protocol."""

    def __init__(self, settings: Settings, repository: ModelRepository) -> None:
        self._settings = settings
        self._repository = repository
        self._messages = Messages("raymesh.runtimes", "oip")

    def methods(self) -> dict[str, Method]:
        """The service, for `grpc_service.Services`."""
        m = self._messages
        return {
            _SERVICE + "ModelConfig": Method(self.config, m.ModelConfigRequest, m.ModelConfigResponse),
            _SERVICE + "ModelStatistics": Method(self.statistics, m.ModelStatisticsRequest, m.ModelStatisticsResponse),
            _SERVICE + "RepositoryIndex": Method(self.index, m.RepositoryIndexRequest, m.RepositoryIndexResponse),
            _SERVICE + "RepositoryModelLoad": Method(
                self.load, m.RepositoryModelLoadRequest, m.RepositoryModelLoadResponse
            ),
            _SERVICE + "RepositoryModelUnload": Method(
                self.unload, m.RepositoryModelUnloadRequest, m.RepositoryModelUnloadResponse
            ),
        }

    async def config(self, request: Any, context: Any) -> Any:
        """The model's configuration as Triton describes it; loads the model if need be."""
        deadline_s = until_s(context, default_s=self._settings.request_timeout_s)
        config = await self._repository.config(request.name, request.version, until_s=deadline_s)
        return self._messages.ModelConfigResponse(config=config)

    async def statistics(self, request: Any, context: Any) -> Any:
        """What one model has done, or all loaded ones."""
        return self._messages.ModelStatisticsResponse(
            model_stats=await self._repository.statistics(request.name, request.version)
        )

    async def index(self, request: Any, context: Any) -> Any:
        """Every model with its state."""
        return self._messages.RepositoryIndexResponse(models=self._repository.index(only_ready=request.ready))

    async def load(self, request: Any, context: Any) -> Any:
        """Have a registered model loaded."""
        model = _model_in(request)
        check_load_parameters(model, list(request.parameters))
        deadline_s = until_s(context, default_s=self._settings.load_timeout_s)
        await self._repository.load(model, until_s=deadline_s)
        return self._messages.RepositoryModelLoadResponse(model_name=model, isLoaded=True)

    async def unload(self, request: Any, context: Any) -> Any:
        """Have every copy of a model unloaded."""
        model = _model_in(request)
        await self._repository.unload(model)
        return self._messages.RepositoryModelUnloadResponse(model_name=model, isUnloaded=True)


def check_load_parameters(model: str, names: list[str]) -> None:
    """Raise `InvalidInput` when a load brings its own configuration or files: a registered model is immutable."""
    if names:
        raise InvalidInput(
            f"failed to load '{model}', the parameter '{names[0][:100]}' is not supported: "
            "a model is loaded as it was registered; register another one under its own name"
        )


def _model_in(request: Any) -> str:
    # Triton's clients write the second field, KServe's the first.
    name = request.model_name or request.repository_name
    if not name:
        raise InvalidInput("the request names no model")
    return str(name)
