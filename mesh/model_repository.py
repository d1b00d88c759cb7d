"""Triton's questions about a model repository: index, load, unload, configuration, statistics. REST and gRPC alike.

Rule of the file: answers are JSON values whose names are those of Triton's messages; how they travel is the callers'
concern. Triton's repository is our registry: what is registered can be asked for, loaded or not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from raymesh.mesh.catalog import Catalog
from raymesh.mesh.fresh_copies import Placed
from raymesh.mesh.model_metadata import ModelMetadata
from raymesh.mesh.model_status import Status
from raymesh.mesh.placing import Placing
from raymesh.mesh.vmodels import VModels
from raymesh.registry.keys import DEFAULT_TENANT
from raymesh.registry.view import ModelEntry
from raymesh.runtimes.errors import Code, ModelNotFound, Reason, RequestError
from raymesh.runtimes.oip import MODEL_VERSION, check_version
from raymesh.runtimes.statistics import Statistics, merge
from raymesh.runtimes.upstream import Upstreams

log = logging.getLogger(__name__)

#: Triton's words for a model's state.
_STATES = {Status.LOADED: "READY", Status.LOADING: "LOADING"}
#: Why an UNAVAILABLE model is none the worse for it.
NOT_LOADED_REASON = "not loaded; a request loads it"
#: Longest one runtime may take to say what it has done.
STATISTICS_TIMEOUT_S = 2.0


class ModelRepository:
    """What is registered, as a Triton repository. `on_placed` is told of every placement."""

    def __init__(
        self,
        catalog: Catalog,
        vmodels: VModels,
        placing: Placing,
        metadata: ModelMetadata,
        upstreams: Upstreams,
        on_placed: Callable[[str, Placed], None],
    ) -> None:
        self._catalog = catalog
        self._vmodels = vmodels
        self._placing = placing
        self._metadata = metadata
        self._upstreams = upstreams
        self._on_placed = on_placed

    async def find(self, model: str, version: str = "") -> ModelEntry:
        """The model's entry, for a vmodel's name that of its active model. Raises `ModelNotFound`, for another version
        than the one there is too.
        """
        entry = await self._vmodels.model_behind(f"{DEFAULT_TENANT}/{model}")
        if entry is None:
            raise ModelNotFound(model)
        check_version(model, version)
        return entry

    def index(self, *, only_ready: bool) -> list[dict[str, str]]:
        """``[{"name", "version", "state", "reason"}]`` of every model (every loaded one), in order of name."""
        listed = []
        for entry in self._catalog.page(DEFAULT_TENANT, after="", limit=len(self._catalog.view.models)):
            status = self._catalog.status(entry, is_loading=self._placing.is_placing(entry.record.name))
            state = _STATES.get(status.status, "UNAVAILABLE")
            if only_ready and state != "READY":
                continue
            reason = ""
            if state == "UNAVAILABLE":
                reason = status.errors[0] if status.errors else NOT_LOADED_REASON
            listed.append({"name": entry.record.id, "version": MODEL_VERSION, "state": state, "reason": reason})
        return listed

    async def load(self, model: str, *, until_s: float) -> None:
        """Have a registered model loaded by `until_s` (loop time). Raises why it is not: "failed to load …"."""
        try:
            entry = await self.find(model)
            if not self._catalog.holders(entry):
                name = entry.record.name
                async with asyncio.timeout_at(until_s):
                    self._on_placed(name, await self._placing.place(name, until_s=until_s))
        except RequestError as error:
            failure = error
        except TimeoutError:
            failure = RequestError(Code.DEADLINE_EXCEEDED, "it was not loaded in time", reason=Reason.DEADLINE)
        else:
            return
        raise RequestError(
            failure.code,
            f"failed to load '{model}', {failure.message}",
            reason=failure.reason,
            retry_after_s=failure.retry_after_s,
        )

    async def unload(self, model: str) -> None:
        """Have every copy of a registered model unloaded. It stays registered: the next request loads it again."""
        await self._catalog.unload(await self.find(model))

    async def config(self, model: str, version: str = "", *, until_s: float) -> dict[str, Any]:
        """The model's `ModelConfig`, by `until_s` (loop time); loads the model if need be."""
        entry = await self.find(model, version)
        known = await self._metadata.get(entry.record.name, until_s=until_s)
        rows_max = int(known.get("max_batch_size", 0))

        def describe(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
            # With a batch size, Triton's dims leave out the dimension of the rows.
            skipped = 1 if rows_max else 0
            return [
                {"name": t["name"], "data_type": _data_type(t["datatype"]), "dims": t["shape"][skipped:]}
                for t in tensors
            ]

        config = {
            "name": model,
            "platform": known.get("platform", ""),
            "backend": entry.record.type,
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": rows_max,
            "input": describe(known.get("inputs", [])),
            "output": describe(known.get("outputs", [])),
        }
        if rows_max:
            config["dynamic_batching"] = {}
        return config

    async def statistics(self, model: str = "", version: str = "") -> list[dict[str, Any]]:
        """`ModelStatistics` of one model, summed over its copies since they were loaded; of all loaded ones for ""."""
        if model:
            entry = await self.find(model, version)
            asked, instances = entry.record.name, {placed.address for placed in self._catalog.holders(entry)}
        else:
            asked = f"{DEFAULT_TENANT}/"
            instances = {entry.record.address for entry in self._catalog.view.instances.values()}
        found: dict[str, dict[str, Any]] = {}
        for answer in await asyncio.gather(*(self._ask(address, asked) for address in instances)):
            for name, counted in answer.items():
                found[name] = merge(found[name], counted) if name in found else counted
        if model and not found:
            found[asked] = {**Statistics().as_json(), "bytes": 0}
        return [_describe(model or name.partition("/")[2], found[name]) for name in sorted(found)]

    async def _ask(self, address: str, asked: str) -> dict[str, Any]:
        try:
            return await self._upstreams.call(
                address, "GET", f"/control/statistics/{asked}", timeout_s=STATISTICS_TIMEOUT_S
            )
        except RequestError as error:
            # A runtime that is gone has no copies to speak of.
            log.info("no statistics from %s: %s", address, error.message)
            return {}


def _describe(model: str, counted: dict[str, Any]) -> dict[str, Any]:
    size_bytes = counted.pop("bytes")
    memory = [{"type": "CPU", "id": 0, "byte_size": size_bytes}] if size_bytes else []
    return {"name": model, "version": MODEL_VERSION, **counted, "memory_usage": memory}


def _data_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
