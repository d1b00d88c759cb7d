"""What a model's inputs and outputs are: asked of a runtime that holds it, remembered for its generation.

Rule of the file: a model is immutable, so what a runtime said once holds as long as the generation does.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from raymesh.mesh.catalog import Catalog
from raymesh.mesh.fresh_copies import Placed
from raymesh.mesh.placing import Placing
from raymesh.runtimes.errors import Code, ModelNotFound, Reason, RequestError, Unavailable
from raymesh.runtimes.upstream import Upstreams

#: Answers kept; a thousand bytes each or so.
KEPT_MAX = 10_000
#: Runtimes asked before giving up; more than one only under churn.
ATTEMPTS_MAX = 3


class ModelMetadata:
    """Finds a model's metadata, loading the model if nobody has it."""

    def __init__(
        self,
        catalog: Catalog,
        placing: Placing,
        upstreams: Upstreams,
        on_placed: Callable[[str, Placed], None],
    ) -> None:
        self._catalog = catalog
        self._placing = placing
        self._upstreams = upstreams
        self._on_placed = on_placed
        #: By model name: its generation and the runtime's answer; the least recently asked first.
        self._known: OrderedDict[str, tuple[int, dict[str, Any]]] = OrderedDict()

    async def get(self, name: str, *, until_s: float) -> dict[str, Any]:
        """``{"name", "platform", "inputs", "outputs"}`` of model `name`, by `until_s` (loop time).

        Raises `ModelNotFound`, or why the model cannot be loaded.
        """
        stale: frozenset[str] = frozenset()
        for _ in range(ATTEMPTS_MAX):
            entry = await self._catalog.find(name)
            if entry is None:
                raise ModelNotFound(name.partition("/")[2])
            known = self._known.get(name)
            if known is not None and known[0] == entry.create_revision:
                self._known.move_to_end(name)
                return known[1]
            placed = self._catalog.holder(entry, stale)
            if placed is None:
                placed = await self._placing.place(name, until_s=until_s, stale=stale)
                self._on_placed(name, placed)
            timeout_s = until_s - asyncio.get_running_loop().time()
            try:
                answer = await self._upstreams.call(
                    placed.address, "GET", f"/control/metadata/{name}", timeout_s=max(timeout_s, 0.0)
                )
            except RequestError as error:
                if error.code not in {Code.NOT_FOUND, Code.UNAVAILABLE}:
                    raise
                self._catalog.fresh.forget(name, placed.instance)
                stale |= {placed.instance}
                continue
            self._known[name] = (placed.generation, answer)
            if len(self._known) > KEPT_MAX:
                self._known.popitem(last=False)
            return answer
        raise Unavailable("no instance keeps the model long enough to describe it", reason=Reason.NOT_LOADED)
